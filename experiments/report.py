"""Turn the JSON files of this folder's scripts into the README's tables, in Markdown.

    python experiments/report.py [NAME ...] [--budget cpu]

Mean ± standard deviation, over whole trainings, of the detached classifier's top-1 in percent. A row's command is
`python train.py`, the flags above the table, the row's own, and `--seed` with each seed.
"""
import argparse
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("frozen", "a-ssl", "h-ssl", "supervised")


def cell(values):
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def split_flags(rows):
    """What all rows' flags begin with, and {row: the rest}."""
    tokens = {row: [f"--{part.strip()}" for part in flags.split("--")[1:]] for row, flags in rows.items()}
    first, common = next(iter(tokens.values())), 0
    while common < min(map(len, tokens.values())) and all(t[common] == first[common] for t in tokens.values()):
        common += 1
    return " ".join(first[:common]), {row: " ".join(t[common:]) for row, t in tokens.items()}


def plain(runs):
    """A line a row: flags, frozen and trained encoder."""
    base, rest = split_flags({r["row"]: r["flags"] for r in runs})
    lines = [f"`{base}`\n", "| run | own flags | frozen | trained | trainings |", "| --- | --- | --- | --- | --- |"]
    for row, own in rest.items():
        of_row = [r for r in runs if r["row"] == row]
        lines.append(f"| {row} | `{own}` | {cell([r['frozen_top1'] for r in of_row])} | {cell([r['top1'] for r in of_row])} | {len(of_row)} |")
    return lines


def by_method(runs):
    """Table 1's form: a line a group, a column a method; rows are called GROUP METHOD."""
    groups = dict.fromkeys(r["row"].split()[0] for r in runs)
    base, rest = split_flags({r["row"].split()[0]: r["flags"].replace(f" --method {r['row'].split()[1]}", "") for r in runs})
    lines = [f"`{base} --method METHOD`\n", "| group | own flags | frozen | A-SSL | H-SSL | supervised | H-SSL − A-SSL | trainings |", "| --- " * 8 + "|"]
    for group in groups:
        found = {m: [r["top1"] for r in runs if r["row"] == f"{group} {m}"] for m in METHODS}
        found["frozen"] = found["frozen"] or [r["frozen_top1"] for r in runs if r["row"] == f"{group} h-ssl"]
        difference = f"{statistics.mean(found['h-ssl']) - statistics.mean(found['a-ssl']):+.2f}".replace("-", "−")
        cells = [cell(values) if values else "not run" for values in found.values()]
        lines.append(f"| {group} | `{rest[group]}` | {' | '.join(cells)} | {difference} | {len(found['h-ssl'])} |")
    return lines


def show(record):
    """Print a JSON file's content as a table."""
    runs = record["runs"]
    about = [" or ".join(sorted({str(r[key]) for r in runs})) for key in ("machine", "torch", "commit")]
    print(f"\n**{record['name']}**, {record['budget']}: {about[0]}, torch {about[1]}, commit {about[2]}")
    print("\n".join((by_method if record["name"].removesuffix("-untied") in ("mnist", "cifar10", "tiny-imagenet") else plain)(runs)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="which tables; default: all that there are")
    parser.add_argument("--budget", default="cpu")
    args = parser.parse_args()
    for path in sorted(RESULTS.glob(f"*-{args.budget}.json")):
        record = json.loads(path.read_text())
        if not args.name or record["name"] in args.name:
            show(record)


if __name__ == "__main__":
    main()
