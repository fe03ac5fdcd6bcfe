"""Time the project's parts, each beside what it is compared with, and compare their memory.

    python experiments/benchmark.py [--rows step form ...] [--device cpu] [--batch-size 64]

    step           a training step of A-SSL over H-SSL: three groups, float32 and half precision
    form           an H-SSL step with ReLU before pooling, or without channels-last, over ours
    convolution    our group convolution over conv2d of the same sizes, forward and backward
    lars           LARS, ours, timm's and lightly's, over torch's SGD, on the residual network
    nt_xent        lightly's NT-Xent over ours, forward and backward
    epoch          an epoch of train.py over as many bare steps

The two sides of a row take turns in one process. Networks have their full width, images are random,
and timm and lightly take part if they are installed. Prints one Markdown table; all rows together
are written into experiments/results/benchmark-DEVICE.json as well.

Letters: B batch, C channels, G group elements, H W space.
"""
import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import report
import tables

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data as datasets    # noqa: E402
import probe    # noqa: E402
import train    # noqa: E402
from hssl import allowed_pairs    # noqa: E402
from lars import LARS    # noqa: E402
from layers import GroupConv2d, PerElement, ResidualBackbone, steerable_basis    # noqa: E402
from losses import nt_xent    # noqa: E402


def now(device):
    """The time in seconds, once the GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function, device):
    start = now(device)
    function()
    return now(device) - start


def start_of(event):
    """An event's time, to sort by."""
    return event.start_ns()


def peak_memory(function, device):
    """The most bytes that one call's tensors hold beyond what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = 0
    peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=start_of):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare(title, function, reference, args):
    """Time two functions in alternating order: a record for the table and the file."""
    for side in (function, reference):
        side()    # by the second call all is allocated, and the GPU's kernels are chosen
    times = []
    reference_times = []
    for _ in range(args.repeats):
        times.append(seconds(function, args.device))
        reference_times.append(seconds(reference, args.device))
    return dict(
        title=title,
        seconds=times,
        reference_seconds=reference_times,
        memory=peak_memory(function, args.device),
        reference_memory=peak_memory(reference, args.device),
    )


def random_data(count, device="cpu"):
    """A data set of MNIST's shape that shows nothing, in one class."""
    images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    files = labels.cpu().numpy()
    return datasets.Dataset(images, labels, files, images, labels, files, ["0"], 0.0, 0.3)


class Step:
    """A training step as train.py takes it, on one batch that is in place."""

    def __init__(self, args, method, group_name, amp):
        settings = train.parse([
            "--dataset", "mnist", "--method", method, "--group", group_name, "--amp", amp])
        settings.image_shape = [1, 28]
        torch.manual_seed(0)
        group, objective = train.make_objective(settings, random_data(1))
        self.objective = objective.to(args.device)
        self.device = args.device
        self.amp = amp
        self.optimizer = LARS(objective.parameters(), 0.1)
        self.scaler = torch.amp.GradScaler(args.device, enabled=amp == "float16")
        pairs = allowed_pairs(group)
        chosen = pairs[torch.randint(len(pairs), (args.batch_size,))]
        g1, g2 = group.elements[chosen].to(args.device).unbind(1)
        x = torch.rand(args.batch_size, 1, 28, 28, device=args.device)
        self.inputs = (x, g1, g2)

    def __call__(self):
        with probe.precision(self.device, self.amp):
            loss = self.objective(*self.inputs)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def relu_first(encoder):
    """The same function with SESN's order: ReLU before max-pool."""
    for layer in encoder:
        if isinstance(layer, PerElement) and isinstance(layer[0], nn.MaxPool2d):
            pool = layer[0]
            layer[0] = layer[1]
            layer[1] = pool
    return encoder


def in_words(amp):
    return amp.replace("off", "float32")


def step_row(args):
    for group in ("translation", "rotation", "scale"):
        for amp in args.amp:
            a_ssl = Step(args, "a-ssl", group, amp)
            h_ssl = Step(args, "h-ssl", group, amp)
            yield compare(f"A-SSL / H-SSL, {group}, {in_words(amp)}", a_ssl, h_ssl, args)


def form_row(args):
    for amp in args.amp:
        ours = Step(args, "h-ssl", "translation", amp)
        words = f"pooling first, channels-last, {in_words(amp)}"
        other = Step(args, "h-ssl", "translation", amp)
        other.objective.encoder = relu_first(other.objective.encoder)
        yield compare(f"ReLU before pooling / {words}", other, ours, args)
        other = Step(args, "h-ssl", "translation", amp)
        # Without `Backbone.forward`, which makes images channels-last.
        other.objective.encoder = nn.Sequential(*other.objective.encoder)
        yield compare(f"contiguous / {words}", other, ours, args)


class ForwardAndBackward:
    """A function of tensors, and the gradients of its sum."""

    def __init__(self, function, inputs, parameters=()):
        self.function = function
        self.inputs = inputs
        self.sources = [*inputs, *parameters]

    def __call__(self):
        y = self.function(*self.inputs)
        torch.autograd.grad(y, self.sources, torch.ones_like(y))


