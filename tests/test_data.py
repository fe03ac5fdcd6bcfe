"""Data sets: shapes, determinism, what is asked of MNIST's files, and plans that no number of processes changes."""
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import data
import probe
import run
from helpers import train_here


@pytest.fixture(scope="module")
def glyphs():
    return data.glyphs()


def test_glyphs_shapes(glyphs):
    assert glyphs.train_images.shape == (10_000, 1, 28, 28) and glyphs.test_images.shape == (2_000, 1, 28, 28)
    assert glyphs.train_images.dtype == torch.uint8 and glyphs.train_labels.dtype == torch.int64
    assert torch.bincount(glyphs.train_labels).min() > 900 and glyphs.classes == len(set(data.GLYPHS)) == 10


def test_glyphs_come_from_their_seed(glyphs):
    again, other = data.glyphs(), data.glyphs(seed=1)
    assert torch.equal(again.train_images, glyphs.train_images) and torch.equal(again.test_labels, glyphs.test_labels)
    assert not torch.equal(other.train_images, glyphs.train_images)


def test_glyphs_stay_inside_and_show_something(glyphs):
    """Every image holds a character, bright pixels among dark ones, and does not run out of the picture."""
    images = glyphs.train_images.float() / 255
    ink = images.sum((1, 2, 3))
    assert (images.amax((1, 2, 3)) > 0.8).all() and (ink > 20).all() and (ink < 0.6 * 28 * 28).all()
    border = torch.cat([images[:, 0, [0, -1]].flatten(1), images[:, 0, :, [0, -1]].flatten(1)], 1)
    assert (border > 0.6).any(1).float().mean() < 0.005                             # a corner of a large K may touch it


def test_batch_is_normalised(glyphs):
    index = torch.tensor([5, 3, 3])
    batch = glyphs.batch(glyphs.train_images, index)
    expected = (glyphs.train_images[index].double() / 255 - glyphs.mean) / glyphs.std
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch.double(), expected, rtol=1e-6, atol=1e-6)


def test_train_images_limits_the_training_split_only(glyphs, monkeypatch):
    monkeypatch.setattr(data, "glyphs", lambda: glyphs)
    some = data.load("glyphs", "unused", train_images=100)
    assert len(some.train_images) == len(some.train_labels) == 100 and len(some.test_images) == 2_000
    for count in (0, 10_001):
        with pytest.raises(ValueError, match="10000 training images"):
            data.load("glyphs", "unused", train_images=count)


def test_unknown_name():
    with pytest.raises(ValueError, match="no data set 'cifar'"):
        data.load("cifar", "unused")
    with pytest.raises(ValueError, match="no nuisance 'mirror', only rotation, scale, translation$"):
        data.load("glyphs", "unused", nuisance="mirror")


def numbered(monkeypatch, count=300):
    """--dataset glyphs has images whose first two pixels tell their number; labels are the same."""
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) // 256, torch.arange(count) % 256
    some = data.Dataset(images, torch.arange(count), images[:50], torch.arange(50), 10, 0.0, 1.0)
    monkeypatch.setattr(data, "glyphs", lambda: some)


def test_the_seed_draws_the_subset(monkeypatch):
    """From what --validate leaves, without repetition, each image with its label, in their order."""
    numbered(monkeypatch)

    def numbers(**options):
        d = data.load("glyphs", "unused", **options)
        assert torch.equal(d.train_images[:, 0, 0, 0].long() * 256 + d.train_images[:, 0, 0, 1], d.train_labels)
        assert d.test_labels.tolist() == [*(range(100, 300) if "validate" in options else range(50))]
        return d.train_labels.tolist()

    drawn = [numbers(train_images=60, validate=200, seed=seed) for seed in (0, 1, 2)]
    for one in drawn:
        assert len(one) == 60 and one == sorted(set(one)) and max(one) < 100
    assert drawn[0] != drawn[1] != drawn[2] and drawn[0] == numbers(train_images=60, validate=200)
    assert len(set(drawn[0]) & set(drawn[1])) < 60 and max(numbers(train_images=60)) > 200
    assert numbers(seed=7) == numbers(train_images=300, seed=7) == [*range(300)]
    assert numbers(validate=200, seed=7) == [*range(100)]


