"""Draw the figures of README.md, TOUR.md and experiments/README.md.

    pip install -r experiments/requirements.txt
    python experiments/figures.py idea RUN       an image's two views, from a run by rotation
    python experiments/figures.py curves NAME    loss and measures over the training of a table
    python experiments/figures.py sweeps         top-1 over base space and over distance
    python experiments/figures.py tour           the pictures of TOUR.md, from its own blocks

They go into runs/figures, or with --results FOLDER there; the documents show those of
experiments/results/figures.
"""
import argparse
import copy
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import ConnectionPatch, Rectangle

import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hssl    # noqa: E402
import probe    # noqa: E402

BLUE = "#1f5fa8"
RED = "#c2402a"
GREY = "#777777"


def colours(z, fibers):
    """Fibers z (C, H, W) as colours (H, W, 3): their first three principal components.

    The components are those of fibers (P, C), so that pictures can be compared.
    """
    mean = fibers.mean(0)
    centred = fibers - mean
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    spread = (centred @ axes.T).abs().quantile(0.98, 0)
    components = (z.movedim(0, 2) - mean) @ axes.T
    return (0.5 + 0.5 * components / spread).clamp(0, 1)


def picture(figure, left, bottom, size, values, title="", edge=None, fontsize=10, **options):
    """Add a square picture of a tensor: an image (H, W) in grey, or colours (H, W, 3).

    Lengths are fractions of the figure's height.
    """
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left * height / width, bottom, size * height / width, size))
    options.setdefault("cmap", "gray")
    axes.imshow(values.numpy(), **options)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=fontsize, pad=5)
    for spine in axes.spines.values():
        spine.set_color(edge or "black")
        spine.set_linewidth(2.5 if edge else 0.8)
    return axes


def arrow(figure, a, b, colour="black"):
    """From the right edge of axes a to the left edge of axes b."""
    figure.add_artist(ConnectionPatch(
        (1.03, 0.5), (-0.05, 0.5), "axes fraction", "axes fraction", axesA=a, axesB=b,
        arrowstyle="-|>", color=colour, linewidth=1.5))


@torch.no_grad()
def idea(args):
    """An image through an encoder by rotation: the same views from images and from features."""
    encoder, settings = probe.load_encoder(args.of)
    data = probe.load_data(settings, "cpu")
    group = hssl.Rotation(4)
    x = data.batch(data.test_images, torch.tensor([0]))    # (1, 1, H, W)
    z = encoder(x)    # (1, C, 4, H', W')
    fibers = z[0].flatten(1).T    # (4·H'·W', C)
    views = [(1, BLUE, 0.55), (2, RED, 0.1)]

    figure = plt.figure(figsize=(10.8, 4.9))
    bold = dict(fontsize=11, weight="bold")
    figure.text(0.01, 0.95, "A-SSL: a transformed image and a pass for every view", **bold)
    image = picture(figure, 0.02, 0.33, 0.3, x[0, 0], "image $x$")
    differences = []
    for k, colour, bottom in views:
        g = torch.tensor([k])
        moved = group.T(g, x)
        view = group.base(encoder(moved))
        difference = (view - group.view(g, z)).norm() / view.norm()
        differences.append(difference.item())
        transformed = picture(figure, 0.42, bottom, 0.3, moved[0, 0], f"$T_{{g_{k}}}\\,x$", colour)
        features = picture(figure, 0.82, bottom, 0.3, colours(view[0, :, 0], fibers),
                           f"$f(T_{{g_{k}}}\\,x)$: view {k}", colour)
        arrow(figure, image, transformed)
        arrow(figure, transformed, features, colour)

    figure.text(0.55, 0.95, "H-SSL: one pass, all views read from its features", color=BLUE, **bold)
    image = picture(figure, 1.19, 0.33, 0.3, x[0, 0], "image $x$")
    maps = []
    for k, edge in enumerate((None, None, RED, BLUE)):
        maps.append(picture(figure, 1.56, 0.715 - 0.21 * k, 0.15, colours(z[0, :, k], fibers),
                            f"$z=f(x)$, {90 * k}°", edge, fontsize=8.5))
        arrow(figure, image, maps[k])
    for k, colour, bottom in views:
        view = group.view(torch.tensor([k]), z)
        features = picture(figure, 1.84, bottom, 0.3, colours(view[0, :, 0], fibers),
                           f"$\\Gamma_{{g_{k}}}\\,f(x)$: view {k}", colour)
        arrow(figure, maps[4 - k], features, colour)    # the view of g reads orientation -g
    figure.text(0.01, 0.01, f"A trained encoder ({z.shape[-1]}×{z.shape[-1]} positions, 4 "
                "orientations; colours: principal components of the fibers); $g_1$ = 90°, $g_2$ = "
                f"180°. Left and right, the views differ by {max(differences):.0e} at most, "
                "relatively.", fontsize=8.5, color=GREY)
    return {"idea": figure}


