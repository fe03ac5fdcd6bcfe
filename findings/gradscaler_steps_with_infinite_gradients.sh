#!/usr/bin/env bash
# GradScaler steps with infinite gradients once its scale is 2**-128 or less.
#
# torch 2.14.1, device "cpu". The documentation of GradScaler.step promises
# that the optimizer's step is skipped when a gradient is infinite or NaN. The
# check, however, reads the gradients before they are unscaled. From the usual
# 2**16, 144 overflows in a row bring the scale to 2**-128, whose inverse no
# float32 can hold. The next batch, a perfectly good one, has finite scaled
# gradients; the check passes, unscaling makes them infinite, and the step is
# taken. After 166 overflows the scale is 0. It never grows again, since growth
# multiplies it, and every step is taken with NaN.
#
# The documentation does say that a scale may fall below 1. See also
# pytorch/pytorch#99640 (open), which proposes to forbid that.
#
# Seen: a good batch after N overflows; then the scale 2,500 good batches on
#   143 overflows: scale 2**-127, gradient 1.0, weight -1.0, later 2**-126
#   144 overflows: scale 2**-128, gradient inf, weight -inf, later 2**-127
#   166 overflows: scale 0, gradient nan, weight nan, later 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir torch==2.14.1

venv/bin/python -I - <<'EOF'
import math

import torch

torch.set_num_threads(1)


def train(overflows):
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")

    def step(slope):
        optimizer.zero_grad()
        scaler.scale((slope * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(overflows):
        step(math.inf)
        assert weight.item() == 0, "an overflow was not skipped"
    scale = scaler.get_scale()
    step(1.0)
    seen = scale, weight.grad.item(), weight.item()
    for _ in range(2500):
        step(1.0)
    return *seen, scaler.get_scale()


def power(scale):
    return f"2**{math.log2(scale):.0f}" if scale else "0"


results = {n: train(n) for n in (143, 144, 166)}
for n, (scale, gradient, weight, later) in results.items():
    print(f"{n} overflows: scale {power(scale)}, gradient {gradient}, "
          f"weight {weight}, later {power(later)}")
assert results[143] == (2.0**-127, 1.0, -1.0, 2.0**-126)
assert results[144][:3] == (2.0**-128, math.inf, -math.inf)
scale, gradient, weight, later = results[166]
assert scale == later == 0 and math.isnan(gradient) and math.isnan(weight)
EOF