# ----------------------------------------------------------------------------------------------------------- nuisances
def blob(count):
    """Images (count, 1, 28, 28) uint8 of a Gaussian 6 pixels right of the middle."""
    at = torch.arange(28) - 13.5
    image = 250 * torch.exp(-((at[None] - 6) ** 2 + at[:, None] ** 2) / 8)
    return image.round().byte().expand(count, 1, 28, 28)


def centroids(images):
    """How far right and up of the middle the mass of images (N, C, H, W) is, in pixels: (N,) each."""
    mass = images.double().sum(1)
    at = torch.arange(images.shape[-1]) - (images.shape[-1] - 1) / 2
    total = mass.sum((1, 2))
    return (mass.sum(1) * at).sum(1) / total, -(mass.sum(2) * at).sum(1) / total


def test_a_rotation_turns_by_any_angle():
    """The mass moves on a circle about the centre, which it covers evenly, and stays."""
    turned = data.disturbed(blob(2000), "rotation", seed=3)
    right, up = centroids(turned)
    assert turned.shape == (2000, 1, 28, 28) and turned.dtype == torch.uint8
    assert ((right**2 + up**2).sqrt() - 6).abs().max() < 0.1
    counts = torch.histc(torch.atan2(up, right), 8, -torch.pi, torch.pi)
    assert counts.min() > 190 and counts.max() < 310
    mass = turned.double().sum((1, 2, 3))
    assert (mass / blob(1).double().sum() - 1).abs().max() < 0.02


def test_a_quarter_turn_is_exact():
    """The angle's sense, and that the centre is the image's: nothing is interpolated."""
    images = torch.randint(256, (3, 2, 28, 28)).float()
    quarters = torch.tensor([0, 1, 3]) * torch.pi / 2
    found = data._moved(images, quarters, torch.ones(3), torch.zeros(3, 2)).round()
    assert all(torch.equal(a, image.rot90(k, (1, 2))) for a, image, k in zip(found, images, (0, 1, 3)))


def test_a_scale_shrinks_about_the_centre():
    """The centroid's distance shrinks by the factor, uniform in 0.3 to 1, and the mass by its square."""
    small = data.disturbed(blob(2000), "scale", seed=3)
    right, up = centroids(small)
    factor = right / 6
    assert small.shape == (2000, 1, 28, 28) and small.dtype == torch.uint8 and up.abs().max() < 0.05
    assert 0.29 < factor.min() < 0.32 and 0.98 < factor.max() < 1.01
    counts = torch.histc(factor, 7, 0.3, 1.0)
    assert counts.min() > 220 and counts.max() < 350
    mass = small.double().sum((1, 2, 3)) / blob(1).double().sum()
    assert (mass / factor**2 - 1).abs().max() < 0.1


def test_shrinking_loses_no_pixel():
    """A single bright pixel is seen at every size, where one bilinear sample a pixel would step over it."""
    images = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 8, 20] = 255
    mass = data.disturbed(images, "scale", seed=0).sum((1, 2, 3))
    assert mass.min() > 10 and mass.max() < 260


