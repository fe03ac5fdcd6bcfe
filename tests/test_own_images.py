"""Own images and Tiny ImageNet: layouts, what is decoded from which file, bad files, the cache."""
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

SIDE = 8
ROOT = Path(data.__file__).resolve().parent


def save(path, mode="RGB", size=(SIDE, SIDE), seed=0, **options):
    """An image of random pixels; returns the pixels, (H, W) or (H, W, C)."""
    shape = size[::-1] + {"RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(mode, ())
    dtype = np.uint16 if mode == "I;16" else np.uint8
    top = np.iinfo(dtype).max + 1
    pixels = np.random.default_rng(seed).integers(top, size=shape, dtype=dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def tree(folder, *names):
    """PNG files of one colour each, whose red tells their place in names."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (i, 0, 200)).save(path, "PNG")
    return folder


def forty(folder, *more):
    """Twenty images of each of two classes, without a test split, and more."""
    return tree(folder, *[f"train/{'ab'[i % 2]}/{i}.png" for i in range(40)], *more)


def load(folder, **options):
    return data.load("folder", folder, folder.parent / "cache", image_size=SIDE, **options)


def all_files(d):
    return [*d.train_files.tolist(), *d.test_files.tolist()]


def labels_of_files(d):
    labels = [*d.train_labels.tolist(), *d.test_labels.tolist()]
    return dict(zip(all_files(d), labels))


def decoded(path):
    """What is decoded from a file, (H, W, C) or, of one channel, (H, W)."""
    folder = path.parent / f"own {path.name}"
    for name in ("train", "val"):
        (folder / name).mkdir(parents=True)
        (folder / name / path.name).write_bytes(path.read_bytes())
    d = load(folder)
    assert torch.equal(d.train_images, d.test_images)
    return d.train_images[0].permute(1, 2, 0).squeeze(2).numpy().astype(int)


# ---------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("train, test", (("train", "val"), ("train", "test"), ("Train", "Val"),
                                         ("train", "valid"), ("TRAIN", "validation")))
def test_labelled_with_a_test_split(tmp_path, train, test, capsys):
    names = [f"{train}/b/0.png", f"{train}/a/1.png", f"{train}/b/deep/2.png", f"{test}/a/3.png",
             f"{test}/b/4.png"]
    d = load(tree(tmp_path / "own", *names, "elsewhere/5.png"))
    assert d.class_names == ["a", "b"] and d.train_images.shape == (3, 3, SIDE, SIDE)
    assert sorted(d.test_files) == names[3:] and sorted(d.train_files) == sorted(names[:3])
    assert labels_of_files(d) == {name: "ab".index(name.split("/")[1]) for name in names}
    reds = [names.index(file) for file in all_files(d)]
    assert torch.cat([d.train_images, d.test_images])[:, 0, 0, 0].tolist() == reds
    printed = capsys.readouterr().out
    assert "3 training images, 2 test images" in printed and "2 classes" in printed
    assert "not used, though they hold images: ['elsewhere']" in printed


def test_val_goes_before_test_which_is_named(tmp_path, capsys):
    names = ["train/a/0.png", "train/a/1.png", "test/a/2.png", "Val/a/3.png"]
    d = load(tree(tmp_path / "own", *names))
    assert d.test_files.tolist() == ["Val/a/3.png"]
    assert "not used, though they hold images: ['test']" in capsys.readouterr().out


def test_folders_that_differ_only_in_case(tmp_path, capsys):
    """One of them is used, and the other is named."""
    names = ["train/a/0.png", "train/b/1.png", "val/a/2.png", "Train/a/3.png", "Val/b/4.png"]
    d = load(tree(tmp_path / "own", *names))
    assert sorted(all_files(d)) == sorted(names[:3])
    assert "not used, though they hold images: ['Train', 'Val']" in capsys.readouterr().out


def test_annotations_are_of_the_test_images_alone(tmp_path):
    own = tree(tmp_path / "own", "train/a/1.png", "train/b/1.png", "val/images/1.png")
    (own / "val" / "val_annotations.txt").write_text("1.png\ta\t0\t0\n\nodd\n")
    d = load(own)
    assert labels_of_files(d) == {"train/a/1.png": 0, "train/b/1.png": 1, "val/images/1.png": 0}


def test_a_class_called_like_a_split(tmp_path):
    names = ["train/train/0.png", "train/val/1.png", "val/val/2.png", "val/train/3.png"]
    d = load(tree(tmp_path / "own", *names))
    assert labels_of_files(d) == dict(zip(names, [0, 1, 1, 0]))


def test_about_a_tenth_is_held_out_and_no_file_changes_sides(tmp_path, capsys):
    before = load(forty(tmp_path / "own"))
    assert 1 <= len(before.test_files) <= 9 and len(all_files(before)) == 40
    assert "about a tenth" in capsys.readouterr().out
    after = load(forty(tmp_path / "own", "train/a/stray.png", "train/c/0.png"))
    assert len(all_files(after)) == 42 and before.digest() != after.digest()
    assert set(before.test_files) <= set(after.test_files)
    assert set(before.train_files) <= set(after.train_files)
    elsewhere = load(forty(tmp_path / "moved" / "other"))
    assert elsewhere.test_files.tolist() == before.test_files.tolist()
    assert elsewhere.digest() == before.digest()


def test_both_forms_of_an_accent_lie_on_one_side(tmp_path):
    names = [f"é{i}.png" for i in range(60)]
    composed = load(tree(tmp_path / "c", *names))
    decomposed = load(tree(tmp_path / "d", *[unicodedata.normalize("NFD", name) for name in names]))
    normal = [unicodedata.normalize("NFC", file) for file in decomposed.test_files]
    assert normal == composed.test_files.tolist()


@pytest.mark.parametrize("pattern", ("{}.png", "a{}/x.png", "x/y/{}.png", "train/{}.png"))
def test_unlabelled(tmp_path, pattern, capsys):
    d = load(tree(tmp_path / "own", *[pattern.format(i) for i in range(40)]))
    assert d.classes == 0 and set(labels_of_files(d).values()) == {-1}
    assert d.train_labels.dtype == torch.int64 and len(d.test_files) > 0
    assert "they need train/CLASS" in capsys.readouterr().out


@pytest.mark.parametrize("stray", ("val/c/9.png", "val/9.png", "train/9.png"))
def test_an_image_of_no_class(tmp_path, stray):
    tree(tmp_path / "own", "train/a/0.png", "train/b/1.png", "val/a/2.png", stray)
    with pytest.raises(ValueError, match=f"'{stray}' in .* is in none of its 2 classes"):
        load(tmp_path / "own")


def test_the_order_is_mixed_and_the_names_load_without_pickle(tmp_path):
    d = load(forty(tmp_path / "own", "train/b/日本 語.JPG", "train/b/two\nlines.png"))
    assert {"train/b/日本 語.JPG", "train/b/two\nlines.png"} <= set(all_files(d))
    assert 3 < sum(d.train_labels[:16].tolist()) < 13  # any first part has all classes
    np.savez(tmp_path / "names.npz", train_files=d.train_files)
    saved = np.load(tmp_path / "names.npz", allow_pickle=False)["train_files"]
    assert saved.tolist() == d.train_files.tolist()


def test_what_is_not_an_image_by_its_name_is_not_a_candidate(tmp_path, capsys):
    own = forty(tmp_path / "own")
    for i in range(40):
        (own / "train" / "ab"[i % 2] / f"{i}.txt").write_text("a caption")
    for name in ("classes.txt", "train/Thumbs.db", "train/a/._0.png", "train/a/.DS_Store",
                 "train/a/.cache/1.png", "train/a/@eaDir/2.png", ".git/3.png"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("no image")
    assert len(all_files(load(own))) == 40
    printed = capsys.readouterr().out
    assert "cannot be read" not in printed and "not used" not in printed


def test_only_links_to_files_are_followed(tmp_path, capsys):
    own = forty(tmp_path / "own")
    (own / "train" / "a" / "up").symlink_to("..")
    (own / "train" / "a" / "around").symlink_to(own)
    tree(tmp_path, "there.png")
    (own / "train" / "a" / "link.png").symlink_to(tmp_path / "there.png")
    (own / "train" / "a" / "dead.png").symlink_to(tmp_path / "gone.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(own / "train" / "a" / "pipe.png")
    files = all_files(load(own))
    assert len(files) == 41 and "train/a/link.png" in files
    assert "'train/a/dead.png' (not a regular file)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- pixels
def test_pixels_without_resizing_are_exact(tmp_path):
    pixels = save(tmp_path / "x.png")
    assert np.array_equal(decoded(tmp_path / "x.png"), pixels)
    save(tmp_path / "w" / "x.WebP", lossless=True)
    assert np.array_equal(decoded(tmp_path / "w" / "x.WebP"), pixels)


def test_photos_of_cameras_and_printers(tmp_path):
    smooth = np.zeros((SIDE, SIDE, 3), np.uint8)
    smooth[:] = np.linspace(0, 255, SIDE)[:, None]
    smooth[..., 2] = 128
    picture = Image.fromarray(smooth)
    picture.save(tmp_path / "x.JPG", quality=100)
    picture.save(tmp_path / "x.mpo", save_all=True, append_images=[picture.rotate(90)], quality=100)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    picture.save(tmp_path / "x.gif", save_all=True, append_images=[picture.rotate(90)])
    for name in ("x.JPG", "x.mpo", "cmyk.jpg", "x.gif"):
        assert np.abs(decoded(tmp_path / name) - smooth).max() < 20, name


@pytest.mark.parametrize("mode", ("L", "LA", "I;16"))
def test_grey_has_one_channel(tmp_path, mode):
    pixels = save(tmp_path / "x.png", mode)
    expected = pixels
    if mode == "LA":
        expected = pixels[..., 0] * (pixels[..., 1] / 255)  # on black
    elif mode == "I;16":
        expected = pixels / 257
    found = decoded(tmp_path / "x.png")
    assert found.shape == (SIDE, SIDE) and np.abs(found - expected).max() <= 1


def test_palette_and_transparency(tmp_path):
    pixels = save(tmp_path / "x.png", "RGBA").astype(int)
    expected = pixels[..., :3] * pixels[..., 3:] / 255
    assert np.abs(decoded(tmp_path / "x.png") - expected).max() <= 1
    picture = Image.new("P", (SIDE, SIDE), 1)
    picture.putpalette([0, 0, 0, 250, 100, 50, 9, 9, 9])
    picture.putpixel((0, 0), 2)
    (tmp_path / "palette").mkdir()
    picture.save(tmp_path / "palette" / "x.png", transparency=2)
    found = decoded(tmp_path / "palette" / "x.png")
    assert found[0, 0].tolist() == [0, 0, 0] and found[3, 3].tolist() == [250, 100, 50]


@pytest.mark.parametrize("extension", ("jpg", "webp", "tiff", "png"))
def test_exif_orientation_is_applied(tmp_path, extension):
    """A white quarter at the upper left, stored in each of eight ways, comes out there."""
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8] = 255
    upright[:8, 8:] = 100
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T,
              8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / str(orientation) / f"x.{extension}"
        path.parent.mkdir()
        Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB").save(path, exif=exif)
        assert np.abs(decoded(path)[2::4, 2::4] - upright[4::8, 4::8]).max() < 20, orientation


def test_a_broken_rational_in_exif_spoils_no_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0  # a resolution, whose denominator is then made 0
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8] = 255
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "x.jpg", exif=exif, quality=100)
    content = (tmp_path / "x.jpg").read_bytes()
    rational = (72).to_bytes(4, "big") + (1).to_bytes(4, "big")
    little = (72).to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert rational in content or little in content
    content = content.replace(rational, rational[:4] + bytes(4))
    content = content.replace(little, little[:4] + bytes(4))
    (tmp_path / "x.jpg").write_bytes(content)
    assert np.abs(decoded(tmp_path / "x.jpg")[2::4, 2::4] - upright[4::8, 4::8]).max() < 20


@pytest.mark.parametrize("size", ((64, 32), (32, 64)))
def test_resized_and_centre_cropped(tmp_path, size):
    """Red at the ends is cut off; stripes of one pixel become grey, by antialiasing."""
    stripes = np.tile(np.uint8([0, 255]), (32, 16))
    picture = Image.new("RGB", size, "red")
    picture.paste(Image.fromarray(stripes), ((size[0] - 32) // 2, (size[1] - 32) // 2))
    picture.save(tmp_path / "x.png")
    assert np.abs(decoded(tmp_path / "x.png")[1:-1, 1:-1] - 127).max() < 20


def test_mean_and_std_are_those_of_the_training_images(tmp_path):
    for i in range(20):
        save(tmp_path / "own" / "train" / f"{i}.png", seed=i)
    tree(tmp_path / "own" / "val", "x.png")
    d = load(tmp_path / "own")
    x = d.train_images.double() / 255
    assert d.mean == pytest.approx(x.mean().item(), rel=1e-5)
    assert d.std == pytest.approx(x.std(correction=0).item(), rel=1e-5)
    plain = load(tree(tmp_path / "plain", "train/a.png", "val/a.png"))
    assert plain.std > 0 and plain.batch(plain.train_images, torch.tensor([0])).isfinite().all()


# -------------------------------------------------------------------------------------- bad files
def test_bad_images_are_counted_and_named(tmp_path, monkeypatch, capsys):
    own = forty(tmp_path / "own")
    save(own / "train" / "a" / "cut.jpg", size=(64, 64))
    cut = (own / "train" / "a" / "cut.jpg").read_bytes()[:1000]
    (own / "train" / "a" / "cut.jpg").write_bytes(cut)
    (own / "train" / "a" / "empty.png").write_bytes(b"")
    (own / "train" / "a" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    save(own / "train" / "a" / "large.png", size=(16, 16))
    save(own / "train" / "a" / "larger.png", size=(32, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for _ in range(2):  # decoded, and from the cache
        assert len(all_files(load(own))) == 40
        printed = capsys.readouterr().out
        assert "5 of 45 images cannot be read" in printed and "Pillow reads no HEIC" in printed
        for name in ("cut.jpg", "empty.png", "phone.HEIC", "large.png", "larger.png"):
            assert f"'train/a/{name}' (" in printed
        assert "exceeds limit of 200 pixels" in printed and "MAX_IMAGE_PIXELS raises" in printed


def write_bad(folder, count):
    for i in range(count):
        (folder / f"bad{i}.png").write_text("no image")


def test_input_that_cannot_be_used_in_one_line(tmp_path):
    def check(folder, text):
        with pytest.raises(ValueError) as error:
            load(folder)
        assert text in str(error.value) and "\n" not in str(error.value)

    check(tmp_path / "missing", f"there is no folder {tmp_path}/missing: expected one with train/")
    (tmp_path / "file").write_text("")
    check(tmp_path / "file", f"there is no folder {tmp_path}/file")
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    check(tmp_path / "empty", "0 training and 0 test images, too few: expected train/CLASS")
    check(tree(tmp_path / "one", "0.png"), "too few: expected")
    check(tree(tmp_path / "train only", "train/a/0.png", "val/.a/1.png"), "too few: expected")
    write_bad(tree(tmp_path / "bad", "train/0.png", "val/1.png") / "train", 3)
    check(tmp_path / "bad", "3 of 5 images cannot be read: 'train/bad")


def test_a_folder_that_cannot_be_entered(tmp_path, monkeypatch, capsys):
    """One that is used is named; one that is not does not matter."""
    own = forty(tmp_path / "own", "val/a/0.png", "private/0.png")
    locked = []
    scandir = os.scandir

    def guarded(path):
        if path in [str(folder) for folder in locked] + locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    locked.append(own / "private")
    assert load(own).test_files.tolist() == ["val/a/0.png"]
    for name in ("val", "train/a"):
        locked.append(own / name)
        with pytest.raises(OSError, match=f"Permission denied: '{own / name}'"):
            load(own)
        locked.pop()


# -------------------------------------------------------------------------------------- the cache
def count_decoded(monkeypatch):
    calls = []
    decode = data._decode

    def counted(path, side):
        calls.append(path)
        return decode(path, side)

    monkeypatch.setattr(data, "_decode", counted)
    return calls


def test_images_are_decoded_once_and_anew_after_any_change(tmp_path, monkeypatch):
    own = forty(tmp_path / "own")
    calls = count_decoded(monkeypatch)
    load(own)
    load(own)
    assert len(calls) == 40
    os.utime(own / "train" / "a" / "0.png", ns=(1, 1))
    load(own)
    assert len(calls) == 80
    (own / "train" / "a" / "0.png").unlink()
    assert len(all_files(load(own))) == 39 and len(calls) == 119
    data.load("folder", own, tmp_path / "cache", image_size=4)
    assert len(calls) == 158
    assert len(list((tmp_path / "cache").iterdir())) == 4  # and nothing that is half done


def test_the_cache_is_mapped_and_not_written(tmp_path):
    own = forty(tmp_path / "own")
    d = load(own)
    assert d.test_images.data_ptr() - d.train_images.data_ptr() == d.train_images.nbytes
    before = d.train_images.clone()
    d.train_images.zero_()
    assert torch.equal(load(own).train_images, before)


def test_a_cache_that_cannot_be_written_or_read(tmp_path, monkeypatch):
    own = forty(tmp_path / "own")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="exists: '.*cache'"):
        load(own)
    (tmp_path / "cache").unlink()
    with monkeypatch.context() as patch:
        def full(content, path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
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


def test_programs_that_start_at_once(tmp_path):
    own = forty(tmp_path / "own")
    script = ("import sys, data; d = data.load('folder', sys.argv[1], sys.argv[2], image_size=8); "
              "print(d.digest())")
    command = [sys.executable, "-c", script, str(own), str(tmp_path / "cache")]
    programs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
                for _ in range(2)]
    digests = [program.communicate()[0].split()[-1] for program in programs]
    assert digests == [load(own).digest()] * 2


# ---------------------------------------------------------------------------------- Tiny ImageNet
def write_tiny_imagenet(folder, layout, classes=200):
    """Tiny ImageNet's tree; each image's green is its class. Returns it."""
    top = folder / "tiny-imagenet-200"
    names = [f"n{k:08d}" for k in range(classes)]
    rows = []
    for k, name in enumerate(names):
        for i, path in enumerate((f"train/{name}/images/{name}_0.JPEG",
                                  f"train/{name}/images/{name}_1.JPEG",
                                  layout.format(WNID=name, file=f"val_{k}.JPEG"))):
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (128, k, 128)).save(top / path, quality=100)
        rows.append(f"val_{k}.JPEG\t{name}\t0\t0\t63\t63\n")
    (top / "wnids.txt").write_text("\n".join(names))
    if "WNID" not in layout:
        text = "".join(rows) + "\n"  # a blank line at the end
        (top / "val" / "val_annotations.txt").write_text(text, encoding="utf-8-sig")
    return top


@pytest.mark.parametrize("layout", ("val/images/{file}", "val/{WNID}/images/{file}",
                                    "val/{WNID}/{file}", "val/images/{WNID}/{file}"))
def test_tiny_imagenet_in_every_layout(tmp_path, layout):
    top = write_tiny_imagenet(tmp_path, layout)
    (top / "train" / "n00000007" / "images" / "._n00000007_0.JPEG").write_text("not an image")
    (top / "test" / "images").mkdir(parents=True)
    (top / "test" / "images" / "test_0.JPEG").write_text("not read")
    tiny = data.load("tiny-imagenet", tmp_path, tmp_path / "cache")
    assert tiny.train_images.shape == (400, 3, 64, 64) and tiny.test_images.shape[0] == 200
    assert tiny.classes == 200 and (tiny.mean, tiny.std) == (0.442, 0.278)
    for images, labels in ((tiny.train_images, tiny.train_labels),
                           (tiny.test_images, tiny.test_labels)):
        green = images[:, 1].float().mean((1, 2))
        assert (green - labels).abs().max() <= 3
    assert torch.bincount(tiny.train_labels).tolist() == [2] * 200


def test_tiny_imagenet_without_labels_or_classes(tmp_path):
    top = write_tiny_imagenet(tmp_path / "a", "val/images/{file}", classes=3)
    (top / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match="'val/images/val_.*' in .* is in none of its 3"):
        data.load("tiny-imagenet", tmp_path / "a", tmp_path)
    write_tiny_imagenet(tmp_path / "b", "val/images/{file}", classes=3)
    with pytest.raises(ValueError, match="has 3 classes, where 200 .* another program") as error:
        data.load("tiny-imagenet", tmp_path / "b", tmp_path)
    assert "delete" not in str(error.value)


def test_tiny_imagenet_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    """Nothing else stays, so that the folder is never half of it."""
    def download(url, folder, md5):
        assert (url, md5) == (data.TINY_IMAGENET_URL, data.TINY_IMAGENET_MD5)
        write_tiny_imagenet(Path(folder), "val/images/{file}")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    tiny = data.load("tiny-imagenet", tmp_path / "new", tmp_path / "cache")
    assert len(tiny.train_images) == 400
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny-imagenet-200"]
