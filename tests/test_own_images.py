"""Data set "folder": layouts, what is decoded from which file, order, bad files, and interruptions."""
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
from helpers import ROOT

SIDE = 8


def save(path, mode="RGB", size=(SIDE, SIDE), seed=0, **options):
    """An image of random pixels; returns the pixels."""
    shape = size[::-1] + {"RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(mode, ())
    dtype, top = (np.uint16, 65536) if mode == "I;16" else (np.uint8, 256)
    pixels = np.random.default_rng(seed).integers(top, size=shape, dtype=dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def one_colour(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), colour).save(path)


def tree(folder, *names):
    """PNG files of one colour each, whose red tells their place in names."""
    for i, name in enumerate(names):
        one_colour(folder / name, (i, 0, 200))
    return folder


def load(folder, **options):
    return data.load("folder", folder, image_size=SIDE, **options)


def reds(images):
    return images[:, 0, 0, 0].tolist()


def only_image(path, grey=False):
    """What is decoded from a file: (C, H, W). The others of its folder are black."""
    for i in range(3):
        Image.new("L" if grey else "RGB", (SIDE, SIDE)).save(path.parent / f"black{i}.png")
    d = load(path.parent)
    images = torch.cat([d.train_images, d.test_images]).numpy()
    return images[images.reshape(4, -1).sum(1).argmax()]


# ---------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("split", ("val", "test"))
def test_labelled_with_a_test_split(tmp_path, split, capsys):
    names = ["train/b/0.png", "train/a/1.png", "train/b/deep/2.png", f"{split}/a/3.png", f"{split}/b/4.png"]
    d = load(tree(tmp_path / "own", *names, "train/.hidden/5.png", "train/a/.6.png", "elsewhere/7.png"))
    assert d.classes == 2 and d.train_images.shape == (3, 3, SIDE, SIDE) and d.train_labels.dtype == torch.int64
    assert dict(zip(reds(d.train_images), d.train_labels.tolist())) == {0: 1, 1: 0, 2: 1}
    assert dict(zip(reds(d.test_images), d.test_labels.tolist())) == {3: 0, 4: 1}
    assert f"3 training images, 2 classes, 2 test images in {split}" in capsys.readouterr().out
    load(tmp_path / "own")
    assert capsys.readouterr().out == ""                                           # from the cache


def test_val_goes_before_test(tmp_path):
    names = ["train/a/0.png", "train/a/1.png", "test/a/2.png", "val/a/3.png"]
    assert reds(load(tree(tmp_path / "own", *names)).test_images) == [3]


def test_a_tenth_is_held_out(tmp_path, capsys):
    d = load(tree(tmp_path / "own", *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(40))))
    assert len(d.train_images) == 36 and len(d.test_images) == 4 and d.classes == 2
    assert sorted(reds(d.train_images) + reds(d.test_images)) == list(range(40))
    assert all(label == red % 2 for label, red in zip(d.test_labels.tolist(), reds(d.test_images)))
    assert "a tenth held out" in capsys.readouterr().out


@pytest.mark.parametrize("names", (
    [f"{i}.png" for i in range(20)], [f"{'ab'[i % 2]}/{i}.png" for i in range(20)],
    [f"x/y/{i}.png" for i in range(20)], [f"train/{i}.png" for i in range(20)]),
    ids=("flat", "CLASS without train", "nested", "train without classes"))
def test_unlabelled(tmp_path, names, capsys):
    d = load(tree(tmp_path / "own", *names))
    assert d.classes == 0 and len(d.train_images) == 18 and len(d.test_images) == 2
    assert d.train_labels.dtype == torch.int64 and set(d.train_labels.tolist() + d.test_labels.tolist()) == {-1}
    assert "no classes (they need train/CLASS/...)" in capsys.readouterr().out


