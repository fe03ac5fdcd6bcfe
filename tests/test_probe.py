"""From an encoder to numbers: the measures, also of unusual features, checkpoints and the command."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data as datasets
import probe

SETTINGS = dict(
    backbone="mnist", group="translation", group_size=1, widths=[2, 3, 4], image_shape=[1, 28],
    kernel_size=3, structure="group", effective_size=None, sigma=0.9, scale_step=1.41,
    extent=None, padding="zeros", dataset="glyphs", data_dir="datasets", cache_dir="datasets",
    train_images=None, image_size=None, validate=None, seed=0, probe_grid=2, amp="off",
    device="cpu", method="h-ssl")


def clusters(count, classes, dimensions, deviation, seed=0):
    """count points (N, D) around as many centres as there are classes, and their labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = deviation * torch.randn(count, dimensions, generator=generator)
    return 3 * torch.eye(classes, dimensions)[labels] + noise, labels


def dataset(train, labels, test, answers, names="abcdef"):
    """A Dataset of images (N, C, H, W) that are not normalised."""
    return datasets.Dataset(train.byte(), labels, np.arange(len(train)), test.byte(), answers,
                            np.arange(len(test)), list(names), mean=0.0, std=1 / 255)


def corners(train=80, test=8):
    """Images of 2x2 pixels, one of which is 1: it tells the class."""
    labels = torch.arange(train) % 4
    answers = torch.arange(test) % 4
    images = torch.eye(4).view(4, 1, 2, 2)
    return dataset(images[labels], labels, images[answers], answers, "abcd")


class Pixels(nn.Module):
    """The images themselves, as features of one group element."""

    def forward(self, x):
        return x.unsqueeze(2)


