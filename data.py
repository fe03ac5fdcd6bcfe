"""Data sets as uint8 tensors on the training device, and the order and the views of every epoch.

A whole data set stays in memory, where a batch is indexed, converted and normalised at once, so
there are no worker processes. Image files are decoded once, and their pixels kept in a cache file.

Letters: N images of a split, B batch, C channels, H W space, P pairs of views to choose from.
"""
import hashlib
import os
import re
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps    # Pillow 10.1 or later

GLYPHS = "AFGKRTY248"    # no two of them alike when turned, as 6 and 9 are

MOMENTS = {"mnist": (0.0, 0.3081), "cifar10": (0.4734, 0.2516)}    # mean and std
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
DOWNLOAD_TIMEOUT = 60    # seconds for which a server may be silent
CACHE_FORMAT = 2    # raise it whenever the same files would give other pixels


@dataclass(frozen=True)
class Dataset:
    """Two splits of images, and what they are normalised by.

    Images are (N, C, H, W) uint8; labels are (N,) int64, from 0 to classes - 1, or all -1 in a
    split without labels; anything else is a ValueError. mean and std are on the scale of 0 to 1.
    Where the mean is 0, black stays 0 when normalised, and meets zero padding without an edge.
    """
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: list
    mean: float
    std: float

    def __post_init__(self):
        for split in ("train", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            types = (images.dtype, labels.dtype)
            fits = types == (torch.uint8, torch.int64) and labels.shape == images.shape[:1]
            if not fits or images.ndim != 4 or len(images) == 0:
                raise ValueError(f"{split} images must be (N, C, H, W) torch.uint8, N at least 1, "
                                 f"and labels (N,) torch.int64, but are {tuple(images.shape)} "
                                 f"{images.dtype} and {tuple(labels.shape)} {labels.dtype}")
            low, high = labels.aminmax()
            if (low < 0 or high >= self.classes) and not low == high == -1:
                raise ValueError(f"{split} labels go from {low} to {high}, with {self.classes} "
                                 "classes: they must be 0 or more and less than that, or all -1")

    @property
    def classes(self):
        return len(self.class_names)

    def batch(self, images, index):
        """Pick images (N, C, H, W) uint8 by index (B,): (B, C, H, W) float32, normalised."""
        picked = images.index_select(0, index).float()
        return picked.sub_(255 * self.mean).div_(255 * self.std)

    def subset(self, train, test=None):
        """The Dataset of the training images with the indices train, an array or a tensor; those
        with the indices test, if given, take the place of the test images."""
        images = self.train_images
        labels = self.train_labels
        data = replace(self, train_images=images[train], train_labels=labels[train])
        if test is None:
            return data
        return replace(data, test_images=images[test], test_labels=labels[test])

    def digest(self):
        """The SHA-256, in hexadecimal digits, of the images and labels of both splits."""
        digest = hashlib.sha256()
        for value in vars(self).values():
            if torch.is_tensor(value):
                digest.update(repr(value.shape).encode())
                digest.update(value.cpu().contiguous().numpy())
        return digest.hexdigest()


def load(name, folder="datasets", cache_dir="datasets", device="cpu", train_images=None,
         image_size=None, validate=None, seed=0):
    """Load a data set by its name.

    "glyphs" is drawn on the spot; "mnist", "cifar10" and "tiny-imagenet" are downloaded into the
    folder when absent; "folder" is your own images, image_size pixels (64) wide and high.
    validate: this many training images, the same for every seed, replace the test split.
    train_images: this many of the rest are used (None: all), drawn by seed. The order stays.
    Raises a ValueError or OSError, in one line, for what cannot be loaded.
    """
    if "" in (folder, cache_dir):
        raise ValueError("the name of a folder is empty: the current folder is '.'")
    if image_size and name != "folder":
        raise ValueError(f"an image size is for 'folder' only: {name}'s images have their own")
    folder = Path(folder).expanduser()
    cache_dir = Path(cache_dir).expanduser()
    if name == "glyphs":
        data = glyphs()
    elif name in MOMENTS:
        data = from_torchvision(name, folder)
    elif name == "tiny-imagenet":
        data = tiny_imagenet(folder, cache_dir)
    elif name == "folder":
        data = image_folder(folder, cache_dir, image_size or 64, class_of_file={})
    else:
        raise ValueError(f"there is no data set {name!r}, only glyphs, mnist, cifar10, "
                         "tiny-imagenet and folder")

    total = len(data.train_images)
    held_out = validate or 0
    rest = total - held_out
    keep = rest if train_images is None else train_images
    if held_out < 0 or not 1 <= keep <= rest:
        raise ValueError(f"{name} has {total} training images: {held_out} cannot be held out and "
                         f"{keep}, at least 1, of the rest taken")
    if held_out:
        shuffled = np.random.default_rng(0).permutation(total)
        data = data.subset(np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out]))
    if keep < rest:
        drawn = np.random.default_rng(seed).permutation(rest)[:keep]
        data = data.subset(np.sort(drawn))
    on_device = {}
    for field, value in vars(data).items():
        if torch.is_tensor(value):
            on_device[field] = value.to(device)
    return replace(data, **on_device)