def test_unlabelled_with_a_test_split(tmp_path):
    d = load(tree(tmp_path / "own", "train/0.png", "train/1.png", "val/x/2.png", "val/3.png"))
    assert d.classes == 0 and sorted(reds(d.test_images)) == [2, 3] and d.test_labels.tolist() == [-1, -1]


@pytest.mark.parametrize("stray", ("val/c/9.png", "val/9.png", "train/9.png"))
def test_an_image_of_no_class(tmp_path, stray):
    tree(tmp_path / "own", "train/a/0.png", "train/b/1.png", "val/a/2.png", stray)
    with pytest.raises(ValueError, match=f"{stray} is in none of the 2 class folders"):
        load(tmp_path / "own")


def test_links_are_followed(tmp_path):
    tree(tmp_path / "there", "0.png", "1.png", "2.png")
    (tmp_path / "own" / "train").mkdir(parents=True)
    (tmp_path / "own" / "train" / "a").symlink_to(tmp_path / "there")
    (tmp_path / "own" / "val" / "a").mkdir(parents=True)
    (tmp_path / "own" / "val" / "a" / "x.png").symlink_to(tmp_path / "there" / "2.png")
    d = load(tmp_path / "own")
    assert d.classes == 1 and sorted(reds(d.train_images)) == [0, 1, 2] and reds(d.test_images) == [2]


def test_order_is_random_and_stable(tmp_path):
    d = load(tree(tmp_path / "own", *(f"train/{i // 50}/{i:03d}.png" for i in range(100))))
    order = reds(d.train_images) + reds(d.test_images)
    assert sorted(order) == list(range(100)) and order != sorted(order)
    assert 10 < sum(d.train_labels[:45].tolist()) < 35                              # any first part has all classes
    again = load(tree(tmp_path / "other", *(f"train/{i // 50}/{i:03d}.png" for i in range(100))))
    assert reds(again.train_images) + reds(again.test_images) == order


# ----------------------------------------------------------------------------------------------------------- pixels
def test_colour_without_resizing_is_exact(tmp_path):
    pixels = save(tmp_path / "own" / "x.png")
    assert np.array_equal(only_image(tmp_path / "own" / "x.png"), pixels.transpose(2, 0, 1))
    pixels = save(tmp_path / "webp" / "x.webp", lossless=True)
    assert np.array_equal(only_image(tmp_path / "webp" / "x.webp"), pixels.transpose(2, 0, 1))


def test_jpeg(tmp_path):
    smooth = np.linspace(0, 255, SIDE)[None, :, None] * np.ones((SIDE, 1, 3))
    (tmp_path / "own").mkdir()
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "own" / "x.jpg", quality=100)
    assert np.abs(only_image(tmp_path / "own" / "x.jpg").transpose(1, 2, 0) - smooth).max() < 4


@pytest.mark.parametrize("mode", ("L", "1", "LA", "I;16"))
def test_grey_has_one_channel(tmp_path, mode):
    path = tmp_path / "own" / "x.png"
    if mode == "1":
        expected = save(tmp_path / "x.png", "L") > 127
        path.parent.mkdir()
        Image.fromarray(expected).save(path)
        expected = expected * 255
    else:
        pixels = save(path, mode)
        expected = {"L": pixels, "I;16": pixels / 257}.get(mode, pixels)
        if mode == "LA":
            expected = pixels[..., 0] * (pixels[..., 1] / 255)                     # on black
    got = only_image(path, grey=True)
    assert got.shape == (1, SIDE, SIDE) and np.abs(got[0] - expected).max() <= (0.5 if mode == "I;16" else mode == "LA")


def test_one_colour_image_makes_all_three_channels(tmp_path):
    grey = save(tmp_path / "own" / "grey.png", "L")
    save(tmp_path / "own" / "colour.png"), save(tmp_path / "own" / "more.png", seed=1)
    d = load(tmp_path / "own")
    assert any(np.array_equal(image, np.stack([grey] * 3)) for image in torch.cat([d.train_images, d.test_images]))


