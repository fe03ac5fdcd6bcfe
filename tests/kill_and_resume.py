"""Kill a training with SIGKILL again and again, resume it each time, and compare its end with that of one left alone.

    python tests/kill_and_resume.py [--kills 10] [--seed 0]

The moments are drawn at random, in turn: while a checkpoint is being written, within a step, while the program starts.
Exit status 1, with what differs, unless weights, optimizer, schedule, log and classifier are the same bit for bit.
"""
import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--device cpu --train-images 1000 --batch-size 64 --widths 2 3 4 --probe-iterations 9 "              # 15 steps
         "--save-every 1 --log-every 1").split()                                                             # an epoch


def start(*command, **options):
    """Start a command line of this repository on one thread."""
    options = dict(stdout=subprocess.DEVNULL, text=True) | options
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, **options)


def wait_until(happened, process):
    while not happened() and process.poll() is None:
        time.sleep(0.002)


def lines(run):
    path = run / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(moment, process, run, rng):
    """Kill at a random moment of one kind; returns in words where that was, or None if the program had finished."""
    temporary = run / "checkpoint.pt.tmp"

    def written():
        with contextlib.suppress(FileNotFoundError):
            return temporary.stat().st_mtime_ns

    if moment == "save":
        before = written()                                                     # of a file that an earlier kill left
        wait_until(lambda: written() not in (None, before), process)
    elif moment == "step":
        target = lines(run) + rng.randint(1, 25)
        wait_until(lambda: lines(run) >= target, process)
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0.1, 4))
    process.kill()
    if process.wait() == 0:
        return None
    return "in a save" if moment == "save" and temporary.exists() else moment if moment != "save" else "after a save"


def differences(a, b, name="checkpoint"):
    """Where two checkpoints differ, by name; tensors must be equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"out", "resume"}
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{name}.{k}")]
    return [] if a == b else [name]


def compare(run, straight):
    """What differs between two finished runs: checkpoint, log (but for the times) and probe.json."""
    def contents(run):
        log = [json.loads(line) for line in (run / "log.jsonl").open()]
        return dict(checkpoint=torch.load(run / "checkpoint.pt", weights_only=True),
                    log=[{key: line[key] for key in line if key != "images_per_second"} for line in log],
                    probe=(run / "probe.json").read_text())
    return differences(contents(run), contents(straight), "run")


def trial(folder, kills, seed=0):
    """Train with kills and without; returns where the kills hit, and what differs in the end (ideally nothing)."""
    rng, run, straight, hits = random.Random(seed), folder / "killed", folder / "straight", []
    train = "train.py", *SMALL, "--epochs", 2 * kills + 2, "--out"
    moments = itertools.cycle(("save", "step", "start"))
    with start(*train, straight) as undisturbed:
        while len(hits) < kills:
            hit = kill_at(next(moments), start(*train, run, "--resume"), run, rng)
            if hit is None:
                raise RuntimeError(f"the program finished after {len(hits)} of {kills} kills: take another --seed")
            hits.append(f"{hit} (step {lines(run)})")
            print(f"kill {len(hits)}: {hits[-1]}", flush=True)
        for process in (start(*train, run, "--resume"), undisturbed):
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
