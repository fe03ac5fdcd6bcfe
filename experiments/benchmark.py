"""Time the project's parts, each beside what it is compared with, and compare their memory.

    python experiments/benchmark.py [--rows step form ...] [--device cpu] [--batch-size 64]

    step           a training step of A-SSL over H-SSL: three groups, float32 and half precision
    form           an H-SSL step with ReLU before pooling, or without channels-last, over ours
    convolution    our group convolution over conv2d of the same sizes, forward and backward
    lars           LARS, ours, timm's and lightly's, over torch's SGD, on the residual network
    nt_xent        lightly's NT-Xent over ours, forward and backward
    epoch          an epoch of train.py over as many bare steps

The two sides of a row take turns in one process. Networks have their full width, images are random,
and timm and lightly take part if they are installed. Prints one Markdown table, and writes
experiments/results/benchmark-DEVICE.json.

Letters: B batch, C channels, G group elements, H W space.
"""
import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data as datasets    # noqa: E402
import probe    # noqa: E402
import train    # noqa: E402
from hssl import ProjectionHead, a_ssl_loss, allowed_pairs, h_ssl_loss, readout    # noqa: E402
from lars import LARS    # noqa: E402
from layers import GroupConv2d, PerElement, ResidualBackbone, steerable_basis    # noqa: E402
from losses import nt_xent    # noqa: E402


# ------------------------------------------------------------------------------ time and memory

def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    """The time of one call, until the GPU is done."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(function, device):
    """The most bytes that one call's tensors hold beyond what was held before."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=start_of)
    held = 0
    peak = 0
    for change in changes:
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def start_of(event):
    return event.start_ns()


def compare(row, title, function, reference, args):
    """Time two functions in alternating order: a record for the table and the file."""
    for side in (function, reference):
        side()    # by the second call all is allocated, and the GPU's kernels are chosen
    times = []
    reference_times = []
    for _ in range(args.repeats):
        times.append(seconds(function, args.device))
        reference_times.append(seconds(reference, args.device))
    return dict(
        row=row,
        title=title,
        seconds=times,
        reference_seconds=reference_times,
        memory=peak_memory(function, args.device),
        reference_memory=peak_memory(reference, args.device),
    )


# ------------------------------------------------------------------------------- training steps

class Step:
    """A training step as train.py takes it, on one batch that is in place. change: a function that
    makes another encoder of the encoder."""

    def __init__(self, args, method, group_name, amp, change=None):
        settings = train.parse([
            "--dataset", "mnist", "--method", method, "--group", group_name, "--amp", amp,
            "--device", args.device, "--batch-size", str(args.batch_size)])
        settings.image_shape = [1, 28]
        torch.manual_seed(0)
        encoder, group = train.make_encoder_and_group(settings)
        if change is not None:
            encoder = change(encoder)
        with torch.no_grad():
            view = group.base(encoder(torch.zeros(1, 1, 28, 28)))
        width = readout(view, settings.grid).shape[1]
        self.encoder = encoder.to(args.device)
        self.head = ProjectionHead(width, *settings.head_widths, settings.grid).to(args.device)
        self.ssl_loss = a_ssl_loss if method == "a-ssl" else h_ssl_loss
        self.group = group
        self.device = args.device
        self.amp = amp
        parameters = [*self.encoder.parameters(), *self.head.parameters()]
        self.optimizer = LARS(parameters, 0.1)
        self.scaler = torch.amp.GradScaler(args.device, enabled=amp == "float16")
        pairs = allowed_pairs(group)
        chosen = pairs[torch.randint(len(pairs), (args.batch_size,))]
        g1, g2 = group.elements[chosen].to(args.device).unbind(1)
        x = torch.rand(args.batch_size, 1, 28, 28, device=args.device)
        self.inputs = (x, g1, g2)

    def __call__(self):
        with probe.precision(self.device, self.amp):
            loss = self.ssl_loss(self.encoder, self.head, nt_xent, self.group, *self.inputs)
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


def contiguous(encoder):
    """The same layers without `Backbone.forward`, which makes images channels-last."""
    return nn.Sequential(*encoder)


