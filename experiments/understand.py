"""What the encoder has learned and what its head has: all measures at each readout, before and after training.

    python experiments/understand.py TABLE [--rows ROW ...]

looks at the runs of `tables.py TABLE` at budget cpu. Readouts of an image's features, one representation each:

    2x2             2x2 means of all maps, which the detached classifier reads
    mean            their mean over positions
    2x2, G          2x2 means of every view that may be drawn, averaged: invariant where Eq. (1) holds
    hidden          the head's hidden layer on the base space
    hidden, G       the same on every view, averaged
    2x2, T          the first, averaged over the images T_g x of the nuisance's group, one pass each; only for a network
    hidden, T       that is not equivariant to the nuisance in the images, and the same of the hidden layer
    projection, G   the projections of these views, scaled to length 1, averaged

Prints, for each run, mean over seeds, before → after training: linear top-1, neighbours, 10 labels a class (all in
percent), effective rank. Then alignment and uniformity of the projections (Wang and Isola, 2020): the mean squared
distance of two views of an image, and the logarithm of the mean of exp(-2 squared distance) over pairs of images.
Writes experiments/results/understand_TABLE.json, which keeps the rows and seeds that it has.
"""
import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from runs import load_run, run                                                 # first: it finds the project's modules
from hssl import Rotation, Scale, readout
from probe import assess
from report import RESULTS

VIEWS = "alignment", "uniformity"                                              # what is said of projections
KEPT = ("top1", "train_top1", "neighbours", "effective_rank", "few_labels")


# Elements that T_g x is averaged over: quarter turns, and sizes 1/1.41 to 1.41, as the equivariant networks have them.
TURNED = {"rotation": Rotation(4), "scale": Scale(3, 1.41)}


@torch.no_grad()
def representations(objective, group, images, turned=None):
    """All readouts of images (N, C, H, W), {name: (N, D)}; and projections of all views (M, N, D), of length 1. turned:
    the group of the images' nuisance if it is not the network's."""
    parts, projections = defaultdict(list), []
    *layers, out = objective.head                                              # linear, (batch norm,) ReLU; linear
    hidden = torch.nn.Sequential(*layers)
    for x in images.split(500):
        z = objective.encoder(x)                                                                     # (b, C, G, H, W)
        views = [group.view(g.expand(len(x), *g.shape), z) for g in group.elements]
        h = torch.stack([hidden(readout(view, objective.head.grid)) for view in views])              # (M, b, hidden)
        p = F.normalize(out(h), dim=2)
        projections.append(p)
        base = hidden(readout(group.base(z), objective.head.grid))
        maps = torch.stack([readout(view, 2) for view in views]).mean(0)                             # (b, S·C·4)
        for name, part in (("2x2", readout(z, 2)), ("mean", readout(z, 1)), ("2x2, G", maps), ("hidden", base),
                           ("hidden, G", h.mean(0)), ("projection, G", p.mean(0))):
            parts[name].append(part)
        if turned:
            passes = [objective.encoder(turned.T(g.expand(len(x)), x)) for g in turned.elements]
            bases = [hidden(readout(group.base(z), objective.head.grid)) for z in passes]
            parts["2x2, T"].append(torch.stack([readout(z, 2) for z in passes]).mean(0))
            parts["hidden, T"].append(torch.stack(bases).mean(0))
    return {name: torch.cat(part) for name, part in parts.items()}, torch.cat(projections, 1)


def alignment_and_uniformity(projections):
    """Of projections (M, N, D) of length 1, M views of each of N images, over pairs of different views or images."""
    (m, n), views = projections.shape[:2], projections.transpose(0, 1).double()                      # (N, M, D)
    alignment = torch.cdist(views, views).square().sum() / (n * m * (m - 1))   # a view's distance to itself is 0
    distances = torch.pdist(projections[0].double()).square()
    return alignment.item(), (-2 * distances).exp().mean().log().item()


def look(folder, data_dir):
    """{when: {readout: measures, ..., "alignment": number, "uniformity": number}} of one run."""
    settings, data, group, *objectives = load_run(folder, data_dir)
    train, test = (data.batch(images, torch.arange(len(images))) for images in (data.train_images, data.test_images))
    turned = TURNED.get(settings["nuisance"]) if settings["nuisance"] != settings["group"] else None
    result = {}
    for when, objective in zip(("before", "after"), objectives):
        x, _ = representations(objective, group, train, turned)
        x_test, projections = representations(objective, group, test, turned)
        found = {name: assess(x[name], data.train_labels, x_test[name], data.test_labels, data.classes,
                              seed=settings["seed"]) for name in x}
        result[when] = {name: {key: measured[key] for key in KEPT} for name, measured in found.items()}
        if len(projections) > 1:                                               # whole maps have one view
            result[when] |= zip(VIEWS, alignment_and_uniformity(projections[:, :2000]))
    return result


def show(found):
    """Print {row: [result of `look`, ...]} as Markdown."""
    def cell(runs, name, read):
        before, after = (statistics.mean(read(run[when][name]) for run in runs) for when in ("before", "after"))
        return f"{before:.2f} → {after:.2f}"
    columns = (lambda r: r["top1"]), (lambda r: r["neighbours"]), (lambda r: r["few_labels"]["10"][0]), \
        (lambda r: r["effective_rank"])
    print("| run | readout | linear top-1 | neighbours | 10 labels a class | effective rank |\n" + "| --- " * 6 + "|")
    for row, runs in found.items():
        for name in (name for name in runs[0]["before"] if name not in VIEWS):
            print(f"| {row} | {name} | " + " | ".join(cell(runs, name, read) for read in columns) + " |")
    print("\n| run | alignment | uniformity |\n| --- | --- | --- |")
    for row, runs in found.items():
        if VIEWS[0] in runs[0]["before"]:
            print(f"| {row} | " + " | ".join(cell(runs, name, lambda value: value) for name in VIEWS) + " |")


def main():
    p = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", help="a table of tables.py whose runs are there")
    p.add_argument("--rows", nargs="+", help="only these (default: all that have a projection head)")
    p.add_argument("--seeds", type=int, nargs="+", help="only these (default: all)")
    p.add_argument("--data-dir", help="folder of the data sets (default: the runs' own)")
    p.add_argument("--runs", default="runs/experiments", help="folder of the runs' folders (default: %(default)s)")
    p.add_argument("--results", default=str(RESULTS), help="folder of the JSON file (default: experiments/results)")
    args = p.parse_args()
    found = defaultdict(list)
    for path in sorted(Path(args.runs).glob(f"{args.table}-cpu-*/run.json")):
        folder, record = path.parent, json.loads(path.read_text())
        row = folder.name.removeprefix(f"{args.table}-cpu-").rsplit("-", 1)[0]
        wanted = record["method"] in ("h-ssl", "a-ssl") and (not args.rows or row in args.rows)
        if wanted and (not args.seeds or record["seed"] in args.seeds):
            found[row].append(look(folder, args.data_dir) | dict(seed=record["seed"], commit=record["commit"]))
    if not found:
        p.error(f"{args.runs} has no finished run of table {args.table} with these rows and seeds that has a head")
    show(found)
    path = Path(args.results) / f"understand_{args.table}.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    for row, runs in held.items():                                             # other rows and seeds stay
        seeds = {r["seed"] for r in found[row]}
        found[row] = sorted([*found[row], *(r for r in runs if r["seed"] not in seeds)], key=lambda r: r["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
