#!/usr/bin/env bash
# A checkpoint that holds torch.__version__ cannot be read by torch.load as it
# is called by default.
#
# torch 2.14.1; 2.11.0 does the same. To record the version beside the weights
# is common, and torch.__version__ is a str by isinstance and when printed. It
# is a subclass, torch.torch_version.TorchVersion, which is pickled by name, and
# which is not among the classes that weights_only=True (the default since 2.6)
# accepts, though it is PyTorch's own. Saving says nothing; the error comes when
# the checkpoint is needed. str(torch.__version__) is a plain string.
#
# Seen:
#   isinstance of str: True
#   torch.__version__: UnpicklingError, names torch.torch_version.TorchVersion
#   str of it: read
#   allowed by torch.serialization.safe_globals: read
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir torch==2.14.1

venv/bin/python -I - <<'PYTHON'
import pickle

import torch

weights = torch.zeros(2)
print("isinstance of str:", isinstance(torch.__version__, str))

torch.save(dict(weights=weights, version=torch.__version__), "checkpoint.pt")
try:
    torch.load("checkpoint.pt")
    raise SystemExit("torch.__version__: read")
except pickle.UnpicklingError as error:
    assert "torch.torch_version.TorchVersion" in str(error)
    print("torch.__version__: UnpicklingError, names torch.torch_version.TorchVersion")

allowed = [torch.torch_version.TorchVersion]
with torch.serialization.safe_globals(allowed):
    read = torch.load("checkpoint.pt")
assert read["version"] == torch.__version__

torch.save(dict(weights=weights, version=str(torch.__version__)), "plain.pt")
assert torch.load("plain.pt")["version"] == torch.__version__
print("str of it: read")
print("allowed by torch.serialization.safe_globals: read")
PYTHON