def test_palette_and_transparency(tmp_path):
    path = tmp_path / "own" / "x.png"
    pixels = save(path, "RGBA").astype(int)
    expected = (pixels[..., :3] * pixels[..., 3:] / 255).transpose(2, 0, 1)
    assert np.abs(only_image(path) - expected).max() <= 1
    picture = Image.new("P", (SIDE, SIDE), 1)
    picture.putpalette([0, 0, 0, 250, 100, 50, 9, 9, 9])
    picture.putpixel((0, 0), 2)
    (tmp_path / "palette").mkdir()
    picture.save(tmp_path / "palette" / "x.png", transparency=2)
    got = only_image(tmp_path / "palette" / "x.png")
    assert got[:, 0, 0].tolist() == [0, 0, 0] and got[:, 3, 3].tolist() == [250, 100, 50]


@pytest.mark.parametrize("mode", ("RGB", "I;16"))
def test_exif_orientation_is_applied(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6                                                               # to be turned clockwise
    pixels = save(tmp_path / "own" / "x.png", mode, exif=exif)
    upright = np.rot90(pixels, -1)
    got = only_image(tmp_path / "own" / "x.png", grey=mode != "RGB").transpose(1, 2, 0)
    assert np.abs(got.squeeze() - (upright if mode == "RGB" else upright / 257)).max() <= (mode != "RGB") * 0.5


@pytest.mark.parametrize("size", ((64, 32), (32, 64)))
def test_resized_and_centre_cropped(tmp_path, size):
    """The middle square is white in its left upper quarter: so is the result; what is red is cut off."""
    picture = Image.new("RGB", size, "red")
    x, y = (size[0] - 32) // 2, (size[1] - 32) // 2
    picture.paste("black", (x, y, x + 32, y + 32)), picture.paste("white", (x, y, x + 16, y + 16))
    (tmp_path / "own").mkdir()
    picture.save(tmp_path / "own" / "x.png")
    got, half = only_image(tmp_path / "own" / "x.png").astype(int), SIDE // 2
    assert (got[:, 1:half - 1, 1:half - 1] == 255).all() and got[1:, half + 1:, half + 1:].max() == 0


def test_a_fine_pattern_is_averaged(tmp_path):
    """Antialiasing: stripes of one pixel become grey, for PNG and for JPEG decoded at a fraction of its size."""
    stripes = np.tile(np.uint8([0, 255]), (128, 64))
    for extension in ("png", "jpg"):
        path = tmp_path / extension / f"x.{extension}"
        path.parent.mkdir()
        Image.fromarray(stripes).save(path)
        got = only_image(path, grey=True).astype(int)
        assert np.abs(got[:, :, 1:-1] - 127).max() < 12, extension


def test_mean_and_std_are_of_the_training_images(tmp_path):
    for i in range(20):
        save(tmp_path / "own" / "train" / f"{i}.png", seed=i)
    one_colour(tmp_path / "own" / "val" / "x.png", "white")
    d = load(tmp_path / "own")
    x = d.train_images.double() / 255
    assert d.mean == pytest.approx(x.mean().item()) and d.std == pytest.approx(x.std(correction=0).item())
    assert load(tree(tmp_path / "flat", *["a.png"] * 2, "b.png", "c.png", "d.png")).std > 0


# -------------------------------------------------------------------------------------------------------- bad files
def test_bad_files_are_counted_and_named(tmp_path, capsys):
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(10)))
    (own / "README.txt").write_text("no image")
    save(own / "cut.jpg", size=(64, 64))
    (own / "cut.jpg").write_bytes((own / "cut.jpg").read_bytes()[:1000])
    (own / "nowhere.png").symlink_to(own / "gone.png")
    (own / os.fsdecode(b"\xff.png")).write_bytes(b"")
    d = load(own)
    assert sorted(reds(d.train_images) + reds(d.test_images)) == list(range(10))
    text = capsys.readouterr().out
    assert "4 of 14 files are no images" in text and "cut.jpg (OSError image file is truncated" in text
    assert "README.txt (UnidentifiedImageError" in text and "nowhere.png (FileNotFoundError" in text


