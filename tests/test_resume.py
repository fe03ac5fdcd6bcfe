"""Runs that are killed and resumed, what --resume refuses, and disks that are full."""
import errno
import os
import pathlib
import shutil
import signal

import pytest
import torch

import data
import probe
import train
from helpers import assert_equal, draw_few_glyphs, exit_code, log_of, status_of, train_here

pytestmark = pytest.mark.usefixtures("few_glyphs")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(out, moment, flags):
    """Train, but die by SIGKILL at a moment: before a step, within or after the last save."""
    torch.set_num_threads(1)
    schedule = train.schedule
    replace = pathlib.Path.replace
    saves = []

    def dying_schedule(step, warmup, total):
        if moment == f"step {step + 1}":
            die()
        return schedule(step, warmup, total)

    def dying_replace(self, target):
        if self.name == "checkpoint.pt.tmp":
            saves.append(self)
            if moment == f"save {len(saves)}":
                die()
        return replace(self, target)

    def dying_result(*arguments):
        die()

    with pytest.MonkeyPatch.context() as patch:
        draw_few_glyphs(patch)
        patch.setattr(train, "schedule", dying_schedule)
        patch.setattr(pathlib.Path, "replace", dying_replace)
        if moment == "classifier":
            patch.setattr(probe, "write_result", dying_result)
        train_here(out, *flags)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function from flags to the folder of a run with these, left alone: 6 steps, 2 epochs."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def folder_of(flags):
        run = folder / " ".join(["run", *flags])
        if not run.exists():
            with pytest.MonkeyPatch.context() as patch:
                draw_few_glyphs(patch)
                train_here(run, *flags)
        return run

    return folder_of


FLOAT16 = "--amp float16 --temperature 0.01"


@pytest.mark.parametrize("moment, saved, flags", (
    ("step 2", None, ""),
    ("save 1", None, "--method supervised"),
    ("step 5", 3, ""),
    ("step 5", 3, "--group rotation --objective byol"),
    ("step 5", 3, "--method a-ssl --objective simsiam"),
    ("step 5", 3, FLOAT16),
    ("save 2", 3, ""),
    ("save 3", 6, ""),
    ("classifier", 6, ""),
))
def test_killed_and_resumed(moment, saved, flags, undisturbed, tmp_path):
    """The undisturbed run's checkpoint and log, bit for bit."""
    flags = flags.split()
    run = tmp_path / "run"
    assert exit_code(killed_run, run, moment, flags) == -signal.SIGKILL
    assert not (run / "probe.json").exists()
    assert (run / "checkpoint.pt").exists() == (saved is not None)
    if saved is not None:
        assert torch.load(run / "checkpoint.pt")["step"] == saved

    resumed = train_here(run, *flags, "--resume")
    expected_run = undisturbed(flags)
    expected = torch.load(expected_run / "checkpoint.pt")
    assert resumed["step"] == 6
    for key in expected.keys() - {"settings"}:
        assert_equal(resumed[key], expected[key])
    lines = log_of(run)
    for line, other in zip(lines, log_of(expected_run), strict=True):
        del line["images_per_second"], other["images_per_second"]
        assert line == other
    assert (run / "probe.json").read_text() == (expected_run / "probe.json").read_text()
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "log.jsonl", "checkpoint.pt", "probe.json"}


def test_a_log_line_that_was_cut(undisturbed, tmp_path):
    """What was written after the checkpoint, whole or not, is written again."""
    run = tmp_path / "run"
    assert exit_code(killed_run, run, "step 6", []) == -signal.SIGKILL
    text = (run / "log.jsonl").read_text()
    assert text.count("\n") == 5
    (run / "log.jsonl").write_text(text[:-20])
    train_here(run, "--resume")
    steps = [line["step"] for line in log_of(run)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_what_may_change(undisturbed, tmp_path):
    """Other intervals and folders lead to the same weights."""
    run = tmp_path / "run"
    assert exit_code(killed_run, run, "step 5", []) == -signal.SIGKILL
    moved = tmp_path / "moved"
    run.rename(moved)
    flags = "--resume --save-every 7 --log-every 2 --eval-every 1 --cache-dir elsewhere".split()
    resumed = train_here(moved, *flags)
    assert_equal(resumed["encoder"], torch.load(undisturbed([]) / "checkpoint.pt")["encoder"])


# ---------------------------------------------------------------------------- what is refused

def spoil(run, how):
    """Do to a finished run what the test's name for it says."""
    path = run / "checkpoint.pt"
    checkpoint = torch.load(path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "flipped bit":
        content = bytearray(path.read_bytes())
        content[content.index(checkpoint["encoder"]["0.weight"].numpy().tobytes()) + 10] ^= 1
        path.write_bytes(content)
    elif how == "foreign":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif how == "encoder alone":
        torch.save({key: checkpoint[key] for key in ("encoder", "settings")}, path)
    elif how == "thesis":
        for name in ("checkpoint.pt", "config.json", "log.jsonl", "probe.json"):
            (run / name).unlink()
        (run / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize("how, flags, message", (
    ("run", "", "--resume"),
    ("thesis", "", "--resume|--out"),
    ("thesis", "--resume", "no checkpoint"),
    ("cut", "--resume", "damaged"),
    ("flipped bit", "--resume", "damaged"),
    ("foreign", "--resume", "checkpoint.pt"),
    ("encoder alone", "--resume", "no training"),
    ("run", "--resume --seed 5", "seed"),
    ("run", "--resume --epochs 3", "epochs"),
    ("run", "--resume --widths 2 3 5", "widths"),
    ("run", "--resume --objective byol", "objective"),
    ("run", "--resume --train-images 100", "images"),
))
def test_what_is_refused(how, flags, message, undisturbed, tmp_path, capsys):
    """One line, status 2, and every file as it was."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed([]), run)
    spoil(run, how)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert status_of(train_here, run, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(words in error for words in message.split("|")), error
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_other_images_are_refused(undisturbed, tmp_path, monkeypatch, capsys):
    """A single pixel tells."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed([]), run)
    others = data.glyphs()
    others.train_images[7, 0, 14, 14] ^= 1
    try:
        assert status_of(train_here, run, "--resume") == 2
    finally:
        others.train_images[7, 0, 14, 14] ^= 1
    error = capsys.readouterr().err
    assert "images" in error and error.count("\n") == 1


# ------------------------------------------------------------------------------ a disk that is full

@pytest.mark.parametrize("name, saved", (
    ("config.json", None), ("checkpoint.pt", None), ("checkpoint.pt", 3), ("probe.json", 6)))
@pytest.mark.parametrize("call", ("write_bytes", "replace"))
def test_a_full_disk(name, saved, call, tmp_path, monkeypatch, capsys):
    """One line, status 2; the old checkpoint stands, no temporary file is left, and --resume
    goes on once there is room."""
    run = tmp_path / "run"
    original = getattr(pathlib.Path, call)

    def full(self, argument):
        if self.name == f"{name}.tmp" and (run / "checkpoint.pt").exists() == (saved is not None):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, argument)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, call, full)
        assert status_of(train_here, run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and "No space left" in error
    assert not list(run.glob("*.tmp")) and not (run / "probe.json").exists()
    assert (run / "checkpoint.pt").exists() == (saved is not None)
    if saved is not None:
        assert torch.load(run / "checkpoint.pt")["step"] == saved
    assert train_here(run, "--resume")["step"] == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_room_for_the_log(tmp_path, monkeypatch, capsys):
    def full_log(out, step):
        return open("/dev/full", "a", buffering=1)

    monkeypatch.setattr(train, "open_log", full_log)
    assert status_of(train_here, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error
