"""What train.py refuses: each with exit status 2, one clear line, and nothing written."""
import functools
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import torch

import data
from helpers import ROOT, SMALL, refusal, train_here

GLYPHS = functools.cache(data.glyphs)

# Numbers out of bounds; the message names the first flag.
NUMBERS = """
    --epochs 0, --batch-size 1, --train-images 1, --validate 0, --lr nan, --lr inf,
    --weight-decay -1, --warmup-epochs nan, --trust-coefficient nan, --temperature 0,
    --momentum 1, --momentum -0.1, --seed -1, --seed 99999999999999999999,
    --widths 0 8 16, --head-widths 0 8, --save-every 0,
    --log-every 0, --eval-every 0, --group-size 0 --group rotation, --scale-step nan --group scale,
    --max-distance 0, --grid -1, --probe-grid -1, --image-size 2 --dataset folder
""".strip().split(",")
# Flags, and what the message must say.
FLAGS = {
    "--epoch 3": "unrecognized",
    "--epochs 1.5": "not an integer",
    "--amp float16": "bfloat16",
    # What only shows once data or encoder are there.
    "--image-size 32": "folder",
    "--batch-size 4096": "200 training images",
    "--widths 2 3": "3 or 4",
    "--structure none --widths 2 3 4 5": "three --widths",
    "--structure none --group translation --group-size 2": "--group-size",
    "--structure none --group rotation --extent 1": "--extent",
    "--kernel-size 4": "odd",
    "--kernel-size 29": "28 pixels",
    "--padding circular --kernel-size 17": "smaller kernel",
    "--base-space 8": "1 to 7",
    "--base-space 7": "make a pair",
    "--grid 6": "the map of 5x5",
    "--probe-grid 8": "the map of 7x7",
    "--dataset folder --data-dir nowhere": "nowhere",
    "--dataset mnist --data-dir ''": "empty",
    "--out config.json": "config.json",
}
for flags in NUMBERS:
    FLAGS[flags.strip()] = flags.split()[0].strip("-")
if not torch.cuda.is_available():
    FLAGS["--device cuda"] = "CUDA GPU"


@pytest.mark.parametrize("flags, words", FLAGS.items())
def test_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "glyphs", GLYPHS)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    pathlib.Path("config.json").write_text("not a folder")
    line = refusal(capsys, train_here, pathlib.Path("run"), *shlex.split(flags))
    assert line.startswith("train.py: ") and words in line
    assert not os.path.exists("run") or os.listdir("run") == []
    assert pathlib.Path("config.json").read_text() == "not a folder"


def test_the_program_itself(tmp_path):
    """As a process of its own: the status, and nothing else on stderr."""
    command = [sys.executable, ROOT / "train.py", *SMALL, "--kernel-size", "4", "--out", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "odd" in process.stderr