@contextmanager
def _downloading(name, folder, files):
    """Bound how long a server may be silent, and fail in one line."""
    print(f"{name}: looking into {folder}, downloading what is missing ...", flush=True)
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    except Exception as error:    # no network, no room, a damaged archive: it can fail in any way
        raise ValueError(f"cannot download or read {name} ({error!r}): if no other program is "
                         f"extracting it, put {files} into {folder}") from None
    finally:
        socket.setdefaulttimeout(timeout_before)


def from_torchvision(name, folder):
    """MNIST (60,000 training and 10,000 test images, 1x28x28, 10 classes) or CIFAR-10 (50,000 and
    10,000, 3x32x32, 10 classes)."""
    from torchvision import datasets    # here, since it takes seconds

    fields = []
    with _downloading(name, folder, "MNIST/raw/*-ubyte(.gz) or cifar-10-python.tar.gz, unaltered,"):
        for train in (True, False):
            split = getattr(datasets, name.upper())(folder, train=train, download=True)
            images = torch.as_tensor(split.data)    # (N, H, W), or (N, H, W, C) of coloured ones
            images = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
            fields += [images, torch.as_tensor(split.targets)]
    return Dataset(*fields, split.classes, *MOMENTS[name])


def tiny_imagenet(folder, cache_dir):
    """Tiny ImageNet: 100,000 training, 10,000 (validation) test images, 3x64x64, 200 classes.
    The validation images may have been sorted into class folders."""
    from torchvision.datasets.utils import download_and_extract_archive

    tree = folder / "tiny-imagenet-200"
    if not tree.exists():
        with _downloading("Tiny ImageNet", folder, f"{TINY_IMAGENET_URL}, unpacked,"):
            folder.mkdir(parents=True, exist_ok=True)
            # Extracted under another name and renamed, so that the tree is never half of it.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                download_and_extract_archive(TINY_IMAGENET_URL, scratch, md5=TINY_IMAGENET_MD5)
                Path(scratch, tree.name).replace(tree)
    class_of_file = {}
    annotations = tree / "val" / "val_annotations.txt"
    if annotations.exists():
        class_of_file = dict(re.findall(r"(\w+\.JPEG)\t(n\d+)", annotations.read_text()))
    data = image_folder(tree, cache_dir, 64, class_of_file)
    if data.classes != 200:
        raise ValueError(f"{tree / 'train'} has {data.classes} classes, where 200 were expected")
    return replace(data, mean=0.442, std=0.278)


