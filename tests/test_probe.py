"""From an encoder to numbers: the measures, whole encoders, checkpoints, the command."""
import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data as datasets
import probe
from helpers import refusal
from layers import DenseBackbone, ResidualBackbone, Untied

SETTINGS = dict(
    dataset="glyphs", method="h-ssl", group="translation", group_size=1, widths=[2, 3, 4],
    image_shape=[1, 28], kernel_size=3, structure="group", scale_step=1.41, extent=None,
    padding="zeros", amp="off", device="cpu", seed=0, train_images=None, image_size=None,
    validate=None, data_dir="datasets", cache_dir="datasets", probe_grid=2)


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
    return datasets.Dataset(images[labels], labels, images[answers], answers, list("abcd"),
                            mean=0.0, std=1 / 255)


def pixels():
    """The images themselves, (B, 1, H, W), as features of one group element."""
    return nn.Unflatten(1, (1, 1))


def test_effective_rank():
    """Singular values of 3 and 1, whatever the mean and the shape."""
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    wide = torch.cat([x, torch.zeros(4, 50_000)], 1)    # whose covariance would take 20 GB
    expected = 0.75 ** -0.75 * 0.25 ** -0.25    # the exponential of the entropy
    for features in (x, 1e-9 * x, wide - 5):
        assert probe.effective_rank(features) == pytest.approx(expected)
    assert probe.effective_rank(x[:1]) == 1


def test_neighbours_are_those_of_a_loop():
    """Votes of the 20 most similar, weighted by exp(s/0.1)."""
    x, labels = clusters(150, 3, 5, deviation=3)
    queries, answers = clusters(300, 3, 5, deviation=3, seed=1)
    hits = 0
    for query, answer in zip(queries, answers):
        s = F.cosine_similarity(x - x.mean(0), (query - x.mean(0))[None])
        votes = torch.zeros(3)
        for i in s.argsort(descending=True)[:20]:
            votes[labels[i]] += (s[i] / 0.1).exp()
        hits += (votes.argmax() == answer).item()
    found = probe.neighbours(x, labels, queries, answers, 3)
    assert 40 < found < 90 and found == pytest.approx(100 * hits / 300, abs=0.4)


@pytest.mark.parametrize("factor, constant", ((1, 14.62), (1e-9, 3.3), (1e9, 0.0)))
def test_neither_size_nor_a_constant_dimension_matters(factor, constant):
    """The constant varies by rounding in training, by 0.001 in the test."""
    x, labels = clusters(1000, 4, 6, deviation=1)
    test, answers = clusters(1000, 4, 6, deviation=1, seed=1)
    right = probe.linear_classifier(x, labels, test, answers, 4)
    assert 85 < right < 99
    column = torch.full((1000, 1), constant)
    column[::2] = column[::2].nextafter(torch.tensor(20.0))
    x = factor * torch.cat([x, column], 1)
    test = factor * torch.cat([test, column + 0.001], 1)
    z, z_test = probe.standardise(x, test)
    assert not z[:, -1].any() and not z_test[:, -1].any()
    # Both are trained to within 1e-3 nats of the minimum: a few of 1,000 rows may change sides.
    assert probe.linear_classifier(x, labels, test, answers, 4) == pytest.approx(right, abs=0.3)
    # A difference of the same size that is there in training is kept.
    x[::2, -1] += factor * 0.001
    z, _ = probe.standardise(x, test)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(7), atol=0.02, rtol=0)


@pytest.mark.parametrize("penalty, size", ((1e-1, 10), (1e-4, 3)))
def test_softmax_regression_ends_near_its_minimum(penalty, size):
    """By Newton's method in float64: what is left is within the gap, which follows from ∇W."""
    x, labels = clusters(300, 3, 4, deviation=2)
    x = x * torch.tensor([size, 1, 1, 1 / size])    # columns of unlike sizes
    weights, gap = probe.softmax_regression(x, labels, penalty, torch.ones(4, 3))

    def objective(w):
        cross_entropy = F.cross_entropy(x.double() @ w, labels)
        return cross_entropy + penalty / 2 * w.square().sum()

    w = weights.double()
    gradient = torch.func.grad(objective)(w)
    bound = gradient.square().sum() / (2 * penalty)
    assert gap <= 1e-3 and gap == pytest.approx(bound.item(), rel=0.05, abs=1e-6)
    for _ in range(20):
        hessian = torch.func.hessian(objective)(w).reshape(12, 12)
        w = w - torch.linalg.solve(hessian, gradient.flatten()).view(4, 3)
        gradient = torch.func.grad(objective)(w)
    assert gradient.abs().max() < 1e-9
    assert -1e-9 <= objective(weights.double()) - objective(w) <= bound