@pytest.mark.parametrize("side, canvas", ((28, 40), (32, 44), (64, 92)))
def test_a_translation_keeps_every_pixel(side, canvas):
    images = torch.randint(1, 256, (300, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved, corners = data.disturbed(images, "translation", seed=3), set()
    assert moved.shape == (300, 3, canvas, canvas) and moved.dtype == torch.uint8
    assert torch.equal(moved.long().sum((1, 2, 3)), images.long().sum((1, 2, 3)))
    for image, source in zip(moved, images):
        top, left = (image[0].any(1 - axis).nonzero()[0].item() for axis in (0, 1))
        assert torch.equal(image[:, top:top + side, left:left + side], source)
        corners.add((top, left))
    room = canvas - side
    assert {top for top, _ in corners} == {left for _, left in corners} == {*range(room + 1)} and len(corners) > room


@pytest.mark.parametrize("nuisance", data.NUISANCES)
def test_who_draws_a_nuisance(nuisance, few_glyphs):
    """The training images' by the run's seed; the test images', and those held out, are the same for every seed."""
    def load(**options):
        return data.load("glyphs", "unused", nuisance=nuisance, **options)
    plain, one, again, other = data.load("glyphs", "unused"), load(seed=1), load(seed=1), load(seed=2)
    assert torch.equal(one.train_images, again.train_images) and not torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_images, other.test_images) and torch.equal(one.train_labels, plain.train_labels)
    assert one.test_images.shape[2:] == one.train_images.shape[2:] and one.train_images.dtype == torch.uint8
    assert one.test_images.shape != plain.test_images.shape or not torch.equal(one.test_images, plain.test_images)
    assert torch.equal(load(seed=1, validate=20).test_images, load(seed=2, validate=20).test_images)
    subset, kept = load(seed=1, train_images=30), data.load("glyphs", "unused", seed=1, train_images=30)
    assert torch.equal(subset.train_images, data.disturbed(kept.train_images, nuisance, seed=2))
    assert torch.equal(subset.test_images, one.test_images)


def test_a_nuisance_is_drawn_for_all_images_at_once():
    """Images beyond the first chunk have draws of their own."""
    moved = data.disturbed(blob(1100), "translation", seed=0)
    assert not torch.equal(moved[:500], moved[500:1000]) and len(moved) == 1100


@pytest.mark.parametrize("nuisance, group, side", (("translation", "translation", 40), ("scale", "rotation", 28)))
def test_training_with_a_nuisance(nuisance, group, side, few_glyphs, tmp_path):
    """The encoder's map and what it is measured on are the nuisance's; probe.py finds the same images again."""
    flags = ["--nuisance", nuisance, "--group", group, "--train-images", "150", "--seed", "3", "--epochs", "1"]
    settings = train_here(tmp_path / "run", *flags)["settings"]
    assert settings["nuisance"] == nuisance and settings["image_shape"] == [1, side]
    encoder, _ = run.load_encoder(tmp_path / "run")
    assert encoder(torch.zeros(2, 1, side, side)).shape[-1] == side // 4
    found = (tmp_path / "run" / "probe.json").read_text()
    run.call(probe.main, probe.parse([str(tmp_path / "run"), "--device", "cpu"]))
    assert (tmp_path / "run" / "probe.json").read_text() == found


def write_idx(path, shape, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    top = 10 if len(shape) == 1 else 256
    values = torch.randint(top, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.write_bytes(struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values.numpy().tobytes())
    return values


def test_mnist_reads_the_files_that_are_there(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    images = write_idx(raw / "train-images-idx3-ubyte", (20, 28, 28), 0)
    labels = write_idx(raw / "train-labels-idx1-ubyte", (20,), 1)
    write_idx(raw / "t10k-images-idx3-ubyte", (6, 28, 28), 2), write_idx(raw / "t10k-labels-idx1-ubyte", (6,), 3)
    mnist = data.load("mnist", tmp_path)
    assert torch.equal(mnist.train_images[:, 0], images) and torch.equal(mnist.train_labels, labels.long())
    assert mnist.test_images.shape == (6, 1, 28, 28)


def test_mnist_that_cannot_be_had_names_folder_and_files(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise RuntimeError("Error downloading\n train-images-idx3-ubyte.gz")
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    with pytest.raises(ValueError) as error:
        data.load("mnist", tmp_path)
    text = str(error.value)
    assert "\n" not in text and str(tmp_path / "MNIST" / "raw") in text
    assert all(f"{part}-{kind}-ubyte" in text for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def write_cifar10(folder, rows=4):
    """CIFAR-10's files with random pixels; returns the pixels of the first training file, (rows, 3072)."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        pixels = rng.integers(256, size=(rows, 3072), dtype=np.uint8)
        first = pixels if name == "data_batch_1" else first
        (folder / name).write_bytes(pickle.dumps(dict(data=pixels, labels=list(range(rows)))))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[str(k) for k in range(10)])))
    return first


def test_cifar10_reads_the_files_that_are_there(tmp_path, monkeypatch):
    """torchvision compares checksums, which random pixels cannot have: that comparison alone is left out here."""
    first = write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    cifar10 = data.load("cifar10", tmp_path)
    assert cifar10.train_images.shape == (20, 3, 32, 32) and cifar10.test_images.shape == (4, 3, 32, 32)
    assert cifar10.classes == 10 and cifar10.train_labels[:4].tolist() == [0, 1, 2, 3]
    assert np.array_equal(cifar10.train_images[:4].flatten(1), first)


def write_tiny_imagenet(folder, per_class=2):
    """A tree like Tiny ImageNet's; every image has one colour, its number in red, its class in green. One is grey."""
    tree, names = folder / "tiny-imagenet-200", [f"n{k:03d}" for k in range(200)]

    def write(path, red, green):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode, colour = ("L", 77) if (red, green) == (1, 7) else ("RGB", (red, green, 128))
        Image.new(mode, (64, 64), colour).save(path, "JPEG", quality=100, subsampling=0)

    for k, name in enumerate(names):
        for i in range(per_class):
            write(tree / "train" / name / "images" / f"{name}_{i}.JPEG", i, k)
        write(tree / "val" / "images" / f"val_{k}.JPEG", 255, k)
    (tree / "wnids.txt").write_text("\n".join(names) + "\n")
    rows = [f"val_{k}.JPEG\t{name}\t0\t0\t63\t63\n" for k, name in enumerate(names)]
    (tree / "val" / "val_annotations.txt").write_text("".join(rows))
    return tree


def test_tiny_imagenet_is_decoded_once(tmp_path, capsys):
    """Labels, order (a first part holds all classes), a grey image; the second time nothing but the cache is read."""
    tree = write_tiny_imagenet(tmp_path)
    tiny = data.load("tiny-imagenet", tmp_path)
    assert "600 of 600" in capsys.readouterr().out
    assert tiny.train_images.shape == (400, 3, 64, 64) and tiny.test_images.shape == (200, 3, 64, 64)
    assert tiny.classes == 200
    assert tiny.train_labels.tolist() == [*range(200), *range(200)] and tiny.test_labels.tolist() == [*range(200)]
    mean = tiny.train_images.float().mean((2, 3))
    assert (mean[:200, 1] - torch.arange(200)).abs().max() <= 2                    # green: the class, in order
    assert (mean[200:, 0] - 1).abs().sort().values[:-1].max() <= 2                 # red: each class's second image
    assert (mean[207] - 77).abs().max() <= 2                                       # the grey one
    tree.rename(tmp_path / "gone")
    again = data.load("tiny-imagenet", tmp_path)
    assert torch.equal(again.train_images, tiny.train_images) and torch.equal(again.test_labels, tiny.test_labels)
    assert capsys.readouterr().out == ""


def test_an_interrupted_decoding_is_not_taken_for_a_cache(tmp_path, monkeypatch):
    """Killed while decoding: no cache stands, and the next start decodes all."""
    write_tiny_imagenet(tmp_path, per_class=1)
    opened = Image.open

    def killed(path):
        if path.name == "val_5.JPEG":
            raise KeyboardInterrupt
        return opened(path)

    monkeypatch.setattr(data.Image, "open", killed)
    with pytest.raises(KeyboardInterrupt):
        data.load("tiny-imagenet", tmp_path)
    monkeypatch.setattr(data.Image, "open", opened)
    assert not (tmp_path / "tiny-imagenet-200-decoded").exists()
    assert len(data.load("tiny-imagenet", tmp_path).test_images) == 200


def test_plan_depends_on_seed_and_epoch_only():
    order, choice = data.epoch_plan(100, 12, seed=3, epoch=7)
    again = data.epoch_plan(100, 12, seed=3, epoch=7)
    assert torch.equal(order, again[0]) and torch.equal(choice, again[1])
    assert torch.equal(order.sort().values, torch.arange(100)) and choice.min() >= 0 and choice.max() == 11
    for seed, epoch in ((3, 8), (4, 7)):
        other = data.epoch_plan(100, 12, seed, epoch)
        assert not torch.equal(order, other[0]) and not torch.equal(choice, other[1])
