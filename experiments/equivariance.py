"""Measure after every layer of a network how far Eq. (1) is from holding: f(T_g x) = Γ_g f(x).

    python experiments/equivariance.py                    fresh networks with SESN's filters
    python experiments/equivariance.py RUN                a run's encoder, before and after training
    python experiments/equivariance.py MODULE:FUNCTION    a network of your own

MODULE is found in the current folder, as are an hssl.py and a layers.py of your own. FUNCTION()
returns a network, a group of hssl.py that moves its last layer's features, and images (B, C, H, W),
normalised.

The error of the first layers f, ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖ on the base space, is averaged
over all elements g but the identity: 0 up to rounding is exact, about 1.4 is unrelated. For
translation an earlier layer's base space is the same window in pixels. A layer is left out where
its features are not (B, C, G, H, W) (for translation (B, C, H, W) will do), or where a shift of the
group is no whole number of its positions. A network that is no backbone of layers.py and no
nn.Sequential counts as one layer.
"""
import argparse
import importlib
import os
import sys

import torch
from torch import nn

import report

# The current folder comes first for what is measured, and what measures it. The project's other
# modules are imported where they are needed, as MODULE may have files of their names beside it.
sys.path.insert(0, os.getcwd())

import hssl    # noqa: E402
import layers    # noqa: E402

sys.path.remove(os.getcwd())


def layer_error(f, group, x):
    """The mean error of f, images to features (B, C, G, H, W), or None if left out."""
    z = f(x[:1])
    if isinstance(group, hssl.Translation):
        if z.ndim == 4:    # Maps (B, C, H, W) have one group element.
            f = nn.Sequential(f, nn.Unflatten(1, (-1, 1)))
            z = f(x[:1])
        side = z.shape[-1]
        stride = x.shape[-1] // side
        if x.shape[-1] % side or group.stride % stride:
            return None
        # An earlier layer has more positions, and the same shifts and window in pixels.
        times = group.stride // stride
        finer = hssl.Translation(side, 1, stride, group.circular)    # a window of 1: all shifts
        finer.elements = group.elements * times
        finer.first = group.first * times
        finer.base_size = group.base_size * times
        group = finer
    if z.ndim != 5:
        return None
    moves = group.elements.reshape(len(group.elements), -1).any(1)    # all but the identity
    if not moves.any():
        raise ValueError("the group has no element but the identity, so nothing moves: take a "
                         "smaller base space")
    elements = group.elements[moves]
    return hssl.equivariance_error(f, group, x, elements, on_base=True).mean().item()


@torch.no_grad()
def layer_errors(network, group, x):
    """The error after every layer in evaluation mode: {layer's name: error}."""
    last = []
    if isinstance(network, getattr(layers, "Untied", ())):
        # In place of Untied's own forward: these two work after any layer.
        last = [nn.Flatten(1, 2), nn.Unflatten(1, (-1, network.group_size))]
        network = network.network
    modules = [network]
    if isinstance(network, getattr(layers, "Backbone", ())):
        modules = network.layers
    elif isinstance(network, nn.Sequential):
        modules = network
    errors = {}
    for count, module in enumerate(modules, 1):
        f = nn.Sequential(*modules[:count], *last).eval()
        error = layer_error(f, group, x)
        if error is not None:
            errors[f"{count} {type(module).__name__}"] = error
    return errors


def fresh_networks():
    """Networks as they begin, on test images of glyphs: {column: {layer: error}}.

    Batch norm has the statistics of 500 training images. Quarter turns by the untied network show
    what an error without any structure is.
    """
    import data as datasets
    import probe

    torch.manual_seed(0)
    backbone = layers.MNISTBackbone
    data = datasets.load("glyphs", train_images=500)
    x = data.batch(data.test_images, torch.arange(50))
    columns = {}
    for title, network, group in (
        ("translation", backbone(), hssl.Translation(7, 4, 4)),
        ("quarter turns", backbone("rotation", 4), hssl.Rotation(4)),
        ("turns by 45°", backbone("rotation", 8), hssl.Rotation(8)),
        ("scale 1.41", backbone("scale", 3), hssl.Scale(3, 1.41)),
        ("quarter turns, untied", layers.Untied(backbone(widths=(128, 252, 380)), 4),
         hssl.Rotation(4)),
    ):
        probe.take_statistics(network, data)
        columns[title] = layer_errors(network, group, x)
    return columns


def networks_of_run(folder, data_dir):
    """A run's encoder as it began and as it ended, on its test images: {column: {layer: error}}."""
    import probe
    import train

    trained, settings = probe.load_encoder(folder)
    data = probe.load_data(settings, "cpu", data_dir)
    x = data.batch(data.test_images, torch.arange(min(50, len(data.test_images))))
    torch.manual_seed(settings["seed"])
    fresh = probe.make_encoder(settings)
    probe.take_statistics(fresh, data)
    group = train.make_group(argparse.Namespace(**settings), trained.stride)
    return {
        "fresh": layer_errors(fresh, group, x),
        "trained": layer_errors(trained, group, x),
    }


def own_network(name):
    """The error after every layer of MODULE:FUNCTION's network."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        network, group, x = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} does not return network, group and images: {error}") from None
    return layer_errors(network, group, x)


def print_table(columns):
    print("\n".join(report.heading("layer", *columns)))
    for layer in next(iter(columns.values())):    # all have the same layers
        print(report.line(layer, *[f"{errors[layer]:.2g}" for errors in columns.values()]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", metavar="RUN or MODULE:FUNCTION",
                        help="(fresh networks)")
    parser.add_argument("--data-dir", help="where a run's data set is (as in the run)")
    parser.add_argument("--results", metavar="FOLDER",
                        help="folder of the JSON file to write, for fresh networks (none)")
    args = parser.parse_args(argv)
    if args.name is not None:
        if os.path.isdir(args.name):
            print_table(networks_of_run(args.name, args.data_dir))
        else:
            print_table({args.name: own_network(args.name)})
        return
    columns = fresh_networks()
    print_table(columns)
    if args.results is not None:
        import tables
        content = dict(torch=torch.__version__, tables={"fresh networks": columns})
        tables.write_json(args.results, "equivariance_fresh", content)


if __name__ == "__main__":
    report.run(main)
