"""Measure after every layer of a network how far Eq. (1) is from holding: f(T_g x) = Γ_g f(x).

    python experiments/equivariance.py                    fresh networks with SESN's filters
    python experiments/equivariance.py RUN [RUN ...]      runs, before and after training
    python experiments/equivariance.py MODULE:FUNCTION    a network of your own

MODULE is found in the current folder, and FUNCTION() returns a network, a group of hssl.py that
moves its last layer's features, and images (B, C, H, W), normalised.

The error of the first layers f, ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖, is averaged over all elements g
but the identity: 0 up to rounding is exact, about 1.4 is unrelated. Rotation and scale are compared
on the base space, which is all that the head reads; translation on the whole map, with the zeros
that enter at its border. A layer is left out where its features are no (B, C, G, H, W), for
translation (B, C, H, W), or its map's side does not divide the image's. A network that is no
nn.Sequential counts as one layer.

Letters: B batch, C channels, G group elements, H W space, M elements that are measured.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data as datasets    # noqa: E402
import probe    # noqa: E402
from hssl import Rotation, Scale, Translation, equivariance_error, make_group    # noqa: E402
from layers import MNISTBackbone, Untied    # noqa: E402


def elements_but_identity(group):
    """What is measured, (M, ...); shifts by one position where no others keep the window inside."""
    elements = group.elements
    moving = elements.reshape(len(elements), -1).any(1)
    if moving.any():
        return elements[moving]
    if isinstance(group, Translation):
        return torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])
    raise ValueError("the group has one element, the identity, so nothing moves: take a smaller "
                     "base space")


def layer_error(f, group, x):
    """The mean error of f, images to features (B, C, G, H, W), or None if left out."""
    elements = elements_but_identity(group)
    z = f(x[:1])
    if z.ndim != 5:
        return None
    if not isinstance(group, Translation):
        return equivariance_error(f, group, x, elements, on_base=True).mean().item()

    stride = group.stride
    if z.shape[-1] != group.side:
        # An earlier layer has more positions, and the same pixels are more of them.
        stride = x.shape[-1] // z.shape[-1]
        if x.shape[-1] % z.shape[-1] or group.stride % stride:
            return None
    elements = elements * (group.stride // stride)
    shifts = Translation(z.shape[-1], 1, stride, group.circular)    # window 1 allows all of these
    return equivariance_error(f, shifts, x, elements).mean().item()


class FirstLayers(nn.Module):
    """Some layers, (B, C, H, W) -> (B, C', G, H', W') where their features have that shape."""

    def __init__(self, layers, group, untied_size=None):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.group = group
        self.untied_size = untied_size

    def forward(self, x):
        z = self.layers(x)
        if self.untied_size is not None:
            return z.squeeze(2).unflatten(1, (-1, self.untied_size))
        if z.ndim == 4 and isinstance(self.group, Translation):
            return z.unsqueeze(2)
        return z


@torch.no_grad()
def layer_errors(network, group, x):
    """The error after every layer in evaluation mode: {layer's name: error}."""
    untied_size = None
    if isinstance(network, Untied):
        untied_size = network.group_size
        network = network.network
    layers = [network]
    if isinstance(network, nn.Sequential):
        layers = list(network)
    errors = {}
    for count, layer in enumerate(layers, 1):
        f = FirstLayers(layers[:count], group, untied_size).eval()
        error = layer_error(f, group, x)
        if error is not None:
            errors[f"{count} {type(layer).__name__}"] = error
    return errors


def fresh_networks(images, train_images=2000):
    """Networks as they begin, on glyphs: {column: {layer: error}}.

    Batch norm has the statistics of train_images, and errors are those of images of the test split.
    Quarter turns by the untied network show what an error without any structure is.
    """
    data = datasets.load("glyphs", train_images=train_images)
    x = data.batch(data.test_images, torch.arange(images))
    columns = {}
    for title, network, group in [
        ("translation", MNISTBackbone(), Translation(7, 4, 4)),
        ("quarter turns", MNISTBackbone("rotation", 4), Rotation(4)),
        ("turns by 45°", MNISTBackbone("rotation", 8), Rotation(8)),
        ("scale 1.41", MNISTBackbone("scale", 3), Scale(3, 1.41)),
        ("quarter turns, untied", Untied(MNISTBackbone(widths=(128, 252, 380)), 4), Rotation(4)),
    ]:
        probe.take_statistics(network, data)
        columns[title] = layer_errors(network, group, x)
    return columns


def run_before_and_after(folder, data_dir, images):
    """A run's encoder: {"before training": {layer: error}, "after": ...}."""
    trained, settings = probe.load_encoder(folder)
    data = probe.load_data(settings, "cpu", data_dir)
    torch.manual_seed(settings["seed"])
    fresh = probe.make_encoder(settings)    # with the weights that train.py began with
    probe.take_statistics(fresh, data)
    side = settings["image_shape"][1] // fresh.stride
    group = make_group(settings["group"], settings["group_size"], settings["base_space"], side,
                       fresh.stride, settings["scale_step"], settings["padding"] == "circular")
    x = data.batch(data.test_images, torch.arange(min(images, len(data.test_images))))
    before = layer_errors(fresh, group, x)
    return {"before training": before, "after": layer_errors(trained, group, x)}


def own_network(name):
    """What MODULE:FUNCTION returns, measured: {name: {layer: error}}."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        network, group, x = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} must name a function without arguments that returns a network, "
                         f"a group and images: {error}") from None
    return {name: layer_errors(network, group, x)}


def print_table(columns):
    print(f"\n| layer | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    layers = {layer: None for errors in columns.values() for layer in errors}    # in their order
    for layer in layers:
        cells = []
        for errors in columns.values():
            cells.append(f"{errors[layer]:.2g}" if layer in errors else "")
        print(f"| {layer} | {' | '.join(cells)} |")


def measure(args):
    """Print the tables, and keep those of runs and of fresh networks in a file. Raises a ValueError
    or an OSError, in one line, for bad input."""
    path = args.results / "equivariance_error.json"
    tables = {}
    if not args.names:
        path = args.results / "equivariance_fresh.json"
        torch.manual_seed(0)
        tables["fresh networks"] = fresh_networks(args.images)
    for name in args.names:
        if ":" in name and not Path(name).exists():
            print_table(own_network(name))
        else:
            tables[Path(name).name] = run_before_and_after(name, args.data_dir, args.images)
    for name, columns in tables.items():
        print(f"\n{name}")
        print_table(columns)
    if tables:
        args.results.mkdir(parents=True, exist_ok=True)
        content = json.dumps(dict(torch=torch.__version__, tables=tables), indent=1) + "\n"
        probe.write_whole(path, content.encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="RUN or MODULE:FUNCTION")
    parser.add_argument("--images", type=int, default=200, help="test images, at most (200)")
    parser.add_argument("--data-dir", help="where the data sets are (default: as in the run)")
    parser.add_argument("--results", default=ROOT / "experiments/results", type=Path,
                        help="folder of the JSON file (experiments/results)")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images {args.images} must be at least 1")
    try:
        measure(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"equivariance.py: {error}\n")


if __name__ == "__main__":
    main()