def convolution_row(args):
    """The MNIST network's second layer. conv2d has ready filters and reads the same memory."""
    for group, size in (("translation", 1), ("rotation", 4), ("scale", 3)):
        basis = steerable_basis(group, size, 7)
        layer = GroupConv2d(32, 63, basis, cyclic=group == "rotation").to(args.device)
        groups = size if layer.extent == 1 else 1
        conv2d = nn.Conv2d(32 * size, 63 * size, 7, padding=3, groups=groups).to(args.device)
        maps = torch.randn(args.batch_size, 32 * size, 14, 14, device=args.device)
        maps = maps.to(memory_format=torch.channels_last)    # (B, G·C, H, W)
        z = maps.unflatten(1, (size, 32)).transpose(1, 2)    # (B, C, G, H, W)
        sides = []
        for module, x in ((layer, z), (conv2d, maps)):
            x = x.detach().requires_grad_()
            sides.append(ForwardAndBackward(module, [x], module.parameters()))
        yield compare(f"GroupConv2d / conv2d, {group}, 7x7, 32 to 63, float32", *sides, args)


def optimizer_step(optimizer, device):
    """The step of an optimizer on the residual network's weights for scale."""
    weights = list(ResidualBackbone("scale", 3).to(device).parameters())
    for w in weights:
        w.grad = torch.randn_like(w)
    return optimizer(weights, lr=1e-3, momentum=0.9, weight_decay=1e-4).step


def lars_row(args):
    optimizers = {"LARS": LARS}
    with contextlib.suppress(ImportError):
        from timm.optim.lars import Lars
        optimizers["timm's LARS"] = Lars
    with contextlib.suppress(ImportError):
        from lightly.utils.lars import LARS as LightlyLARS
        optimizers["lightly's LARS"] = LightlyLARS
    sgd = optimizer_step(torch.optim.SGD, args.device)
    for name, optimizer in optimizers.items():
        step = optimizer_step(optimizer, args.device)
        yield compare(f"{name} / torch's SGD", step, sgd, args)


def nt_xent_row(args):
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        return
    inputs = []
    for _ in range(2):    # views of the paper's batch
        inputs.append(torch.randn(4096, 128, device=args.device, requires_grad=True))
    theirs = ForwardAndBackward(NTXentLoss(temperature=0.1), inputs)
    ours = ForwardAndBackward(nt_xent, inputs)
    yield compare("lightly's NT-Xent / nt_xent, 2 x 4096 x 128", theirs, ours, args)


def epoch_row(args, steps=10):
    """Run train.py by translation, and take as many bare steps before each of its epochs."""
    amp = args.amp[0]
    step = Step(args, "h-ssl", "translation", amp)
    data = random_data(steps * args.batch_size, args.device)
    times = []    # before and after the bare steps
    draw = datasets.epoch_plan

    def epoch_plan(*arguments):
        times.append(now(args.device))
        for _ in range(steps):
            step()
        times.append(now(args.device))
        return draw(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        settings = train.parse([
            "--dataset", "mnist", "--device", args.device, "--amp", amp, "--out", f"{folder}/run",
            "--batch-size", str(args.batch_size), "--epochs", str(args.repeats + 2)])
        with contextlib.redirect_stdout(io.StringIO()), \
                mock.patch.object(probe, "load_data", return_value=data), \
                mock.patch.object(datasets, "epoch_plan", epoch_plan):
            train.main(settings)
    spans = [end - start for start, end in zip(times, times[1:])]
    bare = spans[0::2]
    whole = spans[1::2]
    title = f"epoch of train.py / {steps} bare steps, {in_words(amp)}"
    # The first of both set things up; after the last bare steps no time is taken.
    yield dict(title=title, seconds=whole[1:], reference_seconds=bare[1:-1])


ROWS = dict(step=step_row, form=form_row, convolution=convolution_row, lars=lars_row,
            nt_xent=nt_xent_row, epoch=epoch_row)


def table_line(record):
    reference = statistics.median(record["reference_seconds"])
    ratio = statistics.median(record["seconds"]) / reference
    memory = " | "
    if "memory" in record:
        bytes_held = record["reference_memory"]
        memory = f"{record['memory'] / bytes_held:.2f} | {bytes_held / 1e6:,.1f}"
    return f"| {record['title']} | {ratio:.2f} | {1000 * reference:,.1f} | {memory} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="(all)")
    add("--device", choices=("cpu", "cuda"), default=device, help="(cuda if there is a GPU)")
    add("--batch-size", type=int, help="images a step (cuda: 4096, cpu: 64)")
    add("--amp", nargs="+", choices=("off", "bfloat16", "float16"),
        help="precisions of step and form; epoch has the first (cuda: float16, cpu: off bfloat16)")
    add("--repeats", type=int, default=3, help="times of each side (3)")
    add("--results", type=Path, help="folder of the JSON file, which then holds these rows alone")
    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 4096 if args.device == "cuda" else 64
    if args.amp is None:
        args.amp = ["float16"] if args.device == "cuda" else ["off", "bfloat16"]
    if args.results is None and set(args.rows) == set(ROWS):
        args.results = report.RESULTS
    if args.results is not None:
        args.results.mkdir(parents=True, exist_ok=True)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")    # the profiler looks for GPUs, and says so
    # As train.py does it: shapes stay, so a search is worth it; and float32 means float32.
    torch.backends.cudnn.benchmark = True
    torch.backends.fp32_precision = "ieee"
    print("| compared | ratio of times | reference, ms | ratio of peak memory | reference, MB |")
    print("| --- | --- | --- | --- | --- |")
    records = []
    for row in args.rows:
        for record in ROWS[row](args):
            print(table_line(record), flush=True)
            records.append(dict(row=row) | record)
    if args.results is None:
        return
    commit, dirty = tables.commit()
    content = dict(device=args.device, machine=tables.machine(args.device),
                   torch=torch.__version__, commit=commit, dirty=dirty,
                   batch_size=args.batch_size, repeats=args.repeats, records=records)
    path = args.results / f"benchmark-{args.device}.json"
    probe.write_whole(path, json.dumps(content, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
