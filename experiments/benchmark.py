"""Ratios of times, both sides measured in turn in one process: median over rounds.

    python experiments/benchmark.py [--batch 512] [--rounds 7] [--threads 2]

(a) a whole training step at the MNIST backbone, A-SSL over H-SSL, for each group;
(b) reading both views from the features, over the encoder's own pass, both forward and backward;
(c) the steerable convolutions, forward and backward, over plain conv2d with kernels of the expanded shape.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Dataset                                                                             # noqa: E402
from hssl import allowed_pairs                                                                       # noqa: E402
from lars import LARS                                                                                # noqa: E402
from layers import GroupConv2d, LiftingConv2d, steerable_basis                                       # noqa: E402
from probe import build                                                                              # noqa: E402
from train import make_objective, parse                                                              # noqa: E402


def compare(a, b, rounds):
    """Seconds of a() and b(), in alternating order: (median a, median b, median of the rounds' ratios)."""
    def timed(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    a(), b()
    times = [(timed(a), timed(b)) if i % 2 else tuple(reversed((timed(b), timed(a)))) for i in range(rounds)]
    return (*(statistics.median(t) for t in zip(*times)), statistics.median(x / y for x, y in times))


def training_step(method, group, batch, widths):
    args = parse(["--dataset", "mnist", "--device", "cpu", "--method", method, "--group", group, "--widths", *map(str, widths)])
    torch.manual_seed(0)
    images = torch.randint(256, (batch, 1, 28, 28), dtype=torch.uint8)
    data = Dataset(images, torch.zeros(batch).long(), images, torch.zeros(batch).long(), 10, 0.0, 0.3)
    encoder, group = build(vars(args), 1, 28)
    objective = make_objective(args, encoder, group, data)
    optimizer, pairs = LARS(objective.parameters(), 0.1), allowed_pairs(group)

    def step():
        index = torch.randperm(batch)
        g1, g2 = group.elements[pairs[torch.randint(len(pairs), (batch,))]].unbind(1)
        loss = objective(data.batch(images, index), g1, g2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def views_and_encoder(name, batch, widths):
    args = parse(["--dataset", "mnist", "--device", "cpu", "--group", name, "--widths", *map(str, widths)])
    encoder, group = build(vars(args), 1, 28)
    x, pairs = torch.randn(batch, 1, 28, 28), allowed_pairs(group)
    g1, g2 = group.elements[pairs[torch.randint(len(pairs), (batch,))]].unbind(1)
    z = encoder(x).detach().requires_grad_()
    return (lambda: (group.view(g1, z).sum() + group.view(g2, z).sum()).backward(), lambda: encoder(x).sum().backward())


def convolution(group, elements, extent, channels_in, channels_out, side, batch, lifting):
    """The layer, and conv2d with a ready kernel of the same expanded shape, forward and backward."""
    basis = steerable_basis(group, elements, 7, 3, 0.9)
    if lifting:
        layer, x = LiftingConv2d(channels_in, channels_out, basis), torch.randn(batch, channels_in, side, side)
        flat, groups, fan = x, 1, channels_in
    else:
        layer = GroupConv2d(channels_in, channels_out, basis, extent, group == "rotation")
        flat = torch.randn(batch, elements * channels_in, side, side)
        x = flat.unflatten(1, (elements, channels_in)).transpose(1, 2)              # as the layer before hands it on
        groups = elements if extent == 1 else 1
        fan = elements * channels_in // groups
    x, flat = x.detach().requires_grad_(), flat.detach().clone().requires_grad_()
    kernel = torch.randn(elements * channels_out, fan, 7, 7, requires_grad=True)
    bias = torch.randn(elements * channels_out, requires_grad=True)

    def run(forward, *inputs):
        y = forward()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    return (lambda: run(lambda: layer(x), x, *layer.parameters()),
            lambda: run(lambda: F.conv2d(flat, kernel, bias, padding=3, groups=groups), flat, kernel, bias))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=512, help="images")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--widths", type=int, nargs=3, default=(8, 16, 24), help="of the backbone in (a) and (b)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch}, median of {args.rounds} rounds\n")
    print(f"| training step, widths {args.widths} | A-SSL, s | H-SSL, s | ratio |\n| --- | --- | --- | --- |")
    for group in ("translation", "rotation", "scale"):
        a, h, ratio = compare(*(training_step(m, group, args.batch, args.widths) for m in ("a-ssl", "h-ssl")), args.rounds)
        print(f"| {group} | {a:.3f} | {h:.3f} | {ratio:.2f} |", flush=True)
    print("\n| both views over the encoder | views, s | encoder, s | ratio |\n| --- | --- | --- | --- |")
    for group in ("translation", "rotation", "scale"):
        views, encoder, ratio = compare(*views_and_encoder(group, args.batch, args.widths), args.rounds)
        print(f"| {group} | {views:.4f} | {encoder:.4f} | {ratio:.3f} |", flush=True)
    print("\n| convolution 7x7, forward and backward | layer, s | conv2d, s | ratio |\n| --- | --- | --- | --- |")
    one, two, three = 32, 63, 95                                                   # the full MNIST backbone's shapes
    batch = max(1, args.batch // 4)
    for group, elements, extent in (("translation", 1, 1), ("rotation", 4, 4), ("scale", 3, 1)):
        for name, shape in (("lifting", (1, one, 28, batch, True)), ("second", (one, two, 14, batch, False)), ("third", (two, three, 7, batch, False))):
            layer, plain, ratio = compare(*convolution(group, elements, extent, *shape), args.rounds)
            print(f"| {group}, {name} | {layer:.4f} | {plain:.4f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
