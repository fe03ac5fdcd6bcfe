"""Measure how far Eq. (1) is from holding for other people's encoders, untrained.

    python experiments/encoders.py [--write]    prints a table; writes results/encoders.json

Without --write rows of libraries that are not installed are left out. Nothing else needs these:

    pip install timm==1.0.31 e2cnn==0.2.3 "numpy<2" joblib autograd pymanopt lie-learn
    pip install --no-deps escnn==1.0.11    (py3nj needs a Fortran compiler, and is not used)

The error is that of hssl.equivariance_error, in float64, with random weights (seed 0), in training
mode without dropout: batch norm takes its statistics from the batch, as under both losses.

e2cnn, escnn: 16 glyphs, 28x28. Three layers, each of 8 regular fields, with kernels of 5x5, batch
norm, ReLU, and 2x2 max pooling between layers, which drops the last row of an odd side. The mean
over the quarter turns for C4, over the turns between them for C8. timm: 4 images of noise,
3x224x224, shifted by the stride, down and right. What leaves image or map on one side enters on the
other. Networks as delivered → with circular convolutions → with circular pooling, too.
"""
import argparse
import importlib.metadata
import importlib.util

import torch
from torch import nn

import report    # comes first: it puts the project's folder on the path
import tables
import data as datasets
import hssl
from losses import nt_xent

QUARTERS = torch.arange(1, 4)    # of C4, 90° each
EIGHTHS = torch.arange(1, 8, 2)    # of C8, 45° each
# Networks of timm, and settings that are not its own.
NETWORKS = (
    ("resnet18", {}),
    ("resnet18", {"zero_init_last": False}),
    ("resnetblur50", {}),
    ("mobilenetv3_small_100", {}),
    ("tf_mobilenetv3_small_100", {}),
    ("convnext_atto", {}),
    ("convnext_atto", {"ls_init_value": 1}),
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    ("swin_tiny_patch4_window7_224", {}),
)


def mean_error(f, group, x, elements):
    return f"{hssl.equivariance_error(f, group, x, elements).mean().item():.2g}"


def losses_apart(f, group, x):
    torch.manual_seed(0)
    head = hssl.ProjectionHead(8 * 7 * 7, hidden=64, out=32).double()
    g1 = torch.arange(len(x)) % 4
    a = hssl.a_ssl_loss(f, head, nt_xent, group, x, g1, 3 - g1).item()
    h = hssl.h_ssl_loss(f, head, nt_xent, group, x, g1, 3 - g1).item()
    return f"; L_A {a:.2f}, L_H {h:.2f}, difference {abs(a - h):.2g}"


def steerable(library, turns, layer_count):
    """A network of e2cnn or escnn: a function, (B, 1, H, H) -> (B, 8, turns, H', H')."""
    torch.manual_seed(0)
    gspaces = importlib.import_module(f"{library}.gspaces")
    enn = importlib.import_module(f"{library}.nn")
    space = gspaces.Rot2dOnR2(turns) if library == "e2cnn" else gspaces.rot2dOnR2(turns)
    image_type = enn.FieldType(space, [space.trivial_repr])
    fields = enn.FieldType(space, 8 * [space.regular_repr])
    layers = []
    for before in [image_type, fields, fields][:layer_count]:
        layers.append(enn.R2Conv(before, fields, 5, padding=2))
        layers.append(enn.InnerBatchNorm(fields))
        layers.append(enn.ReLU(fields))
        layers.append(enn.PointwiseMaxPool(fields, 2, stride=2))
    network = enn.SequentialModule(*layers[:-1]).double()

    def f(x):
        return network(enn.GeometricTensor(x, image_type)).tensor.unflatten(1, (-1, turns))
    return f


def steerable_rows(library):
    glyphs = datasets.glyphs(train=1, test=16)
    x = glyphs.batch(glyphs.test_images, torch.arange(16)).double()
    group = hssl.Rotation(4)
    right = steerable(library, 4, 3)

    def wrong(x):    # the right shape, with fields and turns mixed up
        return right(x).flatten(1, 2).unflatten(1, (4, -1)).transpose(1, 2)

    rows = {}
    for order, f in (("(-1, 4))`", right), ("(4, -1)).transpose(1, 2)`", wrong)):
        cell = mean_error(f, group, x, QUARTERS) + losses_apart(f, group, x)
        rows[f"C4, `.tensor.unflatten(1, {order}"] = cell
    rows["C4, images of 27x27"] = mean_error(right, group, x[..., 1:, 1:], QUARTERS)
    for layer_count in (1, 3):
        f = steerable(library, 8, layer_count)
        rows[f"C8, layers: {layer_count}"] = mean_error(f, hssl.Rotation(8), x, EIGHTHS)
    return rows


def make_circular(module, pooling):
    """Pad convolutions circularly or, if pooling, poolings."""
    for name, child in list(module.named_children()):
        make_circular(child, pooling)
        if not pooling and isinstance(child, nn.Conv2d):
            child.padding_mode = "circular"
        if pooling and hasattr(child, "pad_mode"):    # timm's BlurPool2d
            child.pad_mode = "circular"
        if pooling and isinstance(child, nn.MaxPool2d) and child.padding:
            pool = nn.MaxPool2d(child.kernel_size, child.stride)
            setattr(module, name, nn.Sequential(nn.CircularPad2d(child.padding), pool))


def timm_rows(library):
    timm = importlib.import_module(library)
    rows = {}
    for name, settings in NETWORKS:
        torch.manual_seed(0)
        x = torch.randn(4, 3, 224, 224).double()
        network = timm.create_model(name, drop_path_rate=0, **settings).double()

        def f(x):    # (B, C, 1, H', W')
            maps = network.forward_intermediates(x, indices=1, intermediates_only=True)
            return maps[-1].unsqueeze(2)

        side = f(x).shape[-1]
        group = hssl.Translation(side, 1, 224 // side, circular=True)
        shift = torch.tensor([[1, 1]])
        errors = [mean_error(f, group, x, shift)]
        for pooling in (False, True):
            make_circular(network, pooling)
            errors.append(mean_error(f, group, x, shift))
        words = [name] + [f"{key}={value}" for key, value in settings.items()]
        rows[", ".join(words)] = " → ".join(errors)
    return rows


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results/encoders.json")
    write = parser.parse_args().write
    lines = report.heading("encoder, untrained", "error of Eq. (1)")
    content = {"torch": torch.__version__}
    for library in ("e2cnn", "escnn", "timm"):
        if importlib.util.find_spec(library) is None:
            if write:
                raise ValueError(f"--write needs {library}, which is not installed")
            print(f"{library} is not installed: its rows are left out")
            continue
        release = f"{library} {importlib.metadata.version(library)}"
        measure = timm_rows if library == "timm" else steerable_rows
        content[release] = measure(library)
        for encoder, cell in content[release].items():
            lines.append(report.line(f"{release}, {encoder}", cell))
    print("\n".join(lines))
    if write:
        tables.write_json(report.RESULTS, "encoders", content)


if __name__ == "__main__":
    report.run(main)
