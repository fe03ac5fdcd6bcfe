"""What is said of a representation beside the classifier: neighbours, rank, spread, few labels; also in training."""
import json

import pytest
import torch
import torch.nn.functional as F

import data
import probe
import run
from helpers import log_of, train_here

MEASURES = ["linear", "neighbours", "effective_rank", "spread"]


def clusters(count, classes, dimensions, deviation=0.1, seed=0):
    """count points (N, D) around as many far centres as there are classes, and their labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = deviation * torch.randn(count, dimensions, generator=generator)
    return 3 * torch.eye(classes, dimensions)[labels] + noise, labels


def test_effective_rank():
    """One direction has rank 1, equal and uncorrelated ones have their number, and only ratios matter."""
    equal = torch.cat([torch.eye(8), -torch.eye(8)])
    assert probe.effective_rank(equal) == pytest.approx(8)
    assert probe.effective_rank(100 * equal + 5) == pytest.approx(8)
    assert probe.effective_rank(torch.arange(10.0)[:, None] * torch.ones(1, 8)) == pytest.approx(1, abs=1e-3)
    uneven = torch.cat([torch.diag(torch.tensor([3.0, 1.0])), -torch.diag(torch.tensor([3.0, 1.0]))])
    p = torch.tensor([0.75, 0.25])                                             # singular values 3 : 1
    assert probe.effective_rank(uneven) == pytest.approx((-(p * p.log()).sum()).exp().item())
    assert probe.effective_rank(torch.ones(5, 4)) == pytest.approx(1)          # nothing varies


def test_spread():
    """0 for a collapse to one point, near 1 for noise without a direction, below for a mean that stands out."""
    noise = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert probe.spread(noise) == pytest.approx(1, abs=0.01)
    assert probe.spread(noise + 2) == pytest.approx(5**-0.5, abs=0.02)         # lengths grow by √(1 + 2²)
    assert probe.spread(1e-4 * noise + 1) < 1e-3


def test_neighbours_are_those_of_a_loop():
    """Votes of the 20 most similar, weighted by exp(s / 0.1), for every query by itself."""
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(150, 5, generator=generator) + 1, torch.randn(1100, 5, generator=generator) + 1
    labels, answers = torch.randint(3, (150,), generator=generator), torch.randint(3, (1100,), generator=generator)
    hits = 0
    for query, answer in zip(queries, answers):
        s = F.cosine_similarity(x - x.mean(0), (query - x.mean(0))[None])
        votes = [0.0, 0.0, 0.0]
        for i in s.argsort(descending=True)[:20]:
            votes[labels[i]] += (s[i] / 0.1).exp().item()
        hits += votes.index(max(votes)) == answer
    assert probe.neighbours(x, labels, queries, answers, 3) == pytest.approx(100 * hits / 1100)
    assert 20 < 100 * hits / 1100 < 50                                         # chance, for these labels mean nothing


def test_neighbours_of_fewer_than_twenty():
    x, labels = clusters(6, 3, 4)
    assert probe.neighbours(x, labels, x, labels, 3) == 100


def test_few_labels():
    """Far classes need one label each; overlapping ones gain by more; a number that a class has not is left out."""
    x, labels = clusters(250, 5, 8)
    test, test_labels = clusters(100, 5, 8, seed=1)
    easy = probe.few_labels(x, labels, test, test_labels, 5)
    assert list(easy) == ["1", "10"] and easy["1"] == easy["10"] == [100, 0]
    x, labels = clusters(2500, 5, 8, deviation=2)
    test, test_labels = clusters(2000, 5, 8, deviation=2, seed=1)
    hard = probe.few_labels(x, labels, test, test_labels, 5)
    assert hard["1"][0] + 5 < hard["10"][0] and hard["10"][0] + 2 < hard["100"][0] and hard["1"][1] > hard["100"][1] > 0
    assert probe.few_labels(x, labels, test, test_labels, 5) == hard
    assert probe.few_labels(x, labels, test, test_labels, 5, seed=1) != hard


def test_few_labels_chooses_its_penalty_on_images_that_it_does_not_draw(monkeypatch):
    """The last twentieth decides alone: with its labels permuted, other penalties win, and the test images lose."""
    x, labels = clusters(2500, 5, 8, deviation=2)
    test, test_labels = clusters(2000, 5, 8, deviation=2, seed=1)
    right = probe.few_labels(x, labels, test, test_labels, 5)
    wrong = labels.clone()
    wrong[-125:] = (labels[-125:] + 1) % 5
    assert probe.few_labels(x, wrong, test, test_labels, 5)["10"][0] < right["10"][0]
    drawn, original = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **options: drawn.append(a) or original(a, **options))
    x[-125:] += 1000
    probe.few_labels(x, labels, test, test_labels, 5)
    assert [len(a) for a in drawn] == [5] * 10 + [50] * 10 + [500] * 10
    assert all(a.abs().max() < 100 for a in drawn)


def test_looking_changes_nothing(few_glyphs, tmp_path, capsys):
    """--eval-every 2: lines of every second epoch say how encoder and frozen encoder do; the training is the same."""
    plain = train_here(tmp_path / "plain", "--epochs", "5")
    capsys.readouterr()
    watched = train_here(tmp_path / "watched", "--epochs", "5", "--eval-every", "2")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["neighbours" in line and "(frozen " in line for line in said] == [False, True, False, True, False]
    for name, value in plain["encoder"].items():
        assert torch.equal(value, watched["encoder"][name]), name
    log = log_of(tmp_path / "watched")
    with_measures = [line for line in log if "neighbours" in line]
    assert [(line["epoch"], line["step"]) for line in with_measures] == [(2, 6), (4, 12)]
    frozen = watched["frozen"]["held_out"]
    for line in with_measures:
        assert {name: line[f"frozen_{name}"] for name in MEASURES} == frozen
        assert 0 <= line["neighbours"] <= 100 and 1 <= line["effective_rank"] <= 64 and 0 < line["spread"] < 1
    assert with_measures[0]["effective_rank"] != frozen["effective_rank"]


def test_the_last_look_is_what_the_result_says(few_glyphs, tmp_path):
    """held_out in probe.json: the same measures, from the features that the classifier reads, for both encoders."""
    train_here(tmp_path, "--eval-every", "1")
    result, last = json.loads((tmp_path / "probe.json").read_text()), log_of(tmp_path)[-1]
    assert {name: last[name] for name in MEASURES} == result["held_out"]
    assert {name: last[f"frozen_{name}"] for name in MEASURES} == result["frozen"]["held_out"]
    assert list(result["few_labels"]) == list(result["frozen"]["few_labels"]) == ["1", "10"]
    assert all(name in result and name in result["frozen"] for name in ("top1", *MEASURES[1:]))
    assert result["frozen_top1"] == result["frozen"]["top1"]


def test_held_out():
    assert [probe.held_out(n) for n in (2, 200, 10_000, 60_000)] == [(1, 1), (40, 10), (2000, 500), (10_000, 2000)]


def test_images_without_labels(few_glyphs, monkeypatch, tmp_path, capsys):
    """A run ends with what can be said: rank and spread, and why there is no top-1; supervised training is refused."""
    few = data.glyphs()
    nothing = data.Dataset(few.train_images, few.train_labels * 0 - 1, few.test_images, few.test_labels * 0 - 1,
                           classes=0, mean=few.mean, std=few.std)
    monkeypatch.setattr(data, "glyphs", lambda: nothing)
    train_here(tmp_path / "run", "--eval-every", "1")
    printed = capsys.readouterr().out
    assert "no top-1: these images have no labels" in printed and "top-1 on" not in printed
    assert "effective rank of 64: frozen " in printed
    result = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert result["top1"] is None and result["test_images"] == 100 and "neighbours" not in result
    assert result["effective_rank"] > 1 and result["frozen"]["spread"] > 0
    assert "neighbours" not in log_of(tmp_path / "run")[-1] and "effective_rank" in log_of(tmp_path / "run")[-1]
    run.call(probe.main, probe.parse([str(tmp_path / "run"), "--device", "cpu", "--features", f"{tmp_path}/f.npz"]))
    assert set(json.loads(capsys.readouterr().out)) == {"train_features", "test_features"}
    train_here(tmp_path / "frozen", "--method", "frozen")
    with pytest.raises(SystemExit) as end:
        train_here(tmp_path / "supervised", "--method", "supervised")
    assert end.value.code == 2 and "needs labels" in capsys.readouterr().err


def test_an_overflow_is_no_traceback(few_glyphs):
    """Features that are not finite count as 0: LAPACK would refuse them."""
    some = data.load("glyphs", "unused", train_images=100)

    class Overflow(torch.nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1, None, :4, :4] > 1, x[:, :1, None, :4, :4], torch.inf)

    result = probe.probe(Overflow(), some, iterations=9)
    assert 0 <= result["top1"] <= 100 and result["effective_rank"] >= 1 and "1" in result["few_labels"]


# ------------------------------------------------------------------------------------------------------- the classifier
@pytest.mark.parametrize("penalty", (1e-1, 1e-3, 1e-5))
def test_the_classifier_is_at_its_minimum(penalty):
    """Newton's method in float64 finds no objective that is lower by more than the gap, from wherever it starts."""
    x, labels = clusters(300, 3, 6, deviation=2)

    def objective(weights):
        scores = x.to(weights.dtype) @ weights[:-1] + weights[-1]
        return F.cross_entropy(scores, labels) + penalty / 2 * weights.square().sum()

    least = torch.zeros(7, 3, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(objective)(least)
        hessian = torch.autograd.functional.hessian(objective, least).reshape(21, 21)
        least = least - torch.linalg.solve(hessian, gradient.flatten()).view(7, 3)
    assert torch.func.grad(objective)(least).norm() < 1e-9
    for start in (None, torch.randn(7, 3, generator=torch.Generator().manual_seed(0))):
        weights, gap = probe.softmax_regression(x, labels, 3, penalty, start)
        assert not weights.requires_grad and (gap <= 1e-4 or penalty < 1e-3)   # float32's losses resolve no more
        assert -1e-6 <= objective(weights.double()) - objective(least) <= gap + 1e-6
    early, gap = probe.softmax_regression(x, labels, 3, penalty, 10 * torch.ones(7, 3), iterations=1, tolerance=0)
    assert 0 <= objective(early.double()) - objective(least) <= gap            # the bound holds on the way, too


def test_the_penalty_is_chosen_on_images_that_the_classifier_does_not_see(monkeypatch):
    """With wrong labels in the last twentieth the strongest penalty is the best; the last training has all images."""
    x, labels = clusters(2000, 4, 8, deviation=2)
    test, test_labels = clusters(1000, 4, 8, deviation=2, seed=1)
    seen, original = [], probe.softmax_regression
    monkeypatch.setattr(probe, "softmax_regression",
                        lambda x, *rest: seen.append((len(x), rest[2])) or original(x, *rest))
    right = probe.assess(x, labels, test, test_labels, 4)
    assert seen == [(1900, penalty) for penalty in probe.PENALTIES] + [(2000, right["penalty"])]
    assert right["penalty"] < probe.PENALTIES[0] and right["train_loss"] < 1.3 and right["gap"] <= 1e-4
    wrong = labels.clone()
    wrong[-100:] = (labels[-100:] + 1) % 4
    assert probe.assess(x, wrong, test, test_labels, 4)["penalty"] == probe.PENALTIES[0]


def test_statistics_are_exact_for_trained_encoders_too(few_glyphs, tmp_path):
    """The last checkpoint's batch norm has the training images' own mean and variance, whatever the views were."""
    some = data.load("glyphs", "unused", train_images=200)
    for method in ("h-ssl", "a-ssl"):
        train_here(tmp_path / method, "--method", method)
        encoder, _ = run.load_encoder(tmp_path / method)
        norm = next(m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
        inputs = []
        norm.register_forward_hook(lambda module, given, output: inputs.append(given[0].detach()))
        encoder(some.batch(some.train_images, torch.arange(200)))
        torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, inputs[0].var((0, 2, 3)), rtol=1e-4, atol=1e-5)
