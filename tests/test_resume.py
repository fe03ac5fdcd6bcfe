"""Runs that are killed and resumed, what --resume refuses, and disks that are full."""
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import signal

import pytest
import torch

import data
import train
from helpers import (assert_equal, draw_few_glyphs, exit_code, log_of, refusal, status_of,
                     train_here)

pytestmark = pytest.mark.usefixtures("few_glyphs")


def killed_run(out, moment, flags=(), amp="off"):
    """Train, but die by SIGKILL at, say, "schedule 6", the sixth step, or "replace 3", the third
    file that is complete but for its name: after config.json and log.jsonl, the checkpoint."""
    torch.set_num_threads(1)
    name, number = moment.split()
    owner = {"schedule": train, "replace": pathlib.Path}[name]
    function = getattr(owner, name)
    calls = []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        draw_few_glyphs(patch)
        patch.setattr(owner, name, dying)
        train_here(out, *flags, amp=amp)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function from flags to the folder of a run with these, left alone: 6 steps, 2 epochs."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def folder_of(*flags, amp="off"):
        run = folder / " ".join(["run", *flags, amp])
        if not run.exists():
            train_here(run, *flags, amp=amp)
        return run

    return folder_of


@pytest.mark.parametrize("moment, saved, flags", (
    ("replace 1", None, ""),
    ("replace 3", None, "--method supervised"),
    ("schedule 6", 3, ""),
    ("schedule 6", 3, "--method a-ssl --group rotation"),
    ("schedule 6", 3, "--temperature 0.01"),    # where float16 overflows at times
    ("replace 4", 3, ""),
    ("replace 5", 6, ""),
    ("replace 6", 6, ""),
))
def test_killed_and_resumed(moment, saved, flags, undisturbed, tmp_path):
    """The undisturbed run's checkpoint and log, bit for bit."""
    amp = "float16" if "temperature" in flags else "off"
    flags = flags.split()
    run = tmp_path / "run"
    assert exit_code(killed_run, run, moment, flags, amp) == -signal.SIGKILL
    assert not (run / "probe.json").exists()
    assert (run / "checkpoint.pt").exists() == (saved is not None)
    if saved is not None:
        assert torch.load(run / "checkpoint.pt")["step"] == saved
    if moment == "schedule 6":
        # The fourth line is of a step that is taken again, and what follows is damaged.
        lines = (run / "log.jsonl").read_text()
        assert lines.count("\n") == 5
        (run / "log.jsonl").write_bytes(lines[:-20].encode() + b"\n\xff}\n")

    resumed = train_here(run, *flags, "--resume", amp=amp)
    expected_run = undisturbed(*flags, amp=amp)
    expected = torch.load(expected_run / "checkpoint.pt")
    assert resumed["step"] == 6
    for key in expected.keys() - {"settings", "starts"}:
        assert_equal(resumed[key], expected[key])
    for line, other in zip(log_of(run), log_of(expected_run), strict=True):
        del line["images_per_second"], other["images_per_second"]
        assert line == other
    assert (run / "probe.json").read_text() == (expected_run / "probe.json").read_text()
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "log.jsonl", "checkpoint.pt", "probe.json"}


def test_what_is_printed_is_no_reason_to_lose_an_epoch(tmp_path, monkeypatch):
    """As when `| head` has ended."""
    def print_to_nobody(*words, **options):
        if words[0].startswith("epoch 1/"):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "print", print_to_nobody, raising=False)
    assert status_of(train_here, tmp_path / "run", "--save-every", "1") == 2
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_what_may_change(undisturbed, tmp_path):
    """Other intervals and folders lead to the same weights. config.json tells of both starts, and
    a log of a cluster's own may lie beside it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "slurm-1.out").write_text("started")
    assert exit_code(killed_run, run, "schedule 5") == -signal.SIGKILL
    moved = tmp_path / "moved"
    run.rename(moved)
    flags = "--resume --save-every 7 --log-every 2 --eval-every 1 --cache-dir elsewhere".split()
    resumed = train_here(moved, *flags)
    assert_equal(resumed["encoder"], torch.load(undisturbed() / "checkpoint.pt")["encoder"])
    starts = json.loads((moved / "config.json").read_text())["starts"]
    assert starts == [dict(step=step, torch=torch.__version__, processes=1) for step in (0, 3)]


@pytest.mark.parametrize("how, flags, message", (
    ("run", "", "--resume"),
    ("run", "--resume --seed 5", "seed"),
    ("run", "--resume --widths 2 3 5", "widths"),
    ("result alone", "", "another --out"),
    ("result alone", "--resume", "another --out"),
    ("cut", "--resume", "damaged"),
    ("encoder alone", "--resume", "no training"),
    ("more test images", "--resume", "images"),
))
def test_what_is_refused(how, flags, message, undisturbed, tmp_path, monkeypatch, capsys):
    """Every file stays as it was, and no advice is what was done already."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed(), run)
    path = run / "checkpoint.pt"
    if how == "result alone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "encoder alone":
        checkpoint = torch.load(path)
        torch.save({key: checkpoint[key] for key in ("encoder", "settings")}, path)
    elif how == "more test images":
        few = data.glyphs()
        twice = torch.arange(100).repeat(2)
        more = dataclasses.replace(few, test_images=few.test_images[twice],
                                   test_labels=few.test_labels[twice])
        monkeypatch.setattr(data, "glyphs", functools.partial(dataclasses.replace, more))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    line = refusal(capsys, train_here, run, *flags.split())
    assert message in line
    assert "--resume" not in line or "--resume" not in flags
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("name, saved, call", (
    ("config.json", None, "replace"),
    ("checkpoint.pt", 3, "replace"),
    ("probe.json", 6, "write_bytes"),
))
def test_a_full_disk(name, saved, call, tmp_path, monkeypatch, capsys):
    """The old checkpoint stands, no temporary file is left, and --resume goes on once there is
    room."""
    run = tmp_path / "run"
    original = getattr(pathlib.Path, call)

    def full(self, argument):
        if self.name == f"{name}.tmp" and (run / "checkpoint.pt").exists() == (saved is not None):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, argument)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, call, full)
        line = refusal(capsys, train_here, run)
    assert name in line and "No space left" in line
    assert not list(run.glob("*.tmp")) and not (run / "probe.json").exists()
    assert (run / "checkpoint.pt").exists() == (saved is not None)
    if saved is not None:
        assert torch.load(run / "checkpoint.pt")["step"] == saved
    assert train_here(run, "--resume")["step"] == 6
