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
import unicodedata
import warnings
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

LAYOUTS = "train/CLASS/... with val/CLASS/... or test/CLASS/..., or images without classes"
HIDDEN = re.compile(r"\.|@eaDir$")    # the latter holds previews
SPLITS = ["train", "val", "valid", "validation", "test"]    # in upper or lower case; two are used
EXTENSIONS = (".jpg .jpeg .jpe .jfif .mpo .png .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm "
              ".jp2 .avif .heic .heif").split()
CACHE_FORMAT = 1    # to be raised whenever the same files would give other pixels


@dataclass(frozen=True)
class Dataset:
    """Two splits of images, and what they are normalised by.

    Images are (N, C, H, W) uint8; labels are (N,) int64, all -1 where there are no classes; files
    are (N,) arrays of relative paths with "/", or of the images' indices in their split where they
    do not come from files of their own. mean and std are on the scale of 0 to 1. Where the mean is
    0, black is 0 after normalisation too, and meets zero padding without an edge. Raises a
    ValueError for images or labels of another type.
    """
    train_images: torch.Tensor
    train_labels: torch.Tensor
    train_files: np.ndarray
    test_images: torch.Tensor
    test_labels: torch.Tensor
    test_files: np.ndarray
    class_names: list
    mean: float
    std: float

    def __post_init__(self):
        for split in ("train", "test"):
            images = getattr(self, f"{split}_images").dtype
            labels = getattr(self, f"{split}_labels").dtype
            if images != torch.uint8 or labels != torch.int64:
                raise ValueError("images must be torch.uint8 and labels torch.int64, but those of "
                                 f"the {split} split are {images} and {labels}")

    @property
    def classes(self):
        return len(self.class_names)

    def batch(self, images, index):
        """Pick images (N, C, H, W) uint8 by index (B,): (B, C, H, W) float32, normalised."""
        picked = images.index_select(0, index).float()
        return picked.sub_(255 * self.mean).div_(255 * self.std)

    def subset(self, train, test=None):
        """The Dataset of the training images with the indices train, an array or a tensor.

        The training images with the indices test, if given, take the place of the test images.
        """
        fields = {}
        for kind in ("images", "labels", "files"):
            whole = getattr(self, f"train_{kind}")
            fields[f"train_{kind}"] = whole[train]
            if test is not None:
                fields[f"test_{kind}"] = whole[test]
        return replace(self, **fields)

    def digest(self):
        """The SHA-256, in hexadecimal digits, of the training images, labels and file names."""
        digest = hashlib.sha256(self.train_images.cpu().flatten().numpy())
        rest = self.train_images.shape, self.train_labels.tolist(), self.train_files.tolist()
        digest.update(repr(rest).encode())
        return digest.hexdigest()


