"""The programs in experiments/ that need no finished runs: each does what it says."""
import json

import numpy as np
import pytest
import torch
from torch import nn

import benchmark
import data
import equivariance
import nuisances
import probe
import simclr
from helpers import log_of, status_of, train_here
from hssl import Rotation, Translation
from layers import MNISTBackbone, Untied
from losses import nt_xent

SMALL = ("--dataset glyphs --device cpu --batch-size 64 --epochs 2 --widths 2 3 4 --kernel-size 3 "
         "--head-widths 16 8").split()
WIDTHS = (2, 3, 4)


# ---------------------------------------------------------------------------------------- simclr.py

@pytest.mark.parametrize("count", (2, 3, 4))
def test_multi_view_loss_is_that_of_a_plain_loop(count, float64):
    """For each projection and each partner: -log of the partner's share among all the others."""
    views = [torch.randn(5, 6) for _ in range(count)]
    terms = []
    for v in range(count):
        for i in range(5):
            total = 0.0
            partners = []
            for w in range(count):
                for k in range(5):
                    if (w, k) == (v, i):
                        continue
                    term = torch.exp(torch.cosine_similarity(views[v][i], views[w][k], dim=0) / 0.3)
                    total += term
                    if k == i:
                        partners.append(term)
            terms += [-torch.log(partner / total) for partner in partners]
    loss = simclr.multi_view_nt_xent(*views, temperature=0.3)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    if count == 2:
        torch.testing.assert_close(loss, nt_xent(*views, temperature=0.3))


def test_multi_view_loss_refuses_views_that_do_not_fit():
    with pytest.raises(ValueError):
        simclr.multi_view_nt_xent(torch.ones(4, 3), torch.ones(4, 3), torch.ones(5, 3))


def bright_square(count):
    x = torch.zeros(count, 2, 28, 28)
    x[:, :, 10:18, 12:16] = 1
    return x


def augmented(x, seed):
    return simclr.augment(x, torch.Generator().manual_seed(seed))


def test_augment_depends_on_the_generator_alone_and_moves_each_image_differently():
    x = bright_square(6).double()
    first = augmented(x, 0)
    assert torch.equal(first, augmented(x, 0))
    assert not torch.equal(first, augmented(x, 1))
    assert first.shape == x.shape and first.dtype == x.dtype
    for i in range(6):
        for k in range(i):
            assert (first[i] - first[k]).abs().max() > 0.5


def test_augment_keeps_what_the_image_shows(monkeypatch):
    """Without noise and bends: areas of e^-0.44 to e^0.44 times 32, near their place."""

    def zeros(*shape, **options):
        return torch.zeros(*shape)

    monkeypatch.setattr(torch, "randn", zeros)
    x = augmented(bright_square(500), 0)[:, 0]
    area = x.sum((1, 2))
    assert 32 * 0.6 < area.min() < 32 * 0.75
    assert 32 * 1.3 < area.max() < 32 * 1.65
    place = torch.arange(28.0)
    for along in (x.sum(2), x.sum(1)):
        centre = along @ place / area
        assert (centre - 13.5).abs().max() < 4
        assert centre.std() > 0.5


def test_h_ssl_compares_two_views_of_each_copy():
    torch.manual_seed(0)
    group = Translation(7, 5, 4)
    encoder = MNISTBackbone(widths=WIDTHS, kernel_size=3).eval()
    objective = simclr.AugmentedHSSL(encoder, nn.Flatten(), 0.5, group)
    copies = torch.randn(2, 3, 1, 28, 28)
    elements = group.elements[torch.tensor([[0, 1, 2], [5, 4, 3]])]
    views = []
    for x in copies:
        for g in elements:
            views.append(group.view(g, encoder(x)).flatten(1))
    expected = simclr.multi_view_nt_xent(*views, temperature=0.5)
    torch.testing.assert_close(objective(*copies, *elements), expected)


@pytest.mark.parametrize("method", ("simclr", "h-ssl"))
def test_simclr_trains_a_run_that_probe_reads(method, few_glyphs, tmp_path, capsys):
    flags = ["--method", method, *SMALL, "--out", str(tmp_path)]
    simclr.main(flags)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[1]["loss"] < lines[0]["loss"]

    encoder, settings = probe.load_encoder(tmp_path)
    assert settings["method"] == method
    measures = probe.evaluate(encoder, data.load("glyphs"), settings["probe_grid"])
    result = json.loads((tmp_path / "probe.json").read_text())
    assert {name: result[name] for name in measures} == measures
    assert result["frozen"]["effective_rank"] != result["effective_rank"]

    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert status_of(simclr.main, flags) == 2
    assert status_of(simclr.main, [*flags, "--resume"]) == 2
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_simclr_s_numbers_depend_on_the_seed_alone(few_glyphs, tmp_path):
    losses = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / name
        simclr.main(["--method", "simclr", *SMALL, "--seed", seed, "--out", str(out)])
        losses.append([line["loss"] for line in log_of(out)])
    assert losses[0] == losses[1] != losses[2]


