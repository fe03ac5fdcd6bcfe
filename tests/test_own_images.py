"""Own images and Tiny ImageNet: layouts, what is decoded from which file, bad files, the cache."""
import os
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from helpers import FORKS

SIDE = 8
ORIENTATION = 0x0112    # tags of EXIF
RESOLUTION = 0x011A


def tree(folder, *names):
    """PNG files of one colour each, whose red tells their place in names."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (i, 0, 200)).save(path, "PNG")
    return folder


def forty(folder, *more):
    """Twenty images each of two classes, without a test split, and more."""
    return tree(folder, *[f"train/{'ab'[i % 2]}/{i}.png" for i in range(40)], *more)


def load(folder, **options):
    return data.load("folder", folder, folder.parent / "cache", image_size=SIDE, **options)


def labels_of(d):
    """The label of each file of both splits."""
    files = np.concatenate([d.train_files, d.test_files]).tolist()
    labels = torch.cat([d.train_labels, d.test_labels]).tolist()
    return dict(zip(files, labels))


def assert_decoded(path, picture, expected, error, **options):
    """Saved under this name, a picture gives these pixels, (H, W, C) or, of one channel, (H, W)."""
    for split in ("train", "val"):
        (path / split).mkdir(parents=True)
        picture.save(path / split / path.name, **options)
    d = load(path)
    assert torch.equal(d.train_images, d.test_images)
    found = d.train_images[0].permute(1, 2, 0).squeeze(2).numpy().astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= error, path.name


# ------------------------------------------------------------------------------------------ layouts

@pytest.mark.parametrize("train, test, unused", (
    ("train", "val", ["Train", "Val"]),
    ("train", "test", ["elsewhere"]),
    ("Train", "Val", ["test"]),
    ("train", "valid", ["elsewhere", "test"]),
    ("TRAIN", "validation", ["test"]),
))
def test_labelled_with_a_test_split(tmp_path, train, test, unused, capsys):
    """Of two classes that are called like splits. Folders that are not used are named."""
    names = [f"{train}/val/0.png", f"{train}/train/1.png", f"{train}/val/deep/2.png",
             f"{test}/train/3.png", f"{test}/val/4.png"]
    others = [f"{folder}/val/5.png" for folder in unused]
    d = load(tree(tmp_path / "own", *names, *others))
    assert d.class_names == ["train", "val"]
    assert sorted(d.test_files) == names[3:]
    assert labels_of(d) == dict(zip(names, [1, 0, 1, 0, 1]))
    reds = torch.cat([d.train_images, d.test_images])[:, 0, 0, 0]
    assert [names[red] for red in reds] == list(labels_of(d))
    printed = capsys.readouterr().out
    assert "3 training images, 2 test images" in printed and "2 classes" in printed
    assert f"not used, though they hold images: {unused}" in printed


def test_about_a_tenth_is_held_out_and_no_file_changes_sides(tmp_path, capsys):
    """Nor when a file system stores accents in the other form."""
    names = [f"train/{'ab'[i % 2]}/é{i}.png" for i in range(40)]
    before = load(tree(tmp_path / "own", *names))
    assert 1 <= len(before.test_files) <= 9 and len(labels_of(before)) == 40
    assert "about a tenth" in capsys.readouterr().out
    assert 3 < before.train_labels[:16].sum() < 13    # any first part has all classes
    after = load(tree(tmp_path / "own", *names, "train/a/stray.png", "train/c/0.png"))
    assert len(labels_of(after)) == 42 and before.digest() != after.digest()
    assert set(before.test_files) <= set(after.test_files)
    assert set(before.train_files) <= set(after.train_files)
    other_names = [unicodedata.normalize("NFD", name) for name in names]
    moved = load(tree(tmp_path / "moved", *other_names))
    files = [unicodedata.normalize("NFC", file) for file in moved.test_files]
    assert files == before.test_files.tolist()


@pytest.mark.parametrize("pattern", ("a{}/x.png", "x/y/{}.png", "train/{}.png"))
def test_unlabelled(tmp_path, pattern, capsys):
    names = [pattern.format(i) for i in range(40)]
    d = load(tree(tmp_path / "own", *names))
    assert d.classes == 0 and set(labels_of(d).values()) == {-1}
    assert d.train_labels.dtype == torch.int64 and len(d.test_files) > 0
    assert "they need train/CLASS" in capsys.readouterr().out


def test_what_is_a_candidate(tmp_path, capsys):
    """Images by their names, and links to them and to folders, but no circles of links."""
    names = {"train/b/日本 語.JPG", "train/b/two\nlines.png", "train/a/link.png"}
    own = forty(tmp_path / "own", *names)
    a = own / "train" / "a"
    (a / "link.png").rename(tmp_path / "there.png")
    (a / "link.png").symlink_to(tmp_path / "there.png")
    (a / "dead.png").symlink_to(tmp_path / "gone.png")
    (a / "up").symlink_to("..")
    (a / "around").symlink_to(own)
    (a / "outside").symlink_to(tmp_path)
    (own / "train").rename(tmp_path / "elsewhere")
    (own / "train").symlink_to(tmp_path / "elsewhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(a / "pipe.png")
    for name in ("classes.txt", "train/Thumbs.db", "train/a/._0.png", "train/a/.DS_Store",
                 "train/a/.cache/1.png", "train/a/@eaDir/2.png", ".git/3.png",
                 *[f"train/a/{i}.txt" for i in range(60)]):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("no image")
    d = load(own)
    assert len(labels_of(d)) == 43 and names <= labels_of(d).keys()
    assert not d.train_files.dtype.hasobject
    printed = capsys.readouterr().out
    assert "'train/a/dead.png' (not a regular file)" in printed and "not used" not in printed
    assert "._0.png" not in printed and ".txt" not in printed


# ------------------------------------------------------------------------------------------- pixels

def random_pixels(*channels, dtype=np.uint8):
    rng = np.random.default_rng(0)
    return rng.integers(np.iinfo(dtype).max + 1, size=(SIDE, SIDE, *channels), dtype=dtype)


@pytest.mark.parametrize("name", ("x.png", "x.WebP"))
@pytest.mark.parametrize("channels", ((), (3,)))
def test_pixels_without_resizing_are_exact(tmp_path, channels, name):
    """Grey has one channel, also in a format that does not know grey."""
    pixels = random_pixels(*channels)
    assert_decoded(tmp_path / name, Image.fromarray(pixels), pixels, 0, lossless=True)


def test_sixteen_bits_and_transparency(tmp_path):
    """Where a picture is transparent, it is black."""
    deep = random_pixels(dtype=np.uint16)
    assert_decoded(tmp_path / "deep.png", Image.fromarray(deep), deep / 257, 1)
    for channels in (2, 4):
        pixels = random_pixels(channels)
        expected = pixels[..., :-1] * (pixels[..., -1:] / 255)
        picture = Image.fromarray(pixels)
        assert_decoded(tmp_path / f"{channels}.png", picture, expected.squeeze(), 1)
    expected = np.full((SIDE, SIDE, 3), (250, 100, 50))
    expected[0, 0] = 0
    picture = Image.new("P", (SIDE, SIDE), 1)
    picture.putpalette([0, 0, 0, 250, 100, 50, 9, 9, 9])
    picture.putpixel((0, 0), 2)
    assert_decoded(tmp_path / "palette.png", picture, expected, 0, transparency=2)


def test_photos_and_animations(tmp_path):
    """MPO, CMYK, GIF, and a turned photo, whose EXIF calls its resolution a text."""
    smooth = np.zeros((SIDE, SIDE, 3), np.uint8)
    smooth[:] = np.linspace(0, 255, SIDE)[:, None]
    smooth[..., 2] = 128
    picture = Image.fromarray(smooth)
    more = dict(save_all=True, append_images=[picture.rotate(90)], quality=100)
    assert_decoded(tmp_path / "x.mpo", picture, smooth, 20, **more)
    assert_decoded(tmp_path / "x.gif", picture, smooth, 20, **more)
    assert_decoded(tmp_path / "x.JPG", picture.convert("CMYK"), smooth, 20, quality=100)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    exif[RESOLUTION] = 72.0
    rational = struct.pack(">HH", RESOLUTION, 5)
    assert rational in exif.tobytes()
    broken = exif.tobytes().replace(rational, struct.pack(">HH", RESOLUTION, 2))
    turned = picture.rotate(180)
    assert_decoded(tmp_path / "turned.jpg", turned, smooth, 20, exif=broken, quality=100)


@pytest.mark.parametrize("extension", ("jpg", "webp", "tiff", "png"))
def test_exif_orientation_is_applied(tmp_path, extension):
    """A white quarter at the upper left, stored in each of eight ways, comes out there."""
    upright = np.zeros((SIDE, SIDE), np.uint8)
    upright[:4, :4] = 255
    upright[:4, 4:] = 100
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T,
              8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.{extension}"
        picture = Image.fromarray(pixels.copy())
        assert_decoded(path, picture, upright, 20, exif=exif, quality=100)


@pytest.mark.parametrize("size", ((64, 32), (32, 64)))
def test_resized_and_centre_cropped(tmp_path, size):
    """Red at the ends is cut off; stripes of one pixel become grey, by antialiasing."""
    stripes = np.tile(np.uint8([0, 255]), (32, 16))
    picture = Image.new("RGB", size, "red")
    picture.paste(Image.fromarray(stripes), (size[0] // 2 - 16, size[1] // 2 - 16))
    grey = np.full((SIDE, SIDE, 3), 127)
    assert_decoded(tmp_path / "x.png", picture, grey, 40)


def test_mean_and_std_are_those_of_the_training_images(tmp_path):
    names = [f"train/{i}.png" for i in range(20)]
    d = load(tree(tmp_path / "own", *names, "val/x.png"))
    x = d.train_images.double() / 255
    assert d.mean == pytest.approx(x.mean().item(), rel=1e-5)
    assert d.std == pytest.approx(x.std(correction=0).item(), rel=1e-5)
    black = Image.new("L", (SIDE, SIDE))
    assert_decoded(tmp_path / "black.png", black, np.zeros((SIDE, SIDE)), 0)
    plain = load(tmp_path / "black.png")
    assert plain.batch(plain.train_images, torch.tensor([0])).isfinite().all()


# ---------------------------------------------------------------------------------------- bad files

def test_bad_images_are_counted_and_named(tmp_path, monkeypatch, capsys):
    own = forty(tmp_path / "own")
    a = own / "train" / "a"
    Image.fromarray(random_pixels(3)).save(a / "cut.jpg")
    (a / "cut.jpg").write_bytes((a / "cut.jpg").read_bytes()[:-100])
    (a / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    Image.new("RGB", (16, 16)).save(a / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for _ in range(2):    # decoded, and from the cache
        assert len(labels_of(load(own))) == 40
        printed = capsys.readouterr().out
        assert "3 of 43 images cannot be read" in printed and "Pillow reads no HEIC" in printed
        for name in ("cut.jpg", "phone.HEIC", "large.png"):
            assert f"'train/a/{name}' (" in printed
        assert "exceeds limit of 200 pixels" in printed and "MAX_IMAGE_PIXELS raises" in printed


@pytest.mark.parametrize("names, words", (
    ("", "there is no folder .*own: expected one with train/CLASS"),
    ("train/a/0.txt", "0 training and 0 test images, too few: expected train/CLASS"),
    ("train/a/0.png val/.a/1.png", "1 training and 0 test images, too few"),
    ("train/0.png val/1.png train/bad2.png train/bad3.png train/bad4.png",
     "3 of 5 images cannot be read: 'train/bad"),
    ("train/a/0.png val/a/1.png val/c/2.png", "'val/c/2.png' in .* is in none of its 1 classes"),
    ("train/a/0.png val/a/1.png train/2.png", "'train/2.png' in .* is in none of its 1 classes"),
))
def test_input_that_cannot_be_used(tmp_path, names, words):
    own = tree(tmp_path / "own", *names.split())
    for bad in own.glob("train/bad*"):
        bad.write_text("no image")
    with pytest.raises(ValueError, match=words) as error:
        load(own)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_entered(tmp_path, monkeypatch):
    """One that is used is named; one that is not does not matter."""
    own = forty(tmp_path / "own", "val/a/0.png", "private/0.png")
    scandir = os.scandir
    locked = own / "private"

    def guarded(path):
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert load(own).test_files.tolist() == ["val/a/0.png"]
    for name in ("val", "train/a"):
        locked = own / name
        with pytest.raises(OSError, match=f"Permission denied: '{own / name}'"):
            load(own)


# ---------------------------------------------------------------------------------------- the cache

def test_images_are_decoded_once_and_anew_after_any_change(tmp_path, capsys):
    own = forty(tmp_path / "own")
    d = load(own)
    assert "decoding 40 images" in capsys.readouterr().out
    # The file is mapped into memory, and no change there reaches it.
    assert d.test_images.data_ptr() - d.train_images.data_ptr() == d.train_images.nbytes
    before = d.train_images.clone()
    d.train_images.zero_()
    assert torch.equal(load(own).train_images, before)
    assert "decoding" not in capsys.readouterr().out
    os.utime(own / "train" / "a" / "0.png", ns=(1, 1))
    load(own)
    assert "decoding 40 images" in capsys.readouterr().out
    (own / "train" / "a" / "0.png").unlink()
    assert len(labels_of(load(own))) == 39
    smaller = data.load("folder", own, tmp_path / "cache", image_size=4)
    assert smaller.train_images.shape[1:] == (3, 4, 4)
    assert len(list((tmp_path / "cache").iterdir())) == 4    # and nothing that is half done


def test_a_cache_that_cannot_be_written_or_read(tmp_path, monkeypatch):
    own = forty(tmp_path / "own")

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            load(own)
    assert list((tmp_path / "cache").iterdir()) == []
    load(own)
    [cache] = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read .*own-.*another cache folder") as error:
        load(own)
    assert "\n" not in str(error.value) and "delete" not in str(error.value)


def digest(folder):
    return load(folder).digest()


def test_programs_that_start_at_once(tmp_path):
    own = forty(tmp_path / "own")
    with FORKS.Pool(2) as pool:
        digests = pool.map(digest, [own, own], chunksize=1)
    assert digests == [digest(own)] * 2


# ------------------------------------------------------------------------------------ Tiny ImageNet

def write_tiny_imagenet(folder, layout, classes=200):
    """Tiny ImageNet's tree; each image's green is its class."""
    top = folder / "tiny-imagenet-200"
    annotations = ""
    for k in range(classes):
        name = f"n{k:08d}"
        # A training image bears the name of another class's validation image.
        for path in (f"train/{name}/images/{name}_0.JPEG",
                     f"train/{name}/images/val_{(k + 1) % classes}.JPEG",
                     layout.format(WNID=name, file=f"val_{k}.JPEG")):
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (128, k, 128)).save(top / path, quality=100)
        annotations += f"val_{k}.JPEG\t{name}\t0\t0\t63\t63\n"
    if "WNID" not in layout:
        # With a byte-order mark, and a blank line at the end.
        path = top / "val" / "val_annotations.txt"
        path.write_text(f"{annotations}\n", encoding="utf-8-sig")
    (top / "test" / "images").mkdir(parents=True)
    (top / "test" / "images" / "test_0.JPEG").write_text("not read")


@pytest.mark.parametrize("layout", ("val/images/{file}", "val/{WNID}/images/{file}",
                                    "val/{WNID}/{file}", "val/images/{WNID}/{file}"))
def test_tiny_imagenet_in_every_layout(tmp_path, layout):
    write_tiny_imagenet(tmp_path, layout)
    tiny = data.load("tiny-imagenet", tmp_path, tmp_path / "cache")
    assert tiny.train_images.shape == (400, 3, 64, 64) and tiny.test_images.shape[0] == 200
    assert tiny.classes == 200 and (tiny.mean, tiny.std) == (0.442, 0.278)
    for split in ("train", "test"):
        green = getattr(tiny, f"{split}_images")[:, 1].float().mean((1, 2))
        assert (green - getattr(tiny, f"{split}_labels")).abs().max() <= 3


def test_corrected_annotations_are_read_again(tmp_path):
    """The images' cache does not hide them."""
    write_tiny_imagenet(tmp_path, "val/images/{file}")
    before = data.load("tiny-imagenet", tmp_path, tmp_path / "cache")
    path = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("val_5.JPEG\tn00000005", "val_5.JPEG\tn00000006"), encoding="utf-8")
    after = data.load("tiny-imagenet", tmp_path, tmp_path / "cache")
    corrected = after.test_labels != before.test_labels
    assert after.test_files[corrected].tolist() == ["val/images/val_5.JPEG"]
    assert after.test_labels[corrected].tolist() == [6]


def test_tiny_imagenet_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    """Nothing else stays, so that the folder is never half of it; but here it has few classes."""
    def download(url, folder, md5):
        assert (url, md5) == (data.TINY_IMAGENET_URL, data.TINY_IMAGENET_MD5)
        assert Path(folder).parent == tmp_path / "new"
        write_tiny_imagenet(Path(folder), "val/images/{file}", classes=3)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    with pytest.raises(ValueError, match="has 3 classes, where 200 .* another program") as error:
        data.load("tiny-imagenet", tmp_path / "new", tmp_path / "cache")
    assert "delete" not in str(error.value)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny-imagenet-200"]
