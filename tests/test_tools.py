"""The programs in experiments/ that need no finished runs: each does what it says."""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import benchmark
import data
import equivariance
import nuisances
import probe
import report
import simclr
from helpers import log_of, status_of, train_here
from hssl import Rotation, Translation
from layers import MNISTBackbone, Untied
from losses import nt_xent

SIMCLR = ("--dataset glyphs --device cpu --batch-size 64 --epochs 2 --widths 2 3 4 --kernel-size 3 "
          "--head-widths 16 8 --method").split()


@pytest.mark.parametrize("count", (2, 3, 4))
def test_multi_view_loss_is_that_of_a_plain_loop(count, float64):
    """For each projection and each partner: -log of the partner's share among all the others."""
    views = torch.randn(count, 5, 6)
    units = nn.functional.normalize(views, dim=-1).flatten(0, 1)
    terms = []
    for i in range(5 * count):
        shares = torch.exp(units @ units[i] / 0.3)
        others = shares.sum() - shares[i]
        for partner in range(i % 5, 5 * count, 5):
            if partner != i:
                terms.append(-torch.log(shares[partner] / others))
    loss = simclr.multi_view_nt_xent(*views, temperature=0.3)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    if count == 2:
        torch.testing.assert_close(loss, nt_xent(*views, temperature=0.3))
    with pytest.raises(ValueError):
        simclr.multi_view_nt_xent(*views, torch.ones(4, 6))


def augmented(x, seed):
    return simclr.augment(x, torch.Generator().manual_seed(seed))


def test_augment_moves_each_image_by_the_generator_and_keeps_what_it_shows(monkeypatch):
    x = torch.zeros(500, 2, 28, 28)
    x[:, :, 10:18, 12:16] = 1
    few = x[:6].double()
    first = augmented(few, 0)
    assert torch.equal(first, augmented(few, 0))
    assert not torch.equal(first, augmented(few, 1))
    assert first.shape == few.shape and first.dtype == few.dtype
    for i in range(6):
        for k in range(i):
            assert (first[i] - first[k]).abs().max() > 0.5

    # Without noise and bends: areas of e^-0.44 to e^0.44 times 32, near their place.
    def zeros(*shape, **options):
        return torch.zeros(*shape)

    monkeypatch.setattr(torch, "randn", zeros)
    moved = augmented(x, 0)[:, 0]
    area = moved.sum((1, 2))
    assert 32 * 0.6 < area.min() < 32 * 0.75
    assert 32 * 1.3 < area.max() < 32 * 1.65
    for along in (moved.sum(2), moved.sum(1)):
        centre = along @ torch.arange(28.0) / area
        assert (centre - 13.5).abs().max() < 4
        assert centre.std() > 0.5


def test_h_ssl_compares_two_views_of_each_copy():
    args = simclr.parse([*SIMCLR, "h-ssl"])
    args.image_shape = [1, 28]
    objective, pairs = simclr.make_objective(args)
    objective.eval()
    copies = torch.randn(2, 3, 1, 28, 28)
    g1, g2 = pairs[[0, 30, 60]].unbind(1)
    views = []
    for x in copies:
        z = objective.encoder(x)
        views.append(objective.head(objective.group.view(g1, z)))
        views.append(objective.head(objective.group.view(g2, z)))
    expected = simclr.multi_view_nt_xent(*views, temperature=0.5)
    torch.testing.assert_close(objective(*copies, g1, g2), expected)


@pytest.mark.parametrize("method", ("simclr", "h-ssl"))
def test_simclr_trains_a_run_that_probe_reads(method, few_glyphs, tmp_path):
    losses = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        simclr.main([*SIMCLR, method, "--seed", seed, "--out", str(tmp_path / name)])
        lines = log_of(tmp_path / name)
        assert [line["step"] for line in lines] == [3, 6]
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][1] < losses[0][0]

    run = tmp_path / "a"
    encoder, settings = probe.load_encoder(run)
    assert settings["method"] == method
    measures = probe.evaluate(encoder, data.load("glyphs"), settings["probe_grid"])
    result = json.loads((run / "probe.json").read_text())
    assert {name: result[name] for name in measures} == measures
    assert result["frozen"]["effective_rank"] != result["effective_rank"]

    before = (run / "checkpoint.pt").read_bytes()
    for more in ([], ["--resume"]):
        assert status_of(simclr.main, [*SIMCLR, method, "--out", str(run), *more]) == 2
    assert (run / "checkpoint.pt").read_bytes() == before


