#!/usr/bin/env bash
# An untrained ResNet of timm hardly sees its input: a poor random baseline.
#
# timm 1.0.31, torch 2.14.1. timm starts a ResNet with zero_init_last=True: the
# scale of the last batch norm of each residual branch is 0, so that every
# branch adds 0 until training begins. (torchvision's zero_init_residual does
# the same, but is off unless asked for.) That is documented, and a good start
# for training (Goyal et al., arXiv 1706.02677, section 5.1). What is easily
# missed is what it makes of an untrained network, such as the random encoder
# that learned features are compared with: only the shortcuts are left, which
# have no kernels larger than 1x1 and mostly leave pixels out by their strides.
# In evaluation mode the middle position of the last map, 7x7, has nonzero
# gradients at
#   - 11x11 of the 224x224 pixels for resnet18 and resnet50, as many as the
#     first convolution and the pooling see,
#   - 3x3 for regnetx_002,
# and with zero_init_last=False at all of them. The last map as a whole depends
# on 10 % and 0.8 % of the pixels.
#
# The setting is known to matter in training:
# https://blog.problemsolversguild.com/posts/2022-05-02-zero_init_last_resnetperformance.html
# reports 73 % for timm's resnet18 and 78 % for torchvision's after 5 epochs.
#
# Seen:
#   resnet18 {}: middle 121 pixels in 11x11, whole map 10.3%
#   resnet18 {'zero_init_last': False}: middle 50176 pixels in 224x224, whole map 100.0%
#   resnet50 {}: middle 121 pixels in 11x11, whole map 10.3%
#   resnet50 {'zero_init_last': False}: middle 50176 pixels in 224x224, whole map 100.0%
#   regnetx_002 {}: middle 9 pixels in 3x3, whole map 0.8%
#   regnetx_002 {'zero_init_last': False}: middle 50176 pixels in 224x224, whole map 100.0%
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir timm==1.0.31 torch==2.14.1 torchvision==0.29.1

venv/bin/python -I - <<'EOF'
import timm
import torch

torch.set_num_threads(1)


def seen(name, whole_map, **settings):
    """The number of pixels that the last map, or its middle, depends on, and their box."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, global_pool="", **settings).eval()
    x = torch.randn(1, 3, 224, 224, requires_grad=True)
    maps = network(x)    # (1, C, 7, 7)
    if not whole_map:
        maps = maps[:, :, 3, 3]
    maps.sum().backward()
    used = x.grad[0].ne(0).any(0)    # (224, 224)
    height = used.any(1).nonzero()
    width = used.any(0).nonzero()
    box = [int(rows.max() - rows.min()) + 1 for rows in (height, width)]
    return int(used.sum()), "{}x{}".format(*box)


results = {}
for name in ("resnet18", "resnet50", "regnetx_002"):
    for settings in ({}, {"zero_init_last": False}):
        middle, box = seen(name, False, **settings)
        share = seen(name, True, **settings)[0] / 224**2
        results[name, len(settings)] = box, middle, share
        print(f"{name} {settings}: middle {middle} pixels in {box}, whole map {share:.1%}")

for name in ("resnet18", "resnet50"):
    assert results[name, 0][:2] == ("11x11", 121)
    assert results[name, 0][2] < 0.11
assert results["regnetx_002", 0][:2] == ("3x3", 9)
assert results["regnetx_002", 0][2] < 0.01
for name in ("resnet18", "resnet50", "regnetx_002"):
    assert results[name, 1] == ("224x224", 224**2, 1)
EOF
