"""Look into what a rotation encoder learned besides its top-1, in the runs of `tables.py readouts`.

    python experiments/rotation_shortcut.py [--runs runs/experiments]

Prints for each row, before / after training (mean over seeds, 5,000 MNIST test images):

    top1        of the detached classifier, in percent
    ink         R² of the image's mean brightness, read linearly from the features averaged over positions and
                orientations: the simplest invariant
    ink_in_h    the same from the normalised projections, which NT-Xent compares
    oriented    the share of the features' variance along the orientation axis; 0 if all orientations agree
    rank        effective rank of the representation: exp of the entropy of its covariance's spectrum

Writes experiments/results/rotation_shortcut.json.
"""
import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from runs import load_run                                                      # first: it finds the project's modules
from hssl import readout
from report import RESULTS

MEASURES = ("top1", "ink", "ink_in_h", "oriented", "rank")


def r_squared(features, target):
    """Of a least-squares fit with intercept: features (N, D), target (N,)."""
    features = torch.cat([features - features.mean(0), torch.ones(len(features), 1)], 1).double()
    target = target.double()
    fit = torch.linalg.lstsq(features, target[:, None], driver="gelsd").solution
    return 1 - ((target - features @ fit[:, 0]).var() / target.var()).item()


@torch.no_grad()
def measure(objective, group, images, grid):
    """The measures but top1, {name: float}, of an encoder and head; grid: the classifier's."""
    z = torch.cat([objective.encoder(x) for x in images.split(1000)])                                # (N, C, G, H, W)
    ink, projections = images.mean((1, 2, 3)), F.normalize(objective.head(group.base(z)))
    along_orientations, around_mean = z - z.mean(2, keepdim=True), z - z.mean((0, 2, 3, 4), keepdim=True)
    spectrum = torch.linalg.eigvalsh(readout(z, grid).T.cov()).clamp_min(1e-12)
    spectrum = spectrum / spectrum.sum()
    return dict(ink=r_squared(z.mean((2, 3, 4)), ink), ink_in_h=r_squared(projections, ink),
                oriented=(along_orientations.var() / around_mean.var()).item(),
                rank=(-(spectrum * spectrum.log()).sum()).exp().item())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-dir", help="folder of the data sets (default: the runs' own)")
    p.add_argument("--runs", default="runs/experiments", help="folder of the runs' folders (default: %(default)s)")
    p.add_argument("--results", default=str(RESULTS), help="folder of the JSON file (default: experiments/results)")
    args = p.parse_args()
    found = defaultdict(list)                                                  # row -> [[before, after] for each seed]
    for folder in sorted(Path(args.runs).glob("readouts-cpu-*")):
        settings, data, group, *objectives = load_run(folder, args.data_dir)
        images = data.batch(data.test_images, torch.arange(5000))
        probed = json.loads((folder / "probe.json").read_text())
        found[folder.name.removeprefix("readouts-cpu-").rsplit("-", 1)[0]].append(
            [dict(top1=probed[top1]) | measure(objective, group, images, settings["probe_grid"])
             for objective, top1 in zip(objectives, ("frozen_top1", "top1"))])
    Path(args.results).mkdir(parents=True, exist_ok=True)
    (Path(args.results) / "rotation_shortcut.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"| run | {' | '.join(MEASURES)} |\n" + "| --- " * (len(MEASURES) + 1) + "|")
    for row, seeds in found.items():
        cells = ([statistics.mean(seed[when][name] for seed in seeds) for when in (0, 1)] for name in MEASURES)
        print(f"| {row} | " + " | ".join(f"{before:.2f} / {after:.2f}" for before, after in cells) + " |")


if __name__ == "__main__":
    main()
