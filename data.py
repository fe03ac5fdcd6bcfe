"""Data sets as uint8 tensors on the training device, and the order and the views of every epoch.

A whole data set stays in memory; a batch is indexed, converted and normalised there at once. There are no worker
processes and no Python per image.

Letters: N images of a split, B batch, C channels, H W space.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Dataset:
    """Two splits of labelled images, and how to normalise them.

    Images are (N, C, H, W) uint8, labels (N,) int64. mean and std are on the scale of 0 to 1. Where the mean is 0, the
    background, black, is 0 after normalisation too, as are zero padding and what enters a transformed image: they meet
    without an edge.
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
        return images[index].float().sub_(255 * self.mean).div_(255 * self.std)


def load(name, folder, device="cpu", train_images=None):
    """Load a data set by name: "glyphs" (drawn on the spot) or "mnist" (downloaded into folder when absent).

    train_images keeps only the first so many training images; the test split stays whole.

    Raises:
        ValueError: in one line, for an unknown name, files that cannot be had or read, or too few images.
    """
    if name == "glyphs":
        data = glyphs()
    elif name == "mnist":
        data = mnist(folder)
    else:
        raise ValueError(f"there is no data set {name!r}, only glyphs and mnist")
    total = len(data.train_images)
    keep = total if train_images is None else train_images
    if not 1 <= keep <= total:
        raise ValueError(f"{name} has {total} training images, so {keep} of them cannot be taken")
    return replace(data, train_images=data.train_images[:keep].to(device), train_labels=data.train_labels[:keep].to(device),
                   test_images=data.test_images.to(device), test_labels=data.test_labels.to(device))


def mnist(folder):
    """MNIST through torchvision: 60,000 training and 10,000 test images, 1x28x28, 10 classes.

    Raises:
        ValueError: in one line that names the files, if they cannot be downloaded or read or do not fit each other.
    """
    from torchvision import datasets                                  # here, for it takes a second or two, and glyphs need none of it

    raw, splits = Path(folder) / "MNIST" / "raw", []
    files = {part: [raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"] for part in ("train", "t10k")}
    for part, (images_file, labels_file) in files.items():
        try:
            split = datasets.MNIST(folder, train=part == "train", download=True)
            images, labels = split.data, split.targets
            if images.shape != (len(labels), 28, 28) or labels.max() > 9:
                raise ValueError(f"{len(labels)} labels up to {labels.max()} for images {tuple(images.shape)}")
        except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:     # torchvision raises them all
            reason = " ".join(f"{type(error).__name__} {error}".split())
            if not all(path.is_file() for pair in files.values() for path in pair):
                names = ", ".join(path.name for pair in files.values() for path in pair)
                raise ValueError(f"cannot download MNIST ({reason}); put these into {raw}, as they are or as .gz: {names}") from None
            raise ValueError(f"{images_file} or {labels_file.name} is damaged ({reason}): delete both to download them again") from None
        splits += images[:, None], labels
    return Dataset(*splits, classes=10, mean=0.0, std=0.3081)


# ------------------------------------------------------------------------------------------------------------------ glyphs

GLYPHS = "AFGKRTY248"     # no two of them alike when turned (as 6 and 9, M and W, or N and Z are)


def glyphs(train=10_000, test=2_000, seed=0):
    """Draw the built-in data set: characters in any orientation, 1x28x28, 10 classes, without a download.

    Each image shows one of GLYPHS in Pillow's own font, at random turned (0 to 360 degrees), sized (0.65 to 1 times 24
    pixel type), shifted (up to 2 pixels each way), of one of four stroke weights, with Gaussian noise (σ = 0.1 of full
    white). The same seed gives the same images.
    """
    count, side, over = train + test, 28, 4                           # drawn at 4 times the size, then averaged down
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(count, generator=generator) * (high - low) + low

    font = ImageFont.load_default(size=24 * over)
    strokes = [0, 2, 4, 6]                                            # extra pen width, in pixels of the large drawing
    shapes = torch.stack([_draw(character, font, stroke, side * over) for character in GLYPHS for stroke in strokes])
    shapes = F.avg_pool2d(shapes[:, None], over)                                                  # (10·4, 1, 28, 28)

    labels = torch.randint(len(GLYPHS), (count,), generator=generator)
    weight = torch.randint(len(strokes), (count,), generator=generator)
    angle, size = uniform(0, 2 * np.pi), uniform(0.65, 1.0)
    shift = torch.stack([uniform(-2, 2), uniform(-2, 2)], 1) * 2 / side                             # in half image sides
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    affine = turn / size[:, None, None]
    affine = torch.cat([affine, affine @ -shift[:, :, None]], 2)                                    # (count, 2, 3)
    images = F.grid_sample(shapes[labels * len(strokes) + weight],
                           F.affine_grid(affine, (count, 1, side, side), align_corners=False), align_corners=False)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], classes=len(GLYPHS), mean=0.0, std=0.3)


def _draw(character, font, stroke, side):
    """One white character in the middle of a black square: (side, side) float32 from 0 to 1."""
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((side / 2, side / 2), character, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return torch.from_numpy(np.array(picture)).float() / 255


# ------------------------------------------------------------------------------------------------------ one epoch's plan

def epoch_plan(images, choices, seed, epoch):
    """Draw an epoch's order and each image's view.

    They depend on (seed, epoch) and the image alone: every process draws the same plan and takes its share of it, so
    their number changes nothing.

    Args:
        images: N, their number.
        choices: P, the number of pairs of views to choose from; 1 where there are no views.

    Returns:
        order: (N,) int64, a permutation of the images.
        choice: (N,) int64 below P, for each image, by its index in the data set, not its place in the order.
    """
    rng = np.random.default_rng([seed, epoch])
    return torch.from_numpy(rng.permutation(images)), torch.from_numpy(rng.integers(choices, size=images))
