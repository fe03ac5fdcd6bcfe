"""Runs that are killed, signalled, restarted, or go wrong in their numbers; checkpoints that are damaged or foreign."""
import os
import pickle
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import run as runs
import train
from helpers import SMALL, draw_few_glyphs, free_port, in_processes, like_torchrun, log_of, train_here
from kill_and_resume import compare, lines, start, trial, wait_until

LONG = "--epochs", "25", "--save-every", "100"                                                       # 75 steps
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run on few glyphs: 6 steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_few_glyphs(patch)
        train_here(folder)
    return folder


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_within_a_step(number, finished, few_glyphs, tmp_path, monkeypatch, capsys):
    """That step is finished and saved, the status says which signal, and --resume leads to the undisturbed end."""
    loss, calls, handler = train.nt_xent, [], signal.getsignal(number)

    def interrupted(h1, h2, temperature):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return loss(h1, h2, temperature)

    monkeypatch.setattr(train, "nt_xent", interrupted)
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 128 + number and error.count("\n") == 1
    assert f"{number.name}: saved after step 4, continue with --resume" in error
    assert len(calls) == len(log_of(tmp_path)) == 4 and signal.getsignal(number) == handler
    train_here(tmp_path, "--resume")
    assert len(calls) == 6 and compare(tmp_path, finished) == []


def terminate(folder, *launcher):
    """Send SIGTERM to a command line after its fifth step; returns its status, its stderr, and the step it saved."""
    run = folder / "run"
    process = start(*launcher, "train.py", *SMALL, *LONG, "--out", run, stderr=subprocess.PIPE)
    wait_until(lambda: lines(run) >= 5, process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert log_of(run)[-1]["step"] == step and 5 <= step < 75
    assert f"SIGTERM: saved after step {step}, continue with --resume" in error
    return process.returncode, error, step


def restart(folder):
    """Kill one of torchrun's two processes; returns what differs in the end from a run left alone."""
    run, straight, epochs = folder / "run", folder / "straight", ("--epochs", "12")
    process = start(*TORCHRUN, "--max-restarts=3", "train.py", *SMALL, *epochs, "--out", run,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: lines(run) >= 4 and (run / "checkpoint.pt").exists(), process)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
               if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert len(workers) == 2 and process.returncode == 0 and printed.count("frozen encoder") == 1, printed
    in_processes(2, one_of_two, free_port(), straight, epochs)
    return compare(run, straight)


def one_of_two(rank, port, out, flags):
    like_torchrun(rank, 2, port)
    train_here(out, *flags)


@pytest.mark.background(trial, [2])
def test_killed_twice(job):
    """SIGKILL while a checkpoint is being written and within a step: an undisturbed run's end, bit for bit."""
    _, (hits, different) = job
    assert len(hits) == 2 and "save" in hits[0] and "step" in hits[1] and different == []


@pytest.mark.background(restart, [])
def test_torchrun_restarts_a_killed_process(job):
    """With --max-restarts, SIGKILL to one process costs the steps since the checkpoint and nothing else."""
    assert job[1] == []


@pytest.mark.background(terminate, TORCHRUN)
def test_sigterm_ends_torchrun(job):
    """torchrun hands SIGTERM on; its processes agree on the step to save, and only the first one says so."""
    _, (status, error, _) = job
    assert status == 1 and error.count("saved after step") == 1                                      # torchrun's own


@pytest.mark.background(terminate, [])
def test_sigterm_ends_the_program(job):
    """`python train.py` exits with 143 and one line on stderr, and goes on from there to the undisturbed end."""
    folder, (status, error, step) = job
    assert status == 143 and error.count("\n") == 1
    for out, flags in (("run", ["--resume"]), ("straight", [])):
        train_here(folder / out, *LONG, *flags)
    assert log_of(folder / "run")[step]["step"] == step + 1 and compare(folder / "run", folder / "straight") == []


@pytest.mark.parametrize("message, status", (("CUDA error: integer out of range", 2), ("shapes do not match", None)))
def test_tensors_that_kernels_cannot_count(message, status, capsys):
    """What a GPU's kernels refuse for its size is one line; any other RuntimeError is ours, and is raised."""
    def main(args):
        raise RuntimeError(message)
    with pytest.raises(SystemExit if status else RuntimeError) as stop:
        runs.call(main, None)
    assert not status or stop.value.code == status and "smaller --batch-size" in capsys.readouterr().err


def test_processes_that_leave_together_destroy_their_group(monkeypatch):
    """Of a signal or a loss that is not finite all know; nothing of the group may be left, of which NCCL would warn."""
    done = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append(1))
    with pytest.raises(SystemExit) as stop:
        runs.leave_together(None, 143)
    assert done == [1] and stop.value.code == 143


# ------------------------------------------------------------------------------------- checkpoints that are not whole

