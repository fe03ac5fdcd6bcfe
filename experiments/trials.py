"""Small trainings on a CPU, one table a command. Each table is a list of runs of train.py; finished runs are kept.

    python experiments/trials.py {groups,rates,long,trust,readouts,glyphs,cifar10,cifar10-scale,cifar10-rotation,tiny-imagenet} --data-dir DATASETS [--jobs 2] [--runs runs/trials]

writes experiments/results/TABLE.json (each run's settings and results, the machine, the torch version) and prints the
table: mean and standard deviation over whole trainings, one per seed.
"""
import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data as datasets                                                                              # noqa: E402

MNIST = "--dataset mnist --train-images 10000 --batch-size 512 --epochs 8 --warmup-epochs 1 --trust-coefficient 0.03"
WIDTHS = {"translation": "--widths 16 32 64 --kernel-size 5", "rotation": "--widths 8 16 32 --kernel-size 5",
          "scale": "--widths 8 16 32 --kernel-size 7"}
SMALL = "--dataset mnist --group rotation --train-images 5000 --widths 4 8 16 --kernel-size 5 --warmup-epochs 1 --trust-coefficient 0.03"
RESIDUAL = "--batch-size 256 --warmup-epochs 1 --depth 10 --kernel-size 5 --probe-epochs 40 --widths 8 16 32 64 --trust-coefficient 0.01"
CIFAR = f"--dataset cifar10 --train-images 5000 {RESIDUAL}"
TINY = f"--dataset tiny-imagenet --train-images 16000 --epochs 3 {RESIDUAL}"
LONG = "--dataset mnist --train-images 10000 --kernel-size 5 --batch-size 256 --warmup-epochs 2"

# Each table: a row's name -> flags of train.py, and the seeds.
TABLES = {
    "groups": ({f"{g} {m}": f"{MNIST} --group {g} --method {m} {WIDTHS[g]}" for g in WIDTHS for m in ("h-ssl", "a-ssl")}, (0, 1, 2)),
    # Over half of the paper's 7,000 steps, with a batch that a CPU can afford: 1.6 is what 0.1 per 256 makes at batch 4096.
    "rates": ({f"lr {lr}": f"{LONG} --widths 8 16 32 --epochs 100 --lr {lr}" for lr in (0.1, 1.6)}, (0, 1)),
    # Why do those fall below the frozen encoder?
    "long": ({"temperature 1": f"{LONG} --widths 8 16 32 --epochs 100 --temperature 1",
              "twice the channels, half the epochs": f"{LONG} --widths 16 32 64 --epochs 50"}, (0, 1)),
    # The same product of the two, so the same steps of the weights; but biases and norms take the bare rate.
    "trust": ({f"lr {lr}, trust coefficient {trust}": f"{MNIST} {WIDTHS['translation']} --lr {lr} --trust-coefficient {trust}"
               for lr, trust in ((0.1, 0.03), (3, 0.001))}, (0, 1, 2)),
    "readouts": ({
        **{f"{m} grid {grid}": f"{SMALL} --method {m} --grid {grid} --epochs 10 --batch-size 256"
           for m, grid in (("h-ssl", 0), ("h-ssl", 2), ("h-ssl", 1), ("a-ssl", 1))},
        "h-ssl grid 0, temperature 1": f"{SMALL} --grid 0 --epochs 10 --batch-size 256 --temperature 1",
        "h-ssl grid 1, temperature 1": f"{SMALL} --grid 1 --epochs 10 --batch-size 256 --temperature 1",
        "h-ssl grid 1, 126 negatives": f"{SMALL} --grid 1 --epochs 3 --batch-size 64",
        "h-ssl grid 1, 2046 negatives": f"{SMALL} --grid 1 --epochs 48 --warmup-epochs 4 --batch-size 1024",
        "h-ssl grid 1, twice the channels": f"{SMALL} --grid 1 --epochs 10 --batch-size 256 --widths 8 16 32",
    }, (0, 1)),
    "glyphs": ({"h-ssl": "", "a-ssl": "--method a-ssl", "h-ssl, temperature 0.1": "--temperature 0.1",
                "h-ssl, grid 1": "--grid 1"}, (0, 1, 2)),
    "cifar10": ({f"translation {m}": f"{CIFAR} --epochs 8 --grid 1 --method {m}" for m in ("h-ssl", "a-ssl")}, (0, 1, 2)),
    "cifar10-scale": ({f"scale {m}": f"{CIFAR} --epochs 6 --group scale --kernel-size 7 --grid 1 --method {m}" for m in ("h-ssl", "a-ssl")}, (0, 1, 2)),
    "cifar10-rotation": ({f"rotation {m}": f"{CIFAR} --epochs 6 --group rotation --extent 1 --grid 0 --method {m}" for m in ("h-ssl", "a-ssl")}, (0,)),
    "tiny-imagenet": ({f"translation {m}": f"{TINY} --grid 1 --method {m}" for m in ("h-ssl", "a-ssl")}, (0, 1, 2)),
}


def run(flags, seed, out, data_dir):
    """One training, unless its result is there already; returns its probe.json."""
    result = out / "probe.json"
    if not result.exists():
        command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--seed", str(seed), "--out", str(out),
                   "--data-dir", data_dir, "--resume", "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(result.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    parser.add_argument("--runs", default="runs/trials", help="folder of the runs' folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    rows, seeds = TABLES[args.table]

    def one(job):
        seed, (name, flags) = job
        out = Path(args.runs) / f"{args.table}-{name.replace(' ', '-').replace(',', '')}-{seed}"
        return name, flags, seed, run(flags, seed, out, args.data_dir)

    dataset = next((name for name in ("glyphs", "cifar10", "tiny-imagenet") if args.table.startswith(name)), "mnist")
    datasets.load(dataset, args.data_dir)                              # downloaded once, before several runs would
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(one, itertools.product(seeds, rows.items())))
    record = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", torch=torch.__version__,
                  runs=[dict(row=name, flags=flags, seed=seed, **result) for name, flags, seed, result in results])
    folder = ROOT / "experiments" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{args.table}.json").write_text(json.dumps(record, indent=1) + "\n")

    print(f"{len(seeds)} seeds, {record['machine']}, torch {torch.__version__}\n\n| run | frozen | trained |\n| --- | --- | --- |")
    for name in rows:
        columns = [[r[key] for n, _, _, r in results if n == name] for key in ("frozen_top1", "top1")]
        print(f"| {name} | " + " | ".join(f"{statistics.mean(c):.2f}" + (f" ± {statistics.stdev(c):.2f}" if len(c) > 1 else "") for c in columns) + " |")


if __name__ == "__main__":
    main()
