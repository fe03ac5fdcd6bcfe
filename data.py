"""Data sets as uint8 tensors on the training device, and the order and the views of every epoch.

A whole data set stays in memory; a batch is indexed, converted and normalised there at once. There are no worker
processes and no Python per image.

Letters: N images of a split, B batch, C channels, H W space, P pairs (or larger sets) of views to choose from.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

SHAPES = {"glyphs": (1, 28), "mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64)}         # C, H = W


@dataclass(frozen=True)
class Dataset:
    """Two splits of labelled images, and how to normalise them.

    Images are (N, C, H, W) uint8, labels (N,) int64; mean and std are on the scale of 0 to 1. Where the mean is 0,
    black is 0 after normalisation too, and meets zero padding, and what enters a transformed image, without an edge.
    """
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int
    mean: float
    std: float

    def batch(self, images, index):
        """Pick images (N, C, H, W) uint8 by index (B,) and normalise them: (B, C, H, W) float32, on their device."""
        return images.index_select(0, index).float().sub_(255 * self.mean).div_(255 * self.std)


def load(name, folder, device="cpu", train_images=None):
    """Load "glyphs" (drawn on the spot), "mnist", "cifar10" or "tiny-imagenet" (downloaded into folder when absent).

    train_images is how many training images to keep, from the first; the test split stays whole. Raises a ValueError,
    in one line, for an unknown name, files that cannot be downloaded or read, or too few images.
    """
    loaders = {"glyphs": lambda folder: glyphs(), "mnist": mnist, "cifar10": cifar10, "tiny-imagenet": tiny_imagenet}
    if name not in loaders:
        raise ValueError(f"there is no data set {name!r}, only {', '.join(loaders)}")
    data = loaders[name](folder)
    total = len(data.train_images)
    keep = total if train_images is None else train_images
    if not 1 <= keep <= total:
        raise ValueError(f"{name} has {total} training images, so {keep} of them cannot be taken")
    train, test = (data.train_images[:keep], data.train_labels[:keep]), (data.test_images, data.test_labels)
    return Dataset(*(t.to(device) for t in (*train, *test)), data.classes, data.mean, data.std)


# ---------------------------------------------------------------------------------------------- MNIST and CIFAR-10
def mnist(folder):
    """MNIST: 60,000 training and 10,000 test images, 1x28x28, 10 classes. Errors as for `load`."""
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    raw = Path(folder, "MNIST", "raw")
    splits = _torchvision("MNIST", folder, (28, 28), f"{', '.join(files)} (or their .gz) into {raw}")
    return Dataset(*splits, classes=10, mean=0.0, std=0.3081)


def cifar10(folder):
    """CIFAR-10: 50,000 training and 10,000 test images, 3x32x32, 10 classes. Errors as for `load`."""
    remedy = (f"cifar-10-python.tar.gz into {folder}, or its data_batch_1 to data_batch_5, test_batch and batches.meta "
              f"into {Path(folder, 'cifar-10-batches-py')}")
    splits = _torchvision("CIFAR10", folder, (32, 32, 3), remedy)
    return Dataset(*splits, classes=10, mean=0.4734, std=0.2516)


def _torchvision(name, folder, shape, remedy):
    """Read torchvision's data set of that name: training images, training labels, test images, test labels."""
    from torchvision import datasets                                           # here, for it takes seconds

    splits = []
    for split in ("training", "test"):
        try:
            data = getattr(datasets, name)(folder, train=split == "training", download=True)
            images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
            fits = images.shape == (len(labels), *shape) and images.dtype == torch.uint8
            if not fits or not 0 <= labels.min() <= labels.max() <= 9:
                raise ValueError(f"{len(labels)} labels up to {labels.max()} for images {tuple(images.shape)}")
        except Exception as error:                                             # a file can make it fail in any way
            raise ValueError(f"cannot download or read {name}'s {split} split ({_in_one_line(error)}): delete what is "
                             f"damaged, and put {remedy}, unaltered") from None
        splits += (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()), labels
    return splits


def _in_one_line(error):
    return " ".join(f"{type(error).__name__} {error}".split())


# -------------------------------------------------------------------------------------------------- Tiny ImageNet
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")       # and MD5


def tiny_imagenet(folder):
    """Tiny ImageNet: 100,000 training images, 10,000 labelled validation images (our test split), 3x64x64, 200 classes.

    The JPEG files are decoded once into FOLDER/tiny-imagenet-200-decoded, whose four arrays later runs map into memory:
    that takes no time, and processes of one machine share the pages. Errors as for `load`.
    """
    tree, cache = Path(folder) / "tiny-imagenet-200", Path(folder) / "tiny-imagenet-200-decoded"
    try:
        if not cache.exists():
            if not tree.exists():
                _download_tiny_imagenet(Path(folder), tree)
            _decode_tiny_imagenet(tree, cache)
        arrays = []
        for split in ("train", "val"):
            images, labels = (torch.from_numpy(np.load(cache / f"{split}_{what}.npy", mmap_mode="c"))
                              for what in ("images", "labels"))
            if images.shape != (len(labels), 3, 64, 64) or images.dtype != torch.uint8 or labels.dtype != torch.int64:
                raise ValueError(f"{split}: images {tuple(images.shape)}, {len(labels)} labels")
            arrays += images, labels
    except (ValueError, OSError, EOFError) as error:
        if cache.exists():
            raise ValueError(f"{cache} is damaged ({error}): delete it, and the images are decoded again") from None
        raise ValueError(str(error)) from None
    return Dataset(*arrays, classes=200, mean=0.442, std=0.278)


