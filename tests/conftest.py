"""For all tests: where modules are found, float64, a small data set, and what runs in processes of its own."""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from helpers import draw_few_glyphs                                                                  # noqa: E402
from test_equivariance import float64                                                                # noqa: E402, F401


@pytest.fixture
def few_glyphs(monkeypatch):
    draw_few_glyphs(monkeypatch)


# `@pytest.mark.background(function, arguments)` is for tests that look at what other processes did. function(folder,
# *arguments) is called when the session starts, beside the other tests, and these tests come last. All have one thread:
# threads of several processes on few cores would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "background(function, arguments): what the fixture job does for a test")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("background") is not None)


@pytest.fixture(scope="session", autouse=True)
def jobs(request, tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for item in request.session.items:
            for marker in item.iter_markers("background"):
                function, arguments = marker.args
                folder = tmp_path_factory.mktemp("background")
                started[item.nodeid] = folder, pool.submit(function, folder, *arguments)
        yield started


@pytest.fixture
def job(request, jobs):
    """A test's folder, and what its function returned."""
    folder, future = jobs[request.node.nodeid]
    return folder, future.result()