def relu_first_and_contiguous(encoder):
    return contiguous(relu_first(encoder))


def in_words(amp):
    return "float32" if amp == "off" else amp


def step_row(args):
    for group in ("translation", "rotation", "scale"):
        for amp in args.amp:
            title = f"A-SSL / H-SSL, {group}, {in_words(amp)}"
            yield title, Step(args, "a-ssl", group, amp), Step(args, "h-ssl", group, amp)


def form_row(args):
    for amp in args.amp:
        ours = Step(args, "h-ssl", "translation", amp)
        for name, change in [
            ("ReLU before pooling", relu_first),
            ("contiguous", contiguous),
            ("both", relu_first_and_contiguous),
        ]:
            title = f"{name} / pooling first, channels-last, {in_words(amp)}"
            yield title, Step(args, "h-ssl", "translation", amp, change), ours


# ------------------------------------------------------------------- convolution, optimizer, loss

class ForwardAndBackward:
    """A function of tensors, and the gradients of its sum."""

    def __init__(self, function, inputs, parameters=(), device="cpu", amp="off"):
        self.function = function
        self.inputs = inputs
        self.sources = [*inputs, *parameters]
        self.device = device
        self.amp = amp

    def __call__(self):
        with probe.precision(self.device, self.amp):
            y = self.function(*self.inputs)
        torch.autograd.grad(y, self.sources, torch.ones_like(y))


def convolution_row(args):
    """The MNIST network's second layer. conv2d has ready filters and reads the same memory."""
    amp = "float16" if args.device == "cuda" else "off"
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
            sides.append(ForwardAndBackward(module, [x], module.parameters(), args.device, amp))
        yield f"GroupConv2d / conv2d, {group}, 7x7, 32 to 63, {in_words(amp)}", *sides


def optimizer_step(optimizer, device, **options):
    """The step of an optimizer on the residual network's weights for scale."""
    weights = list(ResidualBackbone("scale", 3).to(device).parameters())
    for w in weights:
        w.grad = torch.randn_like(w)
    return optimizer(weights, lr=1e-3, momentum=0.9, weight_decay=1e-4, **options).step


