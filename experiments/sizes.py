"""Parameters, multiply-adds per image and activation memory per image of every backbone at full size.

    python experiments/sizes.py

Multiply-adds of one forward pass, by torch's own counter; activations are what autograd keeps for the backward pass, each
storage counted once, weights and filters not; the last column is H-SSL's, in half precision, 512 images a GPU.
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
    print(f"torch {torch.__version__}\n| data set | group | parameters | multiply-adds per image | activations per image | in half precision "
          "| batch 4096 on 8 GPUs |\n| --- | --- | --- | --- | --- | --- | --- |")
    for dataset, (channels, side) in IMAGES.items():
        for group, separable in [(g, s) for g in ELEMENTS for s in (0, 64)]:
            if separable and (dataset == "mnist" or group == "rotation"):
                continue
            flags = ["--dataset", dataset, "--group", group, "--device", "cpu", "--separable-from", str(separable)]
            encoder, _ = build(vars(parse(flags)), channels, side)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                encoder.eval()(torch.zeros(1, channels, side, side))
                filters = counter.get_total_flops()
                encoder(torch.zeros(2, channels, side, side))
            macs = (counter.get_total_flops() - 2 * filters) / 2   # two images' pass less one's: making the filters drops out
            cells = []
            for half in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    one, two = (kept(encoder.train(), torch.zeros(n, channels, side, side)) for n in (1, 2))
                cells.append(f"{(two - one) / 2**20:.1f} MiB")
            print(f"| {dataset} | {group}{', separable' * (separable > 0)} | {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M | {macs / 1e9:.2f} G "
                  f"| {' | '.join(cells)} | {(two - one) * 512 / 2**30:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