def test_the_linear_classifier_has_biases_and_takes_more_columns_than_rows():
    """Features that tell nothing: the larger class, the second, is the best guess."""
    labels = (torch.arange(100) >= 10).long()
    for columns in (3, 50_000):
        x = torch.ones(100, columns)
        assert probe.linear_classifier(x, labels, x, labels, 2) == 90


@pytest.mark.parametrize("deviation, tried", ((1000, 2), (0.1, 6)))
def test_the_penalty_is_the_last_before_the_loss_rises(deviation, tried, monkeypatch):
    """Of noise the strongest, of points that are classes the weakest; then all rows are taken."""
    x, labels = clusters(400, 3, 30, deviation)
    penalties = []

    def recording(x, labels, penalty, start, regression=probe.softmax_regression):
        penalties.append((len(x), penalty))
        return regression(x, labels, penalty, start)

    monkeypatch.setattr(probe, "softmax_regression", recording)
    probe.linear_classifier(x, labels, x, labels, 3)
    chosen = probe.PENALTIES[0 if tried == 2 else -1]
    assert penalties == [(380, penalty) for penalty in probe.PENALTIES[:tried]] + [(400, chosen)]


def test_evaluate_on_what_can_be_solved():
    """One pixel of four tells the class: all is known on 2x2 cells, nothing of their mean."""
    expected = dict(top1=100, neighbours=100, effective_rank=3, mean_top1=25, mean_neighbours=25,
                    mean_effective_rank=1, dimensions=4, train_images=80, test_images=8)
    assert probe.evaluate(pixels(), corners(), grid=0) == expected
    assert probe.evaluate(pixels(), corners(), grid=2) == expected
    result = probe.evaluate(pixels(), corners(), grid=1)
    assert result["top1"] == result["mean_top1"] == 25 and result["dimensions"] == 1
    with pytest.raises(ValueError, match=r"\(80, 1, 2, 2\)"):
        probe.evaluate(nn.Identity(), corners())


@pytest.mark.parametrize("label", (-1, 1))
def test_nothing_to_classify(label):
    """No labels, or one class: the effective rank is all that can be said."""
    names = ["a", "b"] if label == 1 else []
    data = dataclasses.replace(corners(), train_labels=torch.full((80,), label),
                               test_labels=torch.full((8,), label), class_names=names)
    result = probe.evaluate(pixels(), data)
    for name in ("top1", "neighbours", "mean_top1", "mean_neighbours"):
        assert result[name] is None
    assert probe.in_words(result) == "effective rank 3.00"


@pytest.mark.parametrize("value", (float("nan"), -float("inf")))
def test_features_that_are_not_finite_are_counted(value):
    def spoil(module, inputs, maps):
        return maps.masked_fill(maps[..., :1, :1] > 0, value)    # class 0

    encoder = pixels()
    encoder.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="features of 20 of 80 images are not finite"):
        probe.evaluate(encoder, corners())


def test_statistics_are_exact_and_modes_and_momenta_are_kept():
    """Also where the encoder raises, and of a batch norm that was frozen."""
    encoder = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(),
                            nn.Unflatten(1, (3, 1)))
    convolution, norm, dropout, _ = encoder
    norm.eval()
    data = corners(1001)    # of which a batch of one image could be left over
    before = copy.deepcopy(encoder.state_dict())
    probe.evaluate(encoder, data)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    probe.take_statistics(encoder, data)
    inputs = convolution(data.train_images.float())
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    statistics = norm.running_mean.clone()
    norm.reset_running_stats()
    probe.evaluate(encoder, data, update_statistics=True)
    assert torch.equal(norm.running_mean, statistics)
    colour = dataclasses.replace(data, train_images=data.train_images.repeat(1, 3, 1, 1))
    for program in (probe.take_statistics, probe.evaluate):
        with pytest.raises(RuntimeError, match="channels"):
            program(encoder, colour)
        assert encoder.training and dropout.training
        assert not norm.training and norm.momentum == 0.3


