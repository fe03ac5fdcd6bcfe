"""Draw the README's figures from real encoders and from the JSON files (pip install -r experiments/requirements.txt).

    python experiments/figures.py {idea,sweeps,losses} [--budget cpu]

idea      one image of MNIST through the rotation encoder of `table1.py mnist`, its views read from features and from images
sweeps    accuracy against base space and distance, H-SSL's beside A-SSL's, from `sweeps.py`
losses    the loss of every H-SSL and A-SSL run of `table1.py mnist`
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt                                                                      # noqa: E402
from matplotlib.patches import ConnectionPatch                                                       # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as datasets                                                                              # noqa: E402
from probe import build, load_checkpoint                                                             # noqa: E402
from report import RESULTS                                                                           # noqa: E402

BLUE, RED, GREY = "#1f5fa8", "#c2402a", "#777777"


def trained(run):
    """The encoder of a finished run on MNIST and its group."""
    checkpoint = load_checkpoint(Path(run) / "checkpoint.pt")
    encoder, group = build(checkpoint["settings"], 1, 28)
    encoder.load_state_dict(checkpoint["encoder"])
    return encoder.eval(), group


def colours(z, basis=None):
    """Fibers (C, H, W) as colours (H, W, 3): their three principal components, of `basis`' fibers where that is given."""
    fibers = (z if basis is None else basis).flatten(1).T                                           # (P, C)
    mean = fibers.mean(0)
    axes = torch.linalg.svd(fibers - mean, full_matrices=False).Vh[:3]
    spread = ((fibers - mean) @ axes.T).abs().quantile(0.98, 0)
    return (0.5 + 0.5 * ((z.movedim(0, 2) - mean) @ axes.T) / spread).clamp(0, 1)


def show(axes, picture, title="", edge=None, fontsize=10, **options):
    axes.imshow(picture, **options)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=fontsize, pad=3)
    for spine in axes.spines.values():
        spine.set(color=edge or "black", linewidth=2.5 if edge else 0.8)


def arrow(figure, a, b, colour="black"):
    """From the right edge of axes a to the left edge of axes b."""
    figure.add_artist(ConnectionPatch((1.03, 0.5), (-0.05, 0.5), "axes fraction", "axes fraction", axesA=a, axesB=b, arrowstyle="-|>", color=colour, linewidth=1.5))


@torch.no_grad()
def idea(args):
    """Above two passes over transformed images, below one pass over the image: the same two views."""
    run = Path(args.runs) / f"mnist-{args.budget}-rotation-h-ssl-0"
    f, group = trained(run)
    data = datasets.load("mnist", args.data_dir)
    x = data.batch(data.test_images, torch.tensor([args.image]))                                    # (1, 1, 28, 28)
    z, elements = f(x), (torch.tensor([1]), torch.tensor([2]))
    basis = z[0].flatten(1, 2)                                                                      # (C, G·H, W)
    figure = plt.figure(figsize=(10.8, 4.9))
    place = lambda left, bottom, size=0.3: figure.add_axes((left * 4.9 / 10.8, bottom, size * 4.9 / 10.8, size))      # noqa: E731
    grey = dict(cmap="gray", vmin=0, vmax=x.max())

    figure.text(0.01, 0.95, "A-SSL: a transformed image and a pass for every view", fontsize=11, weight="bold")
    figure.text(0.55, 0.95, "H-SSL: one pass, all views read from its features", fontsize=11, weight="bold", color=BLUE)
    worst = 0
    whole = place(0.02, 0.33)
    show(whole, x[0, 0], "image $x$", **grey)
    for g, bottom, colour, name in zip(elements, (0.55, 0.1), (BLUE, RED), ("g_1", "g_2")):
        moved = group.T(g, x)
        a, b = place(0.42, bottom), place(0.82, bottom)
        show(a, moved[0, 0], f"$T_{{{name}}}\\,x$", colour, **grey)
        view = group.base(f(moved))
        show(b, colours(view[0, :, 0], basis), f"$f(T_{{{name}}}\\,x)$: view {name[-1]}", colour)
        arrow(figure, whole, a), arrow(figure, a, b, colour)
        worst = max(worst, ((view - group.view(g, z)).norm() / view.norm()).item())
    again = place(1.19, 0.33)
    show(again, x[0, 0], "image $x$", **grey)
    maps = [place(1.56, 0.715 - 0.21 * k, 0.15) for k in range(group.orientations)]
    for k, axes in enumerate(maps):
        reader = {(-int(g)) % group.orientations: c for g, c in zip(elements, (BLUE, RED))}.get(k)
        show(axes, colours(z[0, :, k], basis), f"$z=f(x)$, {360 * k // group.orientations}°", reader, fontsize=8.5)
        arrow(figure, again, axes)
    for g, bottom, colour, name in zip(elements, (0.55, 0.1), (BLUE, RED), ("g_1", "g_2")):
        b = place(1.84, bottom)
        show(b, colours(group.view(g, z)[0, :, 0], basis), f"$\\Gamma_{{{name}}}\\,f(x)$: view {name[-1]}", colour)
        arrow(figure, maps[(-int(g)) % group.orientations], b, colour)
    figure.text(0.01, 0.01, f"A real encoder (7×7 positions, 4 orientations; colours: the fibers' principal components); $g_1$ = 90°, $g_2$ = 180°. "
                f"Largest relative difference of the two sides' views: {worst:.0e}.", fontsize=8.5, color=GREY)
    return figure


