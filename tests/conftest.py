"""For all tests: where modules are found, float64, and a small data set."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from helpers import draw_few_glyphs                                                                  # noqa: E402
from test_equivariance import float64                                                                # noqa: E402, F401


@pytest.fixture
def few_glyphs(monkeypatch):
    draw_few_glyphs(monkeypatch)
