"""Data sets: glyphs, the files of MNIST and CIFAR-10, subsets, downloads, and an epoch's plan."""
import hashlib
import pickle
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

import data

LABELS_HASH = "6a94ba753f1d5553"
BLOCKS = [[16.9, 23.8, 14.7, 9.5, 19.2, 83.9, 70.8, 11.6,
           11.8, 63.4, 50.5, 6.7, 10.8, 11.6, 11.6, 9.8],
          [11.5, 32.3, 129.5, 13.2, 94.2, 172.4, 195.5, 7.6,
           15.6, 96.0, 228.3, 17.1, 7.7, 15.5, 12.4, 6.3]]


@pytest.fixture(scope="module")
def glyphs():
    return data.glyphs()


# ------------------------------------------------------------------------------------------- glyphs
def test_glyphs_shapes(glyphs):
    assert glyphs.train_images.shape == (10_000, 1, 28, 28)
    assert glyphs.test_images.shape == (2_000, 1, 28, 28)
    assert glyphs.train_images.dtype == torch.uint8
    assert glyphs.train_labels.dtype == torch.int64
    assert torch.bincount(glyphs.train_labels).min() > 900
    assert glyphs.class_names == list(data.GLYPHS)
    assert glyphs.classes == len(set(data.GLYPHS)) == 10


def test_glyphs_are_those_of_earlier_versions(glyphs):
    """The draws exactly; the pixels but for rounding, which another Pillow or processor may change.

    The numbers are of commit b2dad70: means over 7x7 blocks of the first and the last image.
    """
    labels = torch.cat([glyphs.train_labels, glyphs.test_labels]).numpy().astype("<i8")
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == LABELS_HASH
    assert not torch.equal(data.glyphs(seed=1).train_images, glyphs.train_images)
    blocks = torch.cat([glyphs.train_images[:1], glyphs.test_images[-1:]]).float()
    blocks = torch.nn.functional.avg_pool2d(blocks, 7).flatten(1)
    assert (blocks - torch.tensor(BLOCKS)).abs().max() < 0.5


def test_a_batch_is_normalised(glyphs):
    index = torch.tensor([5, 3, 3])
    batch = glyphs.batch(glyphs.train_images, index)
    expected = (glyphs.train_images[index].double() / 255 - glyphs.mean) / glyphs.std
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch.double(), expected, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------- load's options
@pytest.fixture
def numbered(monkeypatch, count=300):
    """In place of glyphs: images whose first two pixels say their number, as their labels do."""
    numbers = torch.arange(count)
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = numbers // 256
    images[:, 0, 0, 1] = numbers % 256
    some = data.Dataset(images, numbers, np.arange(count), images[:50], numbers[:50],
                        np.arange(50), list("0123456789"), 0.0, 1.0)
    monkeypatch.setattr(data, "glyphs", lambda: some)


def check_numbers(images, labels, files):
    assert torch.equal(images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1], labels)
    assert labels.tolist() == files.tolist()
    return labels.tolist()


def load_numbers(**options):
    d = data.load("glyphs", **options)
    train = check_numbers(d.train_images, d.train_labels, d.train_files)
    test = check_numbers(d.test_images, d.test_labels, d.test_files)
    return train, test


def test_the_seed_draws_the_subset(numbered):
    """Without repetition, in order, and as ever: the first of a permutation of all."""
    for seed in (0, 1, 2):
        train, test = load_numbers(train_images=60, seed=seed)
        expected = np.random.default_rng(seed).permutation(300)[:60]
        assert train == sorted(expected.tolist())
        assert test == list(range(50))
    assert load_numbers(seed=7)[0] == load_numbers(train_images=300)[0] == list(range(300))


def test_what_is_held_out_is_the_same_for_every_seed(numbered):
    train, test = load_numbers(validate=100, seed=1)
    assert len(test) == 100 and test == sorted(test)
    assert sorted(train + test) == list(range(300)) and train == sorted(train)
    assert min(test) < 50 and max(test) > 250  # labels may be sorted, so not the last ones
    some, same_test = load_numbers(validate=100, train_images=60, seed=2)
    others, _ = load_numbers(validate=100, train_images=60, seed=3)
    assert same_test == test
    assert len(some) == 60 and set(some) < set(train) and some == sorted(some)
    assert some != others


def test_too_few_images_to_take(numbered):
    for options in (dict(train_images=0), dict(train_images=301), dict(validate=300),
                    dict(validate=-1), dict(validate=100, train_images=201)):
        with pytest.raises(ValueError, match="glyphs has 300 training images"):
            data.load("glyphs", **options)


def test_bad_arguments():
    with pytest.raises(ValueError, match="no data set 'cifar', only glyphs, mnist"):
        data.load("cifar")
    with pytest.raises(ValueError, match="image size is for 'folder' only"):
        data.load("glyphs", image_size=32)
    for options in (dict(folder=""), dict(cache_dir="")):
        with pytest.raises(ValueError, match="name of a folder is empty"):
            data.load("folder", **options)


