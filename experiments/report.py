"""Print a table of results as Markdown.

    python experiments/report.py NAME

The runs come from results/NAME.json, which tables.py writes.

First means, of the frozen → trained encoder: mean ± standard deviation over n whole trainings.
Linear is the linear classifier and neighbours the vote of the 20 nearest, both top-1 on test images
in percent. They read the maps averaged to --probe-grid, 2x2 here, and under "mean" the mean over
all positions. Rank is the effective rank. Time is that of the training steps, the median of the
runs.

Then the mean difference of two rows over the n seeds that both have, with its 95 % interval by
Student's t, from three seeds on. It speaks of other seeds, not of other images, and each interval
stands alone.
"""
import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))    # for all scripts, which import this one first

# What Student's t of 3 to 12 seeds stays below with a probability of 97.5 %.
STUDENT_T = [4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010]
MEASURES = {
    "linear": "top1",
    "linear, mean": "mean_top1",
    "neighbours": "neighbours",
    "neighbours, mean": "mean_neighbours",
    "rank": "effective_rank",
}
# Rows to compare, besides those whose names say it: see `pairs`.
COMPARISONS = [
    ("h-ssl, 16 epochs", "a-ssl, 8 epochs"),
    ("h-ssl, 16 epochs", "simclr, 8 epochs"),
]


def read_json(path):
    """The content of a JSON file. Raises a ValueError that names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is empty, cut off or no JSON: {error}") from None


def read_runs(name):
    """All runs of a table, a list of records. Raises a ValueError if there are none."""
    path = RESULTS / f"{name}.json"
    content = read_json(path)
    if not content.get("runs"):
        raise ValueError(f"{path} holds no runs of tables.py")
    return content["runs"]


def run(function, *arguments):
    """Call a program's function; what ends it early is said in one line.

    A console that cannot show a character, such as τ or →, shows ? in its place.
    """
    sys.stdout.reconfigure(errors="replace")
    program = Path(sys.argv[0]).name
    try:
        function(*arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            # The disk is full. At exit Python would try once more, and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


def values(runs, row, measure, frozen=False):
    """{seed: value} of a row by a measure; frozen: before the training. Empty without labels."""
    found = {}
    for run in runs:
        result = run["frozen"] if frozen else run
        if run["row"] == row and result[measure] is not None:
            found[run["seed"]] = result[measure]
    return found


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


def line(*cells):
    return f"| {' | '.join(cells)} |"


def heading(*titles):
    return [line(*titles), "| --- " * len(titles) + "|"]


def mean_cell(found, digits=2):
    """Mean ± standard deviation of {seed: value}."""
    if not found:
        return "–"
    text = f"{statistics.mean(found.values()):.{digits}f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found.values()):.{digits}f}"
    return text


def difference_cell(a, b):
    """The mean of a - b, with its interval from three seeds on."""
    n, mean, error = paired(a, b)
    if n == 0:
        return "–"
    text = f"{mean:+.2f}"
    if n >= 3:
        half_width = STUDENT_T[min(n, 12) - 3] * error
        text += f" [{mean - half_width:+.2f}, {mean + half_width:+.2f}]"
    return text.replace("-", "−")


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


def pairs(rows):
    """The rows to compare: H-SSL with A-SSL, "ROW, CHANGE" with ROW, and those of COMPARISONS."""
    found = []
    for row in rows:
        others = [row.replace("h-ssl", "a-ssl"), row.rpartition(",")[0]]
        found += [(row, other) for other in others if other in rows and other != row]
    return found + [pair for pair in COMPARISONS if set(pair) <= set(rows)]


def differences(runs):
    """A line per comparison: each row with its frozen encoder, then `pairs`."""
    rows = rows_of(runs)
    comparisons = [(row, row, True) for row in rows]
    comparisons += [(row, other, False) for row, other in pairs(rows)]
    titles = [title for title in MEASURES if title != "rank"]
    lines = heading("difference", "n", *titles)
    for row, other, frozen in comparisons:
        label = f"{row} − frozen" if frozen else f"{row} − {other}"
        n, _, _ = paired(values(runs, row, "top1"), values(runs, other, "top1", frozen))
        cells = []
        for title in titles:
            a = values(runs, row, MEASURES[title])
            b = values(runs, other, MEASURES[title], frozen)
            cells.append(difference_cell(a, b))
        lines.append(line(label, str(n), *cells))
    return lines


def table(name):
    """Both tables as Markdown. Raises a ValueError if there are no results."""
    runs = read_runs(name)
    return "\n".join([*means(runs), "", *differences(runs)])


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the table")
    return parser.parse_args(argv)


def main(argv=None):
    print(table(parse(argv).name))


if __name__ == "__main__":
    run(main)
