"""The scripts of experiments/: every run they list is one that train.py takes, results are kept, errors are measured right."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from hssl import Product, Rotation, Translation
from layers import MNISTBackbone, Untied
from probe import build

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SMALL = "--train-images 100 --batch-size 50 --epochs 1 --warmup-epochs 0 --probe-epochs 1 --widths 2 2 2"
SIDES = {"glyphs": (1, 28), "mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64)}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


def run_lists(script, monkeypatch):
    """(table, budget, {row: flags}) of every script, as it hands them to runs.main."""
    found = []

    def keep(doc, experiments, budgets=("paper", "gpu", "cpu")):
        found.extend((name, budget, rows(budget)) for name, rows in experiments.items() for budget in budgets)
    monkeypatch.setattr(script("runs"), "main", keep)
    for path in sorted(EXPERIMENTS.glob("*.py")):
        if "from runs import main" in path.read_text():
            exec(compile(path.read_text(), path, "exec"), dict(__name__="__main__", __doc__=""))
    return found


def test_every_listed_run_is_one_that_train_takes(script, monkeypatch):
    lists = run_lists(script, monkeypatch)
    assert {name for name, _, _ in lists} >= {"mnist", "cifar10", "tiny-imagenet", "mnist-untied", "base-space", "distance", "objectives", "views", "glyphs"}
    for name, budget, rows in lists:
        for row, flags in rows.items():
            args = train.parse([*flags.split(), "--device", "cpu"])
            channels, side = SIDES[args.dataset]
            if budget == "paper":
                assert (args.epochs, args.batch_size, args.temperature) == ({"mnist": 500}.get(args.dataset, 1300), 4096, 0.1), (name, row)
            args.widths = [1] * len(args.widths)                        # whether the settings fit is not a matter of width
            encoder, group = build(vars(args), channels, side)
            assert len(train.allowed_sets(group, args.views, args.max_distance)) > 0, (name, budget, row)
    table1 = {name: rows for name, budget, rows in lists if budget == "paper" and name in SIDES}
    assert {len(table1[name]) for name in ("mnist", "cifar10", "tiny-imagenet")} == {12}              # 3 groups x 4 methods


def test_finished_runs_are_kept(tmp_path):
    """A table is trained, written with everything that names them, and not trained again; other flags are refused."""
    def call(*more):
        return subprocess.run([sys.executable, EXPERIMENTS / "trials.py", "glyphs", "--seeds", "0", "--jobs", "2", "--runs", tmp_path / "runs", "--results", tmp_path,
                               *more], capture_output=True, text=True, cwd=tmp_path)
    first = call("--extra", SMALL)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("frozen ") == 4 and "| h-ssl | " in first.stdout
    runs = json.loads((tmp_path / "glyphs-cpu.json").read_text())["runs"]
    assert len(runs) == 4 and {"row", "flags", "seed", "commit", "machine", "torch", "seconds", "losses", "top1", "frozen_top1"} <= runs[0].keys()
    second = call("--extra", SMALL)
    assert second.returncode == 0 and second.stderr == "" and second.stdout == first.stdout
    other = call("--extra", SMALL + " --lr 0.2")
    assert other.returncode == 1 and "other flags" in other.stderr and "Traceback" not in other.stderr


def test_table_1_s_form(script, capsys):
    runs = [dict(row=f"rotation {m}", flags=f"--dataset mnist --group rotation --method {m}", machine="m", torch="t", commit="c", frozen_top1=50.0, top1=top1)
            for m, values in (("h-ssl", (70, 72)), ("a-ssl", (73, 75))) for top1 in values]
    script("report").show(dict(name="mnist", budget="cpu", runs=runs))
    assert "| 50.00 ± 0.00 | 74.00 ± 1.41 | 71.00 ± 1.41 | not run | −3.00 | 2 |" in capsys.readouterr().out


def test_equivariance_error(script):
    """Zero in every layer where Eq. (1) is exact, about one for an untied network."""
    errors = script("equivariance_error").errors
    torch.manual_seed(0)
    x, padding = torch.randn(40, 1, 28, 28), dict(widths=(3, 5, 6), kernel_size=5, padding_mode="circular")
    turns, shifts = Rotation(4), Translation(7, 4, 4, circular=True)
    for group, f in ((turns, MNISTBackbone("rotation", 4, **padding)), (shifts, MNISTBackbone(**padding)),
                     (Product(shifts, turns), MNISTBackbone("rotation", 4, **padding))):
        g = group.elements[torch.randint(1, len(group.elements), (40,))]
        found = errors(f, group, x, g)
        assert len(found) == 6 and max(found.values()) < 1e-5, found
    untied = Untied(MNISTBackbone(widths=(12, 20, 24), kernel_size=5), 4)
    found = errors(untied, turns, x, turns.elements[torch.randint(1, 4, (40,))])
    assert len(found) == 6 and min(found.values()) > 0.5, found
