"""experiments/tables.py trains what it lists and loses nothing; figures.py draws."""
import importlib
import json
import subprocess
import sys

import pytest
import torch

import data
import hssl
import probe
import report
import simclr
import tables
import train
from helpers import SMALL, draw_few_glyphs, train_here

LISTED = [(budget, name, row) for budget in tables.TABLES for name in tables.TABLES[budget]
          for row in tables.TABLES[budget][name]]
# Those of earlier forms of the tables have no "dirty".
CURRENT = []
for path in sorted(report.RESULTS.glob("*-*.json")):
    runs = json.loads(path.read_text()).get("runs", [])
    if runs and all("dirty" in run for run in runs):
        CURRENT.append(path)


def settings(flags):
    script, words = tables.split_script(flags)
    parse = train.parse
    if script == "experiments/simclr.py":
        parse = simclr.parse
    return parse([*words, "--device", "cpu"])


# ----------------------------------------------------------------------------- what is listed

@pytest.mark.parametrize("budget, name, row", LISTED)
def test_train_takes_every_listed_run(budget, name, row, tmp_path, monkeypatch):
    """Its flags fit each other and the images: encoder, group, pairs and head can be made."""
    flags = tables.TABLES[budget][name][row]
    args = settings(flags)
    if budget == "paper":
        epochs = {"mnist": 500}.get(args.dataset, 1300)
        assert (args.epochs, args.batch_size, args.temperature) == (epochs, 4096, 0.1)

    channels, side = data.SHAPES[args.dataset]
    images = torch.zeros(8, channels, side, side, dtype=torch.uint8)
    labels = torch.arange(8)
    classes = [str(label) for label in range(8)]
    files = labels.numpy()
    few = data.Dataset(images, labels, files, images, labels, files, classes, mean=0, std=1)
    monkeypatch.setattr(probe, "load_data", lambda settings, device: few)
    # Whether they fit is not a matter of width or number.
    args.widths = [1] * len(args.widths)
    args.head_widths = [2, 2]
    args.batch_size = 8
    args.out = str(tmp_path / "run")
    if flags.startswith("experiments/simclr.py"):
        simclr.prepare(args)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["method"] == args.method
    else:
        args.image_shape = [channels, side]
        group, _ = train.make_objective(args, few)
        if args.method != "supervised":
            assert len(hssl.allowed_pairs(group, args.max_distance)) > 0


def test_rows_differ_by_what_their_names_say():
    """Rows that are compared differ in method or structure alone."""
    compared = 0
    for budget, name, row in LISTED:
        rows = tables.TABLES[budget][name]
        for other in [row.replace("h-ssl", "a-ssl"), row.removesuffix(", untied")]:
            if other in rows and other != row:
                a = vars(settings(rows[row]))
                b = vars(settings(rows[other]))
                changed = {key for key in a if a[key] != b[key]} - {"out"}
                assert changed and changed <= {"method", "structure", "crop"}, row
                compared += 1
    assert compared > 30


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.stem)
def test_committed_results_are_of_the_listed_rows(path):
    record = json.loads(path.read_text())
    rows = tables.TABLES[record["budget"]].get(record["name"])
    assert rows is not None, "no such table: another script's results need another name"
    for run in record["runs"]:
        assert settings(run["flags"]) == settings(rows[run["row"]]), run["row"]


# ----------------------------------------------------------------------------- training a table