# A program that ends with a text prints it, and has status 1.
@pytest.mark.parametrize("flags, code", (
    ("--lr 1e38", "simclr.py: the loss is nan in epoch 1: take a lower --lr"),
    ("--objective byol", 2), ("--eval-every 1", 2), ("--structure none", 2),
    ("--batch-size 1000", 2),
))
def test_simclr_ends_when_it_diverges_and_refuses_what_it_does_not_do(
        flags, code, few_glyphs, tmp_path):
    flags = [*SIMCLR, "simclr", *flags.split(), "--out", str(tmp_path)]
    status = str(status_of(simclr.main, flags))
    assert status.replace("inf", "nan") == str(code)    # which of them depends on the machine
    assert not (tmp_path / "checkpoint.pt").exists()


def small(group="translation", group_size=1, **options):
    return MNISTBackbone(group, group_size, widths=(2, 3, 4), kernel_size=5, **options)


def test_every_layer_is_exact_where_the_theory_says_so_and_far_off_without_structure(float64):
    circular = small(padding_mode="circular")
    untied = Untied(MNISTBackbone(widths=(8, 12, 16), kernel_size=5), 4)
    for network, group, least, most in (
        (small("rotation", 4), Rotation(4), 0, 1e-10),
        (circular, Translation(7, 4, 4, circular=True), 0, 1e-10),
        (untied, Rotation(4), 0.5, math.inf),
    ):
        errors = equivariance.layer_errors(network, group, torch.randn(3, 1, 28, 28))
        assert len(errors) == 6
        assert least <= min(errors.values()) and max(errors.values()) < most


def ordinary_network():
    """8 pixels become maps of 8, 4, 8, 4 and 3 positions. Shifts by 2 pixels are exact."""
    first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
    more = [nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2)]
    network = nn.Sequential(first, *more, nn.Flatten())
    return network, Translation(4, 2, 2, circular=True), torch.randn(3, 1, 8, 8)


def test_a_network_of_one_s_own(capsys):
    torch.manual_seed(0)
    network, group, x = ordinary_network()
    errors = equivariance.layer_errors(network, group, x)
    # 3 positions are no whole number of pixels apart.
    assert list(errors) == ["1 Conv2d", "2 MaxPool2d", "3 Upsample", "4 MaxPool2d"]
    assert max(errors.values()) < 1e-6
    # Shifts by one pixel are exact for the first layer alone.
    errors = equivariance.layer_errors(network, Translation(8, 4, 1, circular=True), x)
    assert errors["1 Conv2d"] < 1e-6
    assert errors["3 Upsample"] > 0.3

    equivariance.main(["test_tools:ordinary_network"])
    assert "| 2 MaxPool2d |" in capsys.readouterr().out


def test_a_run_before_and_after_training(few_glyphs, tmp_path, capsys):
    train_here(tmp_path / "run", "--group", "rotation")
    columns = equivariance.run_before_and_after(tmp_path / "run", images=5)
    assert columns["before training"] != columns["after"]
    for errors in columns.values():
        assert len(errors) == 6
        assert max(errors.values()) < 1e-5
    equivariance.main([str(tmp_path / "run")])
    assert "| layer | before training | after |" in capsys.readouterr().out
    assert status_of(equivariance.main, [str(tmp_path)]) == 2
    assert "checkpoint.pt is missing" in capsys.readouterr().err


def test_the_table_of_fresh_networks(tmp_path, monkeypatch, capsys):
    def narrow(*arguments, widths=None):
        return small(*arguments) if widths is None else MNISTBackbone(widths=(8, 12, 16))

    monkeypatch.setattr(equivariance, "MNISTBackbone", narrow)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    columns = equivariance.fresh_networks(images=3, train_images=20)
    last = {title: errors["6 PerElement"] for title, errors in columns.items()}
    assert last.pop("quarter turns") < 1e-5
    assert list(last) == ["translation", "turns by 45°", "scale 1.41", "quarter turns, untied"]
    assert min(last.values()) > 0.05

    monkeypatch.setattr(equivariance, "fresh_networks", columns.copy)
    equivariance.main([])
    record = json.loads((tmp_path / "equivariance_fresh.json").read_text())
    assert record["tables"] == {"fresh networks": columns}
    assert "| 6 PerElement |" in capsys.readouterr().out