def installed(module, name):
    """A class of a package that need not be there, or None."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def lars_row(args):
    sgd = optimizer_step(torch.optim.SGD, args.device)
    for title, optimizer in [
        ("LARS", LARS),
        ("timm's LARS", installed("timm.optim.lars", "Lars")),
        ("lightly's LARS", installed("lightly.utils.lars", "LARS")),
    ]:
        step = None
        if optimizer is not None:
            step = optimizer_step(optimizer, args.device)
        yield f"{title} / torch's SGD", step, sgd


def nt_xent_row(args):
    inputs = []
    for _ in range(2):    # views of the paper's batch
        inputs.append(torch.randn(4096, 128, device=args.device, requires_grad=True))
    ours = ForwardAndBackward(nt_xent, inputs)
    theirs = installed("lightly.loss", "NTXentLoss")
    if theirs is not None:
        theirs = ForwardAndBackward(theirs(temperature=0.1), inputs)
    yield "lightly's NT-Xent / nt_xent, 2 x 4096 x 128", theirs, ours


# ------------------------------------------------------------------------------ a whole training

def no_measures(*args, **kwargs):
    return dict(top1=None, neighbours=None, effective_rank=0.0)


def epoch_record(args, steps=10):
    """Run train.py on random images, translation. Memory is not compared.

    Whenever it starts an epoch, the time of the last one is noted, and as many bare steps taken.
    """
    amp = "float16" if args.device == "cuda" else "off"
    step = Step(args, "h-ssl", "translation", amp)
    count = steps * args.batch_size
    images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, device=args.device)
    labels = torch.zeros(count, dtype=torch.int64, device=args.device)
    files = labels.cpu().numpy()
    data = datasets.Dataset(images, labels, files, images, labels, files, ["0"], 0.0, 0.3)
    whole = []
    bare = []
    draw = datasets.epoch_plan
    started = None

    def bare_steps():
        for _ in range(steps):
            step()

    def noting_epoch_plan(*arguments):
        nonlocal started
        synchronize(args.device)
        if started is not None:
            whole.append(time.perf_counter() - started)
        bare.append(seconds(bare_steps, args.device))
        started = time.perf_counter()
        return draw(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        settings = train.parse([
            "--dataset", "mnist", "--device", args.device, "--amp", amp, "--out", f"{folder}/run",
            "--batch-size", str(args.batch_size), "--epochs", str(args.repeats + 2)])
        with contextlib.redirect_stdout(io.StringIO()), \
                mock.patch.object(probe, "load_data", return_value=data), \
                mock.patch.object(probe, "evaluate", no_measures), \
                mock.patch.object(datasets, "epoch_plan", noting_epoch_plan):
            train.main(settings)
    title = f"epoch of train.py / {steps} bare steps, {in_words(amp)}"
    # The first epoch, and the steps before it, set things up.
    return dict(row="epoch", title=title, seconds=whole[1:], reference_seconds=bare[1:-1])


# ------------------------------------------------------------------------------------ the table

ROWS = dict(step=step_row, form=form_row, convolution=convolution_row, lars=lars_row,
            nt_xent=nt_xent_row)


def records_of(row, args):
    """Measure all comparisons of a row, one after the other."""
    if row == "epoch":
        yield epoch_record(args)
        return
    for title, function, reference in ROWS[row](args):
        if function is None:
            yield dict(row=row, title=title, missing="not installed")
        else:
            yield compare(row, title, function, reference, args)


def table_line(record):
    if "missing" in record:
        return f"| {record['title']} | {record['missing']} | | | | |"
    times = record["seconds"]
    reference_times = record["reference_seconds"]
    of_minima = min(times) / min(reference_times)
    reference = statistics.median(reference_times)
    of_medians = statistics.median(times) / reference
    memory = ""
    megabytes = ""
    if record.get("reference_memory"):
        memory = f"{record['memory'] / record['reference_memory']:.2f}"
        megabytes = f"{record['reference_memory'] / 1e6:,.1f}"
    return (f"| {record['title']} | {of_medians:.2f} | {of_minima:.2f} | {memory} "
            f"| {1000 * reference:,.1f} | {megabytes} |")


def commit():
    """The checked-out commit, with "-dirty" if tracked files changed since; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude", "*"]
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return finished.stdout.strip()


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "epoch"], default=[*ROWS, "epoch"],
                        help="what to measure (all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is a GPU)")
    parser.add_argument("--batch-size", type=int, help="images a step (cuda: 4096, cpu: 64)")
    parser.add_argument("--amp", nargs="+", choices=("off", "bfloat16", "float16"),
                        help="precisions of step and form (off, bfloat16; cuda: float16 as well)")
    parser.add_argument("--repeats", type=int, help="of each side (cuda: 3, cpu: 5)")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results",
                        help="folder of the JSON file (experiments/results)")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and PyTorch sees none")
    if args.batch_size is None:
        args.batch_size = 4096 if args.device == "cuda" else 64
    if args.repeats is None:
        args.repeats = 3 if args.device == "cuda" else 5
    if args.amp is None:
        args.amp = ["off", "bfloat16"]
        if args.device == "cuda":
            args.amp.append("float16")
    if args.batch_size < 2 or args.repeats < 1:
        parser.error("--batch-size must be at least 2, and --repeats 1")

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")    # the profiler looks for GPUs, and says so
    # As train.py does it: shapes stay, so a search is worth it; and float32 means float32.
    torch.backends.cudnn.benchmark = True
    torch.backends.fp32_precision = "ieee"
    print(f"{machine(args.device)}; torch {torch.__version__}; batch {args.batch_size}; ratios of "
          f"{args.repeats} times each\n")
    print("| compared | ratio of medians | of minima | of peak memory | reference, ms | MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    records = []
    for row in args.rows:
        for record in records_of(row, args):
            print(table_line(record), flush=True)
            records.append(record)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()

    content = dict(device=args.device, machine=machine(args.device), torch=torch.__version__,
                   commit=commit(), batch_size=args.batch_size, repeats=args.repeats,
                   records=records)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"benchmark-{args.device}.json"
    probe.write_whole(path, json.dumps(content, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