def load(name, folder="datasets", cache_dir="datasets", device="cpu", train_images=None,
         image_size=None, validate=None, seed=0):
    """Load a data set by its name.

    "glyphs" is drawn on the spot; "mnist", "cifar10" and "tiny-imagenet" are downloaded into the
    folder when absent; "folder" is your own images, image_size pixels (64) wide and high.

    validate: this many training images, the same for every seed, replace the test split.
    train_images: this many of the rest are used (None: all), drawn by seed. The order stays.

    The images of "tiny-imagenet" and "folder" are decoded into one tensor, which has to fit in
    memory (twice, while they are decoded), and kept as CACHE_DIR/NAME-HASH.pt. The hash is over
    all that the pixels depend on, so what was made from images that have changed is never
    opened again. Old files are to be deleted by hand. A killed program may leave a folder
    tmp... there; it can be deleted.

    Raises a ValueError or OSError of one line for an unknown name, files that cannot be downloaded,
    read or written, too few images, or an image_size for another data set.
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
        data = image_folder(folder, cache_dir, image_size or 64)
    else:
        raise ValueError(f"there is no data set {name!r}, only glyphs, mnist, cifar10, "
                         "tiny-imagenet and folder")

    total = len(data.train_images)
    held_out = validate or 0
    rest = total - held_out
    keep = rest if train_images is None else train_images
    if held_out < 0 or not 1 <= keep <= rest:
        raise ValueError(f"{name} has {total} training images, so {keep} cannot be taken "
                         f"and {held_out} held out")
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


# -------------------------------------------------------------------- data sets that are downloaded

@contextmanager
def _downloading(name, folder, files):
    """Bound how long a server may be silent, and fail in one line."""
    print(f"{name}: looking into {folder}, downloading what is missing ...", flush=True)
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    except Exception as error:    # no network, no room, a damaged archive: it can fail in any way
        raise ValueError(f"cannot download or read {name} ({error!r}): another program "
                         f"may be extracting it, then start again; otherwise put {files} into "
                         f"{folder}") from None
    finally:
        socket.setdefaulttimeout(timeout_before)


def from_torchvision(name, folder):
    """MNIST (60,000 training and 10,000 test images, 1x28x28, 10 classes) or CIFAR-10 (50,000 and
    10,000, 3x32x32, 10 classes). Errors as for `load`."""
    from torchvision import datasets    # here, since it takes seconds

    fields = []
    with _downloading(name, folder, "MNIST/raw/*-ubyte(.gz) or cifar-10-python.tar.gz, unaltered,"):
        for train in (True, False):
            split = getattr(datasets, name.upper())(folder, train=train, download=True)
            images = torch.as_tensor(split.data)    # (N, H, W), or (N, H, W, C) of coloured ones
            images = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
            labels = torch.as_tensor(split.targets)
            if len(labels) != len(images):
                raise ValueError(f"{len(images)} images, {len(labels)} labels")
            fields += [images, labels, np.arange(len(labels))]
    return Dataset(*fields, split.classes, *MOMENTS[name])


def tiny_imagenet(folder, cache_dir):
    """Tiny ImageNet: 100,000 training, 10,000 (validation) test images, 3x64x64, 200 classes.

    The validation images may have been sorted into folders. Errors as for `load`.
    """
    tree = folder / "tiny-imagenet-200"
    if not tree.exists():
        from torchvision.datasets.utils import download_and_extract_archive

        with _downloading("Tiny ImageNet", folder, f"{TINY_IMAGENET_URL}, unpacked,"):
            folder.mkdir(parents=True, exist_ok=True)
            # Extracted under another name and renamed, so that the tree is never half of it.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                download_and_extract_archive(TINY_IMAGENET_URL, scratch, md5=TINY_IMAGENET_MD5)
                if not tree.exists():
                    Path(scratch, tree.name).replace(tree)
    data = image_folder(tree, cache_dir, 64)
    if data.classes != 200:
        raise ValueError(f"{tree / 'train'} has {data.classes} classes, where 200 were expected: "
                         "another program may be extracting it")
    return replace(data, mean=0.442, std=0.278)


# ------------------------------------------------------------------------ image files, decoded once

def image_folder(folder, cache_dir, side):
    """Images in one of LAYOUTS, resized and cropped to C x side x side; C is 1 if all are grey.

    The test split is the folder val, valid, validation or test, in upper or lower case. Without
    one, about a tenth is held out by a hash of each file's relative path, so that no file changes
    sides when others come. The same hash gives the order. A class is what val/val_annotations.txt
    (of Tiny ImageNet) says, or else a folder above the image. Errors as for `load`.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: expected one with {LAYOUTS}")
    files = []
    errors = []
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        target = Path(parent).resolve()
        parents = [(folder / above).resolve() for above in Path(parent).relative_to(folder).parents]
        if any(above.is_relative_to(target) for above in parents):
            folders.clear()    # a link to a folder above it goes round for ever
            continue
        folders[:] = [name for name in folders if not HIDDEN.match(name)]
        for name in names:
            path = Path(parent, name).relative_to(folder)
            if path.suffix.lower() in EXTENSIONS and not HIDDEN.match(name):
                files.append(path.parts)

    top_folders = {parts[0] for parts in files if len(parts) > 1}
    # Where both are there, train and not Train.
    parent_of_split = {parent.lower(): parent for parent in sorted(top_folders)}
    splits = []
    class_names = []
    if "train" in parent_of_split:
        # The training folder and the first test folder; others are not used.
        splits = [parent_of_split[name] for name in SPLITS if name in parent_of_split][:2]
        unused = sorted(top_folders.difference(splits))
        if unused:
            print(f"{folder}: not used, though they hold images: {unused}")
        named = {parts[1] for parts in files if parts[0] == splits[0] and len(parts) > 2}
        class_names = sorted(named)
    # A folder that cannot be listed matters if it is used, or could be the missing test folder.
    for error in errors:
        if not splits:
            raise error
        parent = Path(error.filename).relative_to(folder).parts[0]
        if parent in splits or (len(splits) == 1 and parent.lower() in SPLITS):
            raise error

    class_of_test_file = {}
    annotations = folder.joinpath(*splits[1:], "val_annotations.txt")
    if annotations.exists():
        for line in annotations.read_text(encoding="utf-8-sig").splitlines():
            name, _, rest = line.partition("\t")
            class_of_test_file[name] = rest.split("\t")[0]

    label_of_class = {name: label for label, name in enumerate(class_names)}
    rows = []
    for parts in files:
        if splits and parts[0] not in splits:
            continue
        path = "/".join(parts)
        file = folder / path
        normal_path = unicodedata.normalize("NFC", path)    # macOS stores another form
        path_hash = hashlib.sha256(normal_path.encode(errors="surrogatepass")).hexdigest()
        is_test = int(path_hash, 16) % 10 == 0
        candidates = parts[1:-1]
        if len(splits) == 2:
            is_test = parts[0] == splits[1]
            if is_test:
                candidates = (class_of_test_file.get(parts[-1]), *candidates)
        label = next((label_of_class[name] for name in candidates if name in label_of_class), -1)
        if class_names and label < 0:
            raise ValueError(f"{path!r} in {folder} is in none of its {len(class_names)} classes")
        # A dangling link has only its own status; `_decode` reports it.
        status = file.stat(follow_symlinks=file.exists())
        rows.append((is_test, path_hash, path, label, status.st_size, status.st_mtime_ns))
    rows.sort()

    key = hashlib.sha256(repr((CACHE_FORMAT, side, folder.resolve(), rows)).encode()).hexdigest()
    cache = cache_dir / f"{folder.resolve().name}-{key[:32]}.pt"
    if not cache.exists():
        _decode_all(folder, rows, side, cache)
    try:
        images, rows, mean, std, report = torch.load(cache, mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read {cache} ({error!r}): with another cache folder, "
                         "it is made anew") from None
    is_test, _, paths, labels, _, _ = zip(*rows)
    files = np.array(paths)
    labels = torch.tensor(labels)
    n = is_test.count(False)
    test_name = "about a tenth, held out by name"
    if len(splits) == 2:
        test_name = splits[1]
    print(f"{folder}: {n} training images, {len(rows) - n} test images ({test_name}), "
          f"{len(class_names) or 'no (they need train/CLASS/...)'} classes{report}", flush=True)
    return Dataset(images[:n], labels[:n], files[:n], images[n:], labels[n:], files[n:],
                   class_names, mean, std)


