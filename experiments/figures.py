"""Draw the figures of README.md, TOUR.md and experiments/README.md.

    pip install -r experiments/requirements.txt
    python experiments/figures.py idea RUN       an image's two views, from a run by rotation
    python experiments/figures.py curves NAME    loss and measures over the training of a table
    python experiments/figures.py sweeps         accuracy over base space and over distance
    python experiments/figures.py tour           the pictures of TOUR.md, from its own blocks

They go into runs/figures, or with --results FOLDER there; the documents show those of
experiments/results/figures.
"""
import argparse
import itertools
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

import report    # comes first: it puts the project's folder on the path
import hssl
import probe

BLUE = "#1f5fa8"
RED = "#c2402a"
# Rows of a grid of four.
TOP = slice(0, 2)
BOTTOM = slice(2, 4)


def canvas(name, rows, columns):
    """A new figure of this name, as a grid of places for pictures."""
    return plt.figure(name).add_gridspec(rows, columns, wspace=0.25)


def colours(view, z):
    """A view (1, C, 1, H, W) of features z as colours (H, W, 3): the first three principal
    components of the fibers of z, so that all views of z can be compared."""
    fibers = z[0].flatten(1).T    # (P, C)
    mean = fibers.mean(0)
    centred = fibers - mean
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    spread = (centred @ axes.T).abs().quantile(0.98, 0)
    at_positions = view[0, :, 0].movedim(0, 2)    # (H, W, C)
    components = (at_positions - mean) @ axes.T / spread    # (H, W, 3)
    return (components.clamp(-1, 1) + 1) / 2


def picture(place, values, title, edge="black", cmap="gray"):
    """Show an image (1, 1, H, W) by a colour map, or colours (H, W, 3), at a place of a grid."""
    axes = plt.subplot(place)
    axes.imshow(values.squeeze(), cmap)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.spines[:].set(color=edge, linewidth=2)
    return axes


def arrow(a, b, colour="black"):
    """From the right edge of axes a to the left edge of axes b."""
    style = dict(arrowstyle="-|>", color=colour)
    drawn = b.annotate("", (-0.05, 0.5), (1.03, 0.5), b.transAxes, a.transAxes, style)
    drawn.set_in_layout(False)


@torch.no_grad()
def idea(run):
    """An image through an encoder by rotation: the same views from images and from features."""
    encoder, settings = probe.load_encoder(run)
    if (settings["group"], settings["group_size"]) != ("rotation", 4):
        raise ValueError(f"{run} is not by rotation with four orientations")
    data = probe.load_data(settings, "cpu")
    group = hssl.Rotation(4)
    x = data.batch(data.test_images, torch.tensor([0]))    # (1, 1, H, W)
    z = encoder(x)    # (1, C, 4, H', W')
    grid = canvas("idea", 4, 6)
    grid.figure.suptitle("Left: A-SSL, a transformed image and a pass for every view.   "
                         "Right: H-SSL, one pass, all views read from its features.")
    image = picture(grid[1:3, 0], x, "image $x$")
    again = picture(grid[1:3, 3], x, "image $x$")
    maps = []
    for k, edge in enumerate(["black", "black", RED, BLUE]):
        at_k = colours(z[:, :, [k]], z)
        orientation = picture(grid[k, 4], at_k, f"$z=f(x)$, {90 * k}°", edge)
        arrow(again, orientation)
        maps.append(orientation)
    for k, rows, colour in (1, TOP, BLUE), (2, BOTTOM, RED):
        g = torch.tensor([k])
        moved = group.T(g, x)
        passed = colours(group.base(encoder(moved)), z)
        read = colours(group.view(g, z), z)
        transformed = picture(grid[rows, 1], moved, f"$T_{{g_{k}}}\\,x$", colour)
        view = picture(grid[rows, 2], passed, f"$f(T_{{g_{k}}}\\,x)$: view {k}", colour)
        arrow(image, transformed)
        arrow(transformed, view, colour)
        view = picture(grid[rows, 5], read, f"$\\Gamma_{{g_{k}}}\\,f(x)$: view {k}", colour)
        arrow(maps[4 - k], view, colour)    # the view of g reads orientation -g


def curves(name):
    """Loss and --eval-every's measures over the steps of a table's runs, by row."""
    runs = [run for run in report.read_runs(name) if "held_out" in run["frozen"]]
    if not runs:
        raise ValueError(f"{name} was trained without --eval-every, so there is nothing to draw")
    rows = report.rows_of(runs)
    figure, grid = plt.subplots(2, 3, num=f"curves-{name}")
    loss, *panels = grid.flat
    loss.set(title="NT-Xent, nats", xlabel="step")
    for axes, title in zip(panels, report.MEASURES):
        axes.set(title=title, xlabel="step")
    lines = {}    # Seeds share an entry of the legend.
    for run in runs:
        row = run["row"]
        colour = f"C{rows.index(row)}"
        if run["method"] != "supervised":
            steps, losses = zip(*run["losses"])
            loss.plot(steps, losses, color=colour)
        frozen = run["frozen"]["held_out"]
        looks = [frozen | dict(step=0), *run["looks"]]
        steps = [look["step"] for look in looks]
        for axes, measure in zip(panels, report.MEASURES.values()):
            values = [look[measure] for look in looks]
            (lines[row],) = axes.plot(steps, values, ".-", color=colour)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))


def sweeps(_):
    """Accuracy over base space and over distance, H-SSL's beside A-SSL's."""
    _, panels = plt.subplots(1, 4, num="sweeps", figsize=(11, 3.4))
    labels = {"base-space": "side of the window", "distance": "largest distance of two views"}
    measures = {"top1": "linear", "neighbours": "neighbours"}
    for axes, (measure, name) in zip(panels, itertools.product(measures, labels)):
        sweep(axes, report.read_runs(name), measure)
        axes.set(title=measures[measure], xlabel=f"{labels[name]}, positions")
    panels[0].legend(loc=(0.4, 0.1))


