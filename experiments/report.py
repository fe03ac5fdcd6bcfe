"""Print the JSON files in experiments/results/ as Markdown tables.

    python experiments/report.py [NAME ...] [--budget cpu] [--against ROW] [--labels]

Each cell is the mean ± standard deviation, over whole trainings, of the detached classifier's top-1 in percent. A row's
command is `python train.py`, the flags above its table, its own flags, and `--seed` with each seed.

A second table has all measures of the frozen and the trained encoders, and the last one compares rows: mean
differences over the n seeds that both sides have, with 95 % intervals by Student's t (of other seeds, not other
images, and each alone, however many there are). The verdict is on linear top-1: "higher" or "lower" if the interval
excludes 0, "equivalent" if two one-sided tests at 5 % exclude a difference of MARGIN or more.
"""
import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("frozen", "a-ssl", "h-ssl", "supervised")
WITH_LABELS = {"linear top-1": ["top1"], "neighbours": ["neighbours"], "1 label a class": ["few_labels", "1", 0],
               "10 labels a class": ["few_labels", "10", 0], "100 labels a class": ["few_labels", "100", 0],
               "effective rank": ["effective_rank"]}                           # title -> its place in probe.json
SHOWN = "linear top-1", "neighbours", "10 labels a class", "effective rank"     # without --labels
MEASURES = {title: WITH_LABELS[title] for title in SHOWN}
MARGIN = 0.5                    # points of top-1, fixed before the runs: encoders that differ by less are equivalent


def read(result, place):
    """What a nested result holds at a place; None if there is no such place."""
    for key in place:
        if isinstance(result, dict) and key not in result:
            return None
        result = result[key]
    return result


def cell(values):
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def signed(x):
    return f"{x:+.2f}".replace("-", "−")


def heading(*titles):
    return [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]


def code(flags):
    return f"`{flags}`" if flags else ""


def split_flags(rows):
    """From {row: flags}, the flags that all rows begin with, and {row: the rest}."""
    flags = {row: [f"--{flag.strip()}" for flag in text.split("--")[1:]] for row, text in rows.items()}
    common = 0
    for same_place in zip(*flags.values()):
        if len(set(same_place)) > 1:
            break
        common += 1
    shared = next(iter(flags.values()))[:common]
    return " ".join(shared), {row: " ".join(own[common:]) for row, own in flags.items()}


def by_row(runs):
    """A line per row: the frozen and the trained encoder."""
    shared, own = split_flags({r["row"]: r["flags"] for r in runs})
    lines = [code(shared), "", *heading("run", "own flags", "frozen", "trained", "trainings")]
    for row, flags in own.items():
        of_row = [r for r in runs if r["row"] == row]
        frozen, trained = (cell([r[key] for r in of_row]) for key in ("frozen_top1", "top1"))
        lines.append(f"| {row} | {code(flags)} | {frozen} | {trained} | {len(of_row)} |")
    return lines


def by_method(runs):
    """The form of Table 1, for rows called GROUP METHOD: a line per group, a column per method, each with its n."""
    flags, top1 = {}, defaultdict(dict)
    for r in runs:
        group, method = r["row"].split()
        flags[group] = r["flags"].replace(f" --method {method}", "")
        top1[group, method][r["seed"]] = r["top1"]
        top1[group, "frozen"].setdefault(r["seed"], r["frozen_top1"])
    shared, own = split_flags(flags)
    lines = [f"`{shared} --method METHOD`", "", *heading("group", "own flags", *(f"{name} (n)" for name in METHODS))]
    for group in flags:
        found = [list(top1[group, method].values()) for method in METHODS]
        cells = " | ".join(f"{cell(values)} ({len(values)})" if values else "not run" for values in found)
        lines.append(f"| {group} | {code(own[group])} | {cells} |")
    return lines


# --------------------------------------------------------------------------------------------------------- comparisons
def quantile(p, df):
    """The t that Student's T, with df degrees of freedom, stays below with probability p > 0.5: with t = √df tan θ,
    P(|T| < t) is the integral of cos^(df − 1) from 0 to θ, divided by that to π/2."""
    def integral(power, angle):
        if power < 2:
            return math.sin(angle) if power else angle
        return (math.cos(angle) ** (power - 1) * math.sin(angle) + (power - 1) * integral(power - 2, angle)) / power

    low, high = 0, math.pi / 2
    for _ in range(60):                                                        # halved to float64's precision
        middle = (low + high) / 2
        below = integral(df - 1, middle) < (2 * p - 1) * integral(df - 1, math.pi / 2)
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(df) * math.tan(low)


