"""experiments/tables.py trains what it lists and loses nothing; figures.py draws."""
import importlib
import json
import re
import subprocess
import sys

import pytest

import crops
import report
import simclr
import tables
import train
from helpers import SMALL, status_of

SHAPES = {"glyphs": [1, 28], "mnist": [1, 28], "cifar10": [3, 32], "tiny-imagenet": [3, 64]}
LISTED = []
for name, rows in tables.TABLES.items():
    LISTED += [(name, row) for row in rows]
RESULTS = [path for path in sorted(report.RESULTS.glob("*.json"))
           if "runs" in json.loads(path.read_text())]
SCRIPTS = {"train.py": train, "experiments/simclr.py": simclr, "experiments/crops.py": crops}


def settings(flags):
    script, words = tables.split_script(flags)
    return SCRIPTS[script].parse([*words, "--device", "cpu"])


@pytest.mark.parametrize("name, row", LISTED)
def test_train_takes_every_listed_run(name, row, monkeypatch):
    """Its flags fit each other and the images: encoder, group, pairs and head can be made."""
    flags = tables.TABLES[name][row]
    args = settings(flags)
    if name.startswith("paper-"):
        epochs = {"mnist": 500}.get(args.dataset, 1300)
        assert (args.epochs, args.batch_size, args.temperature) == (epochs, 4096, 0.1)
    # Whether they fit is not a matter of width.
    args.widths = [1] * len(args.widths)
    args.head_widths = [2, 2]
    args.image_shape = SHAPES[args.dataset]
    script, _ = tables.split_script(flags)
    if script == "experiments/crops.py":
        monkeypatch.setattr(train, "Translation", crops.Crops)
    make_objective = getattr(SCRIPTS[script], "make_objective", train.make_objective)
    _, pairs = make_objective(args, 8)
    assert len(pairs) > 0


@pytest.mark.parametrize("path", RESULTS, ids=str)
def test_committed_results_are_of_the_listed_rows(path):
    rows = tables.TABLES[path.stem]
    for run in json.loads(path.read_text())["runs"]:
        assert settings(run["flags"]) == settings(rows[run["row"]]), run["row"]


FLAGS = f"--dataset glyphs {' '.join(SMALL)}"
ROWS = {"h-ssl": FLAGS, "a-ssl": f"{FLAGS} --method a-ssl"}


def no_commit():
    return "abc", False


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls tables.py for a table of two rows, in a folder of its own."""
    monkeypatch.setitem(tables.TABLES, "mine", ROWS)
    monkeypatch.setattr(tables, "commit", no_commit)
    monkeypatch.setattr(Started, "commands", [])

    def run(*words):
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
        report.run(tables.main, ["mine", *folders, *words])
        return json.loads((tmp_path / "mine.json").read_text())["runs"]

    return run


class Started:
    """Stands for a process, but train.py runs in this one."""
    commands = []
    returncode = 0

    def __init__(self, command, **options):
        assert command[:2] == [sys.executable, str(tables.ROOT / "train.py")]
        self.commands.append(command)
        train.main(train.parse(command[2:]))

    def poll(self):
        return self.returncode


def test_a_table_is_trained_once_and_loses_nothing(call, tmp_path, monkeypatch, few_glyphs, capsys):
    monkeypatch.setattr(subprocess, "Popen", Started)
    (first,) = call("--seeds", "0", "0", "--only", "h-ssl", "--eval-every", "1")
    assert "| h-ssl | 1 | 2 | " in capsys.readouterr().out
    assert (first["row"], first["seed"], first["flags"]) == ("h-ssl", 0, ROWS["h-ssl"])
    assert [step for step, loss in first["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [look["epoch"] for look in first["looks"]] == [1, 2]
    log = tmp_path / "runs/mine/h-ssl-0/log.jsonl"
    log.write_text(re.sub(r'second": [^,}]+', 'second": 32', log.read_text()))
    assert tables.read_run(log.parent)["training_seconds"] == 6 * 64 / 32
    result = json.loads((tmp_path / "runs/mine/h-ssl-0/probe.json").read_text())
    assert first.items() >= result.items()

    # It is not trained again. What finished in the folder of runs is taken in, and is the newer
    # one; what is only in the file is kept.
    path = tmp_path / "runs" / "mine" / "h-ssl-0" / "run.json"
    second = first | dict(row="a-ssl", seed=7, flags=ROWS["a-ssl"])
    path.write_text(json.dumps(second))
    assert call("--seeds", "0", "--only", "h-ssl") == [first, second]
    path.write_text(json.dumps(first | dict(top1=12.0)))
    assert call("--seeds", "0", "--only", "h-ssl") == [first | dict(top1=12.0), second]
    assert len(Started.commands) == 1

    # Other flags are another experiment, and half a file is named.
    monkeypatch.setitem(ROWS, "h-ssl", ROWS["h-ssl"] + " --lr 0.2")
    assert status_of(call, "--seeds", "0", "--only", "h-ssl") == 2
    assert "with other flags" in capsys.readouterr().err
    path.write_text("")
    assert status_of(call) == 2
    assert str(path) in capsys.readouterr().err
    assert len(json.loads((tmp_path / "mine.json").read_text())["runs"]) == 2


def test_a_failed_run_ends_the_table_with_its_message(call, tmp_path, capsys):
    """The other runs are not started."""
    program = tmp_path / "launcher.py"
    program.write_text("import sys\nsys.exit('no room for ' + sys.argv[1])\n")
    assert status_of(call, "--launcher", f"{sys.executable} {program}") == 2
    assert "no room for" in capsys.readouterr().err
    runs = tmp_path / "runs" / "mine"
    assert [path.name for path in runs.glob("*.txt")] == ["h-ssl-0.txt"]


@pytest.mark.parametrize("words", ("sweeps", "curves paper-mnist"))
def test_figures_of_what_is_committed(words, tmp_path):
    """Their requirements are their own: the project does without matplotlib."""
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("figures")
    figures.main([*words.split(), "--results", str(tmp_path)])
    [path] = tmp_path.glob("*.png")
    assert path.stat().st_size > 5000