def _download_tiny_imagenet(folder, tree):
    """Unpack beside the tree and rename, so that an interrupted download never looks like a finished one."""
    from torchvision.datasets.utils import download_and_extract_archive

    (address, md5), part = TINY_IMAGENET, folder / "tiny-imagenet-200-part"
    try:
        download_and_extract_archive(address, folder, part, md5=md5)
        os.replace(part / tree.name, tree)
        part.rmdir()
    except Exception as error:                                                 # no network, no room, a broken archive
        raise ValueError(f"cannot download Tiny ImageNet ({_in_one_line(error)}): put tiny-imagenet-200.zip from "
                         f"{address} into {folder}, or its unpacked folder {tree.name}") from None


def _decode_tiny_imagenet(tree, cache):
    """Decode all images, the first of every class before the second, so that any first part has all classes."""
    try:
        classes = {name: k for k, name in enumerate((tree / "wnids.txt").read_text().split())}
        rows = [line.split("\t") for line in (tree / "val" / "val_annotations.txt").read_text().splitlines()]
        splits = {"val": [(tree / "val" / "images" / row[0], classes[row[1]]) for row in rows]}
    except (OSError, LookupError) as error:
        raise ValueError(f"{tree} is incomplete ({_in_one_line(error)}): delete it to download it again") from None
    of_class = [sorted((tree / "train" / name / "images").glob("*.JPEG"), key=lambda p: (len(p.name), p.name))
                for name in classes]
    counts = {len(paths) for paths in of_class}
    if len(classes) != 200 or len(counts) != 1 or 0 in counts:
        raise ValueError(f"{tree} is incomplete: {len(classes)} classes of {min(counts, default=0)} to "
                         f"{max(counts, default=0)} training images in place of 200 of equally many; delete it to "
                         "download it again")
    splits["train"] = [(path, k) for same_place in zip(*of_class) for k, path in enumerate(same_place)]

    part = cache.with_name(cache.name + "-part")
    part.mkdir(exist_ok=True)
    for split, rows in splits.items():
        shape = len(rows), 3, 64, 64
        images = np.lib.format.open_memmap(part / f"{split}_images.npy", mode="w+", dtype=np.uint8, shape=shape)
        for i, (path, _) in enumerate(rows, 1):
            try:
                images[i - 1] = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is missing or damaged ({error}): delete {tree} to download again") from None
            if i == len(rows) or i % 1000 == 0 and sys.stdout.isatty():
                end = "\n" if i == len(rows) else ""
                print(f"\rdecoding Tiny ImageNet, {split}: {i} of {len(rows)}", end=end, flush=True)
        images.flush()
        np.save(part / f"{split}_labels.npy", np.array([label for _, label in rows], dtype=np.int64))
    os.replace(part, cache)


# --------------------------------------------------------------------------------------------------------- glyphs
GLYPHS = "AFGKRTY248"     # no two of them alike when turned (as 6 and 9, M and W, or N and Z are)


def glyphs(train=10_000, test=2_000, seed=0):
    """Draw the built-in data set: characters in any orientation, 1x28x28, 10 classes, the same for the same seed.

    Each image shows one of GLYPHS in Pillow's own font, at random turned (0 to 360 degrees), sized (0.65 to 1 times 24
    pixel type), shifted (up to 2 pixels each way), of one of four stroke weights, with Gaussian noise (σ = 0.1 of
    white).
    """
    count, side, over = train + test, 28, 4                                    # drawn 4 times as large
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(count, generator=generator) * (high - low) + low
    font = ImageFont.load_default(size=24 * over)
    strokes = [0, 2, 4, 6]                                                     # extra pen width in the large drawing
    shapes = torch.stack([_draw(character, font, stroke, side * over) for character in GLYPHS for stroke in strokes])
    shapes = F.avg_pool2d(shapes[:, None], over)                               # (10·4, 1, 28, 28)

    labels = torch.randint(len(GLYPHS), (count,), generator=generator)
    weight = torch.randint(len(strokes), (count,), generator=generator)
    angle, size = uniform(0, 2 * np.pi), uniform(0.65, 1.0)
    shift = torch.stack([uniform(-2, 2), uniform(-2, 2)], 1) * 2 / side        # in half image sides
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    affine = turn / size[:, None, None]
    affine = torch.cat([affine, affine @ -shift[:, :, None]], 2)                                     # (count, 2, 3)
    images = F.grid_sample(shapes[labels * len(strokes) + weight],
                           F.affine_grid(affine, (count, 1, side, side), align_corners=False), align_corners=False)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], len(GLYPHS), mean=0.0, std=0.3)


def _draw(character, font, stroke, side):
    """One white character in the middle of a black square: (side, side) float32 from 0 to 1."""
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((side / 2, side / 2), character, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return torch.from_numpy(np.array(picture)).float() / 255


# ----------------------------------------------------------------------------------------------- one epoch's plan
def epoch_plan(images, choices, seed, epoch, device="cpu"):
    """Draw an epoch's order, a permutation of the images (N,), and for each image, by its index in the data set, its
    choice (N,), below P, among the pairs (or larger sets) of views; both int64, on the device.

    They depend on (seed, epoch) alone: all processes draw the same, so their number changes nothing.
    """
    rng = np.random.default_rng([seed, epoch])
    drawn = rng.permutation(images), rng.integers(choices, size=images)
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in drawn)             # without a wait
