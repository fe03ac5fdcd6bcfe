#!/usr/bin/env bash
# update_bn thaws frozen batch norms, and forgets momentum after an error.
#
# torch 2.14.1. torch.optim.swa_utils.update_bn is documented to update running
# means and variances in one pass over a loader. It calls train() on the whole
# model and then sets the mode that the top module had, on every module. A
# batch norm that was frozen by eval() inside a training model
#   - has its statistics replaced, although it is frozen,
#   - is in training mode from then on, so that training goes on changing it.
# If the loader raises, every batch norm keeps momentum=None, a cumulative
# average over all batches instead of a moving one. Calling update_bn again
# does not mend that: it takes None for the momentum to restore.
#
# Seen:
#   frozen layer before: training False, mean 0.5, momentum 0.1
#   frozen layer after: training True, mean 3.0, momentum 0.1
#   after an error in the loader: momentum None
#   after another call, without an error: momentum None
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir torch==2.14.1

venv/bin/python -I - <<'EOF'
import torch
from torch.optim.swa_utils import update_bn

torch.set_num_threads(1)
frozen = torch.nn.BatchNorm1d(1)
frozen.running_mean.fill_(0.5)
model = torch.nn.Sequential(frozen, torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
model.train()
frozen.eval()
batches = [torch.tensor([[2.0], [4.0]])]


def state():
    return frozen.training, frozen.running_mean.item(), frozen.momentum


def failing_loader():
    yield batches[0]
    raise OSError("a file could not be read")


before = state()
update_bn(batches, model)
after = state()
try:
    update_bn(failing_loader(), model)
except OSError:
    error = frozen.momentum
update_bn(batches, model)

for name, values in (("before", before), ("after", after)):
    print("frozen layer {}: training {}, mean {}, momentum {}".format(name, *values))
print("after an error in the loader: momentum", error)
print("after another call, without an error: momentum", frozen.momentum)
assert before == (False, 0.5, 0.1)
assert after == (True, 3.0, 0.1)
assert error is None and frozen.momentum is None
EOF
