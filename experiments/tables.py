"""Train a table of experiments/README.md: each row for every seed, by train.py or a script here.

    python experiments/tables.py NAME [--seeds 0 1 2] [--jobs 2] [--results FOLDER]

    mnist                    Table 1 in small: A-SSL, H-SSL and supervised for each group
    untied-mnist             the structure removed
    untied-glyphs            the same, on images that are turned
    base-space, distance     H-SSL's parameters beside A-SSL's crop size and displacement
    work                     H-SSL for 16 epochs beside A-SSL and SimCLR for 8
    digits                   a setting that teaches, by translation at full width, all images
    why                      narrow networks with the defaults, and with other values
    other-groups             rotation, on glyphs, and scale until the measures stop changing
    cifar10                  the residual network
    paper-...                the paper's settings, for --launcher "torchrun --nproc_per_node=8"

It prints the table. With --results it writes FOLDER/NAME.json, too, which keeps the runs that it
has; report.py reads those of experiments/results. Finished runs, there or in the folder --runs, are
not trained again; interrupted ones go on from their checkpoint.
"""
import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

import report    # comes first: it puts the project's folder on the path
from report import ROOT
import data as datasets
import probe

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
DIGITS = ("--dataset mnist --device cpu --amp bfloat16 --batch-size 256 --warmup-epochs 1 "
          "--kernel-size 3 --base-space 5 --grid 2 --temperature 0.5 --trust-coefficient 0.03")
# The defaults for 1,520 steps of a narrow network, on images held out.
REPLICA = ("--dataset mnist --device cpu --amp bfloat16 --train-images 10000 --validate 5000 "
           "--batch-size 512 --epochs 80 --warmup-epochs 4 --widths 16 32 48 --method h-ssl")
ROTATION_ON_GLYPHS = (
    "--dataset glyphs --device cpu --amp bfloat16 --batch-size 256 --epochs 20 --warmup-epochs 1 "
    "--group rotation --widths 8 16 24 --kernel-size 5 --base-space 3 --grid 2 --temperature 0.5 "
    "--trust-coefficient 0.03")
SCALE_ON_DIGITS = (
    "--dataset mnist --device cpu --amp bfloat16 --train-images 10000 --batch-size 256 --epochs 40 "
    "--warmup-epochs 2 --group scale --widths 8 16 24 --kernel-size 5 --base-space 2 --grid 2 "
    "--temperature 0.5 --trust-coefficient 0.3")
CHOSEN = "--temperature 0.5 --trust-coefficient 0.03 --base-space 5 --grid 2"
CIFAR10 = ("--dataset cifar10 --device cpu --amp bfloat16 --train-images 10000 --batch-size 256 "
           "--warmup-epochs 1 --group translation --widths 8 32 64 128 --kernel-size 3 "
           "--trust-coefficient 0.03 --base-space 5 --grid 2 --probe-grid 2")
SIMCLR = "experiments/simclr.py"


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
    for row, flags in table1(settings).items():
        if not row.endswith("supervised"):
            rows[row] = flags
            rows[f"{row}, untied"] = f"{flags} --structure none"
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
        rows[f"a-ssl {value}"] = f"experiments/crops.py {common} --method a-ssl"
    return rows


def paper(dataset):
    """The paper's settings, which are train.py's defaults, by group."""
    return {group: f"--dataset {dataset} --group {group}" for group in SMALL}


