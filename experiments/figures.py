"""Draw the README's figures from trained encoders and from the JSON files, or a run; writes FOLDER/FIGURE.png.

    pip install -r experiments/requirements.txt
    python experiments/figures.py FIGURE [--budget cpu] [--out FOLDER]
    python experiments/figures.py run RUN                                      writes RUN/run.png

Every figure is a function from the command line's args to a matplotlib figure; FIGURES lists them all.
"""
import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import ConnectionPatch, Rectangle

from runs import ROOT, load_run                                                # first: it finds the project's modules
import probe
from hssl import allowed_pairs
from report import MEASURES, RESULTS, read

BLUE, RED, GREY = "#1f5fa8", "#c2402a", "#777777"
METHODS = {"h-ssl": BLUE, "a-ssl": RED}
COLOURS = BLUE, RED, "#2e8b57", "#b8860b", "#7b3fa0", "black"


def results(name, budget):
    """The runs in a JSON file of tables.py."""
    path = RESULTS / f"{name}-{budget}.json"
    if not path.exists():
        raise SystemExit(f"figures.py: {path} is missing: tables.py {name} --budget {budget} writes it")
    return json.loads(path.read_text())["runs"]


# ---------------------------------------------------------------------------------------------------------------- idea
def colours(z, fibers=None):
    """Show fibers (C, H, W) as colours (H, W, 3): their first three principal components, or those of fibers (P, C)."""
    if fibers is None:
        fibers = z.flatten(1).T
    mean = fibers.mean(0)
    axes = torch.linalg.svd(fibers - mean, full_matrices=False).Vh[:3]
    spread = ((fibers - mean) @ axes.T).abs().quantile(0.98, 0)
    return (0.5 + 0.5 * ((z.movedim(0, 2) - mean) @ axes.T) / spread).clamp(0, 1)