def test_the_digest_tells_images_labels_and_names_apart():
    some = data.glyphs(train=20, test=5)
    assert some.digest() == data.glyphs(train=20, test=5).digest() and len(some.digest()) == 64
    changed_images = some.train_images.clone()
    changed_images[7, 0, 3, 3] ^= 1
    changed_files = np.array([f"{i}.png" for i in range(20)])
    others = [replace(some, train_images=changed_images),
              replace(some, train_labels=some.train_labels.roll(1)),
              replace(some, train_files=changed_files),
              replace(some, train_images=some.train_images.view(20, 1, 14, 56))]
    digests = {other.digest() for other in [some, *others]}
    assert len(digests) == 5
    assert replace(some, test_images=some.test_images * 0).digest() == some.digest()


# ---------------------------------------------------------------------------------- MNIST, CIFAR-10
def write_idx(path, shape, seed):
    """A file in MNIST's format, with random values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    top = 10 if len(shape) == 1 else 256
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(top, shape, generator=generator, dtype=torch.uint8)
    header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
    path.write_bytes(header + values.numpy().tobytes())
    return values


def write_mnist(folder, labels=20):
    raw = folder / "MNIST" / "raw"
    write_idx(raw / "t10k-images-idx3-ubyte", (6, 28, 28), 2)
    write_idx(raw / "t10k-labels-idx1-ubyte", (6,), 3)
    train_labels = write_idx(raw / "train-labels-idx1-ubyte", (labels,), 1)
    return write_idx(raw / "train-images-idx3-ubyte", (20, 28, 28), 0), train_labels


def test_mnist_reads_the_files_that_are_there(tmp_path):
    images, labels = write_mnist(tmp_path)
    mnist = data.load("mnist", tmp_path)
    assert torch.equal(mnist.train_images[:, 0], images)
    assert torch.equal(mnist.train_labels, labels.long())
    assert mnist.test_images.shape == (6, 1, 28, 28)
    assert mnist.test_files.tolist() == list(range(6))
    assert mnist.classes == 10 and (mnist.mean, mnist.std) == (0.0, 0.3081)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_mnist(tmp_path / "x")
    assert len(data.load("mnist", "~/x").train_images) == 20


def write_cifar10(folder, rows=4):
    """CIFAR-10's files with random pixels; returns those of the first file, (rows, 3072)."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    first = rng.integers(256, size=(rows, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
                 "test_batch"):
        pixels = first if name == "data_batch_1" else 255 - first
        content = dict(data=pixels, labels=list(range(rows)))
        (folder / name).write_bytes(pickle.dumps(content))
    label_names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=label_names)))
    return first


def test_cifar10_reads_the_files_that_are_there(tmp_path, monkeypatch):
    """torchvision compares checksums, which random pixels cannot have: that alone is left out."""
    first = write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    cifar10 = data.load("cifar10", tmp_path)
    assert cifar10.train_images.shape == (20, 3, 32, 32)
    assert cifar10.test_images.shape == (4, 3, 32, 32)
    assert cifar10.train_labels[:4].tolist() == [0, 1, 2, 3]
    assert cifar10.class_names[9] == "class 9" and cifar10.classes == 10
    assert np.array_equal(cifar10.train_images[:4].flatten(1), first)


# --------------------------------------------------------------------- downloads, and damaged files
def assert_one_line(error, *texts):
    message = str(error.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_files_that_do_not_belong_together(tmp_path):
    write_mnist(tmp_path, labels=19)
    with pytest.raises(ValueError) as error:
        data.load("mnist", tmp_path)
    assert_one_line(error, "20 images, 19 labels", str(tmp_path), "MNIST/raw")


def test_a_file_that_another_program_is_extracting(tmp_path):
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])
    with pytest.raises(ValueError) as error:
        data.load("mnist", tmp_path)
    assert_one_line(error, "another program may be extracting", "start again")
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("name", ("mnist", "cifar10", "tiny-imagenet"))
def test_a_server_that_says_nothing(tmp_path, monkeypatch, capsys, name):
    """It accepts a connection and is silent: a line at the start, and a line at the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
        monkeypatch.setattr(data, "TINY_IMAGENET_URL", f"{address}tiny-imagenet-200.zip")
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [address])
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{address}cifar.tar.gz")
        # urllib keeps the proxies of its first call.
        monkeypatch.setattr("urllib.request._opener", None)
        for variable in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(variable.upper(), raising=False)
        socket.setdefaulttimeout(321)
        try:
            with pytest.raises(ValueError) as error:
                data.load(name, tmp_path / "new")
            assert socket.getdefaulttimeout() == 321
        finally:
            socket.setdefaulttimeout(None)
    assert_one_line(error, "timed out", str(tmp_path / "new"))
    assert "downloading" in capsys.readouterr().out


# -------------------------------------------------------------------------------- one epoch's plan
def test_an_epoch_plan():
    """A permutation, choices below P, drawn by seed and epoch alone, and as ever."""
    order, choice = data.epoch_plan(100, 12, seed=3, epoch=7)
    assert sorted(order.tolist()) == list(range(100))
    assert order.dtype == choice.dtype == torch.int64
    assert set(choice.tolist()) == set(range(12))
    rng = np.random.default_rng([3, 7])
    assert order.tolist() == rng.permutation(100).tolist()
    assert choice.tolist() == rng.integers(12, size=100).tolist()
    for seed, epoch in ((3, 8), (4, 7)):
        other_order, other_choice = data.epoch_plan(100, 12, seed, epoch)
        assert not torch.equal(other_order, order)
        assert not torch.equal(other_choice, choice)