PAPER = paper("mnist")
ON_A_CPU = f"{PAPER['translation']} --method h-ssl --device cpu --amp bfloat16"
WORK = {
    "h-ssl, 8 epochs": f"{TRANSLATION} --method h-ssl --epochs 8",
    "h-ssl, 16 epochs": f"{TRANSLATION} --method h-ssl --epochs 16",
    "a-ssl, 8 epochs": f"{TRANSLATION} --method a-ssl --epochs 8",
    "simclr, 8 epochs": f"{SIMCLR} {TRANSLATION} --epochs 8",
}
# table -> row -> flags of train.py, or another script and its flags
TABLES = {
    "mnist": table1(SMALL),
    "untied-mnist": untied({group: SMALL[group] for group in GLYPHS}),
    "untied-glyphs": untied(GLYPHS),
    "base-space": sweep(f"{NARROW} --epochs 8", "--base-space", "--max-distance 2"),
    "distance": sweep(f"{NARROW} --epochs 8", "--max-distance", "--base-space 2"),
    "work": WORK,
    "digits": {
        "h-ssl": f"{DIGITS} --method h-ssl --epochs 20",
        "a-ssl": f"{DIGITS} --method a-ssl --epochs 20",
        "supervised": f"{DIGITS} --method supervised --epochs 20",
        "simclr, 10 epochs": f"{SIMCLR} {DIGITS} --epochs 10",
    },
    "why": {
        "the defaults": REPLICA,
        "τ 0.5": f"{REPLICA} --temperature 0.5",
        "circular padding": f"{REPLICA} --padding circular",
        "chosen": f"{REPLICA} {CHOSEN} --kernel-size 3",
    },
    "other-groups": table1({"rotation": ROTATION_ON_GLYPHS, "scale": SCALE_ON_DIGITS}),
    "cifar10": {
        "h-ssl": f"{CIFAR10} --method h-ssl --temperature 0.05 --epochs 10",
        "a-ssl": f"{CIFAR10} --method a-ssl --temperature 0.05 --epochs 10",
        "supervised": f"{CIFAR10} --method supervised --epochs 10",
        "simclr, 5 epochs": f"{SIMCLR} {CIFAR10} --temperature 0.1 --epochs 5",
    },
    "paper-mnist": table1(PAPER) | {"translation h-ssl, on a CPU": ON_A_CPU},
    "paper-cifar10": table1(paper("cifar10")),
    "paper-tiny-imagenet": table1(paper("tiny-imagenet")),
    "paper-untied": untied(PAPER),
    "paper-base-space": sweep(PAPER["translation"], "--base-space", "--max-distance 2"),
    "paper-distance": sweep(PAPER["translation"], "--max-distance", "--base-space 2"),
}


def machine(device, processes=1):
    """The machine's processor, or the GPUs of as many processes, in words."""
    if device == "cuda":
        return f"{processes} {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit():
    """What commit is checked out, and whether code has changed since; nothing without git."""
    printed = []
    for command in ("git rev-parse --short=10 HEAD", 'git status --porcelain -- "*.py"'):
        ended = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        printed.append(ended.stdout.strip())
    return printed[0], printed[1] != ""


def write_json(folder, name, content):
    Path(folder).mkdir(parents=True, exist_ok=True)
    probe.write_whole(f"{folder}/{name}.json", json.dumps(content, indent=1).encode())


def split_script(flags):
    """The script of a row, and its flags as a list."""
    words = shlex.split(flags)
    if words[0].endswith(".py"):
        return words[0], words[1:]
    return "train.py", words