class Normalised(nn.Module):
    """A convolution with batch norm and a dropout, which act differently in training."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout()

    def forward(self, x):
        return self.dropout(self.norm(self.convolution(x))).unsqueeze(2)


# ----------------------------------------------------------------------------- measures
def test_effective_rank():
    """One direction has rank 1, equal ones have their number, and only ratios matter."""
    equal = torch.cat([torch.eye(8), -torch.eye(8)])
    assert probe.effective_rank(equal) == pytest.approx(8)
    assert probe.effective_rank(1e-9 * equal) == pytest.approx(8)
    assert probe.effective_rank(100 * equal + 5) == pytest.approx(8)
    line = torch.arange(10.0)[:, None] * torch.ones(1, 8)
    assert probe.effective_rank(line) == pytest.approx(1, abs=1e-3)
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    shares = torch.tensor([0.75, 0.25])
    entropy = -(shares * shares.log()).sum()
    both_signs = torch.cat([uneven, -uneven])
    assert probe.effective_rank(both_signs) == pytest.approx(entropy.exp().item())
    assert probe.effective_rank(torch.ones(5, 4)) == pytest.approx(1)


@pytest.mark.parametrize("temperature", (0.1, 0.01, 0.001))
def test_neighbours_are_those_of_a_loop(temperature):
    """Votes of the 20 most similar, weighted by exp(s/τ) in float64, where τ 0.01 overflows not."""
    x, labels = clusters(150, 3, 5, deviation=3)
    queries, answers = clusters(300, 3, 5, deviation=3, seed=1)
    hits = 0
    for query, answer in zip(queries, answers):
        s = F.cosine_similarity(x - x.mean(0), (query - x.mean(0))[None])
        votes = torch.zeros(3, dtype=torch.float64)
        for i in s.argsort(descending=True)[:20]:
            votes[labels[i]] += ((s[i].double() - s.max()) / temperature).exp()
        hits += (votes.argmax() == answer).item()
    expected = 100 * hits / 300
    assert 40 < expected < 90
    found = probe.neighbours(x, labels, queries, answers, 3, temperature=temperature)
    assert found == pytest.approx(expected)
    tiny = probe.neighbours(1e-9 * x, labels, 1e-9 * queries, answers, 3, temperature=temperature)
    assert tiny == pytest.approx(expected, abs=0.4)


def test_standardise():
    """Mean 0 and deviation 1 in the first features, and the same map for the others."""
    x, _ = clusters(100, 4, 6, deviation=2)
    z, moved = probe.standardise(x, x + x.std(0, correction=0))
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(6))
    torch.testing.assert_close(moved, z + 1)
    one_row, = probe.standardise(x[:1])
    assert torch.equal(one_row, torch.zeros(1, 6))


@pytest.mark.parametrize("constant", (14.62, 0.1, 3.3, 0.0))
def test_a_dimension_that_is_constant_in_training_carries_nothing(constant):
    """A quarter of its test rows is off by 0.001: once, z was 1,000 there and misled."""
    x, labels = clusters(1000, 4, 6, deviation=1)
    test, answers = clusters(1000, 4, 6, deviation=1, seed=1)
    right = probe.linear_classifier(x, labels, test, answers, 4)
    column = torch.full((1000, 1), constant)
    off = column.clone()
    off[::4] += 0.001
    x = torch.cat([x, column], 1)
    test = torch.cat([test, off], 1)
    z, z_test = probe.standardise(x, test)
    assert not z[:, -1].any() and not z_test[:, -1].any()
    assert z_test.abs().max() < 6
    # Both are trained to within 1e-4 nats of the minimum: three of 1,000 rows may change sides.
    assert probe.linear_classifier(x, labels, test, answers, 4) == pytest.approx(right, abs=0.3)
    # A difference of the same size that is there in training is kept.
    x[::2, -1] += 0.001
    kept, = probe.standardise(x)
    assert kept[:, -1].std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factor", (1e-9, 1e9))
def test_the_size_of_the_features_does_not_matter(factor):
    x, labels = clusters(500, 4, 6, deviation=1)
    test, answers = clusters(500, 4, 6, deviation=1, seed=1)
    right = probe.linear_classifier(x, labels, test, answers, 4)
    assert 85 < right < 99
    scaled = probe.linear_classifier(factor * x, labels, factor * test, answers, 4)
    assert scaled == pytest.approx(right, abs=0.2)


@pytest.mark.parametrize("penalty", (1e-1, 1e-3, 1e-5))
def test_softmax_regression_is_at_its_minimum(penalty):
    """Newton's method in float64 finds nothing lower by more than the gap, from any start."""
    x, labels = clusters(300, 3, 6, deviation=2)

    def objective(weights):
        cross_entropy = F.cross_entropy(x.to(weights.dtype) @ weights, labels)
        return cross_entropy + penalty / 2 * weights.square().sum()

    least = torch.zeros(6, 3, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(objective)(least)
        hessian = torch.autograd.functional.hessian(objective, least).reshape(18, 18)
        least = least - torch.linalg.solve(hessian, gradient.flatten()).view(6, 3)
    assert torch.func.grad(objective)(least).norm() < 1e-9

    random = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for start in (torch.zeros(6, 3), random):
        weights, gap = probe.softmax_regression(x, labels, penalty, start)
        assert not weights.requires_grad
        assert gap <= 1e-4 or penalty < 1e-3                    # float32 resolves no more
        assert -1e-6 <= objective(weights.double()) - objective(least) <= gap + 1e-6
    # The bound holds on the way, too.
    far = 10 * torch.ones(6, 3)
    early, gap = probe.softmax_regression(x, labels, penalty, far, iterations=1, tolerance=0)
    assert 0 <= objective(early.double()) - objective(least) <= gap


def test_the_penalty_is_chosen_on_rows_that_the_classifier_does_not_see(monkeypatch):
    """With wrong labels in the held-out rows the strongest penalty is the best."""
    x, labels = clusters(2000, 4, 8, deviation=2)
    test, answers = clusters(1000, 4, 8, deviation=2, seed=1)
    calls = []
    original = probe.softmax_regression

    def recorded(x, labels, penalty, *arguments, **options):
        calls.append((len(x), penalty))
        return original(x, labels, penalty, *arguments, **options)

    monkeypatch.setattr(probe, "softmax_regression", recorded)
    probe.linear_classifier(x, labels, test, answers, 4)
    # The path ends where the held-out loss has risen, and the one before is taken.
    tried = [penalty for _, penalty in calls[:-1]]
    assert calls[:-1] == [(1900, penalty) for penalty in probe.PENALTIES[:len(tried)]]
    assert 2 < len(tried) < len(probe.PENALTIES)
    assert calls[-1] == (2000, tried[-2])
    held, _ = probe.hold_out(2000)
    labels[held] = (labels[held] + 1) % 4
    probe.linear_classifier(x, labels, test, answers, 4)
    assert calls[-1] == (2000, probe.PENALTIES[0])


# ----------------------------------------------------------------------------- what is held out
def test_rows_are_held_out_at_random_but_alike_for_every_seed():
    """With sorted labels no class would be in both the first fifth and the last twentieth."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) // 250
    noise = 60 * torch.rand(1000, 1, 2, 2, generator=generator)
    images = 100 * torch.eye(4).view(4, 1, 2, 2)[labels] + noise
    data = dataset(images, labels, images[:4], labels[:4])
    torch.manual_seed(0)
    part = probe.split_training(data)
    assert len(part.train_images) == 200 and len(part.test_images) == 50
    assert not set(part.train_files) & set(part.test_files)
    for split in ("train", "test"):
        files = getattr(part, f"{split}_files")
        assert torch.equal(getattr(part, f"{split}_images"), data.train_images[files])
        assert torch.equal(getattr(part, f"{split}_labels"), labels[files])
        assert getattr(part, f"{split}_labels").unique().tolist() == [0, 1, 2, 3]
    result = probe.evaluate(Pixels(), part, grid=0)
    assert result["top1"] == result["neighbours"] == 100
    torch.manual_seed(1)
    assert np.array_equal(probe.split_training(data).test_files, part.test_files)
    assert [len(probe.hold_out(count)[0]) for count in (1, 2, 60, 60_000)] == [1, 1, 3, 2000]


# ----------------------------------------------------------------------------- evaluate
def test_evaluate_on_what_can_be_solved():
    """One pixel of four tells the class: all is known on 2x2 cells, nothing of their mean."""
    expected = dict(top1=100, neighbours=100, effective_rank=3, mean_top1=25, mean_neighbours=25,
                    mean_effective_rank=1, dimensions=4, train_images=80, test_images=8)
    assert probe.evaluate(Pixels(), corners(), grid=0) == expected
    assert probe.evaluate(Pixels(), corners(), grid=2) == expected
    result = probe.evaluate(Pixels(), corners(), grid=1)
    assert result["top1"] == result["mean_top1"] == 25 and result["dimensions"] == 1


def test_features_and_their_chunks():
    """Rows in the images' order; no batch of one image; features of another shape are refused."""
    for count, sizes in ((2001, [667, 667, 667]), (1001, [501, 500]), (1000, [1000])):
        data = corners(train=count)
        batches = probe.batches(Pixels(), data, data.train_images)
        assert [len(batch) for batch in batches] == sizes
        features, means = probe.extract(Pixels(), data, data.train_images, grid=0)
        assert torch.equal(features, data.train_images.float().flatten(1))
        assert torch.equal(means, torch.full((count, 1), 0.25))
    with pytest.raises(ValueError, match=r"\(1000, 1, 2, 2\)"):
        probe.evaluate(nn.Identity(), data)


def test_statistics_are_exact_and_only_taken_if_asked():
    """Somebody else's encoder keeps its statistics; with update_statistics they are the data's."""
    encoder = Normalised()
    data = corners()
    before = copy.deepcopy(encoder.state_dict())
    probe.evaluate(encoder, data)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    probe.evaluate(encoder, data, update_statistics=True)
    inputs = encoder.convolution(data.train_images.float())
    torch.testing.assert_close(encoder.norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(encoder.norm.running_var, inputs.var((0, 2, 3)))
    assert torch.equal(encoder.convolution.weight, before["convolution.weight"])


@pytest.mark.parametrize("update_statistics", (False, True))
def test_modules_keep_their_mode(update_statistics):
    """A batch norm in evaluation mode inside an encoder in training mode, also after an error."""
    encoder = Normalised()
    encoder.norm.eval()
    data = corners()
    probe.evaluate(encoder, data, update_statistics=update_statistics)
    assert encoder.training and encoder.dropout.training and not encoder.norm.training
    colour = dataclasses.replace(data, test_images=data.test_images.repeat(1, 3, 1, 1))
    with pytest.raises(RuntimeError, match="channels"):
        probe.evaluate(encoder, colour, update_statistics=update_statistics)
    assert encoder.training and encoder.dropout.training and not encoder.norm.training


class Broken(nn.Module):
    """The images, but not finite where the first pixel is bright."""

    def __init__(self, value, limit=0):
        super().__init__()
        self.value = value
        self.limit = limit

    def forward(self, x):
        return x.masked_fill(x[:, :, :1, :1] > self.limit, self.value).unsqueeze(2)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_rows_that_are_not_finite(value, capsys):
    """Class 0, a quarter, is lost: its training rows are dropped, its test rows are wrong."""
    result = probe.evaluate(Broken(value), corners(), grid=2)
    assert result["top1"] == result["neighbours"] == 75
    assert result["effective_rank"] == pytest.approx(2)
    assert result["not_finite"] == 20 + 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "20 training images" in printed and "2 test images" in printed
    nan_buffer = Normalised()
    nan_buffer.norm.running_var.fill_(torch.nan)
    for encoder in (Broken(value, limit=-1), nan_buffer):
        with pytest.raises(ValueError, match="no training image has finite features"):
            probe.evaluate(encoder, corners())


def test_few_images():
    """One image has a rank only; two of two classes have fewer neighbours than twenty."""
    one = probe.evaluate(Normalised(), corners(train=1, test=1))
    assert one["top1"] is None and one["effective_rank"] == 1
    two = probe.evaluate(Pixels(), corners(train=2, test=1))
    assert two["neighbours"] == 100


def test_half_precision():
    """By autocast, which ends in float32, or of an encoder that is itself of another type."""
    data = corners()
    encoder = Normalised().eval()
    exact, _ = probe.extract(encoder, data, data.test_images, 0)
    half, _ = probe.extract(encoder, data, data.test_images, 0, amp="bfloat16")
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.02)
    expected = probe.evaluate(encoder, data)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        result = probe.evaluate(copy.deepcopy(encoder).to(dtype), data)
        assert result["top1"] == expected["top1"], dtype


def test_labels_with_gaps():
    data = corners()
    gaps = torch.tensor([0, 2, 5, 9])
    data = dataclasses.replace(data, train_labels=gaps[data.train_labels],
                               test_labels=gaps[data.test_labels])
    result = probe.evaluate(Pixels(), data)
    assert result["top1"] == result["neighbours"] == 100
    # A class of which no training image is known is wrong.
    data.test_labels[0] = 7
    assert probe.evaluate(Pixels(), data)["top1"] == 100 * 7 / 8


def test_nothing_to_classify(capsys):
    """One class: a line says so. No labels: the effective rank is all that can be said."""
    data = corners()
    one_class = dataclasses.replace(data, train_labels=torch.ones(80, dtype=torch.int64))
    result = probe.evaluate(Pixels(), one_class)
    assert "one class: there is nothing to classify" in capsys.readouterr().out
    assert result["top1"] is None and result["mean_neighbours"] is None
    none = dataclasses.replace(data, train_labels=data.train_labels * 0 - 1,
                               test_labels=data.test_labels * 0 - 1, class_names=[])
    result = probe.evaluate(Pixels(), none)
    assert result["top1"] is None and result["neighbours"] is None
    assert result["effective_rank"] == pytest.approx(3)
    assert probe.in_words(result) == "effective rank 3.00"


# ----------------------------------------------------------------------------- checkpoints
def save_run(folder, **more):
    """A run's folder with a checkpoint of a small encoder, which has no training behind it."""
    torch.manual_seed(1)
    encoder = probe.make_encoder(SETTINGS)
    folder.mkdir(exist_ok=True)
    checkpoint = dict(encoder=encoder.state_dict(), settings=SETTINGS, **more)
    torch.save(checkpoint, folder / "checkpoint.pt")
    return encoder


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    probe.write_whole(path, b"old")
    probe.write_whole(path, b"new")
    assert path.read_bytes() == b"new"

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe.Path, "replace", full)
    with pytest.raises(OSError, match="cannot write .*file.*No space"):
        probe.write_whole(path, b"newer")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="absent"):
        probe.write_whole(tmp_path / "absent" / "file", b"")