@pytest.mark.parametrize("before", ("none", "tf32"))
def test_full_precision_is_set_and_taken_back(before):
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    with probe.kept(backends, "fp32_precision"):
        backends[0].fp32_precision = before
        outside = [backend.fp32_precision for backend in backends]
        for amp, expected in (("off", ["ieee", "ieee"]), ("bfloat16", outside)):
            with pytest.raises(ZeroDivisionError), probe.full_precision(amp):
                assert [backend.fp32_precision for backend in backends] == expected
                1 / 0
            assert [backend.fp32_precision for backend in backends] == outside
            with torch.backends.cudnn.flags():    # raises where settings contradict each other
                pass


def test_split_training_is_the_same_for_every_seed():
    """With sorted labels no class would be in both the first fifth and the last twentieth."""
    part = probe.split_training(corners(1000))
    torch.manual_seed(1)
    again = probe.split_training(corners(1000))
    assert len(part.train_images) == 200 and len(part.test_images) == 50
    assert torch.equal(part.train_images, again.train_images)
    for labels in (part.train_labels, part.test_labels):
        assert labels.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("changes, kind", (
    (dict(widths=[2, 3, 4, 5]), ResidualBackbone),
    (dict(structure="none"), DenseBackbone),
    (dict(structure="none", group="rotation", group_size=4, kernel_size=5), Untied),
))
def test_make_encoder(changes, kind):
    settings = SETTINGS | changes | dict(backbone="of an older version")
    encoder = probe.make_encoder(settings)
    assert type(encoder) is kind
    shape = (2, settings["widths"][-1], settings["group_size"], 7, 7)
    assert encoder(torch.rand(2, 1, 28, 28)).shape == shape


def save_run(folder, **more):
    """A run's folder with a checkpoint of a small encoder, which has no training behind it."""
    torch.manual_seed(1)
    encoder = probe.make_encoder(SETTINGS)
    torch.save(dict(encoder=encoder.state_dict(), settings=SETTINGS) | more,
               folder / "checkpoint.pt")
    return encoder


@pytest.mark.parametrize("how", ("missing", "one bit", "no settings", "old"))
def test_checkpoints_that_are_refused_in_one_line(how, tmp_path, capsys):
    """An old one has no basis in it."""
    encoder = save_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    weights = encoder.state_dict()
    if how == "missing":
        path.unlink()
    elif how == "one bit":
        largest = max(encoder.parameters(), key=torch.numel)
        content[content.index(largest.detach().numpy().tobytes())] ^= 1
        path.write_bytes(content)
    elif how == "no settings":
        torch.save(dict(encoder=weights), path)
    else:
        old = {name: value for name, value in weights.items() if not name.endswith("basis")}
        assert len(old) < len(weights)
        save_run(tmp_path, encoder=old)
    with pytest.raises(ValueError):
        probe.load_encoder(tmp_path)
    line = refusal(capsys, probe.main, [str(tmp_path)])
    assert str(path) in line and "layers" not in line
    assert not (tmp_path / "probe.json").exists()


def test_the_command(few_glyphs, tmp_path, capsys):
    """It writes and prints the same: this encoder, and the random one that the seed draws. Where
    images or labels are not known to be the run's, it prints alone."""
    glyphs = datasets.glyphs()
    settings = SETTINGS | dict(images_hash=glyphs.digest())
    encoder = save_run(tmp_path, epoch=7, settings=settings, frozen=dict(top1=12.5, held_out={}))
    probe.main([str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    result = json.loads(printed)
    written = tmp_path / "probe.json"
    assert printed.count("\n") == 1 and result == json.loads(written.read_text())
    assert result.pop("method") == "h-ssl" and result.pop("epoch") == 7
    frozen = result.pop("frozen")
    assert result == probe.evaluate(encoder, glyphs, update_statistics=True)
    torch.manual_seed(SETTINGS["seed"])
    untrained = probe.evaluate(probe.make_encoder(SETTINGS), glyphs, update_statistics=True)
    # What the checkpoint holds is measured again, but for the look at held-out images.
    assert frozen == untrained | dict(held_out={}) and frozen["top1"] != 12.5

    for images_hash in (None, "0" * 64):
        save_run(tmp_path, epoch=8, settings=settings | dict(images_hash=images_hash))
        probe.main([str(tmp_path), "--device", "cpu"])
        output = capsys.readouterr()
        assert json.loads(output.out)["epoch"] == 8 and output.err.count("\n") == 1
        assert json.loads(written.read_text())["epoch"] == 7
