"""experiments/verdict.py on ten networks: five as they should be, and five with a fault that it must find."""
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import verdict
from helpers import train_here
from hssl import Rotation, Scale, Translation
from layers import (GroupConv2d, LiftingConv2d, MNISTBackbone, PerElement, ResidualBackbone, ResNet18Backbone,
                    Untied, steerable_basis)

SMALL = dict(widths=(2, 3, 4), kernel_size=5)
FILTERS = steerable_basis("rotation", 4, 5, 3, 0.9)


def lifted(*layers):
    return nn.Sequential(LiftingConv2d(1, 4, FILTERS), *layers)


def rectangular():
    """The top and bottom rows of every filter are cut off, at each orientation the same ones."""
    basis = FILTERS.clone()
    basis[..., (0, -1), :] = 0
    return nn.Sequential(LiftingConv2d(1, 4, FILTERS), GroupConv2d(4, 4, basis, 4, cyclic=True))


class NormOfEach(nn.BatchNorm2d):
    """Statistics for each channel and orientation: (B, C, G, H, W) with C x G features."""
    def forward(self, x):
        return super().forward(x.flatten(1, 2)).view_as(x)


def norm_of_each():
    network = lifted(PerElement(nn.ReLU()), NormOfEach(16))
    update_bn([verdict.smooth_images(50, 1, 28).cumsum(2)], network)
    return network


# name: network, group, side of the images, verdict, index of the first layer that is not exact, words of the cause
TURNS = Rotation(4)
NETWORKS = {
    "quarter turns": (lambda: MNISTBackbone("rotation", 4, **SMALL), TURNS, 28, "exact", None, ""),
    "residual, quarter turns": (
        lambda: ResidualBackbone("rotation", 4, (2, 3, 4, 5), 1, kernel_size=5), TURNS, 32, "exact", None, ""),
    "circular shifts": (
        lambda: MNISTBackbone(**SMALL, padding_mode="circular"), Translation(7, 4, 4, True), 28, "exact", None, ""),
    "ResNet-18, circular shifts": (
        lambda: ResNet18Backbone(96, padding_mode="circular"), Translation(3, 2, 32, True), 96, "exact", None, ""),
    "eight orientations": (
        lambda: MNISTBackbone("rotation", 8, (2, 3, 4), kernel_size=7), Rotation(8), 56, "approximate", 1, "none of"),
    "stride on an even map": (
        lambda: lifted(PerElement(nn.Conv2d(4, 4, 1, stride=2))), TURNS, 28, "broken", 2, "one corner of each cell"),
    "size not divisible": (
        lambda: lifted(PerElement(nn.MaxPool2d(2), nn.MaxPool2d(2))), TURNS, 30, "broken", 2, "not divisible"),
    "zero padding and shifts": (
        lambda: MNISTBackbone(**SMALL), Translation(7, 4, 4, True), 28, "broken", 1, "zero padding"),
    "window not round": (rectangular, TURNS, 28, "broken", 2, "window is not round"),
    "batch norm over the wrong axes": (norm_of_each, TURNS, 28, "broken", 3, "for each orientation"),
    "untied": (lambda: Untied(MNISTBackbone(widths=(4, 4, 4)), 4), TURNS, 28, "broken", 1, "not shared along the"),
    "whole maps": (lambda: MNISTBackbone(**SMALL), Translation(7, 7, 4), 28, "approximate", 1, "zero padding"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_verdict(name, capsys):
    make, group, side, expected, layer, words = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    channels = next(p for p in network.parameters() if p.ndim > 1).shape[1]
    word, first, causes = verdict.report(network, group, verdict.smooth_images(4, channels, side))
    printed = capsys.readouterr().out
    assert (word, first and int(first.split()[0])) == (expected, layer), printed
    assert words in printed.splitlines()[-1] and printed.count(f"| {expected} |") >= 1


def test_scales_are_approximate_and_ordinary_networks_are_not():
    torch.manual_seed(0)
    scale = MNISTBackbone("scale", 3, **SMALL | dict(kernel_size=7))
    assert verdict.judge(torch.tensor(0.4), Scale(3, 1.41)) == "approximate"
    assert verdict.report(scale, Scale(3, 1.41), verdict.smooth_images(4, 1, 56))[0] in ("approximate", "broken")
    ordinary = nn.Sequential(LiftingConv2d(1, 4, FILTERS), PerElement(nn.Conv2d(4, 4, 3, padding=1)))
    word, first, causes = verdict.report(ordinary, TURNS, verdict.smooth_images(4, 1, 28))
    assert word == "broken" and first.startswith("2 ") and "an ordinary convolution" in causes[0]


@pytest.mark.parametrize("value", (float("nan"), 0.0))
def test_features_that_cannot_be_judged(value, capsys):
    class Constant(nn.Module):
        def forward(self, x):
            return x[:, :, None].expand(-1, -1, 4, -1, -1) * value
    with pytest.raises(SystemExit):
        verdict.report(Constant(), TURNS, verdict.smooth_images(4, 1, 28))
    assert "must be finite and not all 0" in capsys.readouterr().err


@pytest.mark.parametrize("words, status, message", (
    ("{run}", 0, "exact: the network is equivariant up to rounding"),
    ("layers:MNISTBackbone --group translation --circular", 1, "zero padding"),
    ("layers:MNISTBackbone", 2, "features must be (B, C, 4, H, W), but these are (1, 95, 1, 7, 7)"),
    ("layers:nothing", 2, "a module and a function"), ("nothing:at_all", 2, "a module and a function"),
    ("layers:MNISTBackbone --image 3 28 28", 2, "for images (3, 28, 28)"),
    ("layers:MNISTBackbone --image 1 28 40", 2, "must be square"),
    ("layers:MNISTBackbone --group-size 0", 2, "at least 1"),
    ("{run}/nothing", 2, "is missing")))
def test_the_command(words, status, message, few_glyphs, tmp_path, monkeypatch, capsys):
    """A run, a function of a module, and what cannot be measured, in one line."""
    if words == "{run}":
        train_here(tmp_path, "--epochs", "1")
    monkeypatch.setattr(sys, "argv", ["verdict.py", *words.format(run=tmp_path).split()])
    with pytest.raises(SystemExit) as stop:
        verdict.main()
    printed = capsys.readouterr()
    assert stop.value.code == status and message in printed.out + printed.err
    assert status < 2 or printed.err.count("\n") == 1