def test_load_encoder(tmp_path):
    """Encoder and settings are enough, and no random number is used up."""
    saved = save_run(tmp_path).eval()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    encoder, settings = probe.load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert settings == SETTINGS and not encoder.training
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(encoder(x), saved(x))


class Code:
    """What a pickle may run when it is loaded."""

    def __reduce__(self):
        return print, ("code was run",)


def flip_a_bit(path):
    """Damage the largest weight of a checkpoint, as a disk may do it."""
    content = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["encoder"]
    largest = max(state.values(), key=torch.numel)
    content[content.index(largest.numpy().tobytes())] ^= 1
    path.write_bytes(content)


OTHER_CONTENT = {
    "code": dict(encoder={}, settings={}, more=Code()),
    "a tensor": torch.zeros(3),
    "no settings": dict(encoder={}),
    "other settings": dict(encoder={}, settings=[1, 2]),
    "other weights": dict(encoder={"weight": torch.zeros(3)}, settings=SETTINGS),
}


@pytest.mark.parametrize("how", ("missing", "truncated", "one bit", "text", *OTHER_CONTENT))
def test_damaged_checkpoints_are_refused_in_one_line(how, tmp_path, capsys):
    save_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "one bit":
        flip_a_bit(path)
    elif how == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save(OTHER_CONTENT[how], path)
    with pytest.raises(ValueError) as caught:
        probe.load_encoder(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as end:
        probe.main([str(tmp_path)])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.err.count("\n") == 1 and "code was run" not in captured.out
    assert not (tmp_path / "probe.json").exists()


# ----------------------------------------------------------------------------- the command
@pytest.fixture
def glyphs(monkeypatch):
    few = datasets.glyphs(train=60, test=30)
    monkeypatch.setattr(datasets, "glyphs", lambda: few)
    return few


def test_the_command(glyphs, tmp_path, capsys):
    """It writes and prints the same: this encoder, and the random one that the seed draws."""
    encoder = save_run(tmp_path, epoch=7)
    probe.main([str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert result == json.loads((tmp_path / "probe.json").read_text())
    assert result.pop("method") == "h-ssl" and result.pop("epoch") == 7
    frozen = result.pop("frozen")
    assert result == probe.evaluate(encoder, glyphs, update_statistics=True)
    torch.manual_seed(SETTINGS["seed"])
    untrained = probe.make_encoder(SETTINGS)
    assert frozen == probe.evaluate(untrained, glyphs, update_statistics=True)
    assert frozen != result

    # The numbers that a checkpoint holds are not measured again.
    save_run(tmp_path, frozen=dict(top1=12.5))
    probe.main([str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["frozen"] == dict(top1=12.5)


def test_the_features_file(glyphs, tmp_path, capsys):
    """What the classifier reads, with names, and nothing else is written."""
    encoder = save_run(tmp_path)
    path = tmp_path / "features.npz"
    probe.main([str(tmp_path), "--device", "cpu", "--features", str(path)])
    assert capsys.readouterr().out == ""
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "features.npz"}
    probe.take_statistics(encoder, glyphs)
    encoder.eval()
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["class_names"].tolist() == glyphs.class_names
        for split in ("train", "test"):
            images = getattr(glyphs, f"{split}_images")
            features, _ = probe.extract(encoder, glyphs, images, grid=2)
            assert np.array_equal(arrays[f"{split}_features"], features.numpy())
            labels = getattr(glyphs, f"{split}_labels")
            assert np.array_equal(arrays[f"{split}_labels"], labels.numpy())
            files = getattr(glyphs, f"{split}_files")
            assert np.array_equal(arrays[f"{split}_files"], files)


def test_what_the_command_refuses(glyphs, tmp_path, capsys, monkeypatch):
    save_run(tmp_path)
    refused = [["--features", str(tmp_path / "absent" / "f.npz")], ["--device", "cuda"]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags in refused:
        with pytest.raises(SystemExit) as end:
            probe.main([str(tmp_path), *flags])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("probe.py: ") and error.count("\n") == 1
