"""Is a network equivariant, and if not, which layer breaks it?

    python experiments/verdict.py RUN                                            a finished run of train.py
    python experiments/verdict.py MODULE:FUNCTION --group rotation --group-size 4 --image 1 28 28

FUNCTION takes nothing and returns a torch.nn.Module, best an nn.Sequential, whose layers then have a row each. Its
features must be (B, C, G, H, W); for translation (B, C, H, W) will do. Networks are measured in float64 and in
evaluation mode, on random smooth images or the run's test images.

Numbers are ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖: 0 is exact equivariance, 1 an error as large as the features, and √2 is
what unrelated features give. Up to 1e-5 counts as rounding. Quarter turns and shifts with circular padding can be
exact, so there anything more is called broken; 45 degrees, scales and shifts with zero padding cannot, so there an
error below 1 is called approximate. Exit status 0, or 1 if the network is broken.
"""
import argparse
import copy
import importlib
import os
import sys

import torch
import torch.nn.functional as F

from runs import load_run                                                      # first: it finds the project's modules
import run
from equivariance import elements_of, layer_errors
from hssl import Rotation, Scale, Translation
from layers import Backbone, SteerableConv2d, Untied
from measure import header, row

ROUNDING, APPROXIMATE = 1e-5, 1.0


def can_be_exact(group):
    return isinstance(group, Rotation) and 4 % group.orientations == 0 or getattr(group, "circular", False)


def judge(error, group):
    """The word for a layer's largest error."""
    if error <= ROUNDING:
        return "exact"
    return "broken" if can_be_exact(group) or error > APPROXIMATE else "approximate"


def causes(layer, group, shapes):
    """Which of the usual causes a layer has: a list of sentences. shapes: of each module's input and output."""
    found, after = [], shapes[layer][1]
    for module in layer.modules():
        before, _ = shapes.get(module, (None, None))
        stride = getattr(module, "stride", 1)
        stride = max(stride) if isinstance(stride, tuple) else stride or 1
        if isinstance(stride, int) and stride > 1 and before and not isinstance(module, Backbone):
            if before[-1] % stride:
                found.append(f"a map of {before[-1]} is not divisible by the stride {stride}: its end is cut off")
            elif hasattr(module, "weight") and isinstance(group, Rotation):
                found.append(f"a stride of {stride} on an even map reads one corner of each cell, and a turn moves it: "
                             "take means or maxima of the cells")
        if getattr(module, "padding_mode", "") == "zeros" and isinstance(group, Translation) and _pads(module):
            found.append("zero padding: what a shift brings in was not beyond the border; circular padding is exact")
        own = len(after) == 5 and after[2] > 1 and getattr(module, "num_features", 0) == after[1] * after[2]
        if own and hasattr(module, "running_mean"):
            found.append("batch norm has statistics for each orientation or scale: let the group axis join the batch")
        if isinstance(module, SteerableConv2d) and isinstance(group, Rotation) and not _turns(module.basis):
            found.append("the filters at a quarter turn are not those at 0 turned: the kernel's window is not round")
        if isinstance(module, torch.nn.Conv2d) and max(module.kernel_size) > 1 and not isinstance(group, Translation):
            found.append("an ordinary convolution, whose filters are the same for every orientation or scale")
    return list(dict.fromkeys(found))


def _pads(module):
    padding = module.padding
    return any(padding) if isinstance(padding, tuple) else padding != 0


def _turns(basis):
    """Whether the functions (K, G, k, k) at a quarter turn are the first ones turned."""
    quarter, rest = divmod(basis.shape[1], 4)
    return rest > 0 or torch.allclose(basis[:, quarter % basis.shape[1]], basis[:, 0].rot90(1, (1, 2)), atol=1e-6)


