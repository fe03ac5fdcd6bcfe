"""Train a table of experiments/README.md: each row for every seed, by train.py or simclr.py.

    python experiments/tables.py NAME [--seeds 0 1 2] [--jobs 2]

    mnist                    Table 1 in small: A-SSL, H-SSL and supervised for each group
    untied-mnist             the structure removed
    untied-glyphs            the same, on images that are turned
    base-space, distance     H-SSL's parameters beside A-SSL's crop size and displacement
    objectives               SimSiam and BYOL
    work                     H-SSL for 16 epochs beside A-SSL and SimCLR for 8
    cifar10                  the residual network
    paper-...                the paper's settings, for --launcher "torchrun --nproc_per_node=8"

It writes results/NAME.json, which keeps the runs that it has, and prints it as a table. Finished
runs in the folder --runs are not trained again; interrupted ones of train.py go on from their
checkpoint.
"""
import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch

import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data as datasets    # noqa: E402
import probe    # noqa: E402


# --------------------------------------------------------------------------------------- the tables

# Settings were chosen on held-out training images with seeds from 100 on.

MNIST = ("--dataset mnist --device cpu --train-images 5000 --batch-size 256 --warmup-epochs 1 "
         "--trust-coefficient 0.03")
NARROW = f"{MNIST} --group translation --widths 16 32 64 --kernel-size 3 --temperature 0.5"
TRANSLATION = f"{NARROW} --base-space 5 --grid 2"
LIFTED = "--widths 4 8 16 --kernel-size 7 --grid 0"
ROTATION = f"--group rotation {LIFTED} --base-space 2 --temperature 1"
SCALE = f"--group scale {LIFTED} --scale-step 1.2 --temperature 3"
SMALL = {
    "translation": f"{TRANSLATION} --epochs 8",
    "rotation": f"{MNIST} {ROTATION} --epochs 8",
    "scale": f"{MNIST} {SCALE} --epochs 8",
}
GLYPHS = {
    "translation": "--dataset glyphs --device cpu --group translation",
    "rotation": f"--dataset glyphs --device cpu {ROTATION} --trust-coefficient 0.01",
}
CIFAR10 = ("--dataset cifar10 --device cpu --amp bfloat16 --group translation --widths 8 32 64 128 "
           "--kernel-size 3 --batch-size 256 --warmup-epochs 0.5 --temperature 0.5 "
           "--trust-coefficient 0.03 --base-space 6 --grid 2 --probe-grid 2")
SIMCLR = "experiments/simclr.py --method simclr"
AUGMENTED = "experiments/simclr.py --method h-ssl"


def table1(settings):
    """Each method for each group; settings: a group's flags."""
    rows = {}
    for group, flags in settings.items():
        for method in ("a-ssl", "h-ssl", "supervised"):
            rows[f"{group} {method}"] = f"{flags} --method {method}"
    return rows


def untied(settings):
    """Each row with and without structure."""
    rows = {}
    for group, flags in settings.items():
        for method in ("a-ssl", "h-ssl"):
            rows[f"{group} {method}"] = f"{flags} --method {method}"
            rows[f"{group} {method}, untied"] = f"{flags} --method {method} --structure none"
    return rows


def sweep(flags, changed, fixed):
    """Values of one flag; the other is fixed.

    A-SSL's crop is 4 pixels, the encoder's stride, per position of H-SSL's window, and its
    displacement 4 pixels per position of distance. The head sees all positions, for a window of 1
    has only one.
    """
    rows = {}
    for value in (1, 2, 3, 5):
        common = f"{flags} --grid 0 {changed} {value} {fixed}"
        rows[f"h-ssl {value}"] = f"{common} --method h-ssl"
        rows[f"a-ssl {value}"] = f"{common} --method a-ssl --crop"
    return rows


def without_negatives(flags):
    rows = {}
    for objective in ("simsiam", "byol"):
        for method in ("a-ssl", "h-ssl"):
            rows[f"{objective} {method}"] = f"{flags} --objective {objective} --method {method}"
    return rows


def paper(dataset):
    """The paper's settings, which are train.py's defaults, by group."""
    return {group: f"--dataset {dataset} --group {group}" for group in SMALL}


WORK = {
    "h-ssl, 8 epochs": f"{TRANSLATION} --method h-ssl --epochs 8",
    "h-ssl, 16 epochs": f"{TRANSLATION} --method h-ssl --epochs 16",
    "a-ssl, 8 epochs": f"{TRANSLATION} --method a-ssl --epochs 8",
    "simclr, 8 epochs": f"{SIMCLR} {TRANSLATION} --epochs 8",
    "h-ssl on two augmented copies, 8 epochs": f"{AUGMENTED} {TRANSLATION} --epochs 8",
}
# table -> row -> flags of train.py, or another script and its flags
TABLES = {
    "mnist": table1(SMALL),
    "untied-mnist": untied({"translation": SMALL["translation"], "rotation": SMALL["rotation"]}),
    "untied-glyphs": untied(GLYPHS),
    "base-space": sweep(f"{NARROW} --epochs 8", "--base-space", "--max-distance 2"),
    "distance": sweep(f"{NARROW} --epochs 8", "--max-distance", "--base-space 2"),
    "objectives": without_negatives(SMALL["translation"]),
    "work": WORK,
    "cifar10": {
        "h-ssl": f"{CIFAR10} --method h-ssl --epochs 4",
        "simclr": f"{SIMCLR} {CIFAR10} --epochs 2",
    },
    "paper-mnist": table1(paper("mnist")),
    "paper-cifar10": table1(paper("cifar10")),
    "paper-tiny-imagenet": table1(paper("tiny-imagenet")),
    "paper-untied": untied(paper("mnist")),
    "paper-base-space": sweep(paper("mnist")["translation"], "--base-space", "--max-distance 2"),
    "paper-distance": sweep(paper("mnist")["translation"], "--max-distance", "--base-space 2"),
}


