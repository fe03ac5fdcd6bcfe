"""Data sets: glyphs, the files of MNIST and CIFAR-10, subsets, downloads, and an epoch's plan."""
import hashlib
import socket
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data

LABELS_HASH = "6a94ba753f1d5553"
BLOCKS = [11.5, 32.3, 129.5, 13.2, 94.2, 172.4, 195.5, 7.6,
          15.6, 96.0, 228.3, 17.1, 7.7, 15.5, 12.4, 6.3]


def test_glyphs_are_those_of_earlier_versions():
    """The draws exactly; the pixels but for rounding, by the means of the last one's 7x7 blocks."""
    glyphs = data.glyphs()
    assert glyphs.train_images.shape == (10_000, 1, 28, 28)
    assert (glyphs.classes, glyphs.mean, glyphs.std) == (10, 0.0, 0.3)
    labels = torch.cat([glyphs.train_labels, glyphs.test_labels]).numpy().astype("<i8")
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == LABELS_HASH
    blocks = F.avg_pool2d(glyphs.test_images[-1].float(), 7).flatten()
    assert (blocks - torch.tensor(BLOCKS)).abs().max() < 0.5


def test_a_batch_is_normalised():
    few = replace(data.glyphs(train=6, test=1), mean=0.4, std=0.3)
    index = torch.tensor([5, 3, 3])
    batch = few.batch(few.train_images, index)
    assert batch.dtype == torch.float32
    expected = (few.train_images[index].double() / 255 - 0.4) / 0.3
    torch.testing.assert_close(batch.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", ("train", "test"))
def test_what_a_dataset_may_hold(split):
    few = data.glyphs(train=6, test=6)
    images = getattr(few, f"{split}_images")
    labels = getattr(few, f"{split}_labels")
    for kind, values, words in (
        ("images", images / 255, "images must be .* torch.float32"),
        ("images", images[0], "images must be"),
        ("images", images[:0], "images must be .* at least 1"),
        ("images", images[:5], r"images must be .* labels .* \(6,\)"),
        ("labels", labels.byte(), "images must be .* labels .* torch.uint8$"),
        ("labels", labels + 20, "labels go from 2. to 2., with 10 classes"),
        ("labels", torch.arange(6) - 1, "labels go from -1 to 4"),
        ("labels", torch.full((6,), -2), "labels go from -2 to -2"),
    ):
        with pytest.raises(ValueError, match=f"^{split} {words}"):
            replace(few, **{f"{split}_{kind}": values})
    replace(few, **{f"{split}_labels": torch.full((6,), -1)})


def test_the_digest_tells_images_and_labels_of_both_splits_apart():
    few = data.glyphs(train=20, test=5)
    others = [few]
    for split in ("train", "test"):
        images = getattr(few, f"{split}_images")
        labels = getattr(few, f"{split}_labels")
        others.append(replace(few, **{f"{split}_images": images ^ 1}))
        others.append(replace(few, **{f"{split}_images": images.view(-1, 1, 14, 56)}))
        others.append(replace(few, **{f"{split}_labels": labels.roll(1)}))
    assert len({other.digest() for other in others}) == 7
    assert replace(few, train_images=few.train_images.clone()).digest() == few.digest()


@pytest.mark.parametrize("seed", (0, 1))
def test_what_is_held_out_and_what_is_drawn(few_glyphs, seed):
    """The former by seed 0, the latter by the seed; in order, and as ever."""
    few = data.glyphs()
    shuffled = np.random.default_rng(0).permutation(200)
    held_out = np.sort(shuffled[:80])
    rest = np.sort(shuffled[80:])
    drawn = np.sort(np.random.default_rng(seed).permutation(120)[:60])
    some = data.load("glyphs", train_images=60, seed=seed)
    of_all = np.sort(np.random.default_rng(seed).permutation(200)[:60])
    assert torch.equal(some.train_images, few.train_images[of_all])
    assert torch.equal(some.test_images, few.test_images)
    for count, index in ((None, rest), (60, rest[drawn])):
        part = data.load("glyphs", train_images=count, validate=80, seed=seed)
        assert torch.equal(part.train_images, few.train_images[index])
        assert torch.equal(part.train_labels, few.train_labels[index])
        assert torch.equal(part.test_images, few.train_images[held_out])
        assert torch.equal(part.test_labels, few.train_labels[held_out])


def test_bad_arguments(few_glyphs):
    for count, validate in ((0, 0), (1, 200), (1, -1), (121, 80)):
        with pytest.raises(ValueError, match="glyphs has 200 training images"):
            data.load("glyphs", train_images=count, validate=validate)
    with pytest.raises(ValueError, match="no data set 'cifar', only glyphs, mnist"):
        data.load("cifar")


def write_mnist(folder, images, labels):
    """MNIST's files; the same images and labels in both splits."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
            (raw / f"{split}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())


def test_mnist_files(tmp_path, monkeypatch):
    """In a home folder; then with too few labels, letters for digits, and one that is cut off."""
    monkeypatch.setenv("HOME", str(tmp_path))
    images = torch.randint(256, (22, 28, 28), dtype=torch.uint8)
    labels = torch.arange(22, dtype=torch.uint8)
    write_mnist(tmp_path / "x", images, labels % 10)
    mnist = data.load("mnist", "~/x")
    for split in ("train", "test"):
        assert torch.equal(getattr(mnist, f"{split}_images")[:, 0], images)
        assert getattr(mnist, f"{split}_labels").tolist() == (labels % 10).tolist()
    assert mnist.classes == 10 and (mnist.mean, mnist.std) == (0.0, 0.3081)
    write_mnist(tmp_path / "x", images, labels[:9])
    with pytest.raises(ValueError, match=r"train images must be .* labels .* \(9,\)"):
        data.load("mnist", "~/x")
    write_mnist(tmp_path / "x", images, labels)
    with pytest.raises(ValueError, match="train labels go from 0 to 21, with 10 classes"):
        data.load("mnist", "~/x")
    (tmp_path / "x/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0")
    with pytest.raises(ValueError, match="cannot download or read mnist .*MNIST/raw"):
        data.load("mnist", "~/x")


def test_cifar10_is_as_torchvision_reads_it(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)

    def read(folder, train, download):
        return SimpleNamespace(data=pixels if train else pixels[::-1].copy(),
                               targets=[0, 1, 2, 9], classes=list("abcdefghij"))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", read)
    cifar10 = data.load("cifar10", tmp_path)
    assert np.array_equal(cifar10.train_images, pixels.transpose(0, 3, 1, 2))
    assert torch.equal(cifar10.test_images, cifar10.train_images.flip(0))
    assert cifar10.train_labels.tolist() == [0, 1, 2, 9]
    assert cifar10.classes == 10 and (cifar10.mean, cifar10.std) == (0.4734, 0.2516)


@pytest.mark.parametrize("name, file", (
    ("mnist", "MNIST/raw"), ("cifar10", "cifar-10-python.tar.gz"),
    ("tiny-imagenet", "tiny-imagenet-200.zip, unpacked")))
def test_a_server_that_says_nothing(tmp_path, monkeypatch, name, file):
    """One line says what to put where by hand."""
    def urlopen(*arguments, **options):
        raise TimeoutError(f"silent\nfor {socket.getdefaulttimeout()} s")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(ValueError, match=f"for {data.DOWNLOAD_TIMEOUT}.0 s.*{file}") as error:
        data.load(name, tmp_path / "new")
    assert socket.getdefaulttimeout() is None
    assert "\n" not in str(error.value) and str(tmp_path / "new") in str(error.value)


def test_an_epoch_plan():
    """A permutation, choices below P, drawn by seed and epoch alone, and as ever."""
    order, choice = data.epoch_plan(100, 12, seed=3, epoch=7)
    assert order.dtype == choice.dtype == torch.int64
    rng = np.random.default_rng([3, 7])
    assert order.tolist() == rng.permutation(100).tolist()
    assert choice.tolist() == rng.integers(12, size=100).tolist()
