#!/usr/bin/env bash
# torchvision reads one 16-bit grey PNG in three ways, two of them wrong.
#
# torchvision 0.29.1, Pillow 13.0.0. ImageFolder, as delivered, clips every
# value at 255: a photograph of 16 bits is white all over. ToTensor on
# Pillow's image returns int16, so that the upper half of the range is negative
# and nothing is scaled; v2.ToTensor does the same, though it is documented to
# equal ToImage followed by ToDtype(float32, scale=True) up to float precision.
# That pair, and decode_image, are right. Nothing warns of what is lost.
#
# The sign is known: pytorch/vision#8188 (open).
#
# Seen: for the values 100, 1000, 30000, 40000, 65535
#   ImageFolder: torch.uint8 [100, 255, 255, 255, 255]
#   ToTensor: torch.int16 [100, 1000, 30000, -25536, -1]
#   v2.ToTensor: torch.int16 [100, 1000, 30000, -25536, -1]
#   v2.ToImage, v2.ToDtype: torch.float32 [0.0015, 0.0153, 0.4578, 0.6104, 1.0]
#   decode_image: torch.uint16 [100, 1000, 30000, 40000, 65535]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-cache-dir torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==13.0.0

venv/bin/python -I - <<'EOF'
import os
import warnings

import numpy
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.io import decode_image
from torchvision.transforms import v2

torch.set_num_threads(1)
values = [100, 1000, 30000, 40000, 65535]
os.makedirs("images/class")
path = "images/class/grey.png"
Image.fromarray(numpy.array([values], dtype=numpy.uint16)).save(path)
image = Image.open(path)

with warnings.catch_warnings():
    warnings.simplefilter("error")
    folder = datasets.ImageFolder("images", transforms.PILToTensor())
    read = {
        "ImageFolder": folder[0][0][:1],
        "ToTensor": transforms.ToTensor()(image),
    }
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # v2.ToTensor is deprecated in favour of the pair
    read["v2.ToTensor"] = v2.ToTensor()(image)
pair = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
read["v2.ToImage, v2.ToDtype"] = pair(image)
read["decode_image"] = decode_image(path)

for name, pixels in read.items():
    read[name] = pixels.dtype, [round(v, 4) for v in pixels.flatten().tolist()]
    print(f"{name}: {read[name][0]} {read[name][1]}")

signed = torch.int16, [100, 1000, 30000, 40000 - 65536, 65535 - 65536]
assert read["ImageFolder"] == (torch.uint8, [100, 255, 255, 255, 255])
assert read["ToTensor"] == read["v2.ToTensor"] == signed
assert read["v2.ToImage, v2.ToDtype"] == (torch.float32, [round(v / 65535, 4) for v in values])
assert read["decode_image"] == (torch.uint16, values)
EOF
