"""Measure after every layer of a network how far Eq. (1) is from holding: f(T_g x) = Γ_g f(x).

    python experiments/equivariance.py                    fresh networks with SESN's filters
    python experiments/equivariance.py RUN [RUN ...]      runs, before and after training
    python experiments/equivariance.py MODULE:FUNCTION    a network of your own

MODULE is found in the current folder, and FUNCTION() returns a network, a group of hssl.py that
moves its last layer's features, and images (B, C, H, W), normalised.

The error of the first layers f, ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖, is averaged over all elements g
but the identity: 0 up to rounding is exact, about 1.4 is unrelated. Rotation and scale are compared
on the base space; translation on the whole map, with the zeros that enter at its border. A layer is
left out where its features are not (B, C, G, H, W) (for translation (B, C, H, W) will do), or where
its map's side does not divide the image's. A network that is no nn.Sequential counts as one layer.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

import report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data as datasets    # noqa: E402
import probe    # noqa: E402
import train    # noqa: E402
from hssl import Rotation, Scale, Translation, equivariance_error    # noqa: E402
from layers import MNISTBackbone, Untied    # noqa: E402


class GroupAxis(nn.Module):
    """Maps (B, C, H, W) become features with one group element, (B, C, 1, H, W)."""

    def forward(self, z):
        return z.unsqueeze(2) if z.ndim == 4 else z


def layer_error(f, group, x):
    """The mean error of f, images to features (B, C, G, H, W), or None if left out."""
    z = f(x[:1])
    if z.ndim != 5:
        return None
    elements = group.elements
    elements = elements[elements.reshape(len(elements), -1).any(1)]    # all but the identity
    if len(elements) == 0:
        raise ValueError("the group has no element but the identity, so nothing moves: take a "
                         "smaller base space")
    if not isinstance(group, Translation):
        return equivariance_error(f, group, x, elements, on_base=True).mean().item()

    # An earlier layer has more positions, and the same pixels are more of them.
    side = z.shape[-1]
    stride = x.shape[-1] // side
    if x.shape[-1] % side or group.stride % stride:
        return None
    elements = elements * (group.stride // stride)
    shifts = Translation(side, 1, stride, group.circular)    # window 1 allows all of these
    return equivariance_error(f, shifts, x, elements).mean().item()


@torch.no_grad()
def layer_errors(network, group, x):
    """The error after every layer in evaluation mode: {layer's name: error}."""
    last = []
    if isinstance(network, Untied):
        # In place of Untied's own forward: these two work after any layer.
        last = [nn.Flatten(1, 2), nn.Unflatten(1, (-1, network.group_size))]
        network = network.network
    elif isinstance(group, Translation):
        last = [GroupAxis()]
    layers = [network]
    if isinstance(network, nn.Sequential):
        layers = list(network)
    errors = {}
    for count, layer in enumerate(layers, 1):
        f = nn.Sequential(*layers[:count], *last).eval()
        error = layer_error(f, group, x)
        if error is not None:
            errors[f"{count} {type(layer).__name__}"] = error
    return errors


def fresh_networks(images=200, train_images=2000):
    """Networks as they begin, on test images of glyphs: {column: {layer: error}}.

    Batch norm has the statistics of so many training images. Quarter turns by the untied network
    show what an error without any structure is.
    """
    data = datasets.load("glyphs", train_images=train_images)
    x = data.batch(data.test_images, torch.arange(images))
    columns = {}
    for title, network, group in (
        ("translation", MNISTBackbone(), Translation(7, 4, 4)),
        ("quarter turns", MNISTBackbone("rotation", 4), Rotation(4)),
        ("turns by 45°", MNISTBackbone("rotation", 8), Rotation(8)),
        ("scale 1.41", MNISTBackbone("scale", 3), Scale(3, 1.41)),
        ("quarter turns, untied", Untied(MNISTBackbone(widths=(128, 252, 380)), 4), Rotation(4)),
    ):
        probe.take_statistics(network, data)
        columns[title] = layer_errors(network, group, x)
    return columns


def run_before_and_after(folder, images=200):
    """A run's encoder: {"before training": {layer: error}, "after": ...}."""
    trained, settings = probe.load_encoder(folder)
    data = probe.load_data(settings, "cpu")
    torch.manual_seed(settings["seed"])    # the weights that train.py began with
    whole_images = settings | dict(crop=False)    # features are shifted; a crop has no Γ
    fresh, group = train.make_encoder_and_group(argparse.Namespace(**whole_images))
    probe.take_statistics(fresh, data)
    x = data.batch(data.test_images, torch.arange(min(images, len(data.test_images))))
    before = layer_errors(fresh, group, x)
    return {"before training": before, "after": layer_errors(trained, group, x)}


def print_table(columns):
    print(f"\n| layer | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    for layer in next(iter(columns.values())):    # all have the same layers
        cells = [f"{errors[layer]:.2g}" for errors in columns.values()]
        print(f"| {layer} | {' | '.join(cells)} |")


def measure(name):
    """The columns of a table: layer_errors of a run, or of MODULE:FUNCTION's network."""
    if ":" not in name or Path(name).exists():
        return run_before_and_after(name)
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    network, group, x = getattr(importlib.import_module(module), function)()
    return {name: layer_errors(network, group, x)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="RUN or MODULE:FUNCTION")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            print(f"\n{name}")
            print_table(measure(name))
    except (ValueError, OSError, ImportError, AttributeError) as error:
        parser.exit(2, f"equivariance.py: {error}\n")
    if not args.names:
        torch.manual_seed(0)
        columns = fresh_networks()
        print_table(columns)
        content = dict(torch=torch.__version__, tables={"fresh networks": columns})
        path = report.RESULTS / "equivariance_fresh.json"
        probe.write_whole(path, json.dumps(content, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