FLAGS = f"--dataset glyphs {' '.join(SMALL)}"
ROWS = {"h-ssl": f"{FLAGS} --eval-every 1", "a-ssl": f"{FLAGS} --method a-ssl"}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls tables.py for a table of two rows, in a folder of its own."""
    monkeypatch.setitem(tables.TABLES["cpu"], "mine", ROWS)

    def run(*words):
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
        tables.main(tables.parse(["mine", *folders, *words]))
        return json.loads((tmp_path / "mine-cpu.json").read_text())["runs"]

    return run


@pytest.fixture
def started(monkeypatch, few_glyphs):
    """The commands that start train.py, which runs in this process and on few glyphs."""
    commands = []
    start = subprocess.run

    def start_here(command, **options):
        if command[0] == "git":
            return start(command, **options)
        assert command[:2] == [sys.executable, str(tables.ROOT / "train.py")]
        commands.append(command)
        train.main(train.parse(command[2:]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", start_here)
    return commands


def test_a_table_is_trained_once_and_loses_nothing(call, started, tmp_path, monkeypatch, capsys):
    (first,) = call("--seeds", "0", "--only", "h-ssl")
    assert "| h-ssl | 1 | 2 | " in capsys.readouterr().out
    assert (first["row"], first["seed"], first["flags"]) == ("h-ssl", 0, ROWS["h-ssl"])
    assert {"commit", "dirty", "machine", "torch", "seconds", "training_seconds", "top1",
            "mean_top1", "neighbours", "mean_neighbours", "frozen"} <= first.keys()
    assert [step for step, loss in first["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [look["epoch"] for look in first["looks"]] == [1, 2]
    result = json.loads((tmp_path / "runs/mine-cpu-h-ssl-0/probe.json").read_text())
    assert all(first[key] == value for key, value in result.items())

    # It is not trained again.
    assert call("--seeds", "0", "--only", "h-ssl") == [first]

    # A run that finished in the folder of runs is taken in; one that is only in the file is kept.
    other = tmp_path / "runs" / "mine-cpu-a-ssl-7"
    other.mkdir()
    second = first | dict(row="a-ssl", seed=7, flags=ROWS["a-ssl"])
    (other / "run.json").write_text(json.dumps(second))
    assert call("--seeds", "0", "--only", "h-ssl") == [first, second]
    (other / "run.json").unlink()
    assert call("--seeds", "0", "--only", "h-ssl") == [first, second]

    # Other flags are another experiment.
    changed = ROWS | {"h-ssl": ROWS["h-ssl"] + " --lr 0.2"}
    monkeypatch.setitem(tables.TABLES["cpu"], "mine", changed)
    for move in (None, tmp_path / "mine-cpu.json"):
        if move is not None:
            move.rename(tmp_path / "moved.json")
        with pytest.raises(SystemExit) as stop:
            call("--seeds", "0", "--only", "h-ssl")
        assert stop.value.code == 2
        # First the file refuses them, then the folder of the run.
        assert "with other flags" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "moved.json").read_text())["runs"]) == 2
    assert len(started) == 1


def test_a_failed_run_ends_the_table_with_its_message(call, tmp_path, capsys):
    """What had finished before is in the file."""
    finished = tmp_path / "runs" / "mine-cpu-h-ssl-3"
    finished.mkdir(parents=True)
    record = dict(row="h-ssl", seed=3, flags=ROWS["h-ssl"], top1=1.0)
    (finished / "run.json").write_text(json.dumps(record))
    launcher = f"""{sys.executable} -c 'import sys; sys.exit("no room for " + sys.argv[1])'"""
    with pytest.raises(SystemExit) as stop:
        call("--launcher", launcher)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "--seed 0" in error and error.count("failed:\nno room for") == 1
    assert json.loads((tmp_path / "mine-cpu.json").read_text())["runs"] == [record]


@pytest.mark.parametrize("flags, words", (
    ("mnist --only typo", "there is no row 'typo', only translation a-ssl; "),
    ("mnist --seeds 100", "must be 0 to 99"),
    ("mnist --jobs 0", "at least 1"),
    ("mnist --launcher nosuch", "there is no program 'nosuch'"),
    ("typo", "there is no table 'typo' at budget cpu, only mnist, "),
    ("work --budget paper", "there is no table 'work' at budget paper, only "),
))
def test_tables_that_cannot_be_trained_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.parse(flags.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


# ----------------------------------------------------------------------------- figures

@pytest.fixture(scope="module")
def figures():
    """The module, whose requirements are its own: the project does without matplotlib."""
    pytest.importorskip("matplotlib")
    return importlib.import_module("figures")


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("name", ("losses", "sweeps"))
def test_figures_of_committed_tables(figures, name, tmp_path):
    figures.main([name, "--out", str(tmp_path)])
    assert is_picture(tmp_path / f"{name}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run by rotation with looks."""
    folder = tmp_path_factory.mktemp("figures") / "run"
    with pytest.MonkeyPatch().context() as patch:
        draw_few_glyphs(patch)
        train_here(folder, "--group", "rotation", "--eval-every", "1")
    return folder


def test_figures_of_a_run(figures, run, tmp_path, few_glyphs):
    figures.main(["idea", str(run), "--out", str(tmp_path)])
    figures.main(["curves", str(run), "--out", str(tmp_path)])
    assert is_picture(tmp_path / "idea.png") and is_picture(tmp_path / "curves.png")


def test_a_curve_begins_with_the_frozen_encoder(figures, run):
    """Its loss is the mean of an epoch's steps; looks are those of the log."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs, losses, frozen, method = figures.curve(run, "loss")
    assert (epochs, frozen, method) == ([1, 2], None, "h-ssl")
    expected = torch.tensor([line["loss"] for line in log]).view(2, 3).mean(1)
    assert losses == pytest.approx(expected.tolist(), rel=1e-6)
    result = json.loads((run / "probe.json").read_text())
    looks = [line["held_out"]["mean_top1"] for line in log if "held_out" in line]
    first = result["frozen"]["held_out"]["mean_top1"]
    assert figures.curve(run, "mean_top1") == ([0, 1, 2], [first, *looks], first, "h-ssl")


@pytest.mark.parametrize("words, message", (
    (["idea"], "idea takes one run"),
    (["curves", "nosuch"], "nosuch"),
    (["losses", "--budget", "paper"], "there are no results of 'mnist' at budget paper"),
))
def test_figures_that_cannot_be_drawn_are_refused(figures, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        figures.main([*words, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
