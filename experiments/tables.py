"""Train one table of the README: a list of runs of train.py, at one of three budgets, for every seed.

    python experiments/tables.py NAME [--budget cpu] [--jobs 2]

    mnist, cifar10, tiny-imagenet               Table 1: frozen, A-SSL, H-SSL and supervised for each group
    mnist-untied, cifar10-untied, ...           the same with the structure removed
    base-space, distance                        H-SSL's parameters beside A-SSL's crop size and displacement
    objectives                                  SimSiam and BYOL
    nuisances                                   MNIST turned, shrunk, or anywhere on a larger canvas
    why, work, long, readouts, glyphs           what makes training learn or forget; only at budget cpu

    paper   the paper's configuration, for `--launcher "torchrun --nproc_per_node=8"`
    gpu     full width and all images, but fewer epochs and smaller batches: one GPU
    cpu     small widths and part of MNIST's images: minutes per run on one core (the other data sets need more)

Writes experiments/results/NAME-BUDGET.json, which keeps the runs that it has, and prints it as a table. Started again,
it continues where it stopped.
"""
import argparse
import functools
import re
import shlex
import shutil
import sys

from report import METHODS, RESULTS, show
from runs import run, train_table

BUDGETS = ("paper", "gpu", "cpu")
GROUPS = ("translation", "rotation", "scale")

# ------------------------------------------------------------------------------------------- Table 1 and its variations
# At budget cpu trainings with every group take one to four minutes on a core.
MNIST = ("--dataset mnist --device cpu --train-images 5000 --batch-size 256 --epochs 8 --warmup-epochs 1 "
         "--trust-coefficient 0.03")
CPU = {
    "translation": f"{MNIST} --widths 16 32 64 --kernel-size 3 --base-space 5 --grid 2 --temperature 0.5",
    "rotation": f"{MNIST} --widths 4 8 16 --kernel-size 7 --temperature 1",
    "scale": f"{MNIST} --widths 4 8 16 --kernel-size 7 --temperature 1",
}
GPU = {"mnist": "--epochs 50 --warmup-epochs 5 --batch-size 1024", "cifar10": "--epochs 100 --batch-size 512",
       "tiny-imagenet": "--epochs 100 --batch-size 256"}


def setting(dataset, group, budget):
    """The flags that all runs on a data set and group share; None if there are none at this budget."""
    if budget == "cpu":
        return f"{CPU[group]} --group {group}" if dataset == "mnist" else None
    return f"--dataset {dataset} --group {group}" + (f" {GPU[dataset]}" if budget == "gpu" else "")


def table1(dataset, budget):
    settings = {group: setting(dataset, group, budget) for group in GROUPS}
    return {f"{group} {method}": f"{flags} --method {method}"
            for group, flags in settings.items() if flags for method in METHODS}


def untied(dataset, budget):
    """For translation only MNIST's network: without convolutions the residual one is too large."""
    return {row: f"{flags} --structure none" for row, flags in table1(dataset, budget).items()
            if row.split()[1] in ("a-ssl", "h-ssl") and (dataset == "mnist" or "translation" not in row)}


def nuisances(budget):
    """The group's own nuisance in every image: on the equivariant network, on an untied one that costs as much, with
    augmentations, and on the plain network of translation, trained as SimCLR would."""
    rows = {}
    for group in GROUPS:
        # Placed anywhere on 40x40 pixels, an image has a feature map of 10x10 positions.
        window, whole = ("--base-space 7", "--base-space 10") if group == "translation" else ("", "--base-space 7")
        base = f"{setting('mnist', group, budget)} --nuisance {group} {window}".strip()
        plain = f"{setting('mnist', 'translation', budget)} --nuisance {group} {whole} --augment 1"
        rows |= {f"{group} {method}": f"{base} --method {method}" for method in ("h-ssl", "a-ssl", "supervised")}
        if group == "rotation":                                                # of scale it would cost more
            rows |= {f"{group} {method}, untied": f"{base} --method {method} --structure none"
                     for method in ("h-ssl", "a-ssl")}
        rows[f"{group} h-ssl, two augmented passes"] = f"{base} --method h-ssl --augment 2"
        rows[f"{group} a-ssl, plain and augmented"] = f"{plain} --method a-ssl"
    return rows


def sweep(flag, held, budget):
    """Values of one flag, the other held. A-SSL's crop is 4 pixels, our stride, per position of H-SSL's window, and its
    displacement 4 pixels per position of distance. The head sees all positions, of which a window of 1 has one."""
    base = f"{setting('mnist', 'translation', budget)} --grid 0"
    first, last = (f"{flag} {{}}", held) if flag == "--base-space" else (held, f"{flag} {{}}")
    return {f"{name} {value}": f"{base} {method} {first.format(value)} {last.format(value)}" for value in (1, 2, 3, 5)
            for name, method in (("h-ssl", "--method h-ssl"), ("a-ssl", "--method a-ssl --crop"))}


def objectives(budget):
    base = f"{setting('mnist', 'translation', budget)} --objective"
    rows = {f"{objective} {method}": f"{base} {objective} --method {method}"
            for objective in ("simsiam", "byol") for method in ("a-ssl", "h-ssl")}
    return rows | {"byol a-ssl, augmented, whole map": f"{rows['byol a-ssl']} --augment 1 --base-space 7"}


# -------------------------------------------------------------------------------------------------------------- trials
# Why training helps or harms: from the setting of Table 1, one change at a time. The last of two equal flags counts.
HELPS = f"{CPU['translation']} --group translation --method"
SMALL_WINDOWS = "--kernel-size 5 --base-space 4 --grid 0 --temperature 0.1"

