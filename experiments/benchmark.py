"""Ratios of times and memory, both sides measured in turn in one process, in alternating order: medians over the rounds.

    python experiments/benchmark.py [--parts abcdefgh] [--rounds 7] [--device cpu] [--threads 2]

(a) a whole training step, A-SSL over H-SSL, for each data set and group
(b) the group convolution, forward and backward, over conv2d with ready filters of the expanded shape, and escnn's R2Conv
(c) LARS.step on the residual network's weights over SGD(foreach=True), and the LARS of lightly and timm
(d) nt_xent of 2 x 4096 x 128, forward and backward, and lightly's NTXentLoss: time, and peak memory in (2N)² float32 matrices
(e) input: the whole batch at once on the device, and torchvision transforms in a DataLoader with 2 workers
(f) an epoch of train.py over the bare forward-backward-step loop on one batch that is in place
(g) where a training step's time goes: the five largest items
(h) a training step with more views, with two groups, and with SimSiam and BYOL, over the usual one

escnn, lightly and timm are compared with if they are installed; the project does not need them. On a CPU the residual network
is narrowed (its widths are printed), but in (b), (c) and on CUDA it is whole. Images are random: nothing is downloaded.
"""
import argparse
import contextlib
import importlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train                                                                                         # noqa: E402
from data import Dataset                                                                             # noqa: E402
from hssl import Rotation, Translation, allowed_sets                                                 # noqa: E402
from lars import LARS                                                                                # noqa: E402
from layers import GroupConv2d, LiftingConv2d, ResidualBackbone, steerable_basis, steerable_taps     # noqa: E402
from losses import nt_xent                                                                           # noqa: E402
from probe import build                                                                              # noqa: E402

GROUPS = {"translation": (1, 1), "rotation": (4, 4), "scale": (3, 1)}                                # elements, extent
ON_CPU = {"mnist": "--batch-size 128", "cifar10": "--batch-size 64 --depth 10 --widths 8 16 32 64",
          "tiny-imagenet": "--batch-size 32 --depth 10 --widths 4 8 16 32"}                           # four times as many for translation
ON_CUDA = {"mnist": "--batch-size 4096", "cifar10": "--batch-size 128", "tiny-imagenet": "--batch-size 32"}


def installed(name):
    """A module, or None where its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def seconds(f, device):
    """One call's time, by CUDA events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def compare(sides, rounds, device):
    """Time callables {name: f} in alternating order: {name: (median seconds, median of its ratios to the first)}."""
    for f in sides.values():
        f(), f()                                               # the second time everything is allocated
    times = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[::1 if i % 2 else -1]:
            times[name].append(seconds(sides[name], device))
    first = next(iter(times.values()))
    return {name: (statistics.median(t), statistics.median(a / b for a, b in zip(t, first))) for name, t in times.items()}


def training_step(dataset, flags, device):
    """A step as train.py takes it, and the same on one batch that is in place: two callables, images per step."""
    args = train.parse(["--dataset", dataset, "--device", device, *flags.split()])
    args.batch_size *= 4 if args.group == "translation" else 1
    torch.manual_seed(0)
    channels, side = {"mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64), "glyphs": (1, 28)}[dataset]
    images = torch.randint(256, (args.batch_size, channels, side, side), dtype=torch.uint8, device=device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    data = Dataset(images, labels, images, labels, 10, 0.0, 0.3)
    encoder, group = build(vars(args), channels, side)
    objective = train.make_objective(args, encoder, group, data).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]                                # not BYOL's target
    optimizer, sets, elements = LARS(trained, 0.1), allowed_sets(group, args.views).to(device), group.elements.to(device)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "float16")

    def batch():
        index = torch.randperm(args.batch_size, device=device)
        return data.batch(images, index), *elements[sets[torch.randint(len(sets), (args.batch_size,), device=device)]].unbind(1)

    def step(x, *g):
        with torch.autocast(device, getattr(torch, args.amp, None), enabled=args.amp != "off"):
            loss = objective(x, *g)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    ready = batch()
    return lambda: step(*batch()), lambda: step(*ready), args.batch_size


