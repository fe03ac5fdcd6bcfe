"""Data sets: glyphs, the files of MNIST and CIFAR-10, subsets, downloads, and an epoch's plan."""
import hashlib
import pickle
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data

LABELS_HASH = "6a94ba753f1d5553"
BLOCKS = [11.5, 32.3, 129.5, 13.2, 94.2, 172.4, 195.5, 7.6,
          15.6, 96.0, 228.3, 17.1, 7.7, 15.5, 12.4, 6.3]


def test_glyphs_are_those_of_earlier_versions():
    """The draws exactly; the pixels but for rounding, which another Pillow or processor may change.

    The numbers are of commit b2dad70: means over 7x7 blocks of the last image.
    """
    glyphs = data.glyphs()
    assert glyphs.train_images.shape == (10_000, 1, 28, 28)
    assert glyphs.test_images.shape == (2_000, 1, 28, 28)
    assert glyphs.class_names == list(data.GLYPHS) and glyphs.classes == 10
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
def test_images_are_bytes_and_labels_whole_numbers(split):
    """Pixels from 0 to 1 would be normalised as if they went to 255."""
    few = data.glyphs(train=6, test=1)
    images = getattr(few, f"{split}_images") / 255
    with pytest.raises(ValueError, match=f"{split} split are torch.float32 and torch.int64"):
        replace(few, **{f"{split}_images": images})
    labels = getattr(few, f"{split}_labels").byte()
    with pytest.raises(ValueError, match=f"{split} split are torch.uint8 and torch.uint8"):
        replace(few, **{f"{split}_labels": labels})


def test_the_digest_tells_images_labels_and_names_apart():
    few = data.glyphs(train=20, test=5)
    assert replace(few, test_images=few.test_images * 0).digest() == few.digest()
    changed_images = few.train_images.clone()
    changed_images[7, 0, 3, 3] ^= 1
    changed_files = np.array([f"{i}.png" for i in range(20)])
    others = [few, data.glyphs(train=20, test=5, seed=1),
              replace(few, train_images=changed_images),
              replace(few, train_labels=few.train_labels.roll(1)),
              replace(few, train_files=changed_files),
              replace(few, train_images=few.train_images.view(20, 1, 14, 56))]
    assert len({other.digest() for other in others}) == 6


def load_some(**options):
    """A part of the few glyphs: the numbers of its training and of its test images."""
    few = data.glyphs()
    d = data.load("glyphs", **options)
    assert torch.equal(d.train_images, few.train_images[d.train_files])
    assert torch.equal(d.train_labels, few.train_labels[d.train_files])
    if "validate" in options:
        assert torch.equal(d.test_images, few.train_images[d.test_files])
        assert torch.equal(d.test_labels, few.train_labels[d.test_files])
    return d.train_files.tolist(), d.test_files.tolist()


def test_the_seed_draws_the_subset(few_glyphs):
    """Without repetition, in order, and as ever: the first of a permutation of all."""
    for seed in (0, 1):
        train, test = load_some(train_images=60, seed=seed)
        expected = np.random.default_rng(seed).permutation(200)[:60]
        assert train == sorted(expected.tolist())
        assert test == list(range(100))


def test_what_is_held_out_is_the_same_for_every_seed(few_glyphs):
    train, test = load_some(validate=80, seed=1)
    assert len(test) == 80 and sorted(train + test) == list(range(200))
    assert min(test) < 20 and max(test) > 180    # labels may be sorted, so not the last ones
    some, same_test = load_some(validate=80, train_images=60, seed=2)
    others, _ = load_some(validate=80, train_images=60, seed=3)
    assert same_test == test
    assert len(some) == 60 and set(some) < set(train)
    assert some != others


@pytest.mark.parametrize("options, words", (
    (dict(train_images=0), "glyphs has 200 training images"),
    (dict(validate=200), "glyphs has 200 training images"),
    (dict(validate=-1), "glyphs has 200 training images"),
    (dict(validate=80, train_images=121), "glyphs has 200 training images"),
    (dict(name="cifar"), "no data set 'cifar', only glyphs, mnist"),
    (dict(cache_dir=""), "name of a folder is empty"),
))
def test_bad_arguments(options, words, few_glyphs):
    with pytest.raises(ValueError, match=words):
        data.load(**dict(name="glyphs") | options)


