"""Write MNIST with every digit turned, shrunk or shifted, for train.py to train on.

    python experiments/nuisances.py rotation turned
    python train.py --dataset mnist --data-dir turned

rotation turns by any angle; scale shrinks to 0.3 to 1 times the size; translation shrinks the whole
image to 20 of its 28 pixels, for room, and shifts it by at most 4 in each direction. All draws are
uniform. turned/MNIST/raw, a new folder, gets files of MNIST's own names and format, about 55 MB.
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


def write_idx(path, numbers):
    """Write numbers, 0 to 255, in the format of MNIST's files: type, dimensions, sides, numbers."""
    header = np.array([0x800 + numbers.ndim, *numbers.shape], dtype=">i4")
    path.write_bytes(header.tobytes() + numbers.byte().numpy().tobytes())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("nuisance", choices=("rotation", "scale", "translation"))
    parser.add_argument("to", type=Path, metavar="TO", help="a new folder, then --data-dir")
    parser.add_argument("--data-dir", default="datasets", help="where MNIST is (datasets)")
    args = parser.parse_args(argv)
    raw = args.to / "MNIST" / "raw"
    if raw.exists():
        parser.error(f"{raw} is there already: choose a new folder")
    try:
        data = datasets.load("mnist", args.data_dir)
        raw.mkdir(parents=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"nuisances.py: {error}\n")
    train = disturb(data.train_images, args.nuisance, seed=0)
    test = disturb(data.test_images, args.nuisance, seed=1)
    write_idx(raw / "train-images-idx3-ubyte", train[:, 0])
    write_idx(raw / "train-labels-idx1-ubyte", data.train_labels)
    write_idx(raw / "t10k-images-idx3-ubyte", test[:, 0])
    write_idx(raw / "t10k-labels-idx1-ubyte", data.test_labels)


if __name__ == "__main__":
    main()