def paired(a, b):
    """The differences a − b, both {seed: value}, at the seeds that both have: their number n, their mean, and the
    half-width of its 95 % interval, None for less than two."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    n = len(differences)
    half_width = quantile(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return n, statistics.mean(differences) if n else None, half_width


def verdict(mean, half_width, n, margin=MARGIN):
    """What n differences say, from their mean and the half-width of its 95 % interval."""
    if half_width is None:
        return "open"
    narrower = half_width * quantile(0.95, n - 1) / quantile(0.975, n - 1)     # two one-sided tests at 5 %: 90 %
    side = "" if abs(mean) <= half_width else "higher" if mean > 0 else "lower"
    within = f"equivalent within ±{margin:g}" if abs(mean) + narrower < margin else ""
    return ", but ".join(filter(None, (side, within))) or "open"


def difference(n, mean, half_width, usual):
    """A cell, which names n where it is not the usual one of its line."""
    interval = f" [{signed(mean - half_width)}, {signed(mean + half_width)}]" if n > 1 else ""
    return (signed(mean) + interval + f", n {n}" * (n != usual)) if n else "–"


def measured(runs, measures=MEASURES):
    """What runs hold of the measures: {(row, side, title): {seed: value}}, side 0 for their frozen encoder and 1 for
    their trained one; without frozen rows, which would be compared with themselves."""
    found = defaultdict(dict)
    for r in (r for r in runs if "seed" in r and "--method frozen" not in r["flags"]):
        for side, result in enumerate((dict(top1=r["frozen_top1"]) | r.get("frozen", {}), r)):
            for title, place in measures.items():
                if (value := read(result, place)) is not None:
                    found[r["row"], side, title][r["seed"]] = value
    return found


def by_measure(found, against=None):
    """A line per row of `measured`, trained beside frozen by every measure; and a line per comparison: H-SSL beside
    A-SSL, a row called "ROW, CHANGE" beside ROW, and all rows beside one that is named. Old files hold top-1 alone."""
    if not found:
        return []
    rows, _, titles = (list(dict.fromkeys(part)) for part in zip(*found))      # each once, in order

    def compare(a, b, title):
        return paired(found[(*a, title)], found[(*b, title)])

    accuracies = [title for title in titles if title != "effective rank"]
    lines = ["", *heading("frozen → trained", "n", *titles)]
    for row in rows:
        gains, cells = [compare((row, 1), (row, 0), title) for title in titles], []
        usual = gains[0][0]
        for title, gain in zip(titles, gains):
            frozen, trained = (statistics.mean(found[row, side, title].values() or [math.nan]) for side in (0, 1))
            cells.append("–" if not gain[0] else f"{frozen:.2f} → {trained:.2f}, {difference(*gain, usual)}"
                         if title in accuracies else f"{frozen:.0f} → {trained:.0f}")
        lines.append(f"| {row} | {usual} | {' | '.join(cells)} |")

    pairs = {f"{row} − {other}": (row, other) for row in rows
             if (other := row.replace("h-ssl", "a-ssl")) != row and other in rows}
    pairs |= {f"{row} − {base}": (row, base) for row in rows for base in (row.split(",")[0], against)
              if base in rows and base != row}
    lines += ["", *heading("comparison", "n", *accuracies, "verdict")] if pairs else []
    for name, (a, b) in pairs.items():
        results = [compare((a, 1), (b, 1), title) for title in accuracies]
        n, mean, half_width = results[0]
        cells = " | ".join(difference(*result, usual=n) for result in results)
        lines.append(f"| {name} | {n} | {cells} | {verdict(mean, half_width, n)} |")
    return lines


def by_epoch(runs):
    """What --eval-every saw on training images: a line per row, seed and look, after the frozen encoder's."""
    names, lines = ("linear", "neighbours", "effective_rank"), []
    for r in (r for r in runs if r.get("looks")):
        first, place = r["looks"][0], f"| {r['row']} | {r['seed']} |"
        lines.append(f"{place} frozen | " + " | ".join(str(first[f"frozen_{name}"]) for name in names) + " |")
        lines += [f"{place} {look['epoch']} | " + " | ".join(str(look[name]) for name in names) + " |"
                  for look in r["looks"]]
    return ["", *heading("run", "seed", "epoch", *names), *lines] if lines else []


def beside_tied(runs, tied):
    """The runs of a table without structure, called "ROW, untied", and those of the same rows and seeds with it."""
    same = {(r["row"], r["seed"]) for r in runs}
    return [r for r in tied if (r["row"], r["seed"]) in same] + [r | dict(row=f"{r['row']}, untied") for r in runs]


def show(record, against=None, measures=MEASURES, tied=()):
    """Print the content of one JSON file as tables; tied are the runs with structure, for a table without it."""
    runs, name = record["runs"], record["name"]
    machine, torch, commit = (" or ".join(sorted({str(r[key]) for r in runs}))
                              for key in ("machine", "torch", "commit"))
    print(f"\n**{name}**, {record['budget']}: {machine}, torch {torch}, commit {commit}")
    table1 = name.removesuffix("-untied") in ("mnist", "cifar10", "tiny-imagenet")
    lines = (by_method if table1 else by_row)(runs)
    runs = beside_tied(runs, tied) if tied else runs
    print("\n".join(lines + by_measure(measured(runs, measures), against) + by_epoch(runs)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="*", help="which tables (default: all there are)")
    p.add_argument("--budget", default="cpu", help="whose results (default: %(default)s)")
    p.add_argument("--against", metavar="ROW", help="compare all rows with this one, too")
    p.add_argument("--labels", action="store_true", help="show 1 and 100 labels a class, too")
    args = p.parse_args()
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*-{args.budget}.json"))]
    records = {record["name"]: record for record in records}
    for name in args.name or records:
        if name not in records:
            p.error(f"there are no results of {name} at budget {args.budget}, only of {', '.join(records)}")
        if args.against and args.against not in (rows := {r["row"] for r in records[name]["runs"]}):
            p.error(f"{name} has no row {args.against!r}, only {'; '.join(sorted(rows))}")
        tied = records.get(name.removesuffix("-untied"), dict(runs=()))["runs"] if name.endswith("-untied") else ()
        show(records[name], args.against, WITH_LABELS if args.labels else MEASURES, tied)


if __name__ == "__main__":
    main()
