"""Parameters, multiply-adds per image and activation memory per image of every backbone at full size.

    python experiments/sizes.py

Multiply-adds of one forward pass, by torch's own counter; activations are what autograd keeps for the backward pass in
float32 (float16 halves most of it), each storage counted once, weights and filters not.
"""
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from probe import build                                                                              # noqa: E402
from train import ELEMENTS, parse                                                                    # noqa: E402

IMAGES = {"mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64)}


def kept(encoder, x):
    """Bytes that autograd keeps for the backward pass of encoder(x)."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = encoder(x)
        total = sum(storages.values())                          # z keeps all of them alive, so that no address is used twice
    del z
    return total


def main():
    print(f"torch {torch.__version__}\n| data set | group | parameters | multiply-adds per image | activations per image |\n| --- | --- | --- | --- | --- |")
    for dataset, (channels, side) in IMAGES.items():
        for group in ELEMENTS:
            encoder, _ = build(vars(parse(["--dataset", dataset, "--group", group])), channels, side)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                encoder.eval()(torch.zeros(1, channels, side, side))
                filters = counter.get_total_flops()
                encoder(torch.zeros(2, channels, side, side))
            macs = (counter.get_total_flops() - 2 * filters) / 2   # two images' pass less one's: making the filters drops out
            one, three = (kept(encoder.train(), torch.zeros(n, channels, side, side)) for n in (1, 3))
            print(f"| {dataset} | {group} | {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M | {macs / 1e9:.2f} G "
                  f"| {(three - one) / 2 / 2**20:.1f} MiB |", flush=True)


if __name__ == "__main__":
    main()
