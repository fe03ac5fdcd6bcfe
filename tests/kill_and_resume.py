"""Kill a training with SIGKILL again and again, resume it each time, and compare how it ends with one left alone.

    python tests/kill_and_resume.py [--kills 10] [--seed 0]

The moments are drawn at random, in turn: while a checkpoint is being written, within a step, while the program starts.
Exit status 1, with what differs, unless weights, optimizer, schedule, log and classifier are the same bit for bit.
"""
import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--device cpu --train-images 2000 --batch-size 64 --widths 2 3 4 --probe-epochs 5 --save-every 1 --log-every 1".split()


def start(out, epochs, *flags):
    return subprocess.Popen([sys.executable, "train.py", *SMALL, "--epochs", str(epochs), "--out", str(out), *flags], cwd=ROOT,
                            stdout=subprocess.DEVNULL)


def wait_until(happened, process):
    while not happened() and process.poll() is None:
        time.sleep(0.0005)


def lines(run):
    path = run / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(moment, process, run, rng):
    """Wait for a random moment of one kind, then SIGKILL; returns in words where it hit, None if the program was done."""
    temporary = run / "checkpoint.pt.tmp"
    if moment == "save":
        before = temporary.stat().st_mtime_ns if temporary.exists() else None         # one left by an earlier kill
        wait_until(lambda: temporary.exists() and temporary.stat().st_mtime_ns != before if before else temporary.exists(), process)
    elif moment == "step":
        target = lines(run) + rng.randint(1, 40)
        wait_until(lambda: lines(run) >= target, process)
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0.1, 6))
    process.kill()
    if process.wait() == 0:
        return None
    return "in a save" if moment == "save" and temporary.exists() else moment if moment != "save" else "after a save"


def differences(a, b, name="checkpoint"):
    """Where two checkpoints differ, by name; tensors must be equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        return [d for key in a.keys() | b.keys() if key not in ("out", "resume") for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{name}.{k}")]
    return [] if a == b else [name]


def compare(run, straight):
    """What differs between two finished runs: checkpoint, log (but for the times) and probe.json."""
    found = differences(*(torch.load(r / "checkpoint.pt", weights_only=True) for r in (run, straight)))
    logs = [[{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in (r / "log.jsonl").open()]
            for r in (run, straight)]
    found += differences(*logs, "log") + differences(*((r / "probe.json").read_text() for r in (run, straight)), "probe")
    return found


def trial(folder, kills, seed=0):
    """Train with kills and without; returns where the kills hit, and what differs in the end (nothing, if all is well)."""
    rng, run, straight, hits = random.Random(seed), folder / "killed", folder / "straight", []
    epochs = 2 * kills + 2
    moments = itertools.cycle(("save", "step", "start"))
    while len(hits) < kills:
        hit = kill_at(next(moments), start(run, epochs, "--resume"), run, rng)
        if hit is None:
            raise RuntimeError(f"the program finished after {len(hits)} of {kills} kills: take another --seed")
        hits.append(f"{hit} (step {lines(run)})")
        print(f"kill {len(hits)}: {hits[-1]}", flush=True)
    for process in (start(run, epochs, "--resume"), start(straight, epochs)):
        if process.wait():
            raise RuntimeError(f"an undisturbed part ended with status {process.returncode}")
    return hits, compare(run, straight)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hits, different = trial(Path(folder), args.kills, args.seed)
    print(f"{len(hits)} kills, {sum('in a save' in hit for hit in hits)} of them in a save; "
          + (f"DIFFERENT: {different}" if different else "weights, optimizer, schedule, log and classifier identical"))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
