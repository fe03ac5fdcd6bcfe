"""Train a table's rows for every seed, and read finished runs back. The scripts beside this one import from it.

A row has a name and flags of train.py. Finished runs are kept and not trained again; interrupted ones continue from
their checkpoint. results/NAME-BUDGET.json holds each run's flags, seed, commit, machine, torch version, wall time, loss
curve, looks of --eval-every and probe.json.
"""
import copy
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))              # for every script of this folder: they import from here first
import data as datasets                                                                              # noqa: E402
import probe                                                                                         # noqa: E402
import run                                                                                           # noqa: E402
import train                                                                                         # noqa: E402


# ------------------------------------------------------------------------------------------------------------ training
def machine():
    """The machine's GPUs or processor, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit():
    """The checked-out commit, with "-dirty" if more than results changed since; None without git."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    head = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!experiments/results").returncode
    return head + "-dirty" * changed if head else None


def train_row(flags, seed, out, args):
    """Train a row with one seed in the folder out, unless that is done already; returns the run's record, a dict."""
    path = out / "run.json"
    if not path.exists():
        command = [*args.launcher, str(ROOT / "train.py"), *shlex.split(flags), "--seed", str(seed), "--out", str(out),
                   "--data-dir", args.data_dir, "--resume"]
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))} if args.jobs > 1 else {}
        start, code = time.perf_counter(), commit()
        finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        seconds = round(time.perf_counter() - start, 1)
        if finished.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{finished.stderr}")
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        speed = statistics.median(line["images_per_second"] for line in log) if log else None
        result = json.loads((out / "probe.json").read_text())
        record = dict(flags=flags, seed=seed, commit=code, machine=machine(), torch=torch.__version__,
                      seconds=seconds, images_per_second=speed,
                      losses=[[line["step"], round(line["loss"], 4)] for line in log],
                      looks=[line for line in log if "effective_rank" in line], **result)
        path.write_text(json.dumps(record) + "\n")
        print(f"{out.name}: frozen {result['frozen_top1']:.2f} %, trained {result['top1']:.2f} %, {seconds:.0f} s",
              file=sys.stderr, flush=True)
    record = json.loads(path.read_text())
    if record["flags"] != flags:
        raise SystemExit(f"{out} was made with other flags ({record['flags']}): delete it, or choose another --runs")
    return record


def train_table(args):
    """Train the chosen rows for all seeds, and write the JSON file, which keeps the runs that it holds and that are in
    the folder of runs, of all seeds below 100; returns its content. args are those of tables.py."""
    rows = {row: f"{flags} {args.extra}".strip() for row, flags in args.rows.items()}
    path = Path(args.results) / f"{args.name}-{args.budget}.json"
    held = json.loads(path.read_text())["runs"] if path.exists() else []
    if any(rows.get(r["row"]) != r["flags"] for r in held):
        run.stop(f"{path} holds runs with other flags: move it away, or choose another --results")
    try:
        for name in {train.parse(shlex.split(flags)).dataset for flags in rows.values()}:
            datasets.load(name, args.data_dir)                                 # download once, not in every run
    except ValueError as error:
        run.stop(error)

    def folder(row, seed):
        plain = "".join(c if c.isalnum() else "-" for c in row)
        return Path(args.runs) / f"{args.name}-{args.budget}-{plain}-{seed}"

    def train_one(job):
        seed, (row, flags) = job
        return dict(row=row) | train_row(flags, seed, folder(row, seed), args)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train_one, itertools.product(args.seeds, [(row, rows[row]) for row in args.chosen])))
    finished = {(r["seed"], r["row"]): r for r in held}
    for seed, (row, flags) in itertools.product(range(100), rows.items()):
        if (folder(row, seed) / "run.json").exists():
            finished[seed, row] = train_one((seed, (row, flags)))              # which only reads it
    runs = [finished[key] for key in itertools.product(range(100), rows) if key in finished]
    record = dict(name=args.name, budget=args.budget, runs=runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


# ------------------------------------------------------------------------------------------------------------- reading
class Run(NamedTuple):
    settings: dict                 # the flags
    data: datasets.Dataset
    group: object                  # that moves features; of crops, the windows that they show
    before: train.Objective        # encoder and head as the training found them, and as it left them, both in eval mode
    after: train.Objective


def load_run(folder, data_dir=None):
    """Read a finished run of train.py, on the CPU; data_dir: folder of the data sets, None for the run's own."""
    path = Path(folder) / "checkpoint.pt"
    try:
        checkpoint = run.load_checkpoint(path)
        with run.fitting(path):
            s = SimpleNamespace(**checkpoint["settings"])
            chosen = probe.data_of(vars(s), "cpu", data_dir)
        data = datasets.load(*chosen)
        with run.fitting(path):
            torch.manual_seed(s.seed)                                          # the weights that train.py began with
            encoder, group = run.build(vars(s), *data.train_images.shape[1:3])
            before = train.make_objective(s, encoder, group, data)
            probe.take_statistics(encoder, data)
            after = copy.deepcopy(before)
            after.encoder.load_state_dict(checkpoint["encoder"])
            after.head.load_state_dict(checkpoint["head"])
    except ValueError as error:
        run.stop(error)
    return Run(vars(s), data, getattr(group, "shifts", group), before.eval(), after.eval())