def _decode_all(folder, rows, side, cache):
    """Decode the images of all rows, in threads, and write the pixels into the file `cache`.

    It is written in a folder of its own and then renamed, so that programs that start at the same
    time cannot disturb each other. mean and std are those of the first 1,000 training images.
    """
    print(f"decoding {len(rows)} images into {cache}", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            paths = [folder / row[2] for row in rows]
            results = pool.map(_decode, paths, [side] * len(rows))

        readable = []
        pixels = []
        faults = []
        for row, result in zip(rows, results):
            if isinstance(result, str):
                faults.append(f"{row[2]!r} ({result})")
            else:
                readable.append(row)
                pixels.append(result)
        report = ""
        if faults:
            report = (f"; {len(faults)} of {len(rows)} images cannot be read: "
                      f"{', '.join(faults[:5])}; Pillow reads no HEIC, and "
                      "PIL.Image.MAX_IMAGE_PIXELS raises its limit of pixels")
        train = sum(not row[0] for row in readable)
        if len(faults) > len(readable) or train in (0, len(readable)):
            raise ValueError(f"{folder} has {train} training and {len(readable) - train} test "
                             f"images, too few: expected {LAYOUTS}{report}")

        images = torch.from_numpy(np.stack(pixels))
        if (images[:, :1] == images).all():
            images = images[:, :1].contiguous()
        sample = images[:min(train, 1000)] / 255
        std = sample.std(correction=0).item() or 1.0    # images of one colour stay as they are
        mean = sample.mean().item()
        temporary = Path(scratch, cache.name)
        torch.save((images, readable, mean, std, report), temporary)
        temporary.replace(cache)


def _decode(path, side):
    """An image upright, on black, its shorter side resized to `side`, cropped at the centre.

    Returns its pixels (3, side, side) uint8, or, in words, why it cannot be read.
    """
    try:
        if not path.is_file():    # a named pipe would wait for ever
            return "not a regular file"
        with Image.open(path) as image:
            image.load()    # turns a TIFF by itself, and reads metadata that follow the pixels
            # The orientation is read here, and the rest of the EXIF goes: exif_transpose would
            # write it anew, which fails if one entry has the wrong type.
            image.getexif()
            for key in ("exif", "Raw profile type exif"):
                image.info.pop(key, None)
            image = ImageOps.exif_transpose(image)
            if image.mode[0] == "I":    # convert() would clip 16 bits
                values = np.asarray(image) / 257
                image = Image.fromarray(values.round().clip(max=255).astype(np.uint8))
            if image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                image = Image.alpha_composite(black, image.convert("RGBA"))
            image = ImageOps.fit(image.convert("RGB"), (side, side))    # bicubic
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:    # a file can make it fail in any way
        return repr(error)


# ------------------------------------------------------------------------------------------- glyphs

def glyphs(train=10_000, test=2_000, seed=0):
    """Draw the built-in data set: characters in any orientation, 1x28x28, 10 classes.

    Each image shows one of GLYPHS in Pillow's own font, at random turned (0 to 360 degrees), sized
    (0.65 to 1 times 24 pixel type), shifted (up to 2 pixels each way), of one of four stroke
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
    return Dataset(images[:train], labels[:train], np.arange(train),
                   images[train:], labels[train:], np.arange(test),
                   list(GLYPHS), mean=0.0, std=0.3)


# --------------------------------------------------------------------------------- one epoch's plan

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
