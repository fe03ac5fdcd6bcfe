"""What train.py refuses: each with exit status 2, one clear line, no traceback, and no folder made.

The end of a run that goes wrong later is in test_train.py, of a resumed one in test_resume.py,
probe.py's refusals are in test_probe.py, and images that cannot be read in test_own_images.py.
"""
import functools
import os
import pathlib
import shlex
import sys

import pytest
import torch

import data
from helpers import SMALL, start, status_of, train_here

GLYPHS = functools.cache(data.glyphs)

NAMES = {
    "--epoch 3": "unrecognized",
    "--nuisance rotation": "unrecognized",
    "--dataset imagenet": "invalid choice",
    "--group mirror": "invalid choice",
    "--backbone resnet18": "invalid choice",
    "--epochs 1.5": "invalid int",
    "--lr fast": "invalid float",
    "--widths": "expected at least one",
    "--head-widths 16": "expected 2",
}
# Flags, and what the message must say.
NUMBERS = {
    "--epochs 0": "--epochs",
    "--batch-size 1": "--batch-size",
    "--train-images 1": "--train-images",
    "--validate 0": "--validate",
    "--lr nan": "--lr",
    "--lr inf": "--lr",
    "--weight-decay -1": "--weight-decay",
    "--warmup-epochs nan": "--warmup-epochs",
    "--trust-coefficient nan": "--trust-coefficient",
    "--temperature 0": "--temperature",
    "--temperature nan": "--temperature",
    "--momentum 1": "momentum",
    "--momentum -0.1": "momentum",
    "--seed -1": "--seed",
    "--widths 0 8 16": "--widths",
    "--head-widths 0 8": "--head-widths",
    "--save-every 0": "--save-every",
    "--log-every 0": "--log-every",
    "--eval-every 0": "--eval-every",
    "--group-size 0 --group rotation": "--group-size",
    "--scale-step nan --group scale": "scale-step",
    "--max-distance 0": "--max-distance",
    "--grid -1": "--grid",
    "--image-size 2 --dataset folder": "--image-size",
}
# What only shows once data or encoder are there.
TOGETHER = {
    "--image-size 32": "folder",
    "--batch-size 4096": "200 training images",
    "--train-images 20000": "training images",
    "--backbone residual": "4 numbers",
    "--widths 4 8": "3 numbers",
    "--kernel-size 4": "odd",
    "--kernel-size 29": "28",
    "--kernel-size 1": "vanishes",
    "--padding circular --kernel-size 17": "smaller kernel",
    "--scale-step 1 --group scale": "above",
    "--group-size 2": "group_size is 2",
    "--extent 5 --group rotation": "1 to 4",
    "--base-space 5 --group rotation": "1 to 4",
    "--base-space 8": "1 to 7",
    "--base-space 7": "make a pair",
    "--base-space 3 --group scale": "make a pair",
    "--grid 6": "at most 5",
    "--probe-grid 8": "--probe-grid 7",
    "--crop": "--crop",
    "--crop --method a-ssl --group rotation": "--crop",
    "--crop --method a-ssl --structure none": "--crop",
    "--structure none --backbone residual --widths 2 2 2 2": "too large",
    "--dataset folder --data-dir nowhere": "nowhere",
    "--dataset mnist --data-dir ''": "empty",
    "--out config.json": "config.json",
}
if not torch.cuda.is_available():
    NAMES["--device cuda"] = "CUDA GPU"




def assert_refused(flags, words, capsys):
    """Status 2, and one line with these words, alone or after argparse's line of usage."""
    assert status_of(train_here, pathlib.Path("run"), *flags) == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py") and words in line, line
    assert usage == [] or len(usage) == 1 and usage[0].startswith("usage: train.py")
    assert not os.path.exists("run") or os.listdir("run") == []


@pytest.mark.parametrize("flags, words", (NAMES | NUMBERS | TOGETHER).items())
def test_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "glyphs", GLYPHS)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    pathlib.Path("config.json").write_text("not a folder")
    assert_refused(shlex.split(flags), words, capsys)
    assert pathlib.Path("config.json").read_text() == "not a folder"


@pytest.mark.parametrize("dataset, words", (
    ("mnist", "MNIST/raw"), ("cifar10", "cifar-10-python.tar.gz"),
    ("tiny-imagenet", "tiny-imagenet-200")))
def test_no_data_and_no_network(dataset, words, tmp_path, monkeypatch, capsys):
    """The line says what to put where by hand."""
    monkeypatch.chdir(tmp_path)
    # urllib keeps the proxies of its first call.
    monkeypatch.setattr("urllib.request._opener", None)
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    assert_refused(["--dataset", dataset], words, capsys)


def test_the_program_itself(tmp_path):
    """As a process of its own: the status, and nothing else on stderr."""
    process = start("train.py", *SMALL, "--kernel-size", "4", "--out", tmp_path / "run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1 and errors.startswith("train.py") and "odd" in errors
