"""Runs that are killed, told to stop, restarted by torchrun, out of numbers or of disk, and checkpoints that are not whole."""
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kill_and_resume
import probe
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--device cpu --train-images 200 --batch-size 64 --epochs 2 --widths 2 3 4 --probe-epochs 5 --log-every 1 --save-every 1".split()


def run_in_process(out, *flags):
    train.main(train.parse([*SMALL, "--out", str(out), *flags]))
    return torch.load(out / "checkpoint.pt", weights_only=True)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: (its folder, its checkpoint as bytes)."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_in_process(run)
    return run, (run / "checkpoint.pt").read_bytes()


def test_killed_twice(tmp_path):
    """SIGKILL while a checkpoint is being written and within a step: the end is that of an undisturbed run, bit for bit."""
    hits, different = kill_and_resume.trial(tmp_path, kills=2)
    assert len(hits) == 2 and "save" in hits[0] and "step" in hits[1] and different == []


@pytest.mark.parametrize("number, launcher", ((signal.SIGTERM, []), (signal.SIGINT, []),
                                              (signal.SIGTERM, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])))
def test_a_signal_saves_and_says_so(number, launcher, tmp_path):
    """The step in hand is finished and saved, the status says which signal, and --resume leads to the undisturbed end."""
    flags = [*SMALL, "--epochs", "40", "--save-every", "100"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    process = subprocess.Popen([sys.executable, *launcher, "train.py", *flags, "--out", run], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    kill_and_resume.wait_until(lambda: kill_and_resume.lines(run) >= 5, process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert log_of(run)[-1]["step"] == step and 5 <= step < 120
    assert f"{signal.Signals(number).name}: saved after step {step}, continue with --resume" in error
    if launcher:
        assert process.returncode == 1                         # torchrun's own
        return
    assert process.returncode == 128 + number and error.count("\n") == 1
    for out, extra in ((run, ["--resume"]), (straight, [])):
        subprocess.run([sys.executable, "train.py", *flags, "--out", out, *extra], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert kill_and_resume.compare(run, straight) == []


def test_torchrun_restarts_a_killed_process(tmp_path):
    """With --max-restarts a worker killed in mid-run costs the steps since the checkpoint and nothing else."""
    def start(out):
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
                                 "train.py", *SMALL, "--epochs", "8", "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    run, straight = tmp_path / "run", tmp_path / "straight"
    process = start(run)
    kill_and_resume.wait_until(lambda: kill_and_resume.lines(run) >= 7 and (run / "checkpoint.pt").exists(), process)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
               if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert len(workers) == 2 and process.returncode == 0 and printed.count("frozen encoder") == 1, printed
    assert start(straight).wait() == 0
    assert kill_and_resume.compare(run, straight) == []


# ---------------------------------------------------------------------------------------------- checkpoints that are not whole

def refusal(path):
    with pytest.raises(ValueError) as error:
        probe.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_cut_checkpoints_are_refused(finished, tmp_path):
    """50 random lengths, from nothing to one byte short: refused each time, in one line that names the file."""
    content, path = finished[1], tmp_path / "checkpoint.pt"
    for length in [0, len(content) - 1, *random.Random(0).sample(range(1, len(content) - 1), 48)]:
        path.write_bytes(content[:length])
        assert "damaged" in refusal(path)
    path.write_bytes(content)
    assert probe.load_checkpoint(path)["step"] == 6


def test_a_flipped_bit_is_noticed(finished, tmp_path):
    """A byte changed inside the weights, which unpickling alone would let pass."""
    content, path = bytearray(finished[1]), tmp_path / "checkpoint.pt"
    weights = torch.load(finished[0] / "checkpoint.pt", weights_only=True)["head"]["0.weight"].numpy().tobytes()
    content[content.index(weights) + 100] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path)


class Harmful:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_pickle_that_would_run_code(zipped, tmp_path):
    """A checkpoint with code in its pickle, in torch's format or a bare pickle, is refused and the code does not run."""
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "mark"
    if zipped:
        torch.save(dict(encoder=Harmful(mark)), path)
    else:
        path.write_bytes(pickle.dumps(dict(encoder=Harmful(mark))))
    refusal(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())     # the trap is live: it springs
    assert mark.exists()


@pytest.mark.parametrize("foreign", ({}, [1, 2], torch.nn.Linear(2, 2).state_dict(), dict(model={}, optimizer={}, epoch=3)))
def test_foreign_checkpoints_are_refused(foreign, tmp_path):
    torch.save(foreign, tmp_path / "checkpoint.pt")
    refusal(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("spoil", (
    lambda c: c.update(optimizer={}), lambda c: c.update(step="six"), lambda c: c["encoder"].popitem(), lambda c: c.update(random=[]),
    lambda c: c["head"].update({"0.weight": torch.zeros(3)}), lambda c: c.update(scheduler=7), lambda c: c.update(settings=[])))
def test_a_checkpoint_that_only_looks_right(spoil, finished, tmp_path, capsys):
    """Every key there, but not what belongs there: one line and status 2, the file untouched."""
    checkpoint = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    spoil(checkpoint)
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_in_process(tmp_path / "run", "--resume")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "checkpoint.pt" in error, error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_failed_write_keeps_the_old_file(tmp_path):
    """No space: the old content stands, the half-written one is gone, and the error names the file."""
    path = tmp_path / "file"
    probe.write_whole(path, b"old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=str(path)):
        probe.write_whole(path, b"new" * 100_000)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------------- numbers that go wrong

def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    """Step, rate and the last good checkpoint are named, and that checkpoint is not overwritten."""
    whole, calls = train.multi_view_nt_xent, []

    def spoilt(views, temperature):
        calls.append(1)
        return whole(views, temperature) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(train, "multi_view_nt_xent", spoilt)
    with pytest.raises(SystemExit) as stop:
        run_in_process(tmp_path / "run", "--log-every", "100")                             # first looked at when epoch 2 ends
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "the loss is nan at step 5, learning rate 0.075" in error and "checkpoint.pt, is of step 3" in error
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """The last step before a save may spoil the weights while its own loss is still fine."""
    def spoil(self, closure=None):
        if self.param_groups[0]["lr"] < 0.03:                                              # the sixth and last step
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(train.LARS, "step", spoil)
    with pytest.raises(SystemExit) as stop:
        run_in_process(tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "weights are not finite after step 6" in error and "is of step 3" in error
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_float16_overflow_is_left_to_the_scaler(tmp_path):
    """A tiny temperature makes scaled gradients overflow: those steps are left out and counted, and training goes on."""
    checkpoint = run_in_process(tmp_path / "run", "--epochs", "8", "--amp", "float16", "--temperature", "0.01")
    counts = [entry["overflows"] for entry in log_of(tmp_path / "run")]
    assert 1 <= counts[0] <= counts[-1] == counts[12] and counts[-1] == checkpoint["overflows"] and counts == sorted(counts)
    assert checkpoint["scaler"]["scale"] == 2.0 ** 16 / 2 ** counts[-1]
    assert all(value.isfinite().all() for value in checkpoint["encoder"].values())


@pytest.mark.parametrize("amp, tolerance", (("bfloat16", 0.02), ("float16", 0.005)))
def test_half_precision_follows_float32(amp, tolerance, tmp_path):
    """Over 24 steps on the CPU the loss stays within the rounding of the number format times a few layers."""
    losses = {}
    for name in ("off", amp):
        run_in_process(tmp_path / name, "--epochs", "8", "--amp", name)
        losses[name] = [entry["loss"] for entry in log_of(tmp_path / name)]
    assert len(losses["off"]) == 24 and losses["off"] != losses[amp]
    assert losses[amp] == pytest.approx(losses["off"], rel=tolerance)