@pytest.mark.parametrize("limit", (100, 150))
def test_image_bomb(tmp_path, monkeypatch, capsys, limit):
    """Beyond Pillow's limit, where it warns, and beyond twice that, where it raises: neither is decoded."""
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(5)))
    save(own / "bomb.png", size=(16, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert len(load(own).train_images) == 4 and "1 of 6 files" in (text := capsys.readouterr().out)
    assert "bomb.png (DecompressionBomb" in text


def test_a_file_that_vanishes(tmp_path, monkeypatch, capsys):
    own, look = tree(tmp_path / "own", *(f"{i}.png" for i in range(10))), data._decode
    monkeypatch.setattr(data, "_decode", lambda *a: ((own / "3.png").unlink(missing_ok=True), look(*a))[1])
    d = load(own)
    assert sorted(reds(d.train_images) + reds(d.test_images)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert "3.png (FileNotFoundError" in capsys.readouterr().out


def test_a_folder_that_vanishes_is_not_taken_for_bad_files(tmp_path, monkeypatch):
    own, look, calls = tree(tmp_path / "own", *(f"{i}.png" for i in range(10))), data._pixels, []

    def pixels(image, *shape):
        calls.append(image)
        if len(calls) == 8 and own.exists():
            own.rename(tmp_path / "away")
        return look(image, *shape)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(data, "_pixels", pixels)
    with pytest.raises(ValueError, match="own has vanished"):
        load(own)
    (tmp_path / "away").rename(own)
    d = load(own)
    assert sorted(reds(d.train_images) + reds(d.test_images)) == list(range(10))


def text_files(folder):
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text("no image")


BAD = {
    "missing": (lambda folder: None, "No such file or directory.*expected train/CLASS"),
    "a file": (lambda folder: folder.write_text(""), "Not a directory"),
    "empty": (lambda folder: folder.mkdir(), "no files.*expected train/CLASS"),
    "empty folders": (lambda folder: (folder / "train" / "a").mkdir(parents=True), "no files"),
    "text files": (text_files, "5 of 5 files are no images: 0.txt.*expected train/CLASS"),
    "most are bad": (lambda folder: (text_files(folder), tree(folder, "a.png", "b.png", "c.png", "d.png")),
                     "5 of 9 files are no images"),
    "one image": (lambda folder: tree(folder, "0.png"), "has 1 images, too few.*expected train/CLASS"),
    "two images": (lambda folder: tree(folder, "0.png", "1.png"), "has 2 images, too few"),
    "one training image": (lambda folder: tree(folder, "train/a/0.png", "val/a/1.png"), "has 2 images, too few"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_in_one_line(tmp_path, case):
    make, text = BAD[case]
    make(tmp_path / "own")
    with pytest.raises(ValueError, match=text) as error:
        load(tmp_path / "own")
    assert "\n" not in str(error.value) and str(tmp_path / "own") in str(error.value)
    assert not (tmp_path / f"own-decoded-{SIDE}").exists()


# --------------------------------------------------------------------------------------------- cache, interruptions
def count_decoded(monkeypatch):
    look, calls = data._pixels, []
    monkeypatch.setattr(data, "_pixels", lambda *a: (calls.append(1), look(*a))[1])
    return calls


@pytest.mark.parametrize("change", ("added", "touched", "removed"))
def test_changed_files_are_decoded_anew(tmp_path, monkeypatch, capsys, change):
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(10)))
    load(own)
    if change == "added":
        tree(own / "more", "x.png")
    elif change == "touched":
        os.utime(own / "3.png", ns=(1, 1))
    else:
        (own / "3.png").unlink()
    calls = count_decoded(monkeypatch)
    d = load(own)
    expected = dict(added=11, touched=10, removed=9)[change]
    assert len(calls) == len(d.train_images) + len(d.test_images) == expected
    assert "have changed: all are decoded anew" in capsys.readouterr().out


def noisy_tree(folder, count=60):
    for i in range(count):
        save(folder / "train" / "ab"[i % 2] / f"{i}.png", seed=i)
    (folder / "train" / "a" / "cut.png").write_bytes((folder / "train" / "a" / "0.png").read_bytes()[:150])
    return folder


def cached(folder):
    cache = folder.with_name(f"{folder.name}-decoded-{SIDE}")
    about = json.loads((cache / "about.json").read_text())
    return (cache / "images").read_bytes(), about["labels"], about["mean"], about["std"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = noisy_tree(tmp_path_factory.mktemp("undisturbed") / "own")
    load(folder)
    return cached(folder)


def test_killed_while_decoding(tmp_path, monkeypatch, undisturbed):
    """SIGKILL between two images; then half an image and half a record are cut off as well."""
    own, part = noisy_tree(tmp_path / "own"), tmp_path / f"own-decoded-{SIDE}-part"
    script = ("import data, sys, time\nlook = data._pixels\n"
              "data._pixels = lambda *a: (time.sleep(0.05), look(*a))[1]\n"
              f"data.load('folder', sys.argv[1], image_size={SIDE})")
    process = subprocess.Popen([sys.executable, "-c", script, str(own)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not ((part / "records").exists() and (part / "records").read_bytes().count(b"\n") > 25):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = 3 * SIDE * SIDE
    stored = (part / "images").stat().st_size // size
    assert 0 < stored < 60
    with open(part / "images", "ab") as images, open(part / "records", "ab") as records:
        images.write(b"half an image"), records.write(b"OSError half a rec")
    calls = count_decoded(monkeypatch)
    load(own)
    assert len(calls) <= 61 - stored and cached(own) == undisturbed


def test_more_records_than_images_and_the_other_way_round(tmp_path, monkeypatch, undisturbed):
    """A stopped decoding that is all done but for the last step, then made inconsistent."""
    own, part = noisy_tree(tmp_path / "own"), tmp_path / f"own-decoded-{SIDE}-part"
    size, replace = 3 * SIDE * SIDE, os.replace
    for spoil, expected in ((lambda: os.truncate(part / "images", 10 * size + 5), (50, 51)),
                            (lambda: os.truncate(part / "records", 65 + 20), (41, 60)),
                            (lambda: (part / "records").write_text("another key\n" + "\n" * 60), (61, 61))):
        monkeypatch.setattr(data.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(own)
        monkeypatch.setattr(data.os, "replace", replace)
        spoil()
        with monkeypatch.context() as patch:
            calls = count_decoded(patch)
            load(own)
        assert expected[0] <= len(calls) <= expected[1] and cached(own) == undisturbed
        os.rename(tmp_path / f"own-decoded-{SIDE}", tmp_path / f"done{expected[0]}")


def test_files_that_change_while_interrupted_are_not_mixed(tmp_path, monkeypatch):
    own = noisy_tree(tmp_path / "own")
    monkeypatch.setattr(data.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(own)
    monkeypatch.undo()
    pixels, calls = save(own / "train" / "a" / "0.png", seed=1000), count_decoded(monkeypatch)
    d = load(own)
    assert len(calls) == 61
    assert any(np.array_equal(image, pixels.transpose(2, 0, 1)) for image in torch.cat([d.train_images, d.test_images]))


class FullDisk(io.FileIO):
    room = 20 * 3 * SIDE * SIDE + 7

    def write(self, content):
        if self.tell() + len(content) > self.room:
            super().write(content[:max(0, self.room - self.tell())])
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_full_disk(tmp_path, monkeypatch, undisturbed):
    """One line with the path; what was decoded stays, and the next start goes on."""
    own = noisy_tree(tmp_path / "own")

    def full(path, mode="r", *options, **named):
        return FullDisk(path, "ab") if str(path).endswith("images") else open(path, mode, *options, **named)
    monkeypatch.setattr(data, "open", full, raising=False)
    with pytest.raises(ValueError, match=f"cannot write .*own-decoded-{SIDE}-part .*No space left") as error:
        load(own)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    calls = count_decoded(monkeypatch)
    load(own)
    assert 40 <= len(calls) <= 41 and cached(own) == undisturbed


def test_nothing_may_be_written_beside_the_folder(tmp_path, monkeypatch):
    def mkdir(path, *options, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(5)))
    monkeypatch.setattr(data.Path, "mkdir", mkdir)
    with pytest.raises(ValueError, match=f"cannot write .*own-decoded-{SIDE}-part .*Permission denied"):
        load(own)


@pytest.mark.parametrize("name", ("images", "about.json"))
def test_damaged_cache(tmp_path, name):
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(5)))
    load(own)
    os.truncate(tmp_path / f"own-decoded-{SIDE}" / name, 100)
    with pytest.raises(ValueError, match="is damaged .*delete it") as error:
        load(own)
    assert "\n" not in str(error.value)


def test_the_cache_is_mapped_and_not_written(tmp_path):
    """Writing into the images changes this process's alone; both splits are parts of one mapping."""
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(5)))
    d = load(own)
    first = d.train_images
    assert d.test_images.data_ptr() - first.data_ptr() == first.nbytes
    before = cached(own)
    first.zero_()
    assert cached(own) == before


def test_two_processes_decode_once(tmp_path, undisturbed):
    own = noisy_tree(tmp_path / "own")
    script = f"import data, sys\ndata.load('folder', sys.argv[1], image_size={SIDE})"
    both = [subprocess.Popen([sys.executable, "-c", script, str(own)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    out = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0] and cached(own) == undisturbed
    assert out.count("decoded: 61 of 61") == 1


# --------------------------------------------------------------------------------------------------- load's options
def test_validate(tmp_path, monkeypatch):
    own = tree(tmp_path / "own", *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(20)), "val/a/x.png", "val/b/y.png")
    whole, some = load(own), load(own, validate=5, train_images=10)
    drawn, left = reds(some.train_images), list(zip(reds(whole.train_images), whole.train_labels.tolist()))[:15]
    assert len(drawn) == 10 and drawn != [red for red, _ in left][:10]
    assert list(zip(drawn, some.train_labels.tolist())) == [pair for pair in left if pair[0] in drawn]
    assert torch.equal(some.test_images, whole.train_images[15:])
    assert torch.equal(some.test_labels, whole.train_labels[15:]) and len(load(own, validate=5).train_images) == 15
    for options in (dict(validate=20), dict(validate=-1), dict(validate=5, train_images=16)):
        with pytest.raises(ValueError, match="folder has 20 training images"):
            load(own, **options)


def test_validate_of_glyphs(monkeypatch):
    few = data.glyphs(train=50, test=20)
    monkeypatch.setattr(data, "glyphs", lambda: few)
    d = data.load("glyphs", "unused", validate=10)
    assert torch.equal(d.train_images, few.train_images[:40]) and torch.equal(d.test_images, few.train_images[40:])
    assert torch.equal(d.test_labels, few.train_labels[40:])
    with pytest.raises(ValueError, match="glyphs has 50 training images"):
        data.load("glyphs", "unused", validate=50)
    with pytest.raises(ValueError, match="28 pixels"):
        data.load("glyphs", "unused", image_size=32)


def test_image_size_is_64_if_not_given(tmp_path):
    own = tree(tmp_path / "own", *(f"{i}.png" for i in range(3)))
    assert data.load("folder", own).train_images.shape[2:] == (64, 64)
