"""Write MNIST with every digit turned, shrunk or shifted, for train.py to train on.

    python experiments/nuisances.py rotation turned [--data-dir datasets]
    python train.py --dataset mnist --data-dir turned

rotation turns by any angle; scale shrinks to 0.3 to 1 times the size. translation shrinks the whole
image from 28 pixels to 20, since train.py reads MNIST with 28 pixels only, so there is no room
without it; then it shifts by whole pixels, at most 4 in each direction. All draws are uniform.
TO/MNIST/raw gets files of MNIST's own names and format, about 55 MB.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data as datasets    # noqa: E402


def disturb(images, nuisance, seed):
    """Move each of images (N, 1, H, H) uint8 in its own way, by seed alone: (N, 1, H, H) uint8."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, len(images), generator=generator)    # (N,) each
    angle = torch.zeros(len(images))
    size = torch.ones(len(images))
    shift = torch.zeros(len(images), 2, 1)
    if nuisance == "rotation":
        angle = 2 * math.pi * first
    elif nuisance == "scale":
        size = 1 - 0.7 * first
    else:
        size = torch.full_like(first, 20 / 28)
        pixels = (9 * torch.stack([first, second], 1)).floor() - 4    # -4 to 4
        shift = pixels[:, :, None] * 2 / 28    # in half image sides

    # Each output position, moved back, says where in the image to look.
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    matrix = matrix.view(-1, 2, 2) / size[:, None, None]
    affine = torch.cat([matrix, matrix @ -shift], 2)    # (N, 2, 3)
    moved = []
    for part, theta in zip(images.split(1000), affine.split(1000)):
        grid = F.affine_grid(theta, (len(part), 1, 56, 56), align_corners=False)
        samples = F.grid_sample(part.float(), grid, align_corners=False)
        moved.append(F.avg_pool2d(samples, 2).round().byte())    # 2x2 samples a pixel
    return torch.cat(moved)


def write_idx(path, array):
    """Write uint8 numbers in the format of MNIST's files: type, dimensions, sides, numbers."""
    header = np.array([0x800 + array.ndim, *array.shape], dtype=">i4")
    path.write_bytes(header.tobytes() + array.tobytes())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("nuisance", choices=("rotation", "scale", "translation"))
    parser.add_argument("to", metavar="TO", help="the folder to be written, then --data-dir")
    parser.add_argument("--data-dir", default="datasets", help="where MNIST is (datasets)")
    parser.add_argument("--seed", type=int, default=0, help="of the training images (0)")
    args = parser.parse_args(argv)
    raw = Path(args.to, "MNIST", "raw")
    try:
        if Path(args.to).exists() and any(Path(args.to).iterdir()):
            raise ValueError(f"{args.to} is not empty: choose a new folder")
        data = datasets.load("mnist", args.data_dir)
        raw.mkdir(parents=True)
        # The test images are the same whatever the seed.
        for name, images, labels, seed in (
                ("train", data.train_images, data.train_labels, args.seed),
                ("t10k", data.test_images, data.test_labels, 2**40)):
            moved = disturb(images, args.nuisance, seed)
            write_idx(raw / f"{name}-images-idx3-ubyte", moved.squeeze(1).numpy())
            write_idx(raw / f"{name}-labels-idx1-ubyte", labels.byte().numpy())
    except (ValueError, OSError) as error:
        parser.exit(2, f"nuisances.py: {error}\n")


if __name__ == "__main__":
    main()
