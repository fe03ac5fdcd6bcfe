"""Print the JSON files in experiments/results/ as Markdown tables.

    python experiments/report.py [NAME ...] [--budget cpu]

Each cell is the mean ± standard deviation, over whole trainings, of the detached classifier's top-1 in percent. A row's
command is `python train.py`, the flags above its table, its own flags, and `--seed` with each seed.
"""
import argparse
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("frozen", "a-ssl", "h-ssl", "supervised")


def cell(values):
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


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
    lines = [code(shared), "", "| run | own flags | frozen | trained | trainings |", "| --- " * 5 + "|"]
    for row, flags in own.items():
        of_row = [r for r in runs if r["row"] == row]
        frozen, trained = (cell([r[key] for r in of_row]) for key in ("frozen_top1", "top1"))
        lines.append(f"| {row} | {code(flags)} | {frozen} | {trained} | {len(of_row)} |")
    return lines


def by_method(runs):
    """The form of Table 1, for rows called GROUP METHOD: a line per group, a column per method."""
    flags, top1, frozen = {}, {}, {}
    for r in runs:
        group, method = r["row"].split()
        flags[group] = r["flags"].replace(f" --method {method}", "")
        top1.setdefault((group, method), []).append(r["top1"])
        if method == "h-ssl":                                                  # where no row of its own is frozen
            frozen.setdefault(group, []).append(r["frozen_top1"])
    shared, own = split_flags(flags)
    lines = [f"`{shared} --method METHOD`", "",
             "| group | own flags | frozen | A-SSL | H-SSL | supervised | H-SSL − A-SSL | trainings |",
             "| --- " * 8 + "|"]
    for group in flags:
        found = [top1.get((group, method), frozen[group] if method == "frozen" else None) for method in METHODS]
        cells = " | ".join(cell(values) if values else "not run" for values in found)
        gain = statistics.mean(top1[group, "h-ssl"]) - statistics.mean(top1[group, "a-ssl"])
        sign = f"{gain:+.2f}".replace("-", "−")
        lines.append(f"| {group} | {code(own[group])} | {cells} | {sign} | {len(top1[group, 'h-ssl'])} |")
    return lines


def show(record):
    """Print the content of one JSON file as a table."""
    runs, name = record["runs"], record["name"]
    machine, torch, commit = (" or ".join(sorted({str(r[key]) for r in runs}))
                              for key in ("machine", "torch", "commit"))
    print(f"\n**{name}**, {record['budget']}: {machine}, torch {torch}, commit {commit}")
    table1 = name.removesuffix("-untied") in ("mnist", "cifar10", "tiny-imagenet")
    print("\n".join(by_method(runs) if table1 else by_row(runs)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="*", help="which tables (default: all there are)")
    p.add_argument("--budget", default="cpu", help="whose results (default: %(default)s)")
    args = p.parse_args()
    for path in sorted(RESULTS.glob(f"*-{args.budget}.json")):
        record = json.loads(path.read_text())
        if not args.name or record["name"] in args.name:
            show(record)


if __name__ == "__main__":
    main()
