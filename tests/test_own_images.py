"""Own images and Tiny ImageNet: layouts, what is decoded from which file, bad files, the cache."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

import data

SIDE = 8


def tree(folder, *names):
    """PNG files of one colour each, whose red tells their place in names."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (i, 0, 200)).save(path, "PNG")
    return folder


def load(folder):
    return data.load("folder", folder, folder.parent / "cache", image_size=SIDE)


def reds(images):
    return images[:, 0, 0, 0].tolist()


def test_classes_are_folders_and_those_of_val_are_matched_by_name(tmp_path):
    own = tree(tmp_path / "own", "train/b/0.png", "train/c/1.PNG", "train/b/deep/2.png",
               "val/c/3.png", "test/d/4.png")
    (own / "train" / "a").mkdir()
    (own / "train" / "c" / "notes.txt").write_text("no image")
    d = load(own)
    assert d.class_names == ["a", "b", "c"]
    assert reds(d.train_images) == [0, 2, 1] and d.train_labels.tolist() == [1, 1, 2]
    assert reds(d.test_images) == [3] and d.test_labels.tolist() == [2]
    pixels = d.train_images.double() / 255
    assert d.mean == pytest.approx(pixels.mean().item(), rel=1e-5)
    assert d.std == pytest.approx(pixels.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("pattern, classes", (
    ("train/{}/{}.png", 2), ("{}/{}.png", 2),
    ("train/{}{}.png", 0), ("train/only/{}/{}.png", 0), ("{}{}.png", 0), ("only/{}/{}.png", 0)))
def test_every_tenth_image_is_held_out(tmp_path, pattern, classes, capsys):
    """Of all classes, where there are any, and a line says so."""
    names = [pattern.format("ab"[i // 20], 100 + i) for i in range(40)]
    d = load(tree(tmp_path / "own", *names))
    assert "every tenth" in capsys.readouterr().out
    assert reds(d.test_images) == [0, 10, 20, 30] and len(d.train_images) == 36
    labels = [0, 0, 1, 1] if classes else [-1, -1, -1, -1]
    assert d.classes == classes and d.test_labels.tolist() == labels


@pytest.mark.parametrize("names, words", (
    ("", "there are 0 images in .*own"),
    ("train/a/0.txt val/a/1.png", "there are 1 images in .*own, too few: expected train/CLASS"),
    ("test/a/0.png val/a/1.png", "test' would be a class: expected train/CLASS"),
    ("train/a/0.png train/b/1.png train/2.png", "train/2.png' is in none of the class folders"),
    ("train/a/0.png train/b/1.png val/c/2.png", "val/c/2.png' is in none of the class folders"),
))
def test_folders_that_cannot_be_used(tmp_path, names, words):
    with pytest.raises(ValueError, match=words):
        load(tree(tmp_path / "own", *names.split()))


def assert_decoded(path, picture, expected, error, **options):
    """Saved under this name, a picture gives these pixels, (H, W, C) or, of one channel, (H, W)."""
    for split in ("train", "val"):
        (path / split).mkdir(parents=True)
        picture.save(path / split / path.name, **options)
    d = load(path)
    assert torch.equal(d.train_images, d.test_images)
    assert d.batch(d.train_images, torch.tensor([0])).isfinite().all()
    found = d.train_images[0].permute(1, 2, 0).squeeze(2).numpy().astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= error, path.name


@pytest.mark.parametrize("extension, shape, dtype, values", (
    ("png", (), "u1", 256), ("webp", (), "u1", 256), ("png", (3,), "u1", 256),
    ("webp", (3,), "u1", 256), ("png", (2,), "u1", 256), ("png", (4,), "u1", 256),
    ("png", (), "u2", 65536), ("tif", (), "u2", 65536), ("pgm", (), "i4", 65536)))
def test_pixels_of_8_and_16_bits(tmp_path, extension, shape, dtype, values):
    """Where a picture is transparent, it is black. Grey has one channel, also as WebP."""
    pixels = np.random.default_rng(0).integers(values, size=(SIDE, SIDE, *shape)).astype(dtype)
    expected = pixels / ((values - 1) // 255)
    if shape in ((2,), (4,)):
        expected = (pixels[..., :-1] * (pixels[..., -1:] / 255)).squeeze()
    path = tmp_path / f"x.{extension}"
    assert_decoded(path, Image.fromarray(pixels), expected, 0.51, lossless=True)


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((SIDE, SIDE), np.uint8)
    upright[:4, :4] = 255
    stored = np.rot90(upright).copy()
    exif = Image.Exif()
    exif[0x0112] = 6    # to be turned clockwise
    assert_decoded(tmp_path / "x.png", Image.fromarray(stored), upright, 0, exif=exif)


@pytest.mark.parametrize("size", ((64, 32), (32, 64)))
def test_resized_and_centre_cropped(tmp_path, size):
    """Red at the ends is cut off, but for what antialiasing mixes in at the border."""
    picture = Image.new("RGB", size, "red")
    picture.paste(Image.new("RGB", (32, 32), "lime"), (size[0] // 2 - 16, size[1] // 2 - 16))
    assert_decoded(tmp_path / "x.png", picture, np.full((SIDE, SIDE, 3), (0, 255, 0)), 30)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Not only a damaged one, but one of pixels that would become black or white in silence."""
    own = tree(tmp_path / "own", "train/0.png", "val/1.png")
    bad = own / "train" / "bad\n.tif"
    contents = [b"no image", (own / "train" / "0.png").read_bytes()[:-30], b"",
                b"Pf 8 8 -1.0\n" + np.ones((SIDE, SIDE), np.float32).tobytes()]
    for value in (np.float32(0.5), np.int32(70_000), np.int32(-3)):
        Image.fromarray(np.full((SIDE, SIDE), value)).save(bad)
        contents.append(bad.read_bytes())
    for content in contents:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the image .*train/bad\\n.tif") as error:
            load(own)
        assert "\n" not in str(error.value)


def test_images_are_decoded_once_and_anew_after_any_change(tmp_path, capsys):
    own = tree(tmp_path / "own", "train/a/0.png", "train/a/1.png", "train/b/2.png", "val/a/3.png")
    load(own).test_images.zero_()    # which does not reach the file
    assert "decoding 4 images" in capsys.readouterr().out
    assert reds(load(own).test_images) == [3]
    assert "decoding" not in capsys.readouterr().out
    os.utime(own / "train" / "a" / "0.png", ns=(1, 1))
    load(own)
    assert "decoding 4 images" in capsys.readouterr().out
    (own / "train" / "a" / "0.png").rename(own / "train" / "b" / "0.png")
    assert load(own).train_labels.tolist() == [0, 1, 1]
    assert data.load("folder", own, tmp_path / "cache").train_images.shape == (3, 3, 64, 64)
    assert len(list((tmp_path / "cache").glob("own-*.pt"))) == 4


def test_a_cache_that_cannot_be_read(tmp_path):
    own = tree(tmp_path / "own", "train/0.png", "train/1.png")
    load(own)
    [cache] = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot read .*{cache.name} .*delete it") as error:
        load(own)
    assert "\n" not in str(error.value)


def write_tiny_imagenet(folder, layout):
    """Tiny ImageNet's tree; each image's green is its class."""
    top = folder / "tiny-imagenet-200"
    annotations = ""
    for k in range(200):
        name = f"n{k:08d}"
        file = f"val_{7 * k % 200}.JPEG"
        for path in (f"train/{name}/images/{name}_0.JPEG", layout.format(WNID=name, file=file)):
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (128, k, 128)).save(top / path, quality=100)
        annotations += f"{file}\t{name}\t0\t0\t63\t63\n"
    if "WNID" not in layout:
        (top / "val" / "val_annotations.txt").write_text(annotations, encoding="utf-8")


@pytest.mark.parametrize("layout", ("val/images/{file}", "val/{WNID}/{file}"))
def test_tiny_imagenet_in_every_layout(tmp_path, layout):
    write_tiny_imagenet(tmp_path, layout)
    tiny = data.load("tiny-imagenet", tmp_path, tmp_path / "cache")
    assert tiny.train_images.shape == tiny.test_images.shape == (200, 3, 64, 64)
    assert tiny.classes == 200 and (tiny.mean, tiny.std) == (0.442, 0.278)
    assert tiny.test_labels.sort().values.tolist() == list(range(200))
    for split in ("train", "test"):
        green = getattr(tiny, f"{split}_images")[:, 1].float().mean((1, 2))
        assert (green - getattr(tiny, f"{split}_labels")).abs().max() <= 3