@torch.no_grad()
def report(network, group, x):
    """Print a row for each layer with an error for each element, and the verdict; returns it: exact, approximate or
    broken, the first layer that is not exact (None), and its causes."""
    network, x, shapes = copy.deepcopy(network).double().eval(), x.double(), {}
    for module in network.modules():
        module.register_forward_hook(lambda m, inputs, output: shapes.update({m: (inputs[0].shape, output.shape)}))
    z, size = network(x[:1]), getattr(group, "orientations", getattr(group, "scales", None))
    if z.ndim != 5 and (z.ndim != 4 or size) or size and z.shape[2] != size:
        run.stop(f"features must be (B, C, {size or 'G'}, H, W), but these are {tuple(z.shape)}")
    if not z.isfinite().all() or not z.any():
        run.stop("features must be finite and not all 0, but those of the first image are not")
    errors = layer_errors(network, group, x)
    header("layer", *(f"g = {g}" for g in elements_of(group).tolist()), "verdict")
    for name, values in errors.items():
        row(name, *(f"{value:.1e}" for value in values), judge(values.max(), group))

    last = judge(list(errors.values())[-1].max(), group)
    first = next((name for name, values in errors.items() if not values.max() <= ROUNDING), None)
    if first is None:
        print("\nexact: the network is equivariant up to rounding")
        return last, first, []
    layers = list(network) if isinstance(network, torch.nn.Sequential) else [network]
    found = (["its weights are not shared along the group"] if isinstance(network, Untied) else
             causes(layers[int(first.split()[0]) - 1], group, shapes))
    why = "; ".join(found) or "none of the usual causes: look for borders, interpolation, mixed positions or group axes"
    print(f"\n{last}: {first} is the first layer that is not exact ({why})")
    return last, first, found


def smooth_images(count, channels, side):
    """Random images without fine detail that fade towards their border: (count, channels, side, side)."""
    coarse = torch.randn(count, channels, side // 4 + 1, side // 4 + 1)
    line = torch.linspace(-1, 1, side)
    radius = (line**2 + line[:, None] ** 2).sqrt()
    return F.interpolate(coarse, size=(side, side), mode="bicubic") * (1.2 - radius).clamp(0, 1)


def make_group(name, size, image_side, side, step=1.41, circular=False):
    """The group that moves features whose maps have this side; of shifts only those by one position."""
    if name == "rotation":
        return Rotation(size)
    if name == "scale":
        return Scale(size, step)
    return Translation(side, side, image_side // side, circular)               # the whole map: it has no other elements


def main():
    p = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("network", metavar="RUN or MODULE:FUNCTION")
    p.add_argument("--group", choices=("translation", "rotation", "scale"), default="rotation")
    p.add_argument("--group-size", type=run.number(int, 1), default=4,
                   help="orientations or scales (default: %(default)s)")
    p.add_argument("--scale-step", type=run.number(float, 1, above=True), default=1.41,
                   help="ratio of neighbouring scales (default: %(default)s)")
    p.add_argument("--circular", action="store_true", help="shifts are circular, as with circular padding")
    p.add_argument("--image", type=run.number(int, 1), nargs=3, default=[1, 28, 28], metavar=("C", "H", "W"),
                   help="(default: MNIST)")
    p.add_argument("--data-dir", help="folder of the data sets (default: the run's own)")
    args = p.parse_args()
    if args.image[1] != args.image[2]:
        p.error(f"--image {' '.join(map(str, args.image))}: images must be square")
    torch.manual_seed(0)
    if ":" in args.network and not os.path.exists(args.network):
        module, function = args.network.split(":", 1)
        sys.path.insert(0, os.getcwd())
        x = smooth_images(8, args.image[0], args.image[1])
        try:
            network = getattr(importlib.import_module(module), function)().float().eval()
            with torch.no_grad():
                side = network(x[:1]).shape[-1]
            group = make_group(args.group, args.group_size, args.image[1], side, args.scale_step, args.circular)
        except Exception as error:                                             # a foreign network can fail in any way
            run.stop(f"{args.network} must be a module and a function in it that takes nothing and returns a network "
                     f"for images {tuple(x.shape[1:])}: {type(error).__name__}: {error}")
    else:
        settings, data, group, _, after = load_run(args.network, args.data_dir)
        network, x = after.encoder, data.batch(data.test_images, torch.arange(32))
    verdict, _, _ = report(network, group, x)
    sys.exit(verdict == "broken")


if __name__ == "__main__":
    main()
