"""From an encoder to numbers: the measures, of unusual features too, checkpoints, the command."""
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
import train
from helpers import SMALL, refusal
from hssl import readout

SETTINGS = vars(train.parse([*SMALL, "--probe-grid", "2"])) | dict(image_shape=[1, 28])


def clusters(count, classes, dimensions, deviation, seed=0):
    """count points (N, D) around as many centres as there are classes, and their labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = deviation * torch.randn(count, dimensions, generator=generator)
    return 3 * torch.eye(classes, dimensions)[labels] + noise, labels


def corners(train=80, test=8):
    """Images of 2x2 pixels, one of which is 1: it tells the class. They are sorted by class."""
    labels = torch.arange(train) * 4 // train
    answers = torch.arange(test) * 4 // test
    images = torch.eye(4).byte().view(4, 1, 2, 2)
    return datasets.Dataset(images[labels], labels, np.arange(train), images[answers], answers,
                            np.arange(test), list("abcd"), mean=0.0, std=1 / 255)


def pixels():
    """The images themselves, (B, 1, H, W), as features of one group element."""
    return nn.Unflatten(1, (1, 1))


def normalised():
    """A convolution with batch norm and a dropout, which act differently in training."""
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Dropout(),
                         nn.Unflatten(1, (3, 1)))


# ----------------------------------------------------------------------------------------- measures

def test_effective_rank():
    """Singular values of 3 and 1, whatever the mean and the size."""
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    shares = torch.tensor([0.75, 0.25])
    entropy = -(shares * shares.log()).sum()
    for features in (x + 5, 1e-9 * x):
        assert probe.effective_rank(features) == pytest.approx(entropy.exp().item())


@pytest.mark.parametrize("temperature, factor", ((0.1, 1e-9), (0.001, 1)))
def test_neighbours_are_those_of_a_loop(temperature, factor):
    """Votes of the 20 most similar, weighted by exp(s/τ) in float64, where none overflows."""
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
    found = probe.neighbours(factor * x, labels, factor * queries, answers, 3,
                             temperature=temperature)
    assert found == pytest.approx(expected, abs=0.4)


@pytest.mark.parametrize("factor, constant", ((1, 14.62), (1, 0.1), (1e-9, 3.3), (1e9, 0.0)))
def test_neither_size_nor_a_constant_dimension_matters(factor, constant):
    """A quarter of the constant's test rows is off by 0.001: once, z was 1,000 there."""
    x, labels = clusters(1000, 4, 6, deviation=1)
    test, answers = clusters(1000, 4, 6, deviation=1, seed=1)
    right = probe.linear_classifier(x, labels, test, answers, 4)
    assert 85 < right < 99
    # Constant but for rounding.
    column = torch.full((1000, 1), constant)
    column[::2] = column[::2].nextafter(torch.tensor(20.0))
    off = column.clone()
    off[::4] += 0.001
    x = factor * torch.cat([x, column], 1)
    test = factor * torch.cat([test, off], 1)
    z, z_test = probe.standardise(x, test)
    assert not z[:, -1].any() and not z_test[:, -1].any()
    # Both are trained to within 1e-3 nats of the minimum: a few of 1,000 rows may change sides.
    assert probe.linear_classifier(x, labels, test, answers, 4) == pytest.approx(right, abs=0.3)
    # A difference of the same size that is there in training is kept.
    x[::2, -1] += factor * 0.001
    z, = probe.standardise(x)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(7), atol=0.02, rtol=0)


@pytest.mark.parametrize("penalty", (1e-1, 1e-5))
def test_softmax_regression_ends_near_its_minimum(penalty):
    """The objective is strongly convex, so the gap follows from its gradient, here in float64."""
    x, labels = clusters(300, 3, 6, deviation=2)
    for iterations in (1, 1000):
        weights, gap = probe.softmax_regression(x, labels, penalty, torch.ones(6, 3), iterations)
        weights = weights.double().requires_grad_()
        loss = F.cross_entropy(x.double() @ weights, labels) + penalty / 2 * weights.square().sum()
        gradient, = torch.autograd.grad(loss, weights)
        expected = gradient.square().sum().item() / (2 * penalty)
        assert gap == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert gap <= 1e-3


def test_the_penalty_is_chosen_on_rows_that_the_classifier_does_not_see(monkeypatch):
    """The path ends where the held-out loss has risen, and the one before is taken."""
    x, labels = clusters(2000, 4, 8, deviation=2)
    calls = []
    original = probe.softmax_regression

    def recorded(x, labels, penalty, *arguments, **options):
        calls.append((len(x), penalty))
        return original(x, labels, penalty, *arguments, **options)

    monkeypatch.setattr(probe, "softmax_regression", recorded)
    probe.linear_classifier(x, labels, x, labels, 4)
    tried = [penalty for _, penalty in calls[:-1]]
    assert calls[:-1] == [(1900, penalty) for penalty in probe.PENALTIES[:len(tried)]]
    assert 2 < len(tried) < len(probe.PENALTIES)
    assert calls[-1] == (2000, tried[-2])


# ----------------------------------------------------------------------------------------- evaluate

