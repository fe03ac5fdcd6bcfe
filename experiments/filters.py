"""How far two layers on a pixel grid are from f(T_g x) = Γ_g f(x) for 45 degrees and for a step of scale.

    python experiments/filters.py [--networks 16] [--images 100]

Nothing is interpolated or padded: images are sums of plane waves with the spectrum of noise blurred by 1.0, 1.5 or 2.5
pixels, so T_g x is the same sum at other points, and a lifting and a group layer, ReLU between them, without padding
leave one position, the centre, where Γ_g only moves the fiber. So the error ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖ is that
of the filters and of sampling itself. Networks have random weights; numbers are means over networks ± standard errors.
escnn's functions, where it is installed, are read out of R2Conv one weight at a time and run in the same layers. Random
weights favour some filters over others, in each parametrisation other ones; so there are two numbers for rotation: with
the functions as they are, and with orthonormal ones that span the same space, which favour none.
Writes experiments/results/filters.json and prints tables. Letters: K functions, k kernel side.
"""
import argparse
import json
import math
import warnings
from pathlib import Path

import torch

from measure import header, installed, row                                     # first: it finds the project's modules
import run
from layers import GroupConv2d, LiftingConv2d, default_filters, hermite_gaussian, steerable_basis
from report import RESULTS

ORIENTATIONS, SCALES, STEP, CHANNELS = 8, 3, 1.41, 6
BLURS = (1.0, 1.5, 2.5)
AS_MANY = {5: (5, 0.65), 7: (6, 0.88), 9: (8, 1.0)}        # k: effective size and σ with no fewer functions than escnn
SEED = 1000                                                # rotation's defaults were found on other images and networks


# --------------------------------------------------------------------------------------------------------- the filters
def unit_norm(basis):
    return basis / basis[:, :1].square().sum((2, 3), keepdim=True).sqrt()


def grid(side):
    """x and y of side x side pixels, rows pointing down."""
    t = torch.arange(side) - side // 2.0
    return torch.meshgrid(t, t, indexing="xy")


def orthonormal(basis):
    """Functions that are orthonormal at the first orientation or scale, and together express the same filters."""
    U, S, _ = torch.linalg.svd(basis[:, 0].flatten(1), full_matrices=False)
    return torch.einsum("kj,kghw->jghw", U / S, basis)


