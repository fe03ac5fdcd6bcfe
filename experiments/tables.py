"""Train a table of experiments/README.md: each row for every seed, by train.py or simclr.py.

    python experiments/tables.py NAME [--budget cpu] [--seeds 0 1 2] [--jobs 2]

    mnist, cifar10, tiny-imagenet   Table 1: A-SSL, H-SSL and supervised for each group
    mnist-untied                    the same with the structure removed
    glyphs                          structure removed, on images that are turned
    base-space, distance            H-SSL's parameters beside A-SSL's crop size and displacement
    objectives                      SimSiam and BYOL
    work                            H-SSL for 16 epochs beside A-SSL and SimCLR for 8
    paper                           the paper's configuration for MNIST on a CPU: hours

    --budget cpu      small widths and part of MNIST's images: minutes per run on one core
    --budget paper    the paper's settings, for --launcher "torchrun --nproc_per_node=8"

It writes results/NAME-BUDGET.json, which keeps the runs that it has, and prints it as a table.
Finished runs in the folder --runs are not trained again, interrupted ones go on from their
checkpoint.
"""
import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data as datasets    # noqa: E402

# ----------------------------------------------------------------------------- the tables
# Settings were chosen on held-out training images with seeds from 100 on.

GROUPS = ("translation", "rotation", "scale")
MNIST = ("--dataset mnist --device cpu --train-images 5000 --batch-size 256 --warmup-epochs 1 "
         "--trust-coefficient 0.03")
SMALL_TRANSLATION = (f"{MNIST} --group translation --widths 16 32 64 --kernel-size 3 "
                     "--temperature 0.5")
TRANSLATION = f"{SMALL_TRANSLATION} --base-space 5 --grid 2"
LIFTED = "--widths 4 8 16 --kernel-size 7 --temperature 1 --grid 0"
CPU = {
    "translation": f"{TRANSLATION} --epochs 8",
    "rotation": f"{MNIST} --group rotation {LIFTED} --epochs 8",
    "scale": f"{MNIST} --group scale {LIFTED} --epochs 8",
}
TURNED_GLYPHS = {
    "translation": "--dataset glyphs --device cpu --group translation",
    "rotation": f"--dataset glyphs --device cpu --group rotation {LIFTED} --trust-coefficient 0.01",
}
CIFAR10 = ("--dataset cifar10 --device cpu --amp bfloat16 --group translation --widths 8 32 64 128 "
           "--kernel-size 3 --batch-size 256 --warmup-epochs 1 --temperature 0.5 "
           "--trust-coefficient 0.03 --base-space 6 --grid 2 --probe-grid 2")
SIMCLR = "experiments/simclr.py --method simclr"
AUGMENTED = "experiments/simclr.py --method h-ssl"
PAPER_ON_CPU = ("--dataset mnist --device cpu --amp bfloat16 --group translation --eval-every 25 "
                "--save-every 5")


def paper(dataset):
    """The paper's settings, which are train.py's defaults, by group."""
    return {group: f"--dataset {dataset} --group {group}" for group in GROUPS}


def table1(settings):
    rows = {}
    for group, flags in settings.items():
        for method in ("a-ssl", "h-ssl", "supervised"):
            rows[f"{group} {method}"] = f"{flags} --method {method}"
    return rows


def untied(settings):
    """Rows are called as in the table of the tied ones, beside which report.py puts them."""
    rows = {}
    for group, flags in settings.items():
        for method in ("a-ssl", "h-ssl"):
            rows[f"{group} {method}"] = f"{flags} --method {method} --structure none"
    return rows


def structure(settings):
    """With and without, in one table."""
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


def variations(settings, sweep_flags):
    """The tables that both budgets have; settings are MNIST's by group."""
    return {
        "mnist": table1(settings),
        "mnist-untied": untied(settings),
        "base-space": sweep(sweep_flags, "--base-space", "--max-distance 2"),
        "distance": sweep(sweep_flags, "--max-distance", "--base-space 2"),
        "objectives": without_negatives(settings["translation"]),
    }


# budget -> table -> row -> flags of train.py, or another script and its flags
TABLES = {
    "cpu": variations(CPU, f"{SMALL_TRANSLATION} --epochs 8") | {
        "work": {
            "h-ssl, 8 epochs": f"{TRANSLATION} --method h-ssl --epochs 8",
            "h-ssl, 16 epochs": f"{TRANSLATION} --method h-ssl --epochs 16",
            "a-ssl, 8 epochs": f"{TRANSLATION} --method a-ssl --epochs 8",
            "simclr, 8 epochs": f"{SIMCLR} {TRANSLATION} --epochs 8",
            "h-ssl on two augmented copies, 8 epochs": f"{AUGMENTED} {TRANSLATION} --epochs 8",
        },
        "glyphs": structure(TURNED_GLYPHS),
        "cifar10": {
            "h-ssl": f"{CIFAR10} --method h-ssl --epochs 16",
            "simclr": f"{SIMCLR} {CIFAR10} --epochs 8",
        },
        "paper": table1({"translation": PAPER_ON_CPU}),
    },
    "paper": variations(paper("mnist"), "--dataset mnist --group translation") | {
        "cifar10": table1(paper("cifar10")),
        "tiny-imagenet": table1(paper("tiny-imagenet")),
    },
}


# ----------------------------------------------------------------------------- training