def test_what_is_looked_at_is_drawn_but_alike_for_every_seed():
    """With sorted labels no class would be in both the first fifth and the last twentieth."""
    data = corners(train=1000)
    part = probe.split_training(data)
    assert len(part.train_images) == 200 and len(part.test_images) == 50
    assert not set(part.train_files) & set(part.test_files)
    for split in ("train", "test"):
        files = getattr(part, f"{split}_files")
        assert torch.equal(getattr(part, f"{split}_images"), data.train_images[files])
        assert torch.equal(getattr(part, f"{split}_labels"), data.train_labels[files])
        assert getattr(part, f"{split}_labels").unique().tolist() == [0, 1, 2, 3]
    torch.manual_seed(1)
    assert np.array_equal(probe.split_training(data).test_files, part.test_files)
    assert [len(probe.hold_out(count)[0]) for count in (1, 60, 60_000)] == [1, 3, 2000]


def test_evaluate_on_what_can_be_solved():
    """One pixel of four tells the class: all is known on 2x2 cells, nothing of their mean."""
    expected = dict(top1=100, neighbours=100, effective_rank=3, mean_top1=25, mean_neighbours=25,
                    mean_effective_rank=1, dimensions=4, train_images=80, test_images=8)
    assert probe.evaluate(pixels(), corners(), grid=0) == expected
    assert probe.evaluate(pixels(), corners(), grid=2) == expected
    result = probe.evaluate(pixels(), corners(), grid=1)
    assert result["top1"] == result["mean_top1"] == 25 and result["dimensions"] == 1


def test_chunks_are_of_like_sizes_and_features_have_a_group_axis():
    """No batch of one image, which would give batch norm no variance."""
    counts = []
    encoder = pixels()

    def count(module, inputs, maps):
        counts.append(len(maps))

    encoder.register_forward_hook(count)
    assert probe.evaluate(encoder, corners(train=1001))["top1"] == 100
    assert counts == [501, 500, 8]
    with pytest.raises(ValueError, match=r"\(80, 1, 2, 2\)"):
        probe.evaluate(nn.Identity(), corners())


def test_statistics_are_exact_and_only_taken_if_asked():
    """Somebody else's encoder keeps its own, and each module its mode, also after an error."""
    encoder = normalised()
    convolution, norm, dropout, _ = encoder
    norm.eval()

    def check_modes():
        assert encoder.training and dropout.training and not norm.training

    data = corners()
    before = copy.deepcopy(encoder.state_dict())
    probe.evaluate(encoder, data)
    check_modes()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    probe.evaluate(encoder, data, update_statistics=True)
    check_modes()
    inputs = convolution(data.train_images.float())
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3)))
    colour = dataclasses.replace(data, test_images=data.test_images.repeat(1, 3, 1, 1))
    with pytest.raises(RuntimeError, match="channels"):
        probe.evaluate(encoder, colour, update_statistics=True)
    check_modes()


@pytest.mark.parametrize("value", (float("nan"), -float("inf")))
def test_rows_that_are_not_finite(value, capsys):
    """Class 0, a quarter, is lost: its training rows are dropped, its test rows are wrong."""
    def spoil(module, inputs, maps):
        return maps.masked_fill(maps[..., :1, :1] > 0, value)

    encoder = pixels()
    encoder.register_forward_hook(spoil)
    result = probe.evaluate(encoder, corners())
    assert result["top1"] == result["neighbours"] == 75
    assert result["effective_rank"] == pytest.approx(2)
    assert result["not_finite"] == 20 + 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "20 training images" in printed and "2 test images" in printed
    encoder = normalised()
    encoder[1].running_var.fill_(value)
    with pytest.raises(ValueError, match="no training image has finite features"):
        probe.evaluate(encoder, corners())


def test_few_images():
    """One image has a rank only; two of two classes have fewer neighbours than twenty."""
    one = probe.evaluate(normalised(), corners(train=1, test=1))
    assert one["top1"] is None and one["effective_rank"] == 1
    assert probe.evaluate(pixels(), corners(train=2, test=1))["neighbours"] == 100


def test_half_precision():
    """By autocast, or of an encoder that is itself of another type."""
    encoder = normalised().eval()
    expected = probe.evaluate(encoder, corners())
    for dtype in (torch.float16, torch.float64):
        result = probe.evaluate(copy.deepcopy(encoder).to(dtype), corners())
        assert result["top1"] == expected["top1"], dtype

    def check_type(module, inputs, maps):
        assert maps.dtype == torch.bfloat16

    encoder[0].register_forward_hook(check_type)
    assert probe.evaluate(encoder, corners(), amp="bfloat16")["top1"] == expected["top1"]
    with pytest.raises(ValueError, match="amp is 'none'"):
        probe.evaluate(encoder, corners(), amp="none")


def test_labels_with_gaps():
    """A class of which no training image is known is wrong."""
    data = corners()
    gaps = torch.tensor([0, 2, 5, 9])
    data = dataclasses.replace(data, train_labels=gaps[data.train_labels],
                               test_labels=gaps[data.test_labels])
    data.test_labels[0] = 7
    result = probe.evaluate(pixels(), data)
    assert result["top1"] == result["neighbours"] == 100 * 7 / 8


