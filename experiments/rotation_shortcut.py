"""What a rotation encoder learnt, beside its top-1: looks into the runs that `trials.py readouts` made.

    python experiments/rotation_shortcut.py --data-dir DATASETS [--runs runs/experiments]

writes experiments/results/rotation_shortcut.json and prints, for each run on 5,000 MNIST test images, before / after
training (mean over seeds):

    top-1         of the detached classifier on the encoder's representation
    ink           R² of the image's mean brightness, read linearly from the encoder's features averaged over positions
                  and orientations: the invariant that needs the least
    ink in h      the same, read from the normalised projections that NT-Xent compares
    oriented      share of the features' variance that lies along the orientation axis; 0 if all orientations agree
    rank          effective rank of the representation, exp of the entropy of its covariance's spectrum
"""
import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as datasets                                                                              # noqa: E402
from hssl import readout                                                                             # noqa: E402
from probe import build, load_checkpoint, represent                                                  # noqa: E402
from train import make_objective, parse                                                              # noqa: E402


def r_squared(features, target):
    """Of a least-squares fit with intercept: features (N, D), target (N,)."""
    features = torch.cat([features - features.mean(0), torch.ones(len(features), 1)], 1).double()
    residual = target.double() - features @ torch.linalg.lstsq(features, target.double()[:, None], driver="gelsd").solution[:, 0]
    return 1 - (residual.var() / target.double().var()).item()


@torch.no_grad()
def look(objective, group, images, settings):
    f, h = objective.encoder.eval(), objective.head.eval()
    z = torch.cat([f(x) for x in images.split(1000)])                                               # (N, C, G, H, W)
    ink = images.mean((1, 2, 3))
    within = z - z.mean(2, keepdim=True)
    spectrum = torch.linalg.eigvalsh(represent(z, settings["probe_grid"]).T.cov()).clamp_min(1e-12)
    spectrum = spectrum / spectrum.sum()
    return dict(ink=r_squared(readout(z.mean(2, keepdim=True), 1), ink), ink_in_h=r_squared(F.normalize(h(group.base(z))), ink),
                oriented=(within.var() / (z - z.mean((0, 2, 3, 4), keepdim=True)).var()).item(),
                rank=(-(spectrum * spectrum.log()).sum()).exp().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="datasets")
    parser.add_argument("--runs", default="runs/experiments")
    args = parser.parse_args()
    data = datasets.load("mnist", args.data_dir)
    images = data.batch(data.test_images, torch.arange(5000))
    table = defaultdict(list)
    for run in sorted(Path(args.runs).glob("readouts-cpu-*")):
        checkpoint = load_checkpoint(run / "checkpoint.pt")
        settings = checkpoint["settings"]
        objectives = []
        for trained in (False, True):
            torch.manual_seed(settings["seed"])
            encoder, group = build(settings, 1, 28)
            objective = make_objective(parse(["--method", settings["method"], "--grid", str(settings["grid"])]), encoder, group, data)
            if trained:
                encoder.load_state_dict(checkpoint["encoder"])
                objective.head.load_state_dict(checkpoint["head"])
            else:                                                                                   # the same weights as at the start; statistics of these images
                torch.optim.swa_utils.update_bn(images.split(1000), encoder)
            objectives.append(look(objective, group, images, settings))
        result = json.loads((run / "probe.json").read_text())
        for values, top1 in zip(objectives, (result["frozen_top1"], result["top1"])):
            values["top1"] = top1
        table[run.name.removeprefix("readouts-cpu-").rsplit("-", 1)[0]].append(objectives)
    columns = ("top1", "ink", "ink_in_h", "oriented", "rank")
    results = Path(__file__).resolve().parent / "results"
    results.mkdir(exist_ok=True)
    (results / "rotation_shortcut.json").write_text(json.dumps(table, indent=1) + "\n")
    print("| run | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, runs in table.items():
        cells = [[statistics.mean(r[when][c] for r in runs) for when in (0, 1)] for c in columns]
        print(f"| {name} | " + " | ".join(f"{a:.2f} / {b:.2f}" for a, b in cells) + " |")


if __name__ == "__main__":
    main()
