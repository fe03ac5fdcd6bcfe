"""Data sets: shapes, determinism, what is asked of MNIST's files, and plans that no number of processes changes."""
import struct

import pytest
import torch

import data


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


def test_train_images_limits_the_training_split_only():
    some = data.load("glyphs", "unused", train_images=100)
    assert len(some.train_images) == len(some.train_labels) == 100 and len(some.test_images) == 2_000
    for count in (0, 10_001):
        with pytest.raises(ValueError, match="10000 training images"):
            data.load("glyphs", "unused", train_images=count)


def test_unknown_name():
    with pytest.raises(ValueError, match="no data set 'cifar'"):
        data.load("cifar", "unused")


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


def test_plan_depends_on_seed_and_epoch_only():
    order, choice = data.epoch_plan(100, 12, seed=3, epoch=7)
    again = data.epoch_plan(100, 12, seed=3, epoch=7)
    assert torch.equal(order, again[0]) and torch.equal(choice, again[1])
    assert torch.equal(order.sort().values, torch.arange(100)) and choice.min() >= 0 and choice.max() == 11
    for seed, epoch in ((3, 8), (4, 7)):
        other = data.epoch_plan(100, 12, seed, epoch)
        assert not torch.equal(order, other[0]) and not torch.equal(choice, other[1])