# ----------------------------------------------------------------------------------------- training

def machine(device, processes=1):
    """The machine's processor, or the GPUs of as many processes, in words."""
    if device == "cuda":
        return f"{processes} {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit():
    """What commit is checked out, and whether code has changed since."""
    head = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", "*.py") != ""
    return head, changed


def git(*arguments):
    """What git prints here; nothing without git, or outside a repository."""
    try:
        finished = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return finished.stdout.strip()


def split_script(flags):
    """The script of a row, and its flags as a list."""
    words = shlex.split(flags)
    if words[0].endswith(".py"):
        return words[0], words[1:]
    return "train.py", words


def train_row(args, row, seed):
    """Train a row with one seed in a folder of its own, unless that is done, and write run.json.

    Raises a ValueError if the script fails.
    """
    letters = [letter if letter.isalnum() else "-" for letter in row]
    out = Path(args.runs, args.name, f"{''.join(letters)}-{seed}")
    if (out / "run.json").exists():
        return
    script, words = split_script(args.rows[row])
    command = [*args.launcher, str(ROOT / script), *words, "--seed", str(seed), "--out", str(out)]
    command += ["--data-dir", args.data_dir, "--resume"]
    if args.eval_every is not None and script == "train.py":
        command += ["--eval-every", args.eval_every]
    environment = dict(os.environ)
    if args.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    head, dirty = commit()
    about = dict(
        row=row,
        flags=args.rows[row],
        seed=seed,
        commit=head,
        dirty=dirty,
    )
    start = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode != 0:
        raise ValueError(f"{shlex.join(command)} failed:\n{finished.stderr}")
    about["seconds"] = round(time.perf_counter() - start, 1)
    settings = json.loads((out / "config.json").read_text())
    about["machine"] = machine(settings["device"], settings.get("processes", 1))
    record = report.read_run(out) | about
    (out / "run.json").write_text(json.dumps(record) + "\n")
    print(f"{row}, seed {seed}: {record['frozen']['top1']} -> {record['top1']}", file=sys.stderr)


def finished_runs(args, path):
    """The runs of the file, and those in the folder of runs, in the order of rows and seeds.

    Raises a ValueError if one of them was made with other flags.
    """
    records = []
    if path.exists():
        records += json.loads(path.read_text())["runs"]
    # A run in the folder of runs is the newer one.
    for file in Path(args.runs, args.name).glob("*/run.json"):
        records.append(json.loads(file.read_text()))
    rows = list(args.rows)
    runs = {}
    for record in records:
        row = record["row"]
        if args.rows.get(row) != record["flags"]:
            raise ValueError(f"row {row!r} was trained with other flags: move {path} and "
                             f"{Path(args.runs, args.name)} away")
        runs[rows.index(row), record["seed"]] = record
    return [runs[key] for key in sorted(runs)]


def train_table(args):
    """Train the chosen rows for the chosen seeds and write the JSON file; args are `parse`'s.

    Raises a ValueError if a run fails, which ends the table, or if others were made with other
    flags. What has finished is written all the same.
    """
    path = Path(args.results, f"{args.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    finished_runs(args, path)
    # Download now, not in several runs at once.
    _, words = split_script(args.rows[args.chosen[0]])
    datasets.load(words[words.index("--dataset") + 1], args.data_dir)

    jobs = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            for row in args.chosen:
                jobs.append(pool.submit(train_row, args, row, seed))
        wait(jobs, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
    runs = finished_runs(args, path)
    if runs:
        probe.write_whole(path, json.dumps(dict(runs=runs), indent=1).encode())
    for job in jobs:
        if not job.cancelled():
            job.result()    # raises what went wrong
    return runs


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="tables.py NAME [--seeds 0 1 2] [--jobs 2] [--help] ...")
    add = parser.add_argument
    add("name", metavar="NAME", choices=TABLES, help="of the table")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--only", nargs="+", metavar="ROW", help="train only these rows, by their full names")
    add("--jobs", type=int, default=1, help="runs at a time; on a CPU they share the cores (1)")
    add("--launcher", type=shlex.split, default=[sys.executable], metavar="COMMAND",
        help="what starts train.py (this Python)")
    add("--eval-every", metavar="EPOCHS", help="passed to train.py, for figures.py curves (never)")
    add("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    add("--runs", default="runs/experiments", help="folder of the runs' folders")
    add("--results", default=str(report.RESULTS), help="folder of the JSON files")
    args = parser.parse_args(argv)
    args.rows = TABLES[args.name]
    args.chosen = args.only or list(args.rows)
    for row in args.chosen:
        if row not in args.rows:
            parser.error(f"there is no row {row!r}, only {'; '.join(args.rows)}")
    return args


def main(args):
    try:
        runs = train_table(args)
    except (ValueError, OSError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(report.means(runs)))


if __name__ == "__main__":
    main(parse())