def refusal(path):
    with pytest.raises(ValueError) as error:
        runs.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_cut_checkpoints_are_refused(finished, tmp_path):
    """50 random lengths, from nothing to one byte short: refused each time, in one line that names the file."""
    content, path = (finished / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    for length in [0, len(content) - 1, *random.Random(0).sample(range(1, len(content) - 1), 48)]:
        path.write_bytes(content[:length])
        assert "damaged" in refusal(path)
    path.write_bytes(content)
    assert runs.load_checkpoint(path)["step"] == 6


def test_a_flipped_bit_is_noticed(finished, tmp_path):
    """A byte changed inside the weights, which unpickling alone would let pass."""
    path, whole = tmp_path / "checkpoint.pt", finished / "checkpoint.pt"
    weights = torch.load(whole, weights_only=True)["head"]["0.weight"].numpy().tobytes()
    content = bytearray(whole.read_bytes())
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
    """A checkpoint with code in its pickle, in torch's format or bare, is refused, and the code does not run."""
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "mark"
    if zipped:
        torch.save(dict(encoder=Harmful(mark)), path)
    else:
        path.write_bytes(pickle.dumps(dict(encoder=Harmful(mark))))
    refusal(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert mark.exists()                                                       # so it would have run


@pytest.mark.parametrize("foreign", (
    {}, [1, 2], torch.nn.Linear(2, 2).state_dict(), dict(model={}, optimizer={}, epoch=3)))
def test_foreign_checkpoints_are_refused(foreign, tmp_path):
    torch.save(foreign, tmp_path / "checkpoint.pt")
    refusal(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("spoil", (
    lambda c: c.update(optimizer={}), lambda c: c.update(step="six"), lambda c: c["encoder"].popitem(),
    lambda c: c.update(random=[]), lambda c: c["head"].update({"0.weight": torch.zeros(3)}),
    lambda c: c.update(scheduler=7), lambda c: c.update(settings=[])))
def test_a_checkpoint_that_only_looks_right(spoil, finished, few_glyphs, tmp_path, capsys):
    """Every key is there, but not what belongs to it: one line and status 2, the file untouched."""
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path, "--resume")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "checkpoint.pt" in error, error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_failed_write_keeps_the_old_file(tmp_path):
    """No space: the old content stands, the half-written one is gone, and the error names the file."""
    path = tmp_path / "file"
    runs.write_whole(path, b"old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=str(path)):
        runs.write_whole(path, b"new" * 100_000)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------------------- numbers that go wrong

def test_a_loss_that_is_not_finite_stops_the_run(few_glyphs, tmp_path, monkeypatch, capsys):
    """Step, rate and the last good checkpoint are named, and that checkpoint is not overwritten."""
    loss, calls = train.nt_xent, []

    def spoilt(h1, h2, temperature):
        calls.append(1)
        return loss(h1, h2, temperature) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(train, "nt_xent", spoilt)
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path, "--log-every", "100")                             # first looked at when epoch 2 ends
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "the loss is nan at step 5, learning rate 0.075" in error and "checkpoint.pt, is of step 3" in error
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(few_glyphs, tmp_path, monkeypatch, capsys):
    """The last step before a save may spoil the weights while its own loss is still fine."""
    def spoil(self, closure=None):
        if self.param_groups[0]["lr"] < 0.03:                                  # the sixth and last step
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(train.LARS, "step", spoil)
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "weights are not finite after step 6" in error and "is of step 3" in error
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


def test_float16_overflow_is_left_to_the_scaler(few_glyphs, tmp_path):
    """A tiny temperature makes scaled gradients overflow: those steps are left out and counted; training goes on."""
    checkpoint = train_here(tmp_path, "--epochs", "8", "--amp", "float16", "--temperature", "0.01")
    counts = [entry["overflows"] for entry in log_of(tmp_path)]
    assert 1 <= counts[0] <= counts[-1] == counts[12] == checkpoint["overflows"] and counts == sorted(counts)
    assert checkpoint["scaler"]["scale"] == 2.0 ** 16 / 2 ** counts[-1]
    assert all(value.isfinite().all() for value in checkpoint["encoder"].values())


@pytest.mark.parametrize("amp, tolerance", (("bfloat16", 0.02), ("float16", 0.005)))
def test_half_precision_follows_float32(amp, tolerance, few_glyphs, tmp_path):
    """Over 24 steps on the CPU the loss stays within the rounding of the number format times a few layers."""
    losses = {}
    for name in ("off", amp):
        train_here(tmp_path / name, "--epochs", "8", "--amp", name)
        losses[name] = [entry["loss"] for entry in log_of(tmp_path / name)]
    assert len(losses["off"]) == 24 and losses["off"] != losses[amp]
    assert losses[amp] == pytest.approx(losses["off"], rel=tolerance)