def cut_off(group, k, sigma=0.9, windows=False):
    """The filters before: He_n(x) He_m(y) exp(-r²/2σ²) as sampled on k x k pixels, for scale times SESN's windows."""
    (x, y), samples = grid(k), []
    if group == "rotation":
        orders = [(n, m) for n in range(5) for m in range(5 - n)]
        for i in range(ORIENTATIONS):
            u, v = turn(i) @ torch.stack([x.flatten(), y.flatten()])
            functions = [hermite_gaussian(u, n, sigma) * hermite_gaussian(v, m, sigma) for n, m in orders]
            samples.append(torch.stack(functions).unflatten(1, (k, k)))
    else:
        for i in range(SCALES):
            width, widest = sigma * STEP**i, sigma * STEP ** (SCALES - 1)
            side = int(k * width / widest) // 2 * 2 + 1 if windows else k
            inside = (x.abs() <= side // 2) & (y.abs() <= side // 2)
            samples.append(torch.stack([hermite_gaussian(x, n, width) * hermite_gaussian(y, m, width) * inside
                                        for n in range(3) for m in range(3)]))
    return unit_norm(torch.stack(samples, 1))


def escnn_filters(k):
    """escnn's functions for regular fields of 8 orientations."""
    torch.set_default_dtype(torch.float32)                                     # escnn fails in float64
    nn, space = installed("escnn.nn"), installed("escnn.gspaces").rot2dOnR2(ORIENTATIONS)
    image, fields = (nn.FieldType(space, [r]) for r in (space.trivial_repr, space.regular_repr))
    convolution, functions = nn.R2Conv(image, fields, k), []
    for one in torch.eye(convolution.weights.numel()):
        convolution.weights.data.copy_(one)
        functions.append(convolution.expand_parameters()[0][:, 0].detach())
    torch.set_default_dtype(torch.float64)
    return unit_norm(torch.stack(functions).double())


# ----------------------------------------------------------------------------------------------------------- the error
def turn(i):
    """The point that an image turned by i steps of 45 degrees shows at (x, y) is turn(i) @ (x, y)."""
    cos, sin = (round(f(2 * math.pi * i / ORIENTATIONS), 15) for f in (math.cos, math.sin))
    return torch.tensor([[cos, -sin], [sin, cos]])


def waves(images, side, blur, matrix):
    """(images, 1, side, side): sums of 100 plane waves, read at the points matrix @ (x, y)."""
    generator = torch.Generator().manual_seed(SEED)
    frequency = torch.randn(images, 100, 2, generator=generator) / (blur * 2**0.5)
    phase = 2 * math.pi * torch.rand(images, 100, 1, generator=generator)
    points = matrix @ torch.stack([t.flatten() for t in grid(side)])
    return torch.cos(frequency @ points + phase).sum(1).view(images, 1, side, side)


@torch.no_grad()
def errors(basis, group, args, blur, steps=1, extent=None, relu=True, scales=(1, 2)):
    """One error for each of args.networks random networks, over args.images images, for g = 45 degrees or one step of
    scale, times steps. Of scale those that exist on both sides are compared: 1 and 2 of 0, 1, 2."""
    rotation, side = group == "rotation", 2 * basis.shape[-1] - 1
    extent = extent or (ORIENTATIONS if rotation else 1)
    x = waves(args.images, side, blur, torch.eye(2))
    moved = waves(args.images, side, blur, turn(steps) if rotation else torch.eye(2) / STEP**steps)
    found = []
    for network in range(args.networks):
        torch.manual_seed(SEED + network)
        lifting = LiftingConv2d(1, CHANNELS, basis)
        second = GroupConv2d(CHANNELS, CHANNELS, basis, extent, cyclic=rotation, bias=False)
        lifting.padding = second.padding = 0
        left, right = (second(lifting(one).relu() if relu else lifting(one)) for one in (moved, x))
        right = right.roll(steps, 2)
        if not rotation:
            left, right = left[:, :, list(scales)], right[:, :, list(scales)]
        found.append((left - right).norm() / right.norm())
    return torch.stack(found)


def mean(found):
    return f"{found.mean():.3f} ± {found.std() / len(found) ** 0.5:.3f}"


# ---------------------------------------------------------------------------------------------------------- the tables
def rotation(args):
    """8 orientations: escnn's filters, ours before and ours now, for each kernel size."""
    rows = []
    header("k", "filters", "K", *(f"span, blur {blur}" for blur in BLURS), *(f"as is, blur {blur}" for blur in BLURS),
           "quarter turns")
    for k in args.kernels:
        orders, sigma = default_filters("rotation", k)
        sides = {"escnn": escnn_filters(k)} if installed("escnn.nn") else {}
        sides |= {"before: n + m < 5, σ 0.9, cut off": cut_off("rotation", k),
                  f"now: n + m < {orders}, σ {sigma:.2f}, fitted": steerable_basis("rotation", ORIENTATIONS, k)}
        if k in AS_MANY:
            orders, sigma = AS_MANY[k]
            more = steerable_basis("rotation", ORIENTATIONS, k, orders, sigma)
            sides[f"with --effective-size {orders} --sigma {sigma}"] = more
        for name, basis in sides.items():
            span, found = ([errors(functions, "rotation", args, blur) for blur in BLURS]
                           for functions in (orthonormal(basis), basis))
            worst = max(errors(basis, "rotation", args, 1.0, steps).max().item() for steps in (2, 4, 6))
            rows.append(dict(k=k, filters=name, K=len(basis), span=[e.tolist() for e in span],
                             errors=[e.tolist() for e in found], quarter_turns=worst))
            row(k, name, len(basis), *map(mean, span), *map(mean, found), f"{worst:.0e}")
    return rows


def scale(args):
    """3 scales, before and now, and what the error is made of: cut off by windows, then, uncut, resolution."""
    sides, rows = {}, []
    for k in args.kernels:
        sides[f"before: k = {k}, σ 0.9, SESN's windows"] = cut_off("scale", k, windows=True)
        sides[f"now: k = {k}, σ {default_filters('scale', k)[1]:.2f}, fitted"] = steerable_basis("scale", SCALES, k)
    sides |= {"k = 7, σ 0.9, all windows 7": cut_off("scale", 7),
              "k = 13, σ 0.9, nothing cut off": cut_off("scale", 13),
              "k = 17, σ 1.1, nothing cut off": cut_off("scale", 17, 1.1)}
    header("filters", *(f"blur {blur}" for blur in BLURS), "blur 1.5, linear", "end of the axis")
    for name, basis in sides.items():
        if basis.isnan().any():                                                # in a window of 1 some functions vanish
            continue
        found = [errors(basis, "scale", args, blur) for blur in BLURS]
        linear = errors(basis, "scale", args, 1.5, relu=False)
        end = errors(basis, "scale", args, 1.5, extent=2, scales=(2,))         # the last, which sees one scale too few
        rows.append(dict(k=basis.shape[-1], filters=name, K=len(basis), errors=[e.tolist() for e in found],
                         linear=linear.tolist(), end=end.tolist()))
        row(name, *map(mean, found), mean(linear), mean(end))
    return rows


def main():
    p = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--networks", type=int, default=16, help="random networks of each kind (default: %(default)s)")
    p.add_argument("--images", type=int, default=100, help="(default: %(default)s)")
    p.add_argument("--kernels", type=int, nargs="+", default=[3, 5, 7, 9], help="kernel sizes (default: 3 5 7 9)")
    p.add_argument("--results", default=str(RESULTS), help="folder of the JSON file (default: experiments/results)")
    args = p.parse_args()
    if min(args.kernels) < 3 or not all(k % 2 for k in args.kernels):
        p.error(f"--kernels {' '.join(map(str, args.kernels))} must be odd, and at least 3")
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")                                            # escnn's, of packages that it lacks
    escnn = installed("escnn")
    if not escnn:
        print("escnn is not installed: without its rows")
    found = dict(torch=torch.__version__, escnn=escnn and escnn.__version__, networks=args.networks, images=args.images,
                 blurs=BLURS, rotation=rotation(args), scale=scale(args))
    Path(args.results).mkdir(parents=True, exist_ok=True)
    (Path(args.results) / "filters.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