def test_nothing_to_classify(capsys):
    """One class: a line says so. No labels: the effective rank is all that can be said."""
    data = corners()
    one_class = dataclasses.replace(data, train_labels=torch.ones(80, dtype=torch.int64))
    result = probe.evaluate(pixels(), one_class)
    assert "one class: there is nothing to classify" in capsys.readouterr().out
    assert result["top1"] is None and result["mean_neighbours"] is None
    none = dataclasses.replace(data, train_labels=data.train_labels * 0 - 1,
                               test_labels=data.test_labels * 0 - 1, class_names=[])
    result = probe.evaluate(pixels(), none)
    assert result["top1"] is None and result["neighbours"] is None
    assert probe.in_words(result) == "effective rank 3.00"


def test_the_linear_classifier_has_biases():
    """Features that tell nothing: the larger class, the second, is the best guess."""
    labels = (torch.arange(100) >= 10).long()
    x = torch.ones(100, 3)
    assert probe.linear_classifier(x, labels, x, labels, 2) == 90


# -------------------------------------------------------------------------------------- checkpoints

def save_run(folder, **more):
    """A run's folder with a checkpoint of a small encoder, which has no training behind it."""
    torch.manual_seed(1)
    encoder = probe.make_encoder(SETTINGS)
    checkpoint = dict(encoder=encoder.state_dict(), settings=SETTINGS, **more)
    torch.save(checkpoint, folder / "checkpoint.pt")
    return encoder


def test_load_encoder(tmp_path):
    """Encoder and settings are enough, and no random number is used up."""
    saved = save_run(tmp_path).eval()
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


OTHER_CONTENT = {
    "code": dict(encoder={}, settings={}, more=Code()),
    "no settings": dict(encoder={}),
    "other weights": dict(encoder={"weight": torch.zeros(3)}, settings=SETTINGS),
}


@pytest.mark.parametrize("how", ("missing", "truncated", "one bit", *OTHER_CONTENT))
def test_damaged_checkpoints_are_refused_in_one_line(how, tmp_path, capsys):
    encoder = save_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:5000])
    elif how == "one bit":
        largest = max(encoder.parameters(), key=torch.numel)
        content[content.index(largest.detach().numpy().tobytes())] ^= 1
        path.write_bytes(content)
    else:
        torch.save(OTHER_CONTENT[how], path)
    with pytest.raises(ValueError):
        probe.load_encoder(tmp_path)
    assert capsys.readouterr().out == ""
    assert str(path) in refusal(capsys, probe.main, [str(tmp_path)])
    assert not (tmp_path / "probe.json").exists()


# -------------------------------------------------------------------------------------- the command

def test_the_command(few_glyphs, tmp_path, capsys):
    """It writes and prints the same: this encoder, and the random one that the seed draws."""
    encoder = save_run(tmp_path, epoch=7)
    probe.main([str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert result == json.loads((tmp_path / "probe.json").read_text())
    assert result.pop("method") == "h-ssl" and result.pop("epoch") == 7
    frozen = result.pop("frozen")
    glyphs = datasets.glyphs()
    assert result == probe.evaluate(encoder, glyphs, update_statistics=True)
    torch.manual_seed(SETTINGS["seed"])
    untrained = probe.make_encoder(SETTINGS)
    assert frozen == probe.evaluate(untrained, glyphs, update_statistics=True)
    assert frozen != result

    # What the checkpoint holds is measured again, but for the look at held-out images.
    save_run(tmp_path, frozen=dict(top1=12.5, held_out=dict(top1=15)))
    probe.main([str(tmp_path), "--device", "cpu"])
    again = json.loads(capsys.readouterr().out)["frozen"]
    assert again == frozen | dict(held_out=dict(top1=15))


def test_the_features_file(few_glyphs, tmp_path, capsys):
    """What the classifier reads, with names, and nothing else is written."""
    encoder = save_run(tmp_path)
    path = tmp_path / "features.npz"
    probe.main([str(tmp_path), "--device", "cpu", "--features", str(path)])
    assert capsys.readouterr().out == ""
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "features.npz"}
    glyphs = datasets.glyphs()
    probe.evaluate(encoder, glyphs, update_statistics=True)
    encoder.eval()
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["class_names"].tolist() == glyphs.class_names
        for split in ("train", "test"):
            images = getattr(glyphs, f"{split}_images")
            with torch.no_grad():
                maps = encoder(glyphs.batch(images, torch.arange(len(images))))
            assert np.array_equal(arrays[f"{split}_features"], readout(maps, 2))
            for kind in ("labels", "files"):
                name = f"{split}_{kind}"
                assert np.array_equal(arrays[name], getattr(glyphs, name))


@pytest.mark.parametrize("flags", ("--features absent/f.npz", "--device cuda"))
def test_what_the_command_refuses(flags, few_glyphs, tmp_path, capsys, monkeypatch):
    save_run(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(capsys, probe.main, [str(tmp_path), *flags.split()])
    assert line.startswith("probe.py: ")