def picture(figure, left, bottom, size, values, title="", edge=None, fontsize=10, **options):
    """Add a square picture: an image (H, W) in grey, or colours (H, W, 3). Lengths are fractions of the height."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left * height / width, bottom, size * height / width, size))
    axes.imshow(values, **dict(cmap="gray") | options)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=fontsize, pad=3)
    plt.setp(list(axes.spines.values()), color=edge or "black", linewidth=2.5 if edge else 0.8)
    return axes


def arrow(figure, a, b, colour="black"):
    """From the right edge of axes a to the left edge of axes b."""
    figure.add_artist(ConnectionPatch((1.03, 0.5), (-0.05, 0.5), "axes fraction", "axes fraction", axesA=a, axesB=b,
                                      arrowstyle="-|>", color=colour, linewidth=1.5))


@torch.no_grad()
def idea(args):
    """one image through the rotation encoder of table mnist: the same two views from images and from features"""
    loaded = load_run(Path(args.runs) / f"mnist-{args.budget}-rotation-h-ssl-0", args.data_dir)
    f, group = loaded.after.encoder, loaded.group
    x = loaded.data.batch(loaded.data.test_images, torch.tensor([args.image]))                       # (1, 1, 28, 28)
    z = f(x)                                                                                         # (1, C, 4, 7, 7)
    fibers, differences = z[0].flatten(1).T, []
    views = [(k, torch.tensor([k]), bottom, colour) for k, bottom, colour in ((1, 0.55, BLUE), (2, 0.1, RED))]
    figure = plt.figure(figsize=(10.8, 4.9))

    figure.text(0.01, 0.95, "A-SSL: a transformed image and a pass for every view", fontsize=11, weight="bold")
    image = picture(figure, 0.02, 0.33, 0.3, x[0, 0], "image $x$")
    for k, g, bottom, colour in views:
        moved = group.T(g, x)
        view = group.base(f(moved))
        a = picture(figure, 0.42, bottom, 0.3, moved[0, 0], f"$T_{{g_{k}}}\\,x$", colour)
        b = picture(figure, 0.82, bottom, 0.3, colours(view[0, :, 0], fibers), f"$f(T_{{g_{k}}}\\,x)$: view {k}",
                    colour)
        arrow(figure, image, a), arrow(figure, a, b, colour)
        differences.append(((view - group.view(g, z)).norm() / view.norm()).item())

    figure.text(0.55, 0.95, "H-SSL: one pass, all views read from its features", fontsize=11, weight="bold", color=BLUE)
    image, maps = picture(figure, 1.19, 0.33, 0.3, x[0, 0], "image $x$"), []
    read = {-k % group.orientations: colour for k, _, _, colour in views}      # the view of g reads orientation -g
    for k in range(group.orientations):
        maps.append(picture(figure, 1.56, 0.715 - 0.21 * k, 0.15, colours(z[0, :, k], fibers),
                            f"$z=f(x)$, {360 * k // group.orientations}°", read.get(k), fontsize=8.5))
        arrow(figure, image, maps[k])
    for k, g, bottom, colour in views:
        view = group.view(g, z)
        b = picture(figure, 1.84, bottom, 0.3, colours(view[0, :, 0], fibers), f"$\\Gamma_{{g_{k}}}\\,f(x)$: view {k}",
                    colour)
        arrow(figure, maps[-k % group.orientations], b, colour)
    figure.text(0.01, 0.01, "A trained encoder (7×7 positions, 4 orientations; colours: principal components of the "
                "fibers); $g_1$ = 90°, $g_2$ = 180°. Left and right, the views differ by "
                f"{max(differences):.0e} at most, relatively.", fontsize=8.5, color=GREY)
    return figure


# -------------------------------------------------------------------------------------------------- from the JSON files
def sweeps(args):
    """accuracy over base space and over distance, H-SSL's beside A-SSL's, from tables base-space and distance"""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
    labels = {"base-space": "s: window of s × s positions (A-SSL: crop of 4s × 4s pixels); distance at most 2",
              "distance": "d: largest distance in positions (A-SSL: displacement of 4d pixels); window 2 × 2"}
    for axes, (name, label) in zip(panels, labels.items()):
        runs = results(name, args.budget)
        points = sorted({int(r["row"].split()[1]) for r in runs})
        for method, colour in METHODS.items():
            top1 = [[r["top1"] for r in runs if r["row"] == f"{method} {point}"] for point in points]
            axes.errorbar(points, [statistics.mean(values) for values in top1],
                          [statistics.stdev(values) if len(values) > 1 else 0 for values in top1],
                          color=colour, marker="o" if method == "h-ssl" else "s", capsize=3,
                          label=f"{method.upper()}, mean ± std of {len(top1[0])} trainings")
        frozen = statistics.mean(r["frozen_top1"] for r in runs if r["row"] == f"h-ssl {points[0]}")
        axes.axhline(frozen, color=GREY, linestyle="--", label="frozen encoder")
        axes.set_xlabel(label, fontsize=8.5), axes.set_xticks(points)
    panels[0].set_ylabel("top-1 on MNIST's test images, %"), panels[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def losses(args):
    """the loss of every H-SSL and A-SSL run of table mnist"""
    runs = results("mnist", args.budget)
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.3))
    for axes, group in zip(panels, ("translation", "rotation", "scale")):
        for method, colour in METHODS.items():
            for k, r in enumerate(r for r in runs if r["row"] == f"{group} {method}"):
                axes.plot(*zip(*r["losses"]), "-" if method == "h-ssl" else "--", color=colour, linewidth=1.2,
                          label=None if k else method.upper())
        axes.set(title=group, xlabel="step")
    panels[0].set_ylabel("NT-Xent, nats"), panels[0].legend()
    figure.tight_layout()
    return figure


def work(args):
    """accuracy by three measures against encoder passes and against time, from table work"""
    runs, kinds, figure = results("work", args.budget), defaultdict(list), plt.figure(figsize=(13, 7))
    for r in runs:
        kinds[r["row"].split(",")[0]].append(r)
        passes = 2 if "--method a-ssl" in r["flags"] or "--augment 2" in r["flags"] else 1
        images = r["epoch"] * r["train_images"]
        r["passes"], r["seconds"] = images * passes / 1000, images / r["images_per_second"]
    for k, (x, label) in enumerate(dict(passes="thousands of images through the encoder",
                                        seconds="seconds of training, on one core").items()):
        for i, (title, place) in enumerate(list(MEASURES.items())[:3]):
            axes = figure.add_subplot(2, 3, 3 * k + i + 1, title=f"{title}, %", xlabel=label)
            for (kind, members), colour in zip(kinds.items(), COLOURS):
                rows = dict.fromkeys(r["row"] for r in members)                # a length each
                points = [[(r[x], read(r, place)) for r in members if r["row"] == row] for row in rows]
                means = [[statistics.mean(values) for values in zip(*point)] for point in points]
                deviations = [statistics.stdev(y for _, y in point) if len(point) > 1 else 0 for point in points]
                axes.errorbar(*zip(*means), deviations, color=colour, marker="o", capsize=3, label=kind)
            axes.axhline(statistics.mean(read(r["frozen"], place) for r in kinds["h-ssl"]), color=GREY, label="frozen")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


# --------------------------------------------------------------------------------------------------------------- a run
@torch.no_grad()
def run(args):
    """a run's curves (of --eval-every), an image's two views, and embeddings in two dimensions, coloured by class"""
    if args.run is None:
        raise SystemExit("figures.py: name the run's folder: python experiments/figures.py run RUN")
    loaded = load_run(args.run, args.data_dir)
    s, data, group, f = loaded.settings, loaded.data, loaded.group, loaded.after.encoder
    log = [json.loads(line) for line in (Path(args.run) / "log.jsonl").read_text().splitlines()]
    figure = plt.figure(figsize=(14, 6.6))
    figure.suptitle(f"{args.run}: {s['method']}, {s['group']}, {s['dataset']}", fontsize=11)

    titles = dict(loss="loss", linear="linear classifier, %", neighbours="20 nearest neighbours, %",
                  effective_rank="effective rank", spread="spread (0: collapsed)")
    for k, (name, title) in enumerate(titles.items()):
        axes = figure.add_subplot(2, 5, k + 1, title=title, xlabel="step")
        lines = [line for line in log if name in line]
        if not lines:
            why = "--eval-every was not given" if name == "spread" or data.classes else "no labels"
            axes.text(0.5, 0.5, why, ha="center", transform=axes.transAxes)
            continue
        steps, values = [line["step"] for line in lines], [line[name] for line in lines]
        if name != "loss":
            frozen = lines[0][f"frozen_{name}"]
            steps, values = [0, *steps], [frozen, *values]
            axes.axhline(frozen, color=GREY, linestyle="--", label="frozen encoder")
            axes.set_ylim(0, 1.1 * max(values))
            axes.legend(fontsize=8)
        axes.plot(steps, values, color=BLUE, marker=None if name == "loss" else ".")

    x = data.batch(data.test_images, torch.tensor([args.image % len(data.test_images)]))
    pairs = allowed_pairs(group, s["max_distance"], equal=len(group.elements) == 1)
    z, pair = f(x), group.elements[pairs[len(pairs) // 3]]
    shown = (x[0] - x.min()) / (x.max() - x.min())
    picture(figure, 0.05, 0.27, 0.14, shown[0] if len(shown) == 1 else shown.movedim(0, 2), "image $x$", fontsize=9)
    for k, (g, colour) in enumerate(zip(pair, (BLUE, RED))):
        view = group.view(g[None], z)[0]
        view = view[:, view.shape[1] // 2]                                     # one map of the window, (C, H', W')
        picture(figure, 0.22 + 0.17 * k, 0.27, 0.14, colours(view, z[0].flatten(1).T),
                f"$g_{k + 1}$ = {g.tolist()}", colour, fontsize=9)
    figure.text(0.03, 0.15, "an image, and views for $g_1$ and $g_2$ read from\nthe features of one pass (colours: "
                "principal\ncomponents)", fontsize=8.5, color=GREY)

    images, labels = data.test_images[:1000], data.test_labels[:1000]
    embeddings = {f"{name} encoder's features": probe.extract(o.encoder, data, images, s["probe_grid"])
                  for name, o in (("frozen", loaded.before), (s["method"], loaded.after))}
    if s["method"] in ("h-ssl", "a-ssl"):
        everything = data.batch(images, torch.arange(len(images)))
        embeddings["the head's projections"] = loaded.after.head(group.base(f(everything)))
    embeddings = {title: torch.nn.functional.normalize(e, dim=1) for title, e in embeddings.items()}
    embeddings = {title: e - e.mean(0) for title, e in embeddings.items()}
    limit = 1.05 * max(e.norm(dim=1).quantile(0.99).item() for e in embeddings.values())
    for k, (title, e) in enumerate(embeddings.items()):
        axes = figure.add_subplot(2, 4, 6 + k)
        flat = e @ torch.linalg.svd(e, full_matrices=False).Vh[:2].T                                 # (1000, 2)
        axes.scatter(*flat.T, c=labels if data.classes else GREY, cmap="tab10" if data.classes <= 10 else "hsv", s=5)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=9)
    figure.text(0.36, 0.02, "embeddings of length 1 on their first two principal components, all to one scale; "
                "colours: classes", fontsize=8.5, color=GREY)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.07, hspace=0.3)
    return figure


# -------------------------------------------------------------------------------------------------------------- TOUR.md
def tour(args):
    """the pictures of TOUR.md, four files tour-*.png, drawn from what its blocks compute"""
    scope, figures, draw = {}, {}, {2: tour_filters, 3: tour_equivariance, 4: tour_views, 8: tour_training}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "TOUR.md").read_text(), re.S)
    for step, block in enumerate(blocks[:max(draw)], 1):
        exec(block, scope)
        if step in draw:
            with torch.no_grad():
                figures[draw[step].__name__.replace("_", "-")] = draw[step](SimpleNamespace(**scope))
    return figures


def tour_filters(s):
    """Step 2: basis functions, turned and widened."""
    figure = plt.figure(figsize=(8.4, 4.2))
    figure.text(0.02, 0.94, "rotation: functions at 0°, 90°, 180°, 270°")
    figure.text(0.55, 0.94, "scale: functions at widths 0.7, 0.99, 1.39")
    for basis, functions, left in ((s.turned, (1, 6, 9, 12), 0.04), (s.widened, (0, 1, 4, 5), 1.1)):
        for row, k in enumerate(functions):
            for g in range(basis.shape[1]):
                limit = basis[k, g].abs().max()
                colour = dict(cmap="RdBu", vmin=-limit, vmax=limit)
                picture(figure, left + 0.24 * g, 0.7 - 0.225 * row, 0.21, basis[k, g], **colour)
    return figure


def tour_equivariance(s):
    """Step 3: both sides of Eq. (1) for a quarter turn, and an ordinary network, for which they differ."""
    digit = next(i for i, label in enumerate(s.glyphs.train_labels) if s.data.GLYPHS[label] == "4")
    x, g = s.x[digit:digit + 1].double(), torch.tensor([1])
    figure = plt.figure(figsize=(9.2, 4.9))
    image = picture(figure, 0.03, 0.3, 0.34, x[0, 0], "image $x$")
    moved = s.group.T(g, x)
    for name, f, bottom, colour in (("steerable", s.f, 0.53, BLUE), ("ordinary", s.ordinary, 0.04, RED)):
        f.eval()
        z = f(x)
        left, right, fibers = f(moved)[0, :, 0], s.group.view(g, z)[0, :, 0], z[0].flatten(1).T
        a = picture(figure, 0.5, bottom, 0.38, moved[0, 0], "$T_g\\,x$, $g$ = 90°")
        b = picture(figure, 0.98, bottom, 0.38, colours(left, fibers), f"{name}: $f(T_g\\,x)$ at 0°", colour)
        picture(figure, 1.46, bottom, 0.38, colours(right, fibers), "$\\Gamma_g f(x)$ at 0°", colour)
        arrow(figure, image, a), arrow(figure, a, b, colour)
        f.train()
    return figure


def tour_views(s):
    """Step 4: windows of one map and crops of one image, orientations, and the scale axis, which ends."""
    digit = next(i for i, label in enumerate(s.glyphs.train_labels) if s.data.GLYPHS[label] == "2")
    x, moves = s.x[digit:digit + 1], {"1": (torch.tensor([[1, 1]]), BLUE), "2": (torch.tensor([[-1, 0]]), RED)}
    figure = plt.figure(figsize=(10.4, 5.4))
    whole = picture(figure, 0.05, 0.53, 0.38, x[0, 0], "translation: two windows, distance 2", fontsize=9)
    whole.set(xticks=torch.arange(3.5, 28, 4), yticks=torch.arange(3.5, 28, 4), xticklabels=[], yticklabels=[])
    whole.grid(color="white", alpha=0.25)
    for k, (name, (g, colour)) in enumerate(moves.items()):
        top, left = ((s.shifts.corner - g[0]) * s.shifts.stride - 0.5).tolist()
        whole.add_patch(Rectangle((left, top), 16, 16, fill=False, edgecolor=colour, linewidth=2.5))
        picture(figure, 0.53 + 0.27 * k, 0.59, 0.23, s.crops.T(g, x)[0, 0], f"A-SSL: crop {name}", colour, fontsize=9)
    for k in range(4):
        turned = s.group.T(torch.tensor([-k]) % 4, x)[0, 0]                    # as filters turned by k see it
        title = "G0: 0°" if k == 0 else f"{90 * k}°, read by {360 - 90 * k}°"
        picture(figure, 0.05 + 0.26 * k, 0.09, 0.22, turned, title, BLUE if k == 0 else None, fontsize=8.5)
    figure.text(0.03, 0.4, "rotation: what the filters of each orientation see; the view of g reads orientation −g",
                fontsize=9)
    axes = figure.add_axes((0.63, 0.1, 0.35, 0.76))
    for row, g in enumerate((-2, -1, 0, 1, 2)):
        axes.text(-2.3, -row, f"g = {g}", va="center")
        for scale in range(-1, 4):
            exists, is_read = 0 <= scale <= 2, scale == 1 - g
            if exists or is_read:
                colour = "white" if not is_read else BLUE if exists else RED
                axes.add_patch(Rectangle((scale - 0.4, -row - 0.35), 0.8, 0.7, facecolor=colour, edgecolor="black",
                                         linestyle="-" if exists else "--"))
    axes.set(xlim=(-2.4, 3.6), ylim=(-4.6, 0.6))
    axes.axis("off")
    axes.set_title("scale: the view of g reads scale 1 − g of 0, 1, 2;\nat ±2 the axis has ended (red)", fontsize=9)
    return figure


def tour_training(s):
    """Step 8: the loss of both methods."""
    figure, axes = plt.subplots(figsize=(5.6, 3.2))
    for (name, losses), colour, style, width in zip(s.curves.items(), (RED, BLUE), ("-", "--"), (3.5, 1.5)):
        axes.plot(range(1, len(losses) + 1), losses, style, color=colour, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="NT-Xent, nats")
    axes.legend()
    figure.tight_layout()
    return figure


FIGURES = {"idea": idea, "sweeps": sweeps, "losses": losses, "work": work, "tour": tour, "run": run}


def main():
    about = "\n".join(f"    {name:13}{draw.__doc__}" for name, draw in FIGURES.items())
    p = argparse.ArgumentParser(description=f"{__doc__}\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("figure", choices=FIGURES)
    p.add_argument("run", nargs="?", help="run: the folder of a run, as train.py's --out")
    p.add_argument("--budget", default="cpu", help="whose results (default: %(default)s)")
    p.add_argument("--runs", default="runs/experiments", help="idea: where the runs are (default: %(default)s)")
    p.add_argument("--data-dir", help="idea, run: folder of the data sets (default: the run's own)")
    p.add_argument("--image", type=int, default=0, help="idea, run: index of a test image (default: %(default)s)")
    p.add_argument("--out", type=Path, metavar="FOLDER",
                   help="of the picture (default: experiments/results/figures, or RUN)")
    args = p.parse_args()
    args.out = args.out or Path(args.run or RESULTS / "figures")
    matplotlib.use("Agg")
    drawn = FIGURES[args.figure](args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (drawn if isinstance(drawn, dict) else {args.figure: drawn}).items():
        figure.savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