def read_run(folder):
    """The record of a run, a dict, from what train.py wrote into its folder.

    Losses are some 300 pairs [step, loss], looks what --eval-every saw. The time is that of the
    steps.
    """
    settings = report.read_json(folder / "config.json")
    start = settings["starts"][0]
    seconds = 0
    step = 0
    losses = []
    looks = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        seconds += (line["step"] - step) * settings["batch_size"] / line["images_per_second"]
        step = line["step"]
        losses.append([step, round(line["loss"], 4)])
        if "held_out" in line:
            looks.append(dict(step=step, epoch=line["epoch"], **line["held_out"]))
    record = dict(
        torch=start["torch"],
        machine=machine(settings["device"], start["processes"]),
        training_seconds=round(seconds, 1),
        losses=losses[::len(losses) // 300 + 1],
        looks=looks,
    )
    return record | report.read_json(folder / "probe.json")


def folder_of(args, row, seed):
    letters = [letter if letter.isalnum() else "-" for letter in row]
    return Path(args.runs, args.name, f"{''.join(letters)}-{seed}")


def start(args, row, seed):
    """Start a row's training in a folder of its own; what it prints goes into a file beside it."""
    out = folder_of(args, row, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    script, words = split_script(args.rows[row])
    command = [*args.launcher, str(ROOT / script), *words, "--data-dir", args.data_dir]
    command += ["--seed", str(seed), "--out", str(out), "--resume"]
    if args.eval_every is not None:
        command += ["--eval-every", args.eval_every]
    environment = dict(os.environ)
    if args.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    with open(f"{out}.txt", "w") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)


def finish(args, row, seed, process):
    """Write run.json, once the process has ended. Raises a ValueError if it failed."""
    out = folder_of(args, row, seed)
    if process.returncode != 0:
        printed = Path(f"{out}.txt").read_text(errors="replace")
        raise ValueError(f"{row}, seed {seed}, failed: {shlex.join(process.args)}\n{printed}")
    head, dirty = args.commit
    about = dict(row=row, seed=seed, flags=args.rows[row], commit=head, dirty=dirty)
    record = about | read_run(out)
    probe.write_whole(out / "run.json", json.dumps(record).encode())
    print(f"{row}, seed {seed}: {record['frozen']['top1']} -> {record['top1']}", file=sys.stderr)


def finished_runs(args):
    """The runs in the folders of results and of runs, in the order of rows and seeds.

    Raises a ValueError if one of them was made with other flags.
    """
    records = []
    if args.results is not None and Path(args.results, f"{args.name}.json").exists():
        records += report.read_json(Path(args.results, f"{args.name}.json"))["runs"]
    # A run in the folder of runs is the newer one.
    for path in Path(args.runs, args.name).glob("*/run.json"):
        records.append(report.read_json(path))
    rows = list(args.rows)
    runs = {}
    for record in records:
        row = record["row"]
        if args.rows.get(row) != record["flags"]:
            raise ValueError(f"row {row!r} was trained with other flags: take other --runs and "
                             "--results, or move what is there away")
        runs[rows.index(row), record["seed"]] = record
    return [runs[key] for key in sorted(runs)]


def train_table(args):
    """Train the chosen rows for the chosen seeds, args.jobs at a time; args are `parse`'s.

    When a run fails, and on Ctrl-C, the others are ended, too.
    """
    finished = {(run["row"], run["seed"]) for run in finished_runs(args)}
    waiting = [(row, seed) for seed in args.seeds for row in args.chosen]
    waiting = [run for run in dict.fromkeys(waiting) if run not in finished]
    if waiting:
        # Download now, not in several runs at once.
        _, words = split_script(args.rows[args.chosen[0]])
        datasets.load(words[words.index("--dataset") + 1], args.data_dir)
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, args.jobs):
                row, seed = waiting.pop(0)
                running[row, seed] = start(args, row, seed)
            time.sleep(0.1)
            for (row, seed), process in list(running.items()):
                if process.poll() is not None:
                    del running[row, seed]
                    finish(args, row, seed, process)
    finally:
        for process in running.values():
            process.terminate()


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
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
    add("--results", metavar="FOLDER", help="folder of the JSON file to write (none)")
    args = parser.parse_args(argv)
    args.rows = TABLES[args.name]
    args.chosen = args.only or list(args.rows)
    for row in args.chosen:
        if row not in args.rows:
            parser.error(f"there is no row {row!r}, only {'; '.join(args.rows)}")
    args.commit = commit()
    return args


def main(argv=None):
    args = parse(argv)
    try:
        train_table(args)
    finally:
        runs = finished_runs(args)
        if runs and args.results is not None:
            write_json(args.results, args.name, dict(runs=runs))
    print("\n".join(report.means(runs)))


if __name__ == "__main__":
    report.run(main)