def curves(args):
    """Loss and --eval-every's measures over the steps of a table's runs, by row."""
    figure, grid = plt.subplots(2, 3, figsize=(12, 6))
    loss_axes, *panels = grid.flat
    loss_axes.set(title="NT-Xent, nats", xlabel="step")
    runs = [run for run in report.read_runs(args.of) if run["looks"]]
    if not runs:
        raise ValueError(f"no run of {args.of} has looks: train them with --eval-every")
    rows = report.rows_of(runs)
    for run in runs:
        colour = f"C{rows.index(run['row'])}"
        if run["method"] != "supervised":
            steps, losses = zip(*run["losses"])
            loss_axes.plot(steps, losses, color=colour, linewidth=1.3)
        looks = [dict(step=0, **run["frozen"]["held_out"]), *run["looks"]]
        steps = [look["step"] for look in looks]
        for axes, (title, name) in zip(panels, report.MEASURES.items()):
            axes.set(title=title, xlabel="step")
            values = [look[name] for look in looks]
            axes.plot(steps, values, color=colour, label=run["row"], linewidth=1.3, marker=".")
    # Seeds share an entry.
    lines, labels = panels[-1].get_legend_handles_labels()
    entries = dict(zip(labels, lines))
    loss_axes.legend(entries.values(), entries.keys(), fontsize=8)
    figure.tight_layout()
    return {"curves": figure}


def sweeps(args):
    """Accuracy over base space and over distance, H-SSL's beside A-SSL's."""
    labels = {
        "base-space": "s: window of s × s positions (A-SSL: crop of 4s × 4s pixels); "
                      "distance at most 2",
        "distance": "d: largest distance in positions (A-SSL: displacement of 4d pixels); "
                    "window 2 × 2",
    }
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
    points = (1, 2, 3, 5)
    for axes, (name, label) in zip(panels, labels.items()):
        runs = report.read_runs(name)
        for method, colour, marker in (("h-ssl", BLUE, "o"), ("a-ssl", RED, "s")):
            means = []
            deviations = []
            for point in points:
                top1 = report.values(runs, f"{method} {point}", "top1").values()
                means.append(statistics.mean(top1))
                deviations.append(statistics.stdev(top1))
            axes.errorbar(points, means, deviations, color=colour, marker=marker, capsize=3,
                          label=f"{method.upper()}, mean ± std of {len(top1)} trainings")
        frozen = report.values(runs, "h-ssl 1", "top1", frozen=True)
        axes.axhline(statistics.mean(frozen.values()), color=GREY, linestyle="--",
                     label="frozen encoder")
        axes.set_xlabel(label, fontsize=8.5)
        axes.set_xticks(points)
    panels[0].set_ylabel("top-1 on MNIST's test images, %")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    return {"sweeps": figure}