def machine():
    """The machine's GPUs or processor, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit():
    """The commit that is checked out, and whether code changed since; None twice without git."""
    head = git("rev-parse", "--short=10", "HEAD")
    if head.returncode != 0:
        return None, None
    changed = git("status", "--porcelain", "--", "*.py").stdout != ""
    return head.stdout.strip(), changed


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def split_script(flags):
    """The script of a row, and its flags as a list."""
    words = shlex.split(flags)
    if words[0].endswith(".py"):
        return words[0], words[1:]
    return "train.py", words


def train_row(row, flags, seed, out, args):
    """Train a row with one seed in the folder out, unless that is done; returns the run's record.

    Raises a ValueError if the script fails, or if the folder holds a run with other flags.
    """
    path = out / "run.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["flags"] != flags:
            raise ValueError(f"{out} was made with other flags ({record['flags']}): delete it, or "
                             "choose another --runs")
        return record

    script, words = split_script(flags)
    command = [*args.launcher, str(ROOT / script), *words, "--seed", str(seed), "--out", str(out)]
    command += ["--data-dir", args.data_dir, "--resume"]
    environment = dict(os.environ)
    if args.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    head, dirty = commit()
    start = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if finished.returncode != 0:
        raise ValueError(f"{shlex.join(command)} failed:\n{finished.stderr}")

    record = report.read_run(out)
    record |= dict(row=row, flags=flags, seed=seed, commit=head, dirty=dirty, machine=machine())
    record["seconds"] = round(seconds, 1)
    path.write_text(json.dumps(record) + "\n")
    print(f"{out.name}: {record['frozen']['top1']} -> {record['top1']}, {seconds:.0f} s",
          file=sys.stderr, flush=True)
    return record


def folder_of(args, row, seed):
    letters = [letter if letter.isalnum() else "-" for letter in row]
    return Path(args.runs) / f"{args.name}-{args.budget}-{''.join(letters)}-{seed}"


def train_table(args):
    """Train the chosen rows for the chosen seeds and write the JSON file; args are `parse`'s.

    The file keeps the runs that it holds, and takes in all that are finished in the folder of runs.
    Raises a ValueError if it holds runs with other flags, or a run fails.
    """
    path = Path(args.results) / f"{args.name}-{args.budget}.json"
    runs = {}
    if path.exists():
        for record in json.loads(path.read_text())["runs"]:
            if args.rows.get(record["row"]) != record["flags"]:
                raise ValueError(f"{path} holds runs with other flags: move it away, or choose "
                                 "another --results")
            runs[record["row"], record["seed"]] = record
    # Download now, not in several runs at once.
    for flags in args.rows.values():
        words = shlex.split(flags)
        datasets.load(words[words.index("--dataset") + 1], args.data_dir)

    failures = []

    def train_one(job):
        row, seed = job
        if failures:
            return
        try:
            train_row(row, args.rows[row], seed, folder_of(args, row, seed), args)
        except ValueError as error:
            failures.append(str(error))

    jobs = [(row, seed) for seed in args.seeds for row in args.chosen]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train_one, jobs))

    # What has finished is written even if a run has failed, which ends the table.
    for row, flags in args.rows.items():
        for seed in range(100):
            folder = folder_of(args, row, seed)
            if (folder / "run.json").exists():
                runs[row, seed] = train_row(row, flags, seed, folder, args)
    order = [(row, seed) for row in args.rows for seed in range(100)]
    ordered = [runs[key] for key in order if key in runs]
    if ordered:
        record = dict(name=args.name, budget=args.budget, runs=ordered)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(path)
    if failures:
        raise ValueError("\n".join(failures))


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="tables.py NAME [--budget cpu] [--seeds 0 1 2] [--help] ...")
    add = parser.add_argument
    add("name", metavar="NAME", help="of the table")
    add("--budget", choices=report.BUDGETS, default="cpu", help="(cpu)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 to 99 (0 1 2)")
    add("--only", nargs="+", metavar="ROW", help="train only these rows, by their full names")
    add("--jobs", type=int, default=1, help="runs at a time; on a CPU they share the cores (1)")
    add("--launcher", type=shlex.split, default=[sys.executable], metavar="COMMAND",
        help="what starts train.py (this Python)")
    add("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    add("--runs", default="runs/experiments", help="folder of the runs' folders")
    add("--results", default=str(report.RESULTS), help="folder of the JSON files")
    args = parser.parse_args(argv)

    tables = TABLES[args.budget]
    if args.name not in tables:
        parser.error(f"there is no table {args.name!r} at budget {args.budget}, only "
                     f"{', '.join(tables)}")
    args.rows = tables[args.name]
    args.chosen = args.only or list(args.rows)
    for row in args.chosen:
        if row not in args.rows:
            parser.error(f"there is no row {row!r}, only {'; '.join(args.rows)}")
    if min(args.seeds) < 0 or max(args.seeds) > 99:
        parser.error("--seeds must be 0 to 99: settings were chosen with those from 100 on")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    if not args.launcher or shutil.which(args.launcher[0]) is None:
        parser.error(f"--launcher: there is no program {' '.join(args.launcher[:1])!r}")
    return args


def main(args):
    try:
        train_table(args)
    except (ValueError, OSError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        sys.exit(2)
    runs = json.loads((Path(args.results) / f"{args.name}-{args.budget}.json").read_text())["runs"]
    print("\n".join(report.means(runs)))


if __name__ == "__main__":
    main(parse())
