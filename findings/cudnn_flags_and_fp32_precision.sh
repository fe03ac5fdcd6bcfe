#!/usr/bin/env bash
# torch.backends.cudnn.flags() and torch.backends.fp32_precision = "ieee" spoil
# each other, in either order.
#
# torch 2.14.1; only flags are read, no GPU is needed. In a new process the
# setting for all backends reaches cuDNN's convolutions. But if cudnn.flags()
# was entered and left before, which changes nothing that can be read, it
# no longer reaches them: they stay at TF32, without a word. In the other order
# every precision reads "ieee", yet cudnn.flags() raises and says that
# convolutions and RNNs differ and that the old interface was mixed with the
# new one. PyTorch itself advises cudnn.flags(enabled=False) for the second
# derivatives of RNNs.
#
# pytorch/pytorch#179445 (closed) reports that earlier versions never reached
# the convolutions, and the same error where both interfaces are used. Setting
# cudnn.conv.fp32_precision as well brings the first order to "ieee";
# cudnn.allow_tf32 = False, of the old interface, ends the error of the second.
#
# Seen:
#   start: all none, matmul none, cudnn none, conv tf32, rnn tf32
#   ieee: all ieee, matmul ieee, cudnn ieee, conv ieee, rnn ieee
#   ieee, flags: RuntimeError, "cuDNN conv and cuDNN RNN have different TF32 flags"
#   ieee, allow_tf32 = False, flags: no error
#   flags: all none, matmul none, cudnn none, conv tf32, rnn tf32
#   flags, ieee: all ieee, matmul ieee, cudnn ieee, conv tf32, rnn tf32
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir torch==2.14.1

cat > common.py <<'EOF'
from torch import backends

PLACES = backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn


def precisions(title):
    seen = [place.fp32_precision for place in PLACES]
    print(title + ": all {}, matmul {}, cudnn {}, conv {}, rnn {}".format(*seen))
    return seen


START = ["none", "none", "none", "tf32", "tf32"]
EOF

cat > ieee_first.py <<'EOF'
from common import START, backends, precisions

assert precisions("start") == START
backends.fp32_precision = "ieee"
assert precisions("ieee") == ["ieee"] * 5
message = "cuDNN conv and cuDNN RNN have different TF32 flags"
try:
    with backends.cudnn.flags(enabled=False):
        pass
except RuntimeError as error:
    assert message in str(error)
    print(f'ieee, flags: RuntimeError, "{message}"')
else:
    raise SystemExit("cudnn.flags() no longer raises")
backends.cudnn.allow_tf32 = False
with backends.cudnn.flags(enabled=False):
    print("ieee, allow_tf32 = False, flags: no error")
EOF

cat > flags_first.py <<'EOF'
from common import START, backends, precisions

with backends.cudnn.flags(enabled=False):
    pass
assert precisions("flags") == START
backends.fp32_precision = "ieee"
assert precisions("flags, ieee") == ["ieee", "ieee", "ieee", "tf32", "tf32"]
backends.cudnn.conv.fp32_precision = "ieee"
assert backends.cudnn.conv.fp32_precision == "ieee"
EOF

venv/bin/python ieee_first.py
venv/bin/python flags_first.py