TRIALS = {
    "why": {
        "h-ssl": f"{HELPS} h-ssl", "a-ssl": f"{HELPS} a-ssl",
        **{f"h-ssl, {name}": f"{HELPS} h-ssl {changed}" for name, changed in {
            "16 epochs": "--epochs 16", "24 epochs": "--epochs 24", "kernel 5": "--kernel-size 5",
            "widths 32 63 95": "--widths 32 63 95", "window 4": "--base-space 4", "window 6": "--base-space 6",
            "all positions": "--grid 0", "temperature 0.1": "--temperature 0.1",
            "kernel 5, window 4, all positions, temperature 0.1": SMALL_WINDOWS,
            "4 views": "--views 4", "lr 3, trust coefficient 0.001": "--lr 3 --trust-coefficient 0.001",
            "augmented": "--augment 1", "augmented, two passes": "--augment 2",
            "augmented, two passes, window 6": "--augment 2 --base-space 6"}.items()},
        "a-ssl, widths 32 63 95": f"{HELPS} a-ssl --widths 32 63 95",
        "a-ssl, augmented, whole map": f"{HELPS} a-ssl --augment 1 --base-space 7",
    },
    # Complete trainings of several lengths: what do encoder passes and time buy?
    "work": {f"{row}, {epochs} epochs": f"{HELPS} {flags} --epochs {epochs}" for row, flags, lengths in (
        ("h-ssl", "h-ssl", (4, 8, 16, 24)), ("a-ssl", "a-ssl", (2, 4, 8, 12)),
        ("simclr", "a-ssl --augment 1 --base-space 7", (2, 4, 8, 12)),
        ("h-ssl on two augmented passes", "h-ssl --augment 2 --base-space 6", (2, 4, 8, 12)),
        ("h-ssl with small windows and τ 0.1", f"h-ssl {SMALL_WINDOWS}", (4, 8, 24)),
        ("supervised", "supervised", (8,))) for epochs in lengths},
    # All images, and twelve times the encoder passes of the longest of these.
    "long": {row: f"{HELPS} {flags} --train-images 60000 --eval-every {every}" for row, flags, every in (
        ("h-ssl", "h-ssl --epochs 24", 6), ("a-ssl", "a-ssl --epochs 12", 3),
        ("simclr", "a-ssl --augment 1 --base-space 7 --epochs 12", 3))},
    # Rotation's head on means of each map, beside the default, all positions, which is a row of table mnist.
    "readouts": {f"h-ssl, grid {grid}": f"{CPU['rotation']} --group rotation --method h-ssl --grid {grid}"
                 for grid in (2, 1)},
    # Data with rotation in them. Without structure a network of the same widths and cost has 2.4 times the weights.
    "glyphs": {f"{method}{name}": f"--device cpu --method {method} {flags}".strip()
               for name, flags in (("", ""), (", untied", "--structure none"),
                                   (", untied, same parameters", "--structure none --widths 3 5 10"))
               for method in ("h-ssl", "a-ssl")},
}

# name -> a function of the budget, which returns {row: flags of train.py}, or {} for a budget without settings
TABLES = {name: functools.partial(table1, name) for name in GPU}
TABLES |= {f"{name}-untied": functools.partial(untied, name) for name in GPU}
TABLES |= {"base-space": functools.partial(sweep, "--base-space", "--max-distance 2"),
           "distance": functools.partial(sweep, "--max-distance", "--base-space 2"),
           "objectives": objectives, "nuisances": nuisances}
TABLES |= {name: lambda budget, rows=rows: rows if budget == "cpu" else {} for name, rows in TRIALS.items()}


def parse(argv=None):
    p = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("name", choices=TABLES, metavar="NAME", help=", ".join(TABLES))
    p.add_argument("--budget", choices=BUDGETS, default="cpu", help="(default: %(default)s)")
    p.add_argument("--only", nargs="+", metavar="WORD", help="train only rows with one of these words (default: all)")
    p.add_argument("--seeds", type=run.number(int, 0), nargs="+", default=[0, 1, 2],
                   help="below 100, which the settings were chosen with (default: 0 1 2)")
    p.add_argument("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    p.add_argument("--runs", default="runs/experiments", help="folder of the runs' folders (default: %(default)s)")
    p.add_argument("--results", default=str(RESULTS), help="folder of the JSON files (default: experiments/results)")
    p.add_argument("--jobs", type=run.number(int, 1), default=1, help="runs at a time; on a CPU they share the cores")
    p.add_argument("--launcher", type=shlex.split, default=[sys.executable], metavar="COMMAND",
                   help="what starts train.py (default: this Python)")
    p.add_argument("--extra", default="", help='flags of train.py to add to every run, as --extra="--epochs 1"')
    args = p.parse_args(argv)
    args.rows = TABLES[args.name](args.budget)
    if not args.rows:
        others = " and ".join(budget for budget in BUDGETS if TABLES[args.name](budget))
        p.error(f"{args.name} has no settings for --budget {args.budget}, only for {others}")
    args.chosen = [row for row in args.rows if not args.only or set(args.only) & set(re.findall(r"[^\s,]+", row))]
    if not args.chosen:
        p.error(f"--only {' '.join(args.only)}: no row has any of these words; rows are {'; '.join(args.rows)}")
    if max(args.seeds) > 99:
        p.error(f"--seeds {max(args.seeds)} must be below 100")
    if not shutil.which(args.launcher[0] if args.launcher else ""):
        p.error(f"--launcher: there is no program {args.launcher[:1]}")
    return args


def main(args):
    show(train_table(args))


if __name__ == "__main__":
    main(parse())