def results(name, budget):
    return json.loads((RESULTS / f"{name}-{budget}.json").read_text())["runs"]


def sweeps(args):
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
    for axes, name, label in zip(panels, ("base-space", "distance"), (
            "base space: window of s × s positions (A-SSL: crop of 4s pixels), distance ≤ 2", "largest distance, positions (A-SSL: displacement of 4d pixels), window 2 × 2")):
        runs = results(name, args.budget)
        points = sorted({int(r["row"].split()[1]) for r in runs})
        for method, colour, marker in (("h-ssl", BLUE, "o"), ("a-ssl", RED, "s")):
            values = [[r["top1"] for r in runs if r["row"] == f"{method} {p}"] for p in points]
            axes.errorbar(points, [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values], color=colour, marker=marker, capsize=3,
                          label=f"{method.upper()}, {len(values[0])} trainings: mean ± std")
        frozen = [r["frozen_top1"] for r in runs if r["row"] == f"h-ssl {points[0]}"]
        axes.axhline(statistics.mean(frozen), color=GREY, linestyle="--", label="frozen encoder")
        axes.set_xlabel(label, fontsize=8.5)
        axes.set_xticks(points)
    panels[0].set_ylabel("top-1 on MNIST's test images, %")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def losses(args):
    runs = results("mnist", args.budget)
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.3))
    for axes, group in zip(panels, ("translation", "rotation", "scale")):
        for method, colour, style in (("h-ssl", BLUE, "-"), ("a-ssl", RED, "--")):
            for k, r in enumerate(r for r in runs if r["row"] == f"{group} {method}"):
                axes.plot(*zip(*r["losses"]), style, color=colour, linewidth=1.2, label=None if k else method.upper())
        axes.set(title=group, xlabel="step")
    panels[0].set_ylabel("NT-Xent, nats")
    panels[0].legend()
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("idea", "sweeps", "losses"))
    parser.add_argument("--budget", default="cpu", help="whose results")
    parser.add_argument("--runs", default="runs/experiments", help="idea: folder of the runs' folders")
    parser.add_argument("--data-dir", default="datasets", help="idea: where data sets are")
    parser.add_argument("--image", type=int, default=0, help="idea: index of a test image")
    args = parser.parse_args()
    figure = globals()[args.figure](args)
    (RESULTS / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "figures" / f"{args.figure}.png", dpi=110)
    print(RESULTS / "figures" / f"{args.figure}.png")


if __name__ == "__main__":
    main()