def part_a(args, flags):
    print("\n| (a) training step | images | A-SSL, s | H-SSL, s | A-SSL / H-SSL |\n| --- | --- | --- | --- | --- |")
    for dataset in flags:
        for group in GROUPS:
            settings = f"{flags[dataset]} --group {group}"
            steps = {m: training_step(dataset, f"{settings} --method {m}", args.device) for m in ("h-ssl", "a-ssl")}
            times = compare({m: s[0] for m, s in steps.items()}, args.rounds, args.device)
            print(f"| {dataset}, {group} | {steps['h-ssl'][2]} | {times['a-ssl'][0]:.3f} | {times['h-ssl'][0]:.3f} | {times['a-ssl'][1]:.2f} |", flush=True)


def convolutions(group, c_in, c_out, side, batch, lifting, device):
    """Forward and backward of conv2d with ready filters, our layer, its separable form, and escnn's: {name: callable}."""
    elements, extent = GROUPS[group]
    basis, taps = steerable_basis(group, elements, 7, 3, 0.9), steerable_taps(elements, 7, 3, 0.9)
    folded = c_in * (1 if lifting else elements)               # channels that conv2d sees
    x = torch.randn(batch, folded, side, side, device=device, requires_grad=True)
    sides, groups = {}, elements if extent == 1 and not lifting else 1
    kernel = torch.randn(elements * c_out, folded // groups, 7, 7, device=device, requires_grad=True)
    bias = torch.randn(elements * c_out, device=device, requires_grad=True)

    def run(f, parameters, x=x):
        def both():
            y = f(x)
            y = getattr(y, "tensor", y)                        # escnn wraps its tensors
            torch.autograd.grad(y, (x, *parameters), torch.ones_like(y))
        return both

    sides["conv2d"] = run(lambda x: F.conv2d(x, kernel, bias, padding=3, groups=groups), (kernel, bias))
    if lifting:
        layer = LiftingConv2d(c_in, c_out, basis).to(device)
        sides["layer"] = run(layer, layer.parameters())
    else:
        for name, t in ({"layer": None} | ({} if group == "rotation" else {"separable": taps})).items():
            layer = GroupConv2d(c_in, c_out, basis, extent, group == "rotation", taps=t).to(device)
            sides[name] = run(lambda x, layer=layer: layer(x.unflatten(1, (elements, c_in)).transpose(1, 2)), list(layer.parameters()))
    escnn = installed("escnn.nn")
    if escnn and group == "rotation" and c_in <= 128:          # beyond, its basis expansion does not fit into memory
        space = installed("escnn.gspaces").rot2dOnR2(elements)
        kind = escnn.FieldType(space, c_in * [space.trivial_repr if lifting else space.regular_repr])
        theirs = escnn.R2Conv(kind, escnn.FieldType(space, c_out * [space.regular_repr]), 7, padding=3).to(device)
        sides["escnn"] = run(lambda x: theirs(escnn.GeometricTensor(x, kind)), list(theirs.parameters()))
    return sides


def part_b(args):
    print("\n| (b) convolution 7x7 | images | conv2d, s | layer / conv2d | separable / conv2d | escnn / conv2d |\n| --- | --- | --- | --- | --- | --- |")
    layers = [("MNIST, lifting", 1, 32, 28, 128), ("MNIST, second", 32, 63, 14, 128), ("MNIST, third", 63, 95, 7, 128),
              ("residual, first stage", 128, 128, 32, 8), ("residual, second", 256, 256, 16, 16), ("residual, third", 512, 512, 8, 32)]
    for group in GROUPS:
        for name, c_in, c_out, side, images in layers:
            batch, lifting = images * (1 if args.device == "cpu" else 8), c_in == 1
            times = compare(convolutions(group, c_in, c_out, side, batch, lifting, args.device), args.rounds, args.device)
            cells = [f"{times[k][1]:.2f}" if k in times else "" for k in ("layer", "separable", "escnn")]
            print(f"| {group}, {name} {c_in}-{c_out} at {side} | {batch} | {times['conv2d'][0]:.4f} | {' | '.join(cells)} |", flush=True)


def part_c(args):
    shapes = [p.shape for p in ResidualBackbone("scale", 3).parameters()]

    def step_of(make):
        weights = [torch.randn(s, device=args.device, requires_grad=True) for s in shapes]
        for w in weights:
            w.grad = torch.randn_like(w)
        return make(weights).step

    sgd = dict(lr=0.1, momentum=0.9, weight_decay=1e-4)
    sides = {"SGD, foreach": step_of(lambda w: torch.optim.SGD(w, **sgd, foreach=True)), "our LARS": step_of(lambda w: LARS(w, **sgd)),
             "SGD, a loop": step_of(lambda w: torch.optim.SGD(w, **sgd, foreach=False))}
    for name, module, kind in (("lightly's LARS", "lightly.utils.lars", "LARS"), ("timm's LARS", "timm.optim.lars", "Lars")):
        if installed(module):
            sides[name] = step_of(lambda w: getattr(installed(module), kind)(w, **sgd))
    print("\n| (c) optimizer step, residual network | s | / SGD, foreach |\n| --- | --- | --- |")
    for name, (median, ratio) in compare(sides, 3 * args.rounds, args.device).items():
        print(f"| {name} | {median:.4f} | {ratio:.2f} |", flush=True)


def peak_kib():
    """The most memory that this process has held so far (Linux; getrusage's figure would include its parent's)."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def losses():
    """The losses to compare: {name: callable}."""
    lightly = installed("lightly.loss")
    return {"nt_xent": nt_xent} | ({"lightly's NTXentLoss": lightly.NTXentLoss(temperature=0.1)} if lightly else {})


def loss_peak(name, device):
    """Peak memory of one loss, forward and backward, above what was held before: in (2N)² float32 matrices."""
    loss = losses()[name]
    h1, h2 = (torch.randn(4096, 128, device=device, requires_grad=True) for _ in range(2))
    loss(h1[:64], h2[:64]).backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(h1, h2).backward()
        return (torch.cuda.max_memory_allocated() - before) / (4 * 8192**2)
    before = peak_kib()
    loss(h1, h2).backward()
    return (peak_kib() - before) * 1024 / (4 * 8192**2)


def part_d(args):
    h = [torch.randn(4096, 128, device=args.device, requires_grad=True) for _ in range(2)]
    times = compare({n: lambda f=f: torch.autograd.grad(f(*h), h) for n, f in losses().items()}, args.rounds, args.device)
    print("\n| (d) loss of 2 x 4096 x 128 | s | / nt_xent | peak memory, (2N)² float32 |\n| --- | --- | --- | --- |")
    for name, (median, ratio) in times.items():                # each in a process of its own: a peak can only rise
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import benchmark; print(benchmark.loss_peak({name!r}, {args.device!r}))"
        peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        print(f"| {name} | {median:.3f} | {ratio:.2f} | {peak:.2f} |", flush=True)


def part_e(args):
    from PIL import Image
    from torchvision import transforms
    images = torch.randint(256, (10000, 1, 28, 28), dtype=torch.uint8)
    data = Dataset(images.to(args.device), None, None, None, 10, 0.0, 0.3)
    plain, normalise = [transforms.ToTensor(), transforms.Normalize([0.0], [0.3])], "convert and normalise"
    groups = {normalise: (None, []), "and shift": (Translation(7, 4, 4), [transforms.RandomAffine(0, translate=(0.25, 0.25))]),
              "and turn by 45°, bilinear": (Rotation(8), [transforms.RandomRotation(180, transforms.InterpolationMode.BILINEAR)])}

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, transform):
            self.transform = transform

        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(images[i, 0].numpy()))

    print("\n| (e) input, MNIST, batch 500 | DataLoader, images/s | here, images/s | here / DataLoader |\n| --- | --- | --- | --- |")
    for name, (group, transform) in groups.items():
        loader = torch.utils.data.DataLoader(Pictures(transforms.Compose(transform + plain)), 500, shuffle=True, num_workers=2, persistent_workers=True)

        def ours():
            for index in torch.randperm(10000, device=args.device).split(500):
                x = data.batch(data.train_images, index)
                if group is not None:
                    x = group.T(group.elements.to(args.device)[torch.randint(len(group.elements), (500,), device=args.device)], x)
        times = compare({"here": ours, "loader": lambda: [batch.to(args.device) for batch in loader]}, args.rounds, args.device)
        print(f"| {name} | {10000 / times['loader'][0]:,.0f} | {10000 / times['here'][0]:,.0f} | {times['loader'][1]:.0f} |", flush=True)


def part_f(args):
    """train.py itself, with the bare loop's epoch run and timed whenever an epoch of it ends."""
    _, bare, batch = training_step("glyphs", "", args.device)
    times = []

    class Log(train.Log):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.start = time.perf_counter()

        def epoch(self, *arguments):
            super().epoch(*arguments)
            whole = time.perf_counter() - self.start
            start = time.perf_counter()
            for _ in range(10000 // batch):
                bare()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append((whole, time.perf_counter() - start))
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        usual, train.Log = train.Log, Log
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(train.parse(["--dataset", "glyphs", "--device", args.device, "--epochs", str(args.rounds + 1), "--out", f"{folder}/run",
                                    "--save-every", "2"]))
        train.Log = usual
    whole, loop, ratio = (statistics.median(t) for t in zip(*((a, b, a / b) for a, b in times[1:])))
    print("\n| (f) epoch of glyphs | train.py, images/s | bare loop, images/s | train.py / bare, time |\n| --- | --- | --- | --- |")
    images = 10000 // batch * batch
    print(f"| rotation, batch {batch}, saved every 2 epochs | {images / whole:,.0f} | {images / loop:,.0f} | {ratio:.3f} |")


def part_g(args, flags):
    print("\n| (g) H-SSL training step, share of its time | | | | | |\n| --- | --- | --- | --- | --- | --- |")
    for dataset in flags:
        for group in GROUPS:
            step, _, _ = training_step(dataset, f"{flags[dataset]} --group {group}", args.device)
            step()
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")) as profiler:
                for _ in range(3):
                    step()
            attribute = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
            items = sorted(profiler.key_averages(), key=lambda item: -getattr(item, attribute))
            total = sum(getattr(item, attribute) for item in items)
            print(f"| {dataset}, {group} | " + " | ".join(f"{item.key.removeprefix('aten::')} {100 * getattr(item, attribute) / total:.0f} %" for item in items[:5]) + " |", flush=True)


def part_h(args, flags):
    steps = {
        "H-SSL, 2 views": "", "A-SSL, 2 views": "--method a-ssl", "H-SSL, 4 views": "--views 4", "A-SSL, 4 views": "--method a-ssl --views 4",
        "H-SSL, 2 views, with shifts": "--window 4", "H-SSL, 4 views, with shifts": "--window 4 --views 4",
        "H-SSL, 2 views, SimSiam": "--objective simsiam", "H-SSL, 2 views, BYOL": "--objective byol"}
    times = compare({name: training_step("mnist", f"{flags['mnist']} --group rotation {own}", args.device)[0] for name, own in steps.items()}, args.rounds, args.device)
    print("\n| (h) training step on MNIST, rotation | own flags | seconds | over H-SSL with 2 views |\n| --- | --- | --- | --- |")
    for name, (median, ratio) in times.items():
        print(f"| {name} | `{steps[name]}` | {median:.3f} | {ratio:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="abcdefgh", help="letters of the parts to run")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flags = ON_CPU if args.device == "cpu" else ON_CUDA
    machine = f"{args.threads} CPU threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {machine}, medians of {args.rounds} rounds; (a), (g): {flags}")
    for letter in args.parts:
        part = globals()[f"part_{letter}"]
        part(args, flags) if letter in "agh" else part(args)


if __name__ == "__main__":
    main()
