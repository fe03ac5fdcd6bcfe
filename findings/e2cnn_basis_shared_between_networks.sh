#!/usr/bin/env bash
# Casting one e2cnn network to another precision changes others, too.
#
# e2cnn 0.2.3, torch 2.14.1, numpy 1.26.4. The documentation says that bases of
# filters are cached and reused unless recompute=True. What is reused is the
# module whose buffer holds the basis, so that layers with the same fields and
# the same size of kernel have one tensor between them, in whatever network
# they are. Hence for networks in training mode
#   - .float() on one turns the basis of another, which is .double(), to
#     float32, while its weights stay float64: its next pass raises an error,
#   - .half().float() on one rounds the basis of another to half precision: its
#     outputs change, without a word.
# A network made by copy.deepcopy has a basis of its own, and so has a layer
# made with recompute=True.
#
# Seen:
#   one basis for two networks: True
#   after .float() on another network: weights torch.float64, basis torch.float32
#     its pass: expected scalar type Double but found Float
#     of its copy: torch.float64, of a layer with recompute=True: torch.float64
#   after .half().float() on another network: outputs differ by 0.0004
#     those of its copy: by 0, of a layer with recompute=True: by 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir e2cnn==0.2.3 torch==2.14.1 numpy==1.26.4

venv/bin/python -I -W ignore - <<'EOF'
import copy

import torch
from e2cnn import gspaces, nn

torch.set_num_threads(1)
torch.manual_seed(0)
space = gspaces.Rot2dOnR2(4)
image_type = nn.FieldType(space, [space.trivial_repr])
fields = nn.FieldType(space, 2 * [space.regular_repr])
x = torch.randn(1, 1, 9, 9)


def make_layer(recompute=False):
    return nn.R2Conv(image_type, fields, 5, recompute=recompute)


def basis_of(layer):
    [basis] = [b for name, b in layer.named_buffers() if name.endswith("sampled_basis")]
    return basis


def outputs(layer):
    inputs = nn.GeometricTensor(x.to(layer.weights.dtype), image_type)
    return layer(inputs).tensor.detach()


def change(layer, before):
    return (outputs(layer) - before).abs().max().item()


one = basis_of(make_layer()) is basis_of(make_layer())
print("one basis for two networks:", one)

layer = make_layer().double()
twin = copy.deepcopy(layer)
alone = make_layer(recompute=True).double()
outputs(layer)
make_layer().float()
dtypes = layer.weights.dtype, basis_of(layer).dtype
message = None
try:
    outputs(layer)
except RuntimeError as error:
    message = str(error)
kept = outputs(twin).dtype, outputs(alone).dtype
print("after .float() on another network: weights {}, basis {}".format(*dtypes))
print("  its pass:", message)
print("  of its copy: {}, of a layer with recompute=True: {}".format(*kept))

layer = make_layer().float()
twin = copy.deepcopy(layer)
alone = make_layer(recompute=True)
before = [outputs(f) for f in (layer, twin, alone)]
make_layer().half().float()
changes = [change(f, y) for f, y in zip((layer, twin, alone), before)]
print(f"after .half().float() on another network: outputs differ by {changes[0]:.4f}")
print("  those of its copy: by {:g}, of a layer with recompute=True: by {:g}".format(*changes[1:]))

assert one
assert dtypes == (torch.float64, torch.float32)
assert "expected scalar type Double but found Float" in message
assert kept == (torch.float64, torch.float64)
assert changes[0] > 1e-4 and changes[1:] == [0, 0]
EOF