@pytest.mark.parametrize("nuisance", ("rotation", "scale", "translation"))
def test_nuisances_are_files_that_train_reads(nuisance, tmp_path):
    """MNIST is 30 training and 20 test images here, each a disc with its label."""
    raw = tmp_path / "tiny" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rows, columns = np.mgrid[-13.5:14, -13.5:14]
    disc = torch.from_numpy(200 * (rows**2 + columns**2 < 64))
    for name, count in (("train", 30), ("t10k", 20)):
        nuisances.write_idx(raw / f"{name}-images-idx3-ubyte", disc.expand(count, 28, 28))
        nuisances.write_idx(raw / f"{name}-labels-idx1-ubyte", torch.arange(count) % 10)
    flags = [nuisance, str(tmp_path / "moved"), "--data-dir", str(tmp_path / "tiny")]
    nuisances.main(flags)
    assert status_of(nuisances.main, flags) == 2    # what is there stays
    loaded = data.load("mnist", tmp_path / "moved")
    assert loaded.train_images.shape == (30, 1, 28, 28)
    assert loaded.test_labels.tolist() == list(range(10)) * 2

    moved = loaded.train_images.float()
    area = moved.sum((1, 2, 3)) / disc.sum()
    middle = moved.sum((1, 3)) @ torch.arange(28.0) / moved.sum((1, 2, 3)) - 13.5
    if nuisance == "rotation":    # a disc stays where it is
        assert (area - 1).abs().max() < 0.05
        assert (moved - disc).abs().mean() < 10
        assert (moved - moved[0]).abs().amax((1, 2, 3))[1:].min() > 1
    elif nuisance == "scale":
        assert area.min() < 0.3 and 0.7 < area.max() < 1.05
        assert middle.abs().max() < 0.2
    else:
        assert (area - (20 / 28) ** 2).abs().max() < 0.03
        assert (middle - middle.round()).abs().max() < 0.05
        assert middle.round().min() == -4 and middle.round().max() == 4


def test_peak_memory_is_the_most_that_is_held_at_once():
    def allocate():
        first = torch.ones(1000, 1000)    # 4 MB
        second = first + 1
        del first
        return second + 1

    assert 8_000_000 <= benchmark.peak_memory(allocate, "cpu") < 8_100_000


def test_relu_before_pooling_is_the_same_function(float64):
    x = torch.randn(2, 1, 28, 28)
    network = small()
    expected = network(x)
    torch.testing.assert_close(nn.Sequential(*network)(x), expected)    # without channels-last
    torch.testing.assert_close(benchmark.relu_first(network)(x), expected)
    order = [type(module).__name__ for module in network[1]]
    assert order == ["ReLU", "MaxPool2d", "BatchNorm2d"]


def test_the_benchmark_prints_and_keeps_every_comparison(monkeypatch, tmp_path, capsys):
    for package in ("timm", "lightly"):
        monkeypatch.setitem(sys.modules, package, None)    # as if it were not installed
    benchmark.main("--rows convolution lars nt_xent epoch --device cpu --batch-size 2 --repeats 1 "
                   "--results".split() + [str(tmp_path)])
    records = json.loads((tmp_path / "benchmark-cpu.json").read_text())["records"]
    assert [record["row"] for record in records] == ["convolution"] * 3 + ["lars", "epoch"]
    printed = capsys.readouterr().out
    for record in records:
        assert len(record["seconds"]) == len(record["reference_seconds"]) == 1
        assert benchmark.table_line(record) in printed
    record = dict(title="a / b", seconds=[4.0, 9.0, 2.0], reference_seconds=[2.0, 1.0, 5.0],
                  memory=3e6, reference_memory=2e6)
    assert benchmark.table_line(record) == "| a / b | 2.00 | 2,000.0 | 1.50 | 2.0 |"


@pytest.mark.parametrize("method", ("a-ssl", "h-ssl"))
def test_a_benchmark_step_of_every_kind_trains(method):
    args = SimpleNamespace(device="cpu", batch_size=2)
    step = benchmark.Step(args, method, "translation", "off")
    before = [p.detach().clone() for p in step.objective.encoder.parameters()]
    step()
    after = step.objective.encoder.parameters()
    assert any(not torch.equal(p, q) for p, q in zip(after, before))
