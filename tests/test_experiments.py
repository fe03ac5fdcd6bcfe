"""experiments/tables.py trains what it lists and loses nothing; figures.py draws."""
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import hssl
import report
import simclr
import tables
import train
from helpers import SMALL, status_of, train_here

SHAPES = {"glyphs": (1, 28), "mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64)}
LISTED = []
for name, rows in tables.TABLES.items():
    LISTED += [(name, row) for row in rows]
RESULTS = [path for path in sorted(report.RESULTS.glob("*.json"))
           if "runs" in json.loads(path.read_text())]


def settings(flags):
    script, words = tables.split_script(flags)
    parse = train.parse
    if script == "experiments/simclr.py":
        parse = simclr.parse
    return parse([*words, "--device", "cpu"])


# ----------------------------------------------------------------------------------- what is listed

@pytest.mark.parametrize("name, row", LISTED)
def test_train_takes_every_listed_run(name, row):
    """Its flags fit each other and the images: encoder, group, pairs and head can be made."""
    flags = tables.TABLES[name][row]
    args = settings(flags)
    if name.startswith("paper-"):
        epochs = {"mnist": 500}.get(args.dataset, 1300)
        assert (args.epochs, args.batch_size, args.temperature) == (epochs, 4096, 0.1)

    channels, side = SHAPES[args.dataset]
    images = torch.zeros(8, channels, side, side, dtype=torch.uint8)
    labels = torch.arange(8)
    classes = [str(label) for label in range(8)]
    files = labels.numpy()
    few = data.Dataset(images, labels, files, images, labels, files, classes, mean=0, std=1)
    # Whether they fit is not a matter of width.
    args.widths = [1] * len(args.widths)
    args.head_widths = [2, 2]
    args.image_shape = [channels, side]
    if flags.startswith("experiments/simclr.py"):
        simclr.make_objective(args)
        return
    group, _ = train.make_objective(args, few)
    if args.method != "supervised":
        assert len(hssl.allowed_pairs(group, args.max_distance)) > 0


def test_rows_differ_by_what_their_names_say():
    """Rows that are compared differ in method or structure alone."""
    compared = 0
    for name, row in LISTED:
        rows = tables.TABLES[name]
        for other in [row.replace("h-ssl", "a-ssl"), row.removesuffix(", untied")]:
            if other in rows and other != row:
                a = vars(settings(rows[row]))
                b = vars(settings(rows[other]))
                changed = {key for key in a if a[key] != b[key]} - {"out"}
                assert changed and changed <= {"method", "structure", "crop"}, row
                compared += 1
    assert compared > 30


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_of_the_listed_rows(path):
    rows = tables.TABLES[path.stem]
    for run in json.loads(path.read_text())["runs"]:
        assert settings(run["flags"]) == settings(rows[run["row"]]), run["row"]


# --------------------------------------------------------------------------------- training a table

FLAGS = f"--dataset glyphs {' '.join(SMALL)}"
ROWS = {"h-ssl": FLAGS, "a-ssl": f"{FLAGS} --method a-ssl"}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls tables.py for a table of two rows, in a folder of its own."""
    monkeypatch.setitem(tables.TABLES, "mine", ROWS)

    def run(*words):
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
        tables.main(tables.parse(["mine", *folders, *words]))
        return json.loads((tmp_path / "mine.json").read_text())["runs"]

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
    (first,) = call("--seeds", "0", "--only", "h-ssl", "--eval-every", "1")
    assert "| h-ssl | 1 | 2 | " in capsys.readouterr().out
    assert (first["row"], first["seed"], first["flags"]) == ("h-ssl", 0, ROWS["h-ssl"])
    assert {"commit", "dirty", "machine", "torch", "seconds", "training_seconds", "top1",
            "mean_top1", "neighbours", "mean_neighbours", "frozen"} <= first.keys()
    assert [step for step, loss in first["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [look["epoch"] for look in first["looks"]] == [1, 2]
    result = json.loads((tmp_path / "runs/mine/h-ssl-0/probe.json").read_text())
    assert first.items() >= result.items()

    # It is not trained again. Of file and folder the folder is the newer one.
    path = tmp_path / "runs" / "mine" / "h-ssl-0" / "run.json"
    first["top1"] = 12.0
    path.write_text(json.dumps(first))
    assert call("--seeds", "0", "--only", "h-ssl") == [first]

    # A run that finished in the folder of runs is taken in; one that is only in the file is kept.
    other = tmp_path / "runs" / "mine" / "a-ssl-7"
    other.mkdir()
    second = first | dict(row="a-ssl", seed=7, flags=ROWS["a-ssl"])
    (other / "run.json").write_text(json.dumps(second))
    assert call("--seeds", "0", "--only", "h-ssl") == [first, second]
    (other / "run.json").unlink()
    assert call("--seeds", "0", "--only", "h-ssl") == [first, second]

    # Other flags are another experiment: the file alone refuses them, and so does the folder.
    changed = ROWS | {"h-ssl": ROWS["h-ssl"] + " --lr 0.2"}
    monkeypatch.setitem(tables.TABLES, "mine", changed)
    for name in ("runs", "mine.json"):
        (tmp_path / name).rename(tmp_path / "away")
        assert status_of(call, "--seeds", "0", "--only", "h-ssl") == 2
        assert "with other flags" in capsys.readouterr().err
        (tmp_path / "away").rename(tmp_path / name)
    assert len(json.loads((tmp_path / "mine.json").read_text())["runs"]) == 2
    assert len(started) == 1


def test_a_failed_run_ends_the_table_with_its_message(call, tmp_path, capsys):
    """What had finished before is in the file. The other runs are not started."""
    finished = tmp_path / "runs" / "mine" / "h-ssl-3"
    finished.mkdir(parents=True)
    record = dict(row="h-ssl", seed=3, flags=ROWS["h-ssl"], top1=1.0)
    (finished / "run.json").write_text(json.dumps(record))
    program = tmp_path / "launcher.py"
    program.write_text(f"""import sys
print("started", file=open({str(tmp_path / "starts")!r}, "a"))
sys.exit("no room for " + sys.argv[1])
""")
    assert status_of(call, "--launcher", f"{sys.executable} {program}") == 2
    assert 1 <= len((tmp_path / "starts").read_text().splitlines()) <= 2
    error = capsys.readouterr().err
    assert "--seed 0" in error and error.count("failed:\nno room for") == 1
    assert json.loads((tmp_path / "mine.json").read_text())["runs"] == [record]


@pytest.mark.parametrize("flags, words", (
    ("mnist --only typo", "there is no row 'typo', only translation a-ssl; "),
    ("mnist --jobs 0", "must be greater than 0"),
    ("mnist --launcher nosuch", "No such file or directory: 'nosuch'"),
    ("typo", "invalid choice: 'typo'"),
))
def test_tables_that_cannot_be_trained_are_refused(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", print)    # which needs no images
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]

    def call():
        tables.main(tables.parse([*flags.split(), *folders]))

    assert status_of(call) == 2
    assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ figures

@pytest.fixture(scope="module")
def figures():
    """The module, whose requirements are its own: the project does without matplotlib."""
    pytest.importorskip("matplotlib")
    return importlib.import_module("figures")


def drawn(figures, tmp_path, *words):
    """The names of the pictures that a command draws."""
    figures.main([*[str(word) for word in words], "--out", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    return sorted(path.stem for path in tmp_path.iterdir())


@pytest.mark.parametrize("words, names", (
    (["sweeps"], ["sweeps"]),
    (["curves"], ["curves"]),
    (["tour"], ["tour-equivariance", "tour-filters", "tour-training", "tour-views"]),
))
def test_figures_of_committed_files(figures, words, names, tmp_path):
    assert drawn(figures, tmp_path, *words) == names


def test_figures_of_a_run(figures, tmp_path, few_glyphs):
    """By rotation, with looks: every measure begins with the frozen encoder's."""
    run = tmp_path / "run"
    train_here(run, "--group", "rotation", "--eval-every", "1")
    assert drawn(figures, tmp_path / "idea", "idea", run) == ["idea"]
    record = report.read_run(run)
    figure = figures.curves(SimpleNamespace(runs=[run]))["curves"]
    loss, top1, *_ = figure.axes
    assert loss.lines[0].get_xdata() == pytest.approx([step / 3 for step in range(1, 7)])
    assert list(loss.lines[0].get_ydata()) == [value for _, value in record["losses"]]
    looks = [look["top1"] for look in record["looks"]]
    assert list(top1.lines[0].get_xdata()) == [0, 1, 2]
    assert list(top1.lines[0].get_ydata()) == [record["frozen"]["held_out"]["top1"], *looks]


@pytest.mark.parametrize("words, message", (
    (["idea"], "idea takes one RUN"),
    (["curves", "nosuch"], "nosuch"),
))
def test_figures_that_cannot_be_drawn_are_refused(figures, words, message, tmp_path, capsys):
    assert status_of(figures.main, [*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
