"""Data sets as uint8 tensors on the training device, and the order and the views of every epoch.

A whole data set stays in memory, where a batch is indexed, converted and normalised at once: no worker processes.

Letters: N images of a split, B batch, C channels, H W space, P pairs (or larger sets) of views to choose from.
"""
import fcntl                                                                   # of Linux and macOS
import hashlib
import json
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps                          # Pillow 10.1 or later

LAYOUTS = "train/CLASS/... with val/CLASS/... or test/CLASS/..., or images without classes"
SHAPES = {"glyphs": (1, 28), "mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64)}         # C, H = W
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")       # and MD5
GLYPHS = "AFGKRTY248"     # no two of them alike when turned (as 6 and 9, M and W, or N and Z are)
NUISANCES = "rotation", "scale", "translation"


@dataclass(frozen=True)
class Dataset:
    """Two splits of images (N, C, H, W) uint8 with labels (N,) int64, all -1 where there are 0 classes, and mean and
    std, on the scale of 0 to 1, to normalise them by. Where the mean is 0, black is 0 after normalisation too, and
    meets zero padding, and what enters a transformed image, without an edge."""
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


def load(name, folder, device="cpu", train_images=None, image_size=None, validate=None, nuisance=None, seed=0):
    """Load "glyphs" (drawn on the spot), "mnist", "cifar10" or "tiny-imagenet" (downloaded into folder when absent), or
    "folder": the images in folder, image_size pixels (64) wide and high.

    validate training images, the last, are held out in place of the test split. Of the rest, or of all, train_images
    are drawn by seed, and keep their order. A nuisance, see `disturbed`, is drawn for each image of both splits: by
    seed for the training split, but alike for every seed for the test split (or what is held out), so that all runs are
    measured on the same images. Raises a ValueError, in one line, for an unknown name or nuisance, files that cannot be
    downloaded or read, too few images, or an image_size for another data set."""
    loaders = {"glyphs": lambda folder: glyphs(), "mnist": mnist, "cifar10": cifar10, "tiny-imagenet": tiny_imagenet,
               "folder": lambda folder: image_folder(folder, 64 if image_size is None else image_size)}
    if name not in loaders:
        raise ValueError(f"there is no data set {name!r}, only {', '.join(loaders)}")
    if nuisance not in (None, *NUISANCES):
        raise ValueError(f"there is no nuisance {nuisance!r}, only {', '.join(NUISANCES)}")
    if image_size is not None and name != "folder":
        raise ValueError(f"{name}'s images are {SHAPES[name][1]} pixels wide: an image size is for \"folder\" only")
    data = loaders[name](folder)
    total, held = len(data.train_images), validate or 0
    keep = total - held if train_images is None else train_images
    if held < 0 or not 1 <= keep <= total - held:
        raise ValueError(f"{name} has {total} training images, so {keep} cannot be taken and {held} held out")
    whole, drawn = (data.train_images, data.train_labels), np.random.default_rng(seed).permutation(total - held)[:keep]
    kept = slice(keep) if train_images is None else np.sort(drawn)
    train = [tensor[kept] for tensor in whole]
    test = [tensor[total - held:] for tensor in whole] if held else [data.test_images, data.test_labels]
    if nuisance:
        train[0], test[0] = disturbed(train[0], nuisance, seed + 1), disturbed(test[0], nuisance, 0)
    return Dataset(*(tensor.to(device) for tensor in train + test), data.classes, data.mean, data.std)


# ---------------------------------------------------------------------------------------------- MNIST and CIFAR-10
def mnist(folder):
    """MNIST: 60,000 training and 10,000 test images, 1x28x28, 10 classes. Errors as for `load`."""
    files = ", ".join(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
    remedy = f"{files} (or their .gz) into {Path(folder, 'MNIST', 'raw')}"
    return Dataset(*_torchvision("MNIST", folder, (28, 28), remedy), classes=10, mean=0.0, std=0.3081)


def cifar10(folder):
    """CIFAR-10: 50,000 training and 10,000 test images, 3x32x32, 10 classes. Errors as for `load`."""
    remedy = (f"cifar-10-python.tar.gz into {folder}, or its data_batch_1 to data_batch_5, test_batch and batches.meta "
              f"into {Path(folder, 'cifar-10-batches-py')}")
    return Dataset(*_torchvision("CIFAR10", folder, (32, 32, 3), remedy), classes=10, mean=0.4734, std=0.2516)


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
def tiny_imagenet(folder):
    """Tiny ImageNet: 100,000 training and 10,000 (validation) test images, 3x64x64, 200 classes. Errors: `load`'s."""
    tree, cache = Path(folder) / "tiny-imagenet-200", Path(folder) / "tiny-imagenet-200-decoded"
    return _decoded_once(cache, lambda part: _decode_tiny_imagenet(tree, part))


def _decode_tiny_imagenet(tree, part):
    """Decode all images, the first of every class before the second, so that any first part has all classes."""
    (address, md5), unpacked = TINY_IMAGENET, tree.with_name(f"{tree.name}-part")
    try:
        if not tree.exists():                                                  # made by a rename, so never half of it
            from torchvision.datasets.utils import download_and_extract_archive
            download_and_extract_archive(address, tree.parent, unpacked, md5=md5)
            os.replace(unpacked / tree.name, tree)
            unpacked.rmdir()
    except Exception as error:                                                 # no network, no room, a broken archive
        raise ValueError(f"cannot download Tiny ImageNet ({_in_one_line(error)}): put tiny-imagenet-200.zip from "
                         f"{address} into {tree.parent}, or its unpacked folder {tree.name}") from None
    try:
        classes = {name: k for k, name in enumerate((tree / "wnids.txt").read_text().split())}
        rows = [line.split("\t") for line in (tree / "val" / "val_annotations.txt").read_text().splitlines()]
        test = [(tree / "val" / "images" / row[0], classes[row[1]]) for row in rows]
    except (OSError, LookupError) as error:
        raise ValueError(f"{tree} is incomplete ({_in_one_line(error)}): delete it to download it again") from None
    of_class = [sorted((tree / "train" / name / "images").glob("*.JPEG"), key=lambda p: (len(p.name), p.name))
                for name in classes]
    counts = {len(paths) for paths in of_class}
    if len(classes) != 200 or len(counts) != 1 or 0 in counts:
        raise ValueError(f"{tree} has {len(classes)} classes of {min(counts, default=0)} to {max(counts, default=0)} "
                         "training images, not 200 of equally many: delete it to download it again")
    train = [(path, k) for same_place in zip(*of_class) for k, path in enumerate(same_place)]
    paths, labels = zip(*train, *test)
    for path, why in zip(paths, _decode(paths, (3, 64, 64), part, _list_files(tree)[1])):
        if why:
            raise ValueError(f"{path} is missing or damaged ({why}): delete {tree} to download again")
    return dict(shape=(len(paths), 3, 64, 64), train=len(train), labels=labels, classes=200, mean=0.442, std=0.278)


# ---------------------------------------------------------------------- image files, decoded once, and your own ones
def _decoded_once(cache, decode, listing=None):
    """The data set that decode(part) puts into `cache`, mapped into memory; done again when the listing has changed."""
    part, about = cache.with_name(cache.name + "-part"), cache / "about.json"
    try:
        if cache.exists() and json.loads(about.read_text()).get("listing") != listing:
            print(f"{cache} is of files that have changed: all are decoded anew", flush=True)
            shutil.rmtree(cache)
        if not cache.exists():
            part.mkdir(parents=True, exist_ok=True)
            with open(part / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)                               # others wait for the one that decodes
                if not cache.exists():
                    (part / about.name).write_text(json.dumps(decode(part) | dict(listing=listing)))
                    os.replace(part, cache)
        about = json.loads(about.read_text())
        images = torch.from_numpy(np.memmap(cache / "images", np.uint8, "c").reshape(about["shape"]))
    except (OSError, ValueError, LookupError) as error:
        if cache.exists():
            raise ValueError(f"{cache} is damaged ({error}): delete it, and the images are decoded again") from None
        raise ValueError(f"cannot write {part} ({error})" if isinstance(error, OSError) else str(error)) from None
    n, labels = about["train"], torch.tensor(about["labels"])
    return Dataset(images[:n], labels[:n], images[n:], labels[n:], about["classes"], about["mean"], about["std"])


def _decode(paths, shape, part, listing):
    """Append the pixels to part/images, from where a stopped decoding ended; returns "" or why it failed for each."""
    key, size = hashlib.sha256(f"{listing}{shape}{paths}".encode(errors="replace")).hexdigest(), int(np.prod(shape))
    with open(part / "images", "ab") as images, open(part / "records", "a+b", buffering=0) as records:
        records.seek(0)
        first, *lines = records.read().decode().split("\n")[:-1] or [""]       # the key, and what is returned
        stored = images.tell() // size if first == key else -1
        lines = lines[:np.searchsorted(np.cumsum([not why for why in lines]), stored, side="right")]
        images.truncate(size * lines.count(""))                                # both back to what both have
        records.truncate(0)
        records.write("".join(f"{line}\n" for line in [key, *lines]).encode())
        paths = paths[len(lines):]
        for pixels, path in zip(_for_each(lambda image: _pixels(image, *shape[:2]), paths, "decoded"), paths):
            why = pixels if isinstance(pixels, str) else ""
            if why and not path.parent.exists():
                raise ValueError(f"{path.parent} has vanished; once it is back, start again, and the decoding goes on")
            images.write(b"" if why else pixels.tobytes())
            records.write(f"{why}\n".encode(errors="replace"))
            lines.append(why)
    return lines


def _for_each(function, paths, what):
    """Yield function(opened image) of each, by as many threads as cores; for what fails, a str says why."""
    def attempt(path):
        try:
            with Image.open(path) as image:                                    # reads the header alone
                return function(image)
        except Exception as error:                                             # a file can make it fail in any way
            return _in_one_line(error).replace(f" {str(path)!r}", "")
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")                                        # Pillow's, of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)         # every thread may hold such an image
        for i in range(0, len(paths), 512):                                    # not all at once, to bound the memory
            yield from pool.map(attempt, paths[i:i + 512])
            last = i + 512 >= len(paths)
            if last or sys.stdout.isatty():
                print(f"\r{what}: {min(i + 512, len(paths))} of {len(paths)}", end="\n" * last, flush=True)


def _pixels(image, channels, side):
    """Upright, on black, the shorter side resized to `side`, centre-cropped: (channels, side, side) uint8."""
    image.draft(None, (2 * side, 2 * side))                                    # a JPEG at 1/2, 1/4, 1/8 of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                                                  # L would clip 16 bits
        values = np.asarray(image) / 257
        if image.mode == "F" or values.max() > 255:
            raise ValueError("more than 16 bits of grey")
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(side, side, channels).transpose(2, 0, 1)


def _list_files(folder):
    """The relative paths of all files that are not hidden, and a hash of these, their sizes and their times."""
    paths, errors, listing = [], [], hashlib.sha256()
    for root, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in sorted(os.path.join(root, name) for name in names if name[0] != "."):
            stat = os.stat(path, follow_symlinks=os.path.exists(path))         # of a link to nothing: its own
            paths.append(os.path.relpath(path, folder))
            listing.update(os.fsencode(f"{paths[-1]}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    if errors or not paths:
        raise ValueError(f"cannot read {folder} ({errors[0] if errors else 'no files'}): expected {LAYOUTS}")
    return paths, listing.hexdigest()


def image_folder(folder, side=64):
    """Your own images in one of LAYOUTS, resized and cropped to C x side x side; C is 1 if all are grey, else 3.

    They are decoded once into FOLDER-decoded-SIDE. Their order is random, but the same for the same files. Without val/
    and test/ the last tenth of the training images is held out as the test split. Errors as for `load`."""
    folder = Path(os.path.abspath(folder))
    cache, (paths, listing) = folder.with_name(f"{folder.name}-decoded-{side}"), _list_files(folder)
    return _decoded_once(cache, lambda part: _decode_folder(folder, paths, listing, side, part), listing)


def _decode_folder(folder, paths, listing, side, part):
    """Find splits, classes and channels by the files' headers, decode, and say what was found."""
    splits = [name for name in ("train", "val", "test") if any(path.startswith(f"{name}/") for path in paths)]
    splits = splits[:2] if "train" in splits else []
    paths = [path for path in paths if not splits or path.split("/")[0] in splits]
    grey = _for_each(lambda image: Image.getmodebase(image.mode) == "L", [folder / path for path in paths], "headers")
    found = dict(zip(paths, list(grey)))                                       # whether it is grey, or why it fails
    rows = [(path, path.split("/")[0] in splits[1:], path.split("/")[1] if splits and path.count("/") > 1 else None)
            for path in (paths[i] for i in np.random.default_rng(0).permutation(len(paths))) if found[path] in (0, 1)]
    rows.sort(key=lambda row: row[1])                                          # training first, each as drawn
    classes = sorted({name for _, test, name in rows if name and not test})
    for path, _, name in rows:
        if classes and name not in classes:
            raise ValueError(f"{folder / path} is in none of the {len(classes)} class folders of {folder / 'train'}")
    n = len(rows) - sum(test for _, test, _ in rows)
    print(f"{n} training images, {f'{len(classes)} classes' if classes else 'no classes (they need train/CLASS/...)'}, "
          f"{f'{len(rows) - n} test images in {splits[1]}' if n < len(rows) else 'a tenth held out as the test split'}")
    shape = 3 if False in found.values() else 1, side, side
    found |= zip((row[0] for row in rows), _decode([folder / row[0] for row in rows], shape, part, listing))
    bad = [f"{path} ({why})".encode(errors="replace").decode() for path, why in found.items() if why]
    if bad:
        text = f"{len(bad)} of {len(paths)} files are no images: {', '.join(bad[:5] + ['...'] * (len(bad) > 5))}"
        if 2 * len(bad) > len(paths):
            raise ValueError(f"{folder}: {text}; expected {LAYOUTS}")
        print(text, flush=True)
    rows = [row for row in rows if not found[row[0]]]
    n = len(rows) - sum(test for _, test, _ in rows)
    n -= max(1, n // 10) if n == len(rows) else 0
    if n < 2:
        raise ValueError(f"{folder} has {len(rows)} images, too few to train and test with: expected {LAYOUTS}")
    pixels = np.memmap(part / "images", np.uint8, "r")[:min(n, 10_000) * np.prod(shape)]
    counts, value = np.histogram(pixels, 256, (0, 256))[0], np.arange(256) / 255
    mean = np.average(value, weights=counts)
    std = np.average((value - mean) ** 2, weights=counts) ** 0.5 or 1.0        # of one colour: as it is
    return dict(shape=(len(rows), *shape), train=n, classes=len(classes), class_names=classes, mean=mean, std=std,
                labels=[classes.index(name) if classes else -1 for _, _, name in rows])


# --------------------------------------------------------------------------------------------- nuisances and glyphs
def disturbed(images, nuisance, seed):
    """Draw a nuisance for each of images (N, C, H, W) uint8, H = W, uniformly: "rotation" by any angle; "scale", 0.3 to
    1 times the size; or "translation", any whole pixels on a canvas of S = 4·round(10/28 H) pixels a side (28 -> 40).
    On black, about the centre, bilinear (shrunk: means of 2x2 samples). Returns (N, C, H, W) or (N, C, S, S) uint8."""
    (n, _, side, _), scale = images.shape, nuisance == "scale"
    random = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    angle, size = 2 * np.pi * random[0] * (nuisance == "rotation"), 1 - 0.7 * random[0] * scale
    room = (4 * round(side * 10 / 28) - side) * (nuisance == "translation")
    shift = (random * (room + 1)).floor().T * 2 / (side + room)               # from the top left corner; 0 without room
    return torch.cat([_moved(F.pad(images[i].float(), (0, room, 0, room)), angle[i], size[i], shift[i], 1 + scale)
                      .round().byte() for i in torch.arange(n).split(500)])    # not all at once, to bound the memory


def _moved(images, angle, size, shift, fine=1):
    """Images (B, C, H, W) float32 turned counter-clockwise by angle (B,), size (B,) times as large and then shifted by
    shift (B, 2), right and down in half image sides. A pixel is the mean of fine x fine bilinear samples."""
    affine = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) / size[:, None, None]
    affine = torch.cat([affine, affine @ -shift[:, :, None]], 2)                                     # (B, 2, 3)
    grid = F.affine_grid(affine, (*images.shape[:2], *(fine * side for side in images.shape[2:])), align_corners=False)
    return F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), fine)


def glyphs(train=10_000, test=2_000, seed=0):
    """Draw the built-in data set: characters in any orientation, 1x28x28, 10 classes, the same for the same seed.

    Each image shows one of GLYPHS in Pillow's own font, at random turned (0 to 360 degrees), sized (0.65 to 1 times 24
    pixel type), shifted (up to 2 pixels each way), of one of four stroke weights, with Gaussian noise (σ = 0.1)."""
    count, side, over = train + test, 28, 4                                    # drawn 4 times as large
    font, strokes, pictures = ImageFont.load_default(size=24 * over), [0, 2, 4, 6], []     # extra pen width, enlarged
    for character in GLYPHS:
        for stroke in strokes:
            pictures.append(Image.new("L", (side * over, side * over)))
            ImageDraw.Draw(pictures[-1]).text((side * over / 2, side * over / 2), character, fill=255, font=font,
                                              anchor="mm", stroke_width=stroke)
    shapes = F.avg_pool2d(torch.from_numpy(np.stack(pictures))[:, None].float() / 255, over)         # (40, 1, 28, 28)
    generator = torch.Generator().manual_seed(seed)
    labels, weight = (torch.randint(len(kinds), (count,), generator=generator) for kinds in (GLYPHS, strokes))
    random = torch.rand(4, count, generator=generator)
    angle, size, shift = 2 * np.pi * random[0], 0.65 + 0.35 * random[1], (4 * random[2:] - 2).T      # shift in pixels
    images = _moved(shapes[labels * len(strokes) + weight], angle, size, shift * 2 / side)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], len(GLYPHS), mean=0.0, std=0.3)


# ----------------------------------------------------------------------------------------------- one epoch's plan
def epoch_plan(images, choices, seed, epoch, device="cpu"):
    """Draw an epoch's order, a permutation of the images (N,), and for each image, by its index in the data set, its
    choice (N,), below P, among the pairs (or larger sets) of views; both int64, on the device. They depend on (seed,
    epoch) alone: all processes draw the same, so their number changes nothing."""
    rng = np.random.default_rng([seed, epoch])
    drawn = rng.permutation(images), rng.integers(choices, size=images)
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in drawn)             # without a wait