def write_mnist(folder, labels=20):
    """MNIST's files of random values; returns the training images and labels."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    written = []
    for name, shape in (
        ("train-images-idx3-ubyte", (20, 28, 28)),
        ("train-labels-idx1-ubyte", (labels,)),
        ("t10k-images-idx3-ubyte", (6, 28, 28)),
        ("t10k-labels-idx1-ubyte", (6,)),
    ):
        values = torch.randint(10, shape, dtype=torch.uint8)
        header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
        (raw / name).write_bytes(header + values.numpy().tobytes())
        written.append(values)
    return written[:2]


def test_mnist_reads_the_files_that_are_there(tmp_path, monkeypatch):
    """In a home folder, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    images, labels = write_mnist(tmp_path / "x")
    mnist = data.load("mnist", "~/x")
    assert torch.equal(mnist.train_images[:, 0], images)
    assert torch.equal(mnist.train_labels, labels.long())
    assert mnist.test_images.shape == (6, 1, 28, 28)
    assert mnist.test_files.tolist() == list(range(6))
    assert mnist.classes == 10 and (mnist.mean, mnist.std) == (0.0, 0.3081)


def test_cifar10_reads_the_files_that_are_there(tmp_path, monkeypatch):
    """torchvision compares checksums, which random pixels cannot have: that alone is left out."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(24, 3072), dtype=np.uint8)
    names = [*[f"data_batch_{i}" for i in range(1, 6)], "test_batch"]
    for name, rows in zip(names, np.split(pixels, 6)):
        (folder / name).write_bytes(pickle.dumps(dict(data=rows, labels=[0, 1, 2, 3])))
    label_names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=label_names)))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    cifar10 = data.load("cifar10", tmp_path)
    assert cifar10.train_images.shape == (20, 3, 32, 32)
    assert np.array_equal(cifar10.train_images.flatten(1), pixels[:20])
    assert np.array_equal(cifar10.test_images.flatten(1), pixels[20:])
    assert cifar10.train_labels.tolist() == 5 * [0, 1, 2, 3]
    assert cifar10.class_names == label_names


def test_files_that_do_not_belong_together_or_are_being_extracted(tmp_path):
    write_mnist(tmp_path, labels=19)
    with pytest.raises(ValueError, match="20 images, 19 labels"):
        data.load("mnist", tmp_path)
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])
    with pytest.raises(ValueError, match="another program may be .*start again") as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value) and "delete" not in str(error.value)


@pytest.mark.parametrize("name, words", (
    ("mnist", "MNIST/raw"),
    ("cifar10", "cifar-10-python.tar.gz"),
    ("tiny-imagenet", "tiny-imagenet-200.zip, unpacked"),
))
def test_a_server_that_says_nothing(tmp_path, monkeypatch, capsys, name, words):
    """It accepts a connection and is silent: a line at the start, and at the end another, which
    says what to put where by hand."""
    socket.setdefaulttimeout(321)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
        monkeypatch.setattr(data, "TINY_IMAGENET_URL", f"{address}tiny-imagenet-200.zip")
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [address])
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{address}cifar.tar.gz")
        # urllib keeps the proxies of its first call.
        monkeypatch.setattr("urllib.request._opener", None)
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(ValueError, match=f"timed out.*{words}") as error:
            data.load(name, tmp_path / "new")
    assert socket.getdefaulttimeout() == 321
    socket.setdefaulttimeout(None)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path / "new") in message
    assert "downloading" in capsys.readouterr().out


def test_an_epoch_plan():
    """A permutation, choices below P, drawn by seed and epoch alone, and as ever."""
    order, choice = data.epoch_plan(100, 12, seed=3, epoch=7)
    assert order.dtype == choice.dtype == torch.int64
    rng = np.random.default_rng([3, 7])
    assert order.tolist() == rng.permutation(100).tolist()
    assert choice.tolist() == rng.integers(12, size=100).tolist()