def test_simclr_ends_when_it_diverges_and_refuses_what_it_does_not_do(few_glyphs, tmp_path):
    flags = ["--method", "simclr", *SMALL]
    assert status_of(simclr.main, [*flags, "--lr", "1e38", "--out", str(tmp_path / "a")]) == 1
    for others in (["--objective", "byol"], ["--eval-every", "1"], ["--batch-size", "1000"]):
        assert status_of(simclr.main, [*flags, *others, "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------- equivariance.py

def small(group="translation", group_size=1, **options):
    return MNISTBackbone(group, group_size, widths=WIDTHS, kernel_size=5, **options)


def test_every_layer_is_exact_where_the_theory_says_so_and_far_off_without_structure(float64):
    x = torch.randn(3, 1, 28, 28)
    for network, group in [
        (small("rotation", 4), Rotation(4)),
        (small(padding_mode="circular"), Translation(7, 4, 4, circular=True)),
    ]:
        errors = equivariance.layer_errors(network, group, x)
        assert len(errors) == 6
        assert max(errors.values()) < 1e-10
    untied = Untied(MNISTBackbone(widths=(8, 12, 16), kernel_size=5), 4)
    errors = equivariance.layer_errors(untied, Rotation(4), x)
    assert len(errors) == 6
    assert min(errors.values()) > 0.5


def ordinary_network():
    """8 pixels become maps of 8, 4, 8, 4 and 3 positions. Shifts by 2 pixels are exact."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2),
        nn.Flatten(),
    )
    return network, Translation(4, 2, 2, circular=True), torch.randn(3, 1, 8, 8)


def strided_network():
    """A stride of 2 breaks shifts by one pixel, and says so from there on."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
                            nn.Conv2d(2, 2, 1, stride=2),
                            nn.Upsample(scale_factor=2))
    return network, Translation(8, 4, 1, circular=True), torch.randn(3, 1, 8, 8)


def test_a_network_of_one_s_own(tmp_path, capsys):
    torch.manual_seed(0)
    errors = equivariance.layer_errors(*ordinary_network())
    # 3 positions are no whole number of pixels apart.
    assert list(errors) == ["1 Conv2d", "2 MaxPool2d", "3 Upsample", "4 MaxPool2d"]
    assert max(errors.values()) < 1e-6
    errors = equivariance.layer_errors(*strided_network())
    assert errors["1 Conv2d"] < 1e-6
    assert errors["3 Upsample"] > 0.3

    equivariance.main(["test_tools:ordinary_network", "--results", str(tmp_path)])
    assert "| 2 MaxPool2d |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for name in ("test_tools:no_such", "no_such_module:f", str(tmp_path)):
        assert status_of(equivariance.main, [name]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_before_and_after_training(few_glyphs, tmp_path, capsys):
    train_here(tmp_path / "run", "--group", "rotation")
    equivariance.main([str(tmp_path / "run"), "--images", "5", "--results", str(tmp_path)])
    columns = json.loads((tmp_path / "equivariance_error.json").read_text())["tables"]["run"]
    assert list(columns) == ["before training", "after"]
    assert columns["before training"] != columns["after"]
    for errors in columns.values():
        assert len(errors) == 6
        assert max(errors.values()) < 1e-5
    assert "| layer | before training | after |" in capsys.readouterr().out


def test_the_table_of_fresh_networks(few_glyphs, monkeypatch):
    def narrow(*arguments, widths=None):
        return small(*arguments) if widths is None else MNISTBackbone(widths=(8, 12, 16))

    monkeypatch.setattr(equivariance, "MNISTBackbone", narrow)
    columns = equivariance.fresh_networks(images=3, train_images=20)
    last = {title: errors["6 PerElement"] for title, errors in columns.items()}
    assert last.pop("quarter turns") < 1e-5
    assert list(last) == ["translation", "turns by 45°", "scale 1.41", "quarter turns, untied"]
    assert min(last.values()) > 0.05


# ------------------------------------------------------------------------------------- nuisances.py

@pytest.fixture
def tiny_mnist(tmp_path):
    """A folder with MNIST of 30 training and 20 test images, each a disc with its label."""
    raw = tmp_path / "tiny" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rows, columns = np.mgrid[-13.5:14, -13.5:14]
    disc = 200 * (rows**2 + columns**2 < 64).astype(np.uint8)
    for name, count in (("train", 30), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        nuisances.write_idx(raw / f"{name}-images-idx3-ubyte", np.stack([disc] * count))
        nuisances.write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return tmp_path / "tiny"


@pytest.mark.parametrize("nuisance", ("rotation", "scale", "translation"))
def test_nuisances_are_files_that_train_reads(nuisance, tiny_mnist, tmp_path):
    loaded = []
    for seed in ("0", "1"):
        out = tmp_path / f"{nuisance}-{seed}"
        flags = [nuisance, str(out), "--data-dir", str(tiny_mnist), "--seed", seed]
        nuisances.main(flags)
        assert status_of(nuisances.main, flags) == 2    # what is there stays
        loaded.append(data.load("mnist", out))
    first, second = loaded
    assert first.train_images.shape == (30, 1, 28, 28)
    assert first.test_labels.tolist() == list(range(10)) * 2
    assert torch.equal(first.test_images, second.test_images)    # whatever the seed
    assert not torch.equal(first.train_images, second.train_images)

    original = data.load("mnist", tiny_mnist).train_images.float()
    moved = first.train_images.float()
    area = moved.sum((1, 2, 3)) / original.sum((1, 2, 3))
    rows = moved.sum((1, 3)) @ torch.arange(28.0) / moved.sum((1, 2, 3)) - 13.5
    if nuisance == "rotation":    # a disc stays where it is
        assert (area - 1).abs().max() < 0.05
        assert (moved - original).abs().mean() < 10
        assert (moved - moved[0]).abs().amax((1, 2, 3))[1:].min() > 1
    if nuisance == "scale":
        assert area.min() < 0.3 and 0.7 < area.max() < 1.05
        assert rows.abs().max() < 0.2
    if nuisance == "translation":
        assert (area - (20 / 28) ** 2).abs().max() < 0.03
        assert (rows - rows.round()).abs().max() < 0.05
        assert rows.round().min() == -4 and rows.round().max() == 4


# ------------------------------------------------------------------------------------- benchmark.py

def test_the_benchmark_s_ratios():
    record = dict(title="a / b", seconds=[4.0, 9.0, 2.0], reference_seconds=[2.0, 1.0, 5.0],
                  memory=3e6, reference_memory=2e6)
    assert benchmark.table_line(record) == "| a / b | 2.00 | 2.00 | 1.50 | 2,000.0 | 2.0 |"


def test_peak_memory_is_the_most_that_is_held_at_once():
    def allocate():
        first = torch.ones(1000, 1000)    # 4 MB
        second = first + 1
        del first
        return second + 1

    assert 8_000_000 <= benchmark.peak_memory(allocate, "cpu") < 8_100_000


def test_the_benchmark_s_variants_are_the_same_function(float64):
    x = torch.randn(2, 1, 28, 28)
    expected = small()(x)
    for change in (benchmark.relu_first, benchmark.contiguous, benchmark.relu_first_and_contiguous):
        torch.manual_seed(0)
        torch.randn(2, 1, 28, 28)
        changed = change(small())
        torch.testing.assert_close(changed(x), expected)
    order = [type(module).__name__ for module in benchmark.relu_first(small())[1]]
    assert order == ["ReLU", "MaxPool2d", "BatchNorm2d"]


def test_the_benchmark_prints_and_keeps_every_comparison(monkeypatch, tmp_path, capsys):
    def none_installed(module, name):
        return None

    monkeypatch.setattr(benchmark, "installed", none_installed)
    rows = ["convolution", "lars", "nt_xent", "epoch"]
    benchmark.main(["--rows", *rows, "--device", "cpu", "--batch-size", "2", "--repeats", "1",
                    "--results", str(tmp_path)])
    content = json.loads((tmp_path / "benchmark-cpu.json").read_text())
    records = content["records"]
    assert [record["row"] for record in records] == ["convolution"] * 3 + ["lars"] * 3 + rows[2:]
    printed = capsys.readouterr().out
    for record in records:
        assert benchmark.table_line(record) in printed
    missing = [record["title"] for record in records if "missing" in record]
    assert len(missing) == 3 and printed.count("not installed") == 3
    assert status_of(benchmark.main, ["--repeats", "0"]) == 2


def test_a_benchmark_step_of_every_kind_trains():
    args = benchmark.argparse.Namespace(device="cpu", batch_size=2)
    for method in ("a-ssl", "h-ssl"):
        step = benchmark.Step(args, method, "translation", "off")
        before = [p.detach().clone() for p in step.encoder.parameters()]
        step()
        moved = [not torch.equal(p, q) for p, q in zip(step.encoder.parameters(), before)]
        assert any(moved)
