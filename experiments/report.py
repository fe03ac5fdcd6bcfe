"""Print a table of results as Markdown.

    python experiments/report.py NAME [means | differences]

The runs come from results/NAME.json, which tables.py writes, and from the folders results/NAME/*/
of runs that were started by hand: each holds the config.json, probe.json and log.jsonl that
train.py wrote, and may hold a run.json with "row", "machine" and "commit".

means: frozen → trained encoder, each as mean ± standard deviation over n whole trainings. Linear
is the linear classifier and neighbours the vote of the 20 nearest, both top-1 on test images in
percent. They read the maps averaged to --probe-grid, 2x2 here, and under "mean" the mean over all
positions. Rank is the effective rank. Time is that of the training steps, the median of the runs.

differences: the mean difference of two rows over the n seeds that both have, with its 95 % interval
by Student's t. It speaks of other seeds, not of other images, and each interval stands alone. ≈
marks what is equivalent within ±0.5 points, by two one-sided tests at 5 %.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("means", "differences")
# Fixed before the runs: encoders that differ by less are equivalent.
MARGIN = 0.5
MEASURES = {
    "linear": "top1",
    "linear, mean": "mean_top1",
    "neighbours": "neighbours",
    "neighbours, mean": "mean_neighbours",
    "rank": "effective_rank",
}
# Rows to compare, besides those whose names say it: see `pairs`.
COMPARISONS = {
    "work": [
        ("h-ssl, 16 epochs", "a-ssl, 8 epochs"),
        ("h-ssl, 16 epochs", "simclr, 8 epochs"),
        ("h-ssl on two augmented copies, 8 epochs", "simclr, 8 epochs"),
    ],
    "base-space": [("h-ssl 5", "h-ssl 1"), ("a-ssl 5", "a-ssl 1")],
    "distance": [("h-ssl 5", "h-ssl 1"), ("a-ssl 5", "a-ssl 1")],
    "cifar10": [("h-ssl", "simclr")],
}


# ------------------------------------------------------------------------------------------ reading

def read_run(folder):
    """The record of a run, a dict, from what train.py wrote into its folder, and run.json.

    Losses are [step, loss] pairs, looks what --eval-every saw. The time is that of the steps.
    """
    folder = Path(folder)
    settings = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "probe.json").read_text())
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
        row=f"{settings['group']} {settings['method']}",
        seed=settings["seed"],
        torch=settings["torch"],
        training_seconds=round(seconds, 1),
        losses=losses,
        looks=looks,
    )
    about = folder / "run.json"
    if about.exists():
        result |= json.loads(about.read_text())
    return record | result


def read_runs(name):
    """All runs of a table, a list of records.

    Raises a ValueError if there are none, or two of one row with one seed.
    """
    path = RESULTS / f"{name}.json"
    runs = []
    if path.exists():
        runs += json.loads(path.read_text())["runs"]
    for config in sorted(RESULTS.glob(f"{name}/*/config.json")):
        runs.append(read_run(config.parent))
    if not runs:
        raise ValueError(f"there are no results of {name!r}: tables.py {name} trains them")
    names = [(run["row"], run["seed"]) for run in runs]
    for row, seed in names:
        if names.count((row, seed)) > 1:
            raise ValueError(f"{name} has two runs of row {row!r} with seed {seed}: give one another "
                             "row in its run.json")
    return runs


def values(runs, row, measure, frozen=False):
    """{seed: value} of a row by a measure; frozen: before the training. Empty without labels."""
    found = {}
    for run in runs:
        result = run["frozen"] if frozen else run
        if run["row"] == row and result[measure] is not None:
            found[run["seed"]] = result[measure]
    return found


# --------------------------------------------------------------------------------------- statistics

def integral_of_cosine(power, angle):
    """The integral of cos^power from 0 to angle, by its reduction formula."""
    if power == 0:
        return angle
    if power == 1:
        return math.sin(angle)
    boundary = math.cos(angle) ** (power - 1) * math.sin(angle)
    return (boundary + (power - 1) * integral_of_cosine(power - 2, angle)) / power


def quantile(p, freedom):
    """What Student's t with so many degrees of freedom stays below with probability p > 0.5.

    With t = √freedom · tan θ, P(|T| < t) is the integral of cos^(freedom - 1) from 0 to θ, divided
    by that from 0 to π/2. The angle is found by halving.
    """
    low = 0
    high = math.pi / 2
    target = (2 * p - 1) * integral_of_cosine(freedom - 1, high)
    for _ in range(60):
        middle = (low + high) / 2
        if integral_of_cosine(freedom - 1, middle) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def paired(a, b):
    """Compare a with b, both {seed: value}, at the seeds that both have.

    Returns their number n, the mean of a - b, None without a seed, and the standard error of that
    mean, None with less than two.
    """
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    n = len(differences)
    mean = None
    error = None
    if n > 0:
        mean = statistics.mean(differences)
    if n > 1:
        error = statistics.stdev(differences) / math.sqrt(n)
    return n, mean, error


def equivalent(n, mean, error, margin=MARGIN):
    """Two one-sided tests at 5 %: the 90 % interval lies within ±margin."""
    return n > 1 and abs(mean) + quantile(0.95, n - 1) * error < margin


# ----------------------------------------------------------------------------------------- Markdown

def line(*cells):
    return f"| {' | '.join(cells)} |"


def heading(*titles):
    return [line(*titles), "| --- " * len(titles) + "|"]


def signed(x):
    return f"{x:+.2f}".replace("-", "−")


def mean_cell(found, digits=2):
    """Mean ± standard deviation of {seed: value}."""
    if not found:
        return "–"
    text = f"{statistics.mean(found.values()):.{digits}f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found.values()):.{digits}f}"
    return text


def difference_cell(a, b):
    """The mean of a - b with its interval, as a cell."""
    n, mean, error = paired(a, b)
    if n == 0:
        return "–"
    text = signed(mean)
    if n > 1:
        half_width = quantile(0.975, n - 1) * error
        text += f" [{signed(mean - half_width)}, {signed(mean + half_width)}]"
    if equivalent(n, mean, error):
        text += " ≈"
    return text


def in_words(seconds):
    if seconds < 7200:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h"


def rows_of(runs):
    return list(dict.fromkeys(run["row"] for run in runs))


def means(runs):
    """A line per row: how long it was trained, and frozen -> trained by every measure."""
    lines = heading("encoder", "n", "epochs", "time", *MEASURES)
    for row in rows_of(runs):
        of_row = [run for run in runs if run["row"] == row]
        epochs = {run["epoch"] for run in of_row}
        seconds = [run["training_seconds"] for run in of_row]
        cells = [row, str(len(of_row)), ", ".join(str(epoch) for epoch in sorted(epochs))]
        cells.append(in_words(statistics.median(seconds)))
        for key in MEASURES.values():
            digits = 0 if key == "effective_rank" else 2
            frozen = mean_cell(values(runs, row, key, frozen=True), digits)
            trained = mean_cell(values(runs, row, key), digits)
            cells.append(f"{frozen} → {trained}")
        lines.append(line(*cells))
    return lines


def pairs(rows, name):
    """The rows to compare: H-SSL with A-SSL, "ROW, CHANGE" with ROW, and those of COMPARISONS."""
    found = []
    for row in rows:
        others = [row.replace("h-ssl", "a-ssl"), row.rpartition(",")[0]]
        found += [(row, other) for other in others if other in rows and other != row]
    found += [pair for pair in COMPARISONS.get(name, []) if set(pair) <= set(rows)]
    return found


def differences(runs, name):
    """A line per comparison: each row with its frozen encoder, then `pairs`."""
    rows = rows_of(runs)
    comparisons = [(row, row, True) for row in rows]
    comparisons += [(row, other, False) for row, other in pairs(rows, name)]
    titles = [title for title in MEASURES if title != "rank"]
    lines = heading("difference", "n", *titles)
    for row, other, frozen in comparisons:
        label = f"{row} − {other}"
        if frozen:
            label = f"{row} − frozen"
        n, _, _ = paired(values(runs, row, "top1"), values(runs, other, "top1", frozen))
        cells = []
        for title in titles:
            a = values(runs, row, MEASURES[title])
            b = values(runs, other, MEASURES[title], frozen)
            cells.append(difference_cell(a, b))
        lines.append(line(label, str(n), *cells))
    return lines


def caption(runs, name):
    """What the runs were made with, in a sentence."""
    machines = set()
    versions = set()
    commits = set()
    for run in runs:
        commit = run.get("commit") or "not recorded"
        if run.get("dirty"):
            commit += " with changes"
        machines.add(run.get("machine", "machine not recorded"))
        versions.add(run["torch"])
        commits.add(commit)
    parts = [" or ".join(sorted(found)) for found in (machines, versions, commits)]
    return f"Table {name}: {parts[0]}; torch {parts[1]}; commit {parts[2]}."


def table(name, part=None):
    """A table's Markdown: one of PARTS alone, or all under a caption.

    Raises a ValueError if there are no results.
    """
    runs = read_runs(name)
    if part == "means":
        lines = means(runs)
    elif part == "differences":
        lines = differences(runs, name)
    else:
        lines = [caption(runs, name), "", *means(runs), "", *differences(runs, name)]
    return "\n".join(lines)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="report.py NAME [means | differences]")
    parser.add_argument("name", metavar="NAME", help="of the table")
    parser.add_argument("part", nargs="?", choices=PARTS, help="print this part alone")
    return parser.parse_args(argv)


def main():
    try:
        print(table(**vars(parse())))
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
