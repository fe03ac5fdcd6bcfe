"""The programs in experiments/ that need no finished runs: each does what it says."""
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import crops
import data
import equivariance
import probe
import report
import simclr
import train
from helpers import ROOT, SMALL, log_of, status_of
from hssl import Rotation, Translation
from layers import MNISTBackbone, Untied


@pytest.fixture(autouse=True)
def unchanged_train(monkeypatch):
    """The scripts put something of their own in the place of these."""
    monkeypatch.setattr(train, "Translation", train.Translation)
    monkeypatch.setattr(train, "make_objective", train.make_objective)


def test_simclr_trains_a_run_that_probe_reads(few_glyphs, tmp_path, monkeypatch):
    """The first loss is NT-Xent of two augmented copies; without augmentation it is lower."""
    simclr_flags = ["--dataset", "glyphs", *SMALL]
    losses = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        simclr.main([*simclr_flags, "--seed", seed, "--out", str(tmp_path / name)])
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]

    run = tmp_path / "a"
    encoder, settings = probe.load_encoder(run)
    measures = probe.evaluate(encoder, data.load("glyphs"), settings["probe_grid"])
    result = json.loads((run / "probe.json").read_text())
    assert {name: result[name] for name in measures} == measures
    flags = [*simclr_flags, "--out", str(run), "--resume"]    # it is no run of train.py
    assert status_of(train.main, train.parse(flags)) == 2
    assert status_of(report.run, simclr.main, [*simclr_flags, "--method", "a-ssl"]) == 2

    def unchanged(x, generator):
        assert not torch.is_autocast_enabled("cpu")    # positions are too fine for bfloat16
        return x

    monkeypatch.setattr(simclr, "augment", unchanged)
    simclr.main([*simclr_flags, "--out", str(tmp_path / "d"), "--amp", "bfloat16"])
    assert log_of(tmp_path / "d")[0]["loss"] < losses[0][0]


@pytest.mark.parametrize("circular", (False, True))
def test_a_crop_is_the_window_of_the_shifted_image(circular):
    group = crops.Crops(7, 3, 4, circular)
    x = torch.randn(len(group.elements), 2, 28, 28)
    cut = group.T(group.elements, x)
    assert cut.shape == (len(x), 2, 12, 12)
    for image, g, crop in zip(x, group.elements.tolist(), cut):
        rows = [(4 * (2 - g[0]) + i) % 28 for i in range(12)]
        columns = [(4 * (2 - g[1]) + i) % 28 for i in range(12)]
        assert torch.equal(crop, image[:, rows][:, :, columns])


def test_crops_train_and_are_told_apart(few_glyphs, tmp_path, monkeypatch):
    flags = ["--dataset", "glyphs", *SMALL, "--base-space", "2", "--grid", "0", "--resume",
             "--method", "a-ssl"]
    monkeypatch.chdir(tmp_path)
    crops.main(flags)
    run = "runs/glyphs-crops-translation-0"
    checkpoint = torch.load(f"{run}/checkpoint.pt", weights_only=True)
    assert checkpoint["objective"]["head.layers.0.weight"].shape == (16, 2 * 2 * 4)
    monkeypatch.setattr(train, "Translation", Translation)
    assert status_of(train.main, train.parse([*flags, "--out", run])) == 2
    assert status_of(report.run, crops.main, [*flags, "--method", "h-ssl"]) == 2


def test_every_layer_is_exact_where_the_theory_says_so_and_far_off_without_structure(float64):
    narrow = dict(widths=(2, 3, 4), kernel_size=5)
    turned = MNISTBackbone("rotation", 4, **narrow)
    circular = MNISTBackbone(padding_mode="circular", **narrow)
    untied = Untied(MNISTBackbone(widths=(8, 12, 16), kernel_size=5), 4)
    for network, group, least, most in (
        (turned, Rotation(4), 0, 1e-10),
        (circular, Translation(7, 4, 4, circular=True), 0, 1e-10),
        (untied, Rotation(4), 0.5, math.inf),
    ):
        errors = equivariance.layer_errors(network, group, torch.randn(3, 1, 28, 28))
        assert len(errors) == len(turned.layers)
        assert least <= min(errors.values()) and max(errors.values()) < most


def test_a_broken_copy_of_one_s_own_is_seen(tmp_path):
    """The current folder's hssl.py, here with turns the wrong way, comes before the project's."""
    right = (ROOT / "hssl.py").read_text(encoding="utf-8")
    broken = right.replace("rot90(k, ", "rot90(-k, ")
    assert broken != right
    (tmp_path / "hssl.py").write_text(broken, encoding="utf-8")
    (tmp_path / "train.py").write_text("""import torch, hssl, layers
def make():
    network = layers.MNISTBackbone("rotation", 4, widths=(2, 3, 4))
    return network, hssl.Rotation(4), torch.randn(2, 1, 28, 28)
""")
    command = [sys.executable, str(ROOT / "experiments" / "equivariance.py"), "train:make"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    errors = [float(line.split()[-2]) for line in printed.splitlines()[2:]]
    assert len(errors) == 8 and min(errors) > 0.1