def tour(args):
    """The pictures of TOUR.md, drawn from the variables of its own blocks."""
    text = (ROOT / "TOUR.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    draw_after = {2: tour_filters, 3: tour_equivariance, 4: tour_views, 8: tour_training}
    variables = {}
    figures = {}
    for step in range(1, 9):
        exec(blocks[step - 1], variables)
        if step in draw_after:
            draw = draw_after[step]
            with torch.no_grad():
                figures[draw.__name__.replace("_", "-")] = draw(SimpleNamespace(**variables))
    return figures


def tour_filters(tour):
    """Step 2: basis functions, turned and widened."""
    figure = plt.figure(figsize=(8.4, 4.2))
    figure.text(0.02, 0.94, "rotation: functions at 0°, 90°, 180°, 270°")
    figure.text(0.55, 0.94, "scale: functions, each time 1.41 times as wide")
    chosen = ((tour.turned, (1, 6, 9, 12), 0.04), (tour.widened, (0, 1, 4, 5), 1.1))
    for basis, functions, left in chosen:
        for row, number in enumerate(functions):
            for g, function in enumerate(basis[number]):
                limit = function.abs().max().item()
                picture(figure, left + 0.24 * g, 0.7 - 0.225 * row, 0.21, function, cmap="RdBu",
                        vmin=-limit, vmax=limit)
    return figure


def first_with_label(tour, glyph):
    """The first training image (1, 1, 28, 28) that shows the glyph."""
    labels = tour.glyphs.train_labels.tolist()
    index = labels.index(tour.glyphs.class_names.index(glyph))
    return tour.glyphs.batch(tour.glyphs.train_images, torch.tensor([index]))


def tour_equivariance(tour):
    """Step 3: both sides of Eq. (1) for a quarter turn, and an ordinary network's, which differ."""
    x = first_with_label(tour, "4").double()
    g = torch.tensor([1])
    moved = tour.group.T(g, x)
    figure = plt.figure(figsize=(9.2, 4.9))
    image = picture(figure, 0.03, 0.3, 0.34, x[0, 0], "image $x$")
    rows = (("steerable", tour.f, 0.53, BLUE), ("ordinary", tour.ordinary, 0.04, RED))
    for name, network, bottom, colour in rows:
        network = copy.deepcopy(network).eval()
        z = network(x)
        fibers = z[0].flatten(1).T
        left = network(moved)[0, :, 0]
        right = tour.group.view(g, z)[0, :, 0]
        a = picture(figure, 0.5, bottom, 0.38, moved[0, 0], "$T_g\\,x$, $g$ = 90°")
        b = picture(figure, 0.98, bottom, 0.38, colours(left, fibers),
                    f"{name}: $f(T_g\\,x)$ at 0°", colour)
        picture(figure, 1.46, bottom, 0.38, colours(right, fibers), "$\\Gamma_g f(x)$ at 0°",
                colour)
        arrow(figure, image, a)
        arrow(figure, a, b, colour)
    return figure


def tour_views(tour):
    """Step 4: windows of a map and crops of an image, orientations, a scale axis that ends."""
    x = first_with_label(tour, "2")
    figure = plt.figure(figsize=(10.4, 5.4))
    whole = picture(figure, 0.05, 0.53, 0.38, x[0, 0], "translation: two windows, distance 2",
                    fontsize=9)
    ticks = [3.5, 7.5, 11.5, 15.5, 19.5, 23.5]
    whole.set(xticks=ticks, yticks=ticks, xticklabels=[], yticklabels=[])
    whole.grid(color="white", alpha=0.25)
    for k, (shift, colour) in enumerate((([1, 1], BLUE), ([-1, 0], RED))):
        g = torch.tensor([shift])
        corner = (tour.shifts.corner - g[0]) * tour.shifts.stride - 0.5
        top, left = corner.tolist()
        side = tour.shifts.base_size * tour.shifts.stride
        whole.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour,
                                  linewidth=2.5, clip_on=False, zorder=3))
        moved = tour.shifts.T(g, x)[0, 0]
        first = tour.shifts.corner * tour.shifts.stride
        window = moved[first:first + side, first:first + side]
        picture(figure, 0.53 + 0.27 * k, 0.59, 0.23, window, f"window {k + 1}", colour, fontsize=9)

    titles = ("0°: G0, g = 0°", "90°: view of g = 270°", "180°: view of g = 180°",
              "270°: view of g = 90°")
    for k, title in enumerate(titles):
        # As filters that are turned by k see it.
        turned = tour.group.T(torch.tensor([-k]), x)[0, 0]
        edge = BLUE if k == 0 else None
        picture(figure, 0.05 + 0.26 * k, 0.09, 0.22, turned, title, edge, fontsize=8.5)
    figure.text(0.03, 0.4, "rotation: what the filters of each orientation see; the view of g "
                "reads orientation −g", fontsize=9)

    axes = figure.add_axes((0.63, 0.1, 0.35, 0.76))
    for g in (-2, -1, 0, 1, 2):
        axes.text(-2.3, -g, f"g = {g}", va="center")
        boxes = [(0, "white", "-"), (1, "white", "-"), (2, "white", "-")]
        if abs(g) < 2:
            boxes.append((1 - g, BLUE, "-"))
        else:
            boxes.append((1 - g, "lightgrey", "--"))
        for scale, colour, style in boxes:
            axes.add_patch(Rectangle((scale - 0.4, -g - 0.35), 0.8, 0.7, facecolor=colour,
                                     edgecolor="black", linestyle=style))
    axes.set(xlim=(-2.4, 3.6), ylim=(-2.6, 2.6))
    axes.axis("off")
    axes.set_title("scale: of the scales 0, 1, 2 the view of g reads scale 1 − g;\nat ±2 the axis "
                   "has ended (dashed)", fontsize=9)
    return figure


def tour_training(tour):
    """Step 8: the loss of both methods; the thin dashed curve lies on the thick one."""
    figure, axes = plt.subplots(figsize=(5.6, 3.2))
    looks = ((RED, "-", 3.5), (BLUE, "--", 1.5))
    for (name, values), (colour, style, width) in zip(tour.curves.items(), looks):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, style, color=colour, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="NT-Xent, nats")
    axes.legend()
    figure.tight_layout()
    return figure


FIGURES = dict(idea=idea, sweeps=sweeps, curves=curves, tour=tour)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("of", nargs="?", metavar="RUN or NAME", help="idea, curves: of what")
    parser.add_argument("--results", type=Path, default=Path("runs/figures"), metavar="FOLDER",
                        help="where to write (runs/figures)")
    args = parser.parse_intermixed_args(argv)
    if (args.figure in ("idea", "curves")) != (args.of is not None):
        parser.error("idea takes a RUN by rotation, curves the NAME of a table, the others nothing")
    matplotlib.use("Agg")
    drawn = FIGURES[args.figure](args)
    args.results.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(args.results / f"{name}.png", dpi=110)
        plt.close(figure)
        print(args.results / f"{name}.png")


if __name__ == "__main__":
    report.run(main)
