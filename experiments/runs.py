"""What the tables and sweeps of this folder share: a list of trainings in, experiments/results/NAME-BUDGET.json and a table out.

Each script names its rows, a row being flags of train.py, for each of three budgets:

    paper   the paper's configuration, meant for `--launcher "torchrun --nproc_per_node=8"`
    gpu     full width and all images, fewer epochs and smaller batches: one GPU
    cpu     small widths and a part of the images: minutes a run on one core

Every row is trained once per seed. Finished runs are kept in --runs and not trained again; interrupted ones go on from their
checkpoint. The JSON file holds each run's flags, seed, commit, machine, torch version, wall time, loss curve and probe.json.
"""
import argparse
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

import torch

from report import RESULTS, show

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data as datasets                                                                              # noqa: E402
from train import parse                                                                              # noqa: E402


def machine():
    """The machine's processor or GPU, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit():
    """The checked-out commit, with "-dirty" where more than results was changed; None without git."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    head = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    return head + "-dirty" * git("diff", "--quiet", "HEAD", "--", ".", ":!experiments/results").returncode if head else None


def run(flags, seed, out, args):
    """One training, unless it is finished already; returns its record, a dict."""
    record = out / "run.json"
    if not record.exists():
        command = [*args.launcher, str(ROOT / "train.py"), *shlex.split(flags), "--seed", str(seed), "--out", str(out), "--data-dir", args.data_dir, "--resume"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        result = dict(flags=flags, seed=seed, commit=commit(), machine=machine(), torch=torch.__version__, seconds=round(time.perf_counter() - start, 1),
                      images_per_second=statistics.median([line["images_per_second"] for line in lines]) if lines else None,
                      losses=[[line["step"], round(line["loss"], 4)] for line in lines], **json.loads((out / "probe.json").read_text()))
        record.write_text(json.dumps(result) + "\n")
        print(f"{out.name}: frozen {result['frozen_top1']:.2f} %, trained {result['top1']:.2f} %, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    result = json.loads(record.read_text())
    if result["flags"] != flags:
        raise SystemExit(f"{out} was made with other flags ({result['flags']}): delete it, or choose another --runs")
    return result


def main(doc, experiments, budgets=("paper", "gpu", "cpu")):
    """Read the command line, train what is not trained, write and print.

    Args:
        doc: the script's docstring, for --help.
        experiments: name -> function(budget) -> {row's name: flags of train.py}.
        budgets: those that the functions know.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if len(experiments) > 1:
        parser.add_argument("name", choices=experiments, help="which of the script's tables")
    else:
        parser.set_defaults(name=next(iter(experiments)))
    parser.add_argument("--budget", choices=budgets, default=budgets[-1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    parser.add_argument("--runs", default="runs/experiments", help="folder of the runs' folders")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the JSON files")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; on a CPU each has its share of the cores")
    parser.add_argument("--launcher", type=shlex.split, default=[sys.executable], help="what starts train.py (default: this Python)")
    parser.add_argument("--extra", default="", help="flags of train.py to add to every run, as --extra=\"--epochs 1\"")
    args = parser.parse_args()
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    rows = {row: f"{flags} {args.extra}".strip() for row, flags in experiments[args.name](args.budget).items()}
    for name in {parse(shlex.split(flags)).dataset for flags in rows.values()}:
        datasets.load(name, args.data_dir)                             # downloaded once, before several runs would

    def one(job):
        seed, (row, flags) = job
        out = Path(args.runs) / f"{args.name}-{args.budget}-{''.join(c if c.isalnum() else '-' for c in row)}-{seed}"
        return dict(row=row) | run(flags, seed, out, args)

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(one, itertools.product(args.seeds, rows.items())))
    record = dict(name=args.name, budget=args.budget, runs=runs)
    Path(args.results).mkdir(parents=True, exist_ok=True)
    (Path(args.results) / f"{args.name}-{args.budget}.json").write_text(json.dumps(record, indent=1) + "\n")
    show(record)
