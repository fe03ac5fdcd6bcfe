"""For all tests: where the modules are found, float64, and a small data set."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from helpers import draw_few_glyphs    # noqa: E402
from test_equivariance import float64    # noqa: E402, F401

# One thread here and in what is started: those of several processes would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def few_glyphs(monkeypatch):
    draw_few_glyphs(monkeypatch)