def sweep(axes, runs, measure):
    """The measure over the points of a sweep, by method, and the frozen encoder's."""
    points = [1, 2, 3, 5]
    for method, colour in ("h-ssl", BLUE), ("a-ssl", RED):
        means = []
        deviations = []
        for point in points:
            found = report.values(runs, f"{method} {point}", measure).values()
            means.append(statistics.mean(found))
            deviations.append(statistics.stdev(found))
        axes.errorbar(points, means, deviations, color=colour, label=method)
    frozen = report.values(runs, "h-ssl 1", measure, frozen=True)
    mean = statistics.mean(frozen.values())
    axes.axhline(mean, color="grey", label="frozen")
    axes.set(xticks=points)


def tour(_):
    """The pictures of TOUR.md, drawn from the variables of its own blocks."""
    text = (report.ROOT / "TOUR.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    draw_after = {2: tour_filters, 3: tour_equivariance, 4: tour_views}
    variables = {}
    for step in range(1, 5):
        exec(blocks[step - 1], variables)
        if step in draw_after:
            draw_after[step](SimpleNamespace(**variables))


def tour_filters(tour):
    """Step 2: basis functions, turned and widened; a row is one function."""
    grid = canvas("tour-filters", 1, 2)
    for place, title, functions in (
        (grid[0], "rotation: 0°, 90°, 180°, 270°", tour.turned[[1, 6, 9, 12]]),
        (grid[1], "scale: each 1.41 times as wide", tour.widened[[0, 1, 4, 5]]),
    ):
        largest = functions.abs().amax((2, 3), keepdim=True)
        functions = functions / largest
        functions = F.pad(functions, (1, 1, 1, 1))    # (4, G, k, k)
        rows = functions.movedim(1, 2)    # (4, k, G, k)
        picture(place, rows.flatten(2).flatten(0, 1), title, cmap="RdBu")


def first_of(glyphs, name):
    """The first training image (1, 1, 28, 28) that shows the glyph of this name."""
    label = glyphs.class_names.index(name)
    shown = (glyphs.train_labels == label).nonzero()
    return glyphs.batch(glyphs.train_images, shown[0])


@torch.no_grad()
def tour_equivariance(tour):
    """Step 3: both sides of Eq. (1) for a quarter turn, and an ordinary network's, which differ."""
    x = first_of(tour.glyphs, "4").double()
    g = torch.tensor([1])
    moved = tour.group.T(g, x)
    grid = canvas("tour-equivariance", 4, 4)
    picture(grid[1:3, 0], x, "image $x$")
    picture(grid[1:3, 1], moved, "$T_g\\,x$, $g$ = 90°")
    for name, network, rows, colour in (
        ("steerable", tour.f, TOP, BLUE),
        ("ordinary", tour.ordinary, BOTTOM, RED),
    ):
        z = network(x)
        left = colours(network(moved), z)
        right = colours(tour.group.view(g, z), z)
        picture(grid[rows, 2], left, f"{name}: $f(T_g\\,x)$ at 0°", colour)
        picture(grid[rows, 3], right, "$\\Gamma_g f(x)$ at 0°", colour)


def tour_views(tour):
    """Step 4: windows of a map on an image, orientations, a scale axis that ends."""
    x = first_of(tour.glyphs, "2")
    grid = canvas("tour-views", 1, 6)
    whole = picture(grid[0], x, "translation:\ntwo windows, distance 2")
    stride = tour.shifts.stride
    side = tour.shifts.base_size * stride
    for row, column, colour in (1, 1, BLUE), (-1, 0, RED):
        top = (tour.shifts.first - row) * stride - 0.5
        left = (tour.shifts.first - column) * stride - 0.5
        window = plt.Rectangle((left, top), side, side, fill=False, color=colour)
        window.set(linewidth=2.5, clip_on=False)
        whole.add_patch(window)

    for k in range(4):
        # As filters that are turned by k see it.
        g = torch.tensor([-k])
        seen = tour.group.T(g, x)
        title = f"filters at {90 * k}°:\nview of g = {-90 * k % 360}°"
        picture(grid[1 + k], seen, title)

    # A row is a g from -2 to 2; a column one of five scales, of which the encoder has three.
    scales = torch.zeros(5, 5)
    scales[:, 1:4] = 1
    scales += 2 * torch.eye(5).flip(1)
    picture(grid[5], scales, "rows: g from −2 to 2\npale: scales 0, 1, 2\n"
            "dark: what g's view reads", cmap="Blues")


FIGURES = dict(idea=idea, sweeps=sweeps, curves=curves, tour=tour)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("of", nargs="?", metavar="RUN or NAME", help="idea, curves: of what")
    parser.add_argument("--results", default="runs/figures", metavar="FOLDER",
                        help="where to write (runs/figures)")
    args = parser.parse_intermixed_args(argv)
    if (args.figure in ("idea", "curves")) != (args.of is not None):
        parser.error("idea takes a RUN by rotation, curves the NAME of a table, the others nothing")
    matplotlib.use("Agg")
    plt.rc("figure", figsize=(11, 4.6))
    plt.rc("figure.constrained_layout", use=True)
    FIGURES[args.figure](args.of)
    Path(args.results).mkdir(parents=True, exist_ok=True)
    for name in plt.get_figlabels():
        path = f"{args.results}/{name}.png"
        plt.figure(name).savefig(path, dpi=110, bbox_inches="tight")
        plt.close(name)
        print(path)


if __name__ == "__main__":
    report.run(main)