def image_folder(folder, cache_dir, side, class_of_file):
    """Your own images, resized and cropped to C x side x side; C is 1 if all of them are grey.

    They are listed as torchvision's ImageFolder lists them: training images in train/CLASS/, test
    images in val/CLASS/. A file in class_of_file, a dict, has its class from there. Without val/,
    every tenth image in the order of names is a test image. Without train/, the class folders are
    those in the folder itself. With fewer than two there are no classes: all labels are -1.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    folder = folder.resolve()
    roots = [folder / "train", folder / "val"]
    if not roots[0].is_dir():
        roots = [folder]
    try:
        _, label_of_class = find_classes(roots[0])
    except FileNotFoundError:    # no folders in it
        label_of_class = {}
    for name in label_of_class if len(roots) == 1 else ():
        if name.lower() in ("train", "val", "valid", "test"):
            raise ValueError(f"{str(roots[0] / name)!r} would be a class: expected train/CLASS and "
                             "val/CLASS, or CLASS alone")
    if len(label_of_class) == 1:
        label_of_class = {}

    files = []
    labels = []
    is_test = []
    for root in roots:
        # One class, named ".", makes it list all images below the root.
        for path, _ in make_dataset(root, {".": 0}, IMG_EXTENSIONS, allow_empty=True):
            path = Path(path)
            name = class_of_file.get(path.name, path.relative_to(root).parts[0])
            if label_of_class and name not in label_of_class:
                raise ValueError(f"{str(path)!r} is in none of the class folders of {roots[0]}")
            files.append(path)
            labels.append(label_of_class.get(name, -1))
            is_test.append(root != roots[0])
    labels = torch.tensor(labels)
    is_test = torch.tensor(is_test)
    print(f"{folder}: {len(files)} images, {len(label_of_class)} classes", flush=True)
    if not is_test.any():
        if roots[-1] != folder and roots[-1].is_dir():
            raise ValueError(f"there are no images in {roots[-1]}")
        print("every tenth of them is a test image: there is no train/ with val/", flush=True)
        is_test[::10] = True
    if is_test.all():
        raise ValueError(f"there are {len(files)} images in {folder}, too few: expected "
                         "train/CLASS and val/CLASS, or CLASS alone, or images alone")

    images = _decode_once(files, side, cache_dir / folder.name)
    train_images = images[~is_test]
    sample = train_images[::1 + len(train_images) // 1000] / 255    # evenly spread, at most 1,000
    mean = sample.mean().item()
    std = sample.std(correction=0).item() or 1.0    # images of one colour stay as they are
    return Dataset(train_images, labels[~is_test], images[is_test], labels[is_test],
                   list(label_of_class), mean, std)


def _decode_once(files, side, cache):
    """The pixels of the files, (N, C, side, side) uint8, which are kept as CACHE-HASH.pt.

    The hash is over all that they depend on, so that changed images are decoded anew. Old caches
    are never deleted.
    """
    origin = [CACHE_FORMAT, side]
    for path in files:
        status = os.stat(path)
        origin += [path, status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(repr(origin).encode()).hexdigest()
    cache = Path(f"{cache}-{key[:32]}.pt")
    if not cache.exists():
        print(f"decoding {len(files)} images into {cache}", flush=True)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(_decode, files, [side] * len(files)))
        images = torch.from_numpy(np.stack(pixels))
        if torch.equal(images, images[:, :1].expand_as(images)):
            images = images[:, :1].contiguous()
        # Renamed from a folder of its own, so that the file is never half of it.
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            with open(f"{scratch}/pixels", "wb") as file:    # by a path it would hide a full disk
                torch.save(images, file)
            os.replace(file.name, cache)
    try:
        return torch.load(cache, mmap=True, weights_only=True)
    except Exception as error:    # a damaged file can make it fail in any way
        raise ValueError(f"cannot read {cache} ({error!r}): delete it, and it is made "
                         "anew") from None


def _decode(path, side):
    """The pixels (3, side, side) uint8 of an image: upright, its shorter side resized to `side`,
    cropped at the centre. Raises a ValueError that names the file."""
    try:
        with Image.open(path) as image:
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise ValueError("its pixels are floats, signed, or of 32 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode[0] == "I":    # 16 bits of grey, which convert() would clip
                image = Image.fromarray(np.uint8(np.asarray(image) / 257 + 0.5))
            # Colours times opacity: what is transparent becomes black.
            image = image.convert("RGBA").convert("RGBa")
            image = ImageOps.fit(image, (side, side))    # bicubic
            return np.asarray(image)[..., :3].transpose(2, 0, 1)
    except Exception as error:    # a file can make it fail in any way
        raise ValueError(f"cannot read the image {str(path)!r}: {error!r}") from None


def glyphs(train=10_000, test=2_000, seed=0):
    """Draw the built-in data set: characters in any orientation, 1x28x28, 10 classes.

    Each image shows one of GLYPHS in Pillow's own font, turned (0 to 360 degrees), scaled (0.65 to
    1 times 24-pixel type) and shifted (up to 2 pixels each way) at random, in one of four stroke
    weights, with Gaussian noise (σ = 0.1). The same for the same seed.
    """
    font = ImageFont.load_default(size=96)    # all is drawn four times as large
    pictures = []
    for character in GLYPHS:
        for stroke_width in (0, 2, 4, 6):
            picture = Image.new("L", (112, 112))
            ImageDraw.Draw(picture).text((56, 56), character, fill=255, font=font, anchor="mm",
                                         stroke_width=stroke_width)
            pictures.append(picture)
    pictures = torch.from_numpy(np.stack(pictures))[:, None] / 255
    pictures = F.avg_pool2d(pictures, 4)    # (40, 1, 28, 28)

    count = train + test
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(GLYPHS), (count,), generator=generator)
    stroke = torch.randint(4, (count,), generator=generator)
    random = torch.rand(4, count, generator=generator)
    angle = 2 * np.pi * random[0]
    size = 0.65 + 0.35 * random[1]
    shift = (4 * random[2:] - 2).T * 2 / 28    # (count, 2), in half image sides

    # Each output position, turned and shrunk back, says where in the picture to look.
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    matrix = matrix.view(-1, 2, 2) / size[:, None, None]
    affine = torch.cat([matrix, matrix @ -shift[:, :, None]], 2)    # (count, 2, 3)
    images = pictures[labels * 4 + stroke]
    grid = F.affine_grid(affine, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().byte()
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], list(GLYPHS),
                   mean=0.0, std=0.3)


def epoch_plan(image_count, pair_count, seed, epoch, device="cpu"):
    """Draw an epoch's order, a permutation of the images' indices (N,), and their pairs of views:
    choice (N,), where choice[i], below P, is that of image i.

    Both are int64, on the device. They depend on (seed, epoch) alone: all processes draw the same,
    so their number changes nothing.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(image_count)
    choice = rng.integers(pair_count, size=image_count)
    plan = torch.from_numpy(np.stack([order, choice]))
    return plan.to(device).unbind()
