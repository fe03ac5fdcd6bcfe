"""Measure this code beside another revision of it, and A-SSL's training step beside H-SSL's.

    python experiments/benchmark.py [--against REVISION] [--rows step a-ssl ...] [--results FOLDER]

    step        an H-SSL step, for three groups: the revision's over today's
    a-ssl       A-SSL's step over H-SSL's, today
    evaluate    probe.evaluate on glyphs: today's over the revision's
    command     `python train.py`, from its start to its end: today's over the revision's
    memory      peak memory of an H-SSL step by scale, batch 4096: today's over the revision's
    error       error of its float32 gradient beside float64: today's over the revision's

Today's code is the working tree's; the revision is any name that git has for a commit. Steps are
those of MNIST's network in its full width, on random images. The sides of a row take turns.
"""
import argparse
import importlib.util
import itertools
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.profiler import ProfilerActivity, profile

import report    # comes first: it puts the project's folder on the path
import tables
from report import ROOT
import probe
from lars import LARS
from train import Number

ROWS = ("step", "a-ssl", "evaluate", "command", "memory", "error")


def run(*command, folder):
    """What a program prints that is started in a folder. Raises a ValueError if it fails."""
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode != 0:
        raise ValueError(f"{command} failed: {finished.stderr.strip()[-300:]!r}")
    return finished.stdout


def check_out(revision, folder):
    archive = f"{folder}/revision.zip"
    run("git", "archive", f"--output={archive}", revision, folder=ROOT)
    shutil.unpack_archive(archive, folder)


def load(folder, name):
    """A module of a folder, imported under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"measured_{name}", f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Step:
    """A training step as train.py takes it for MNIST, by a folder's code and a loss of its hssl.py,
    on one batch that is in place."""

    def __init__(self, folder, loss, group_name, batch_size, device, amp="off"):
        hssl = load(folder, "hssl")
        groups = {
            "translation": (1, hssl.Translation(7, 4, 4), 4 * 4),
            "rotation": (4, hssl.Rotation(4), 7 * 7),
            "scale": (3, hssl.Scale(3, 1.41), 7 * 7),
        }
        group_size, group, positions = groups[group_name]
        torch.manual_seed(0)    # Weights are equal where both sides draw them in the same order.
        x = torch.rand(batch_size, 1, 28, 28)
        pairs = hssl.allowed_pairs(group)
        chosen = pairs[torch.randint(len(pairs), (batch_size,))]    # (B, 2)
        g1, g2 = group.elements[chosen].to(device).unbind(1)
        encoder = load(folder, "layers").MNISTBackbone(group_name, group_size)
        head = hssl.ProjectionHead(95 * positions, 512, 128)
        self.networks = nn.ModuleList([encoder, head]).to(device)
        self.loss = getattr(hssl, loss)
        self.fixed = (load(folder, "losses").nt_xent, group)
        self.inputs = [x.to(device), g1, g2]
        self.precision = (device, amp)
        # With this rate the weights stay, and all steps are the same.
        self.optimizer = LARS(self.networks.parameters(), lr=0.0)
        self.scaler = torch.amp.GradScaler(device, enabled=amp == "float16")

    def __call__(self):
        """Take a step; how many seconds it took."""
        start = time.perf_counter()
        with probe.precision(*self.precision):
            loss = self.loss(*self.networks, *self.fixed, *self.inputs)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if loss.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def peak_memory(step):
    """The most bytes that one step's tensors hold beyond what was held before."""
    step()    # By the second call the GPU's kernels are chosen.
    step.optimizer.zero_grad()    # The profiler does not see that older tensors are freed.
    if step.inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = []
    for event in sorted(events, key=operator.methodcaller("start_ns")):
        if event.name() == "[memory]":
            changes.append(event.nbytes())
    return max(itertools.accumulate(changes))


def gradient_error(step):
    """The error of a step's float32 gradient beside the float64 one, as a part of its norm."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        step.networks.to(dtype)
        step.inputs[0] = step.inputs[0].to(dtype)
        step()
        gradients.append(parameters_to_vector(w.grad for w in step.networks.parameters()))
    found, exact = gradients
    return ((found - exact).norm() / exact.norm()).item()


EVALUATE = """
import sys, time, torch
import data, layers, probe
torch.manual_seed(0)
encoder = layers.MNISTBackbone(widths=(16, 32, 64), kernel_size=3).to(sys.argv[2])
glyphs = data.load("glyphs", device=sys.argv[2])
torch.optim.SGD(encoder.parameters())    # PyTorch imports its compiler with the first optimizer
start = time.perf_counter()
probe.evaluate(encoder, glyphs, update_statistics=True)
print(time.perf_counter() - start)
"""


def program_seconds(row, folder, device):
    """The time of a folder's train.py, or that of probe.evaluate, which EVALUATE prints."""
    if row == "evaluate":
        return float(run(sys.executable, "-c", EVALUATE, "--device", device, folder=folder))
    with tempfile.TemporaryDirectory() as empty:
        start = time.perf_counter()
        run(sys.executable, f"{folder}/train.py", "--device", device, folder=empty)
        return time.perf_counter() - start


def compare(title, side, reference, repeats):
    """The record of two sides, functions that return seconds and take turns."""
    record = dict(title=title, seconds=[], reference_seconds=[])
    for _ in range(repeats):
        record["seconds"].append(side())
        record["reference_seconds"].append(reference())
    return record


def compare_steps(title, side, reference, args):
    """Records of time and memory. A side is a folder and the name of a loss."""
    for group in ("translation", "rotation", "scale"):
        for amp in args.amp:
            settings = (group, args.batch_size or 64, args.device, amp)
            first = Step(*side, *settings)
            second = Step(*reference, *settings)
            memory = dict(memory=peak_memory(first), reference_memory=peak_memory(second))
            words = f"{title}, {group}, {amp.replace('off', 'float32')}"
            yield compare(words, first, second, args.repeats) | memory


# Quantities at the paper's batch: row, group, what measures a Step.
LARGE = (
    ("memory", "scale", peak_memory),
    ("error", "translation", gradient_error),
    ("error", "scale", gradient_error),
)


def records_of(row, args):
    """The records of one of ROWS."""
    ours = (ROOT, "h_ssl_loss")
    versus = f"now / {args.against}"
    if row == "step":
        theirs = (args.folder, "h_ssl_loss")
        yield from compare_steps(f"H-SSL, {args.against} / now", theirs, ours, args)
    if row == "a-ssl":
        yield from compare_steps("A-SSL / H-SSL", (ROOT, "a_ssl_loss"), ours, args)
    if row in ("evaluate", "command"):
        now = partial(program_seconds, row, ROOT, args.device)
        before = partial(program_seconds, row, args.folder, args.device)
        yield compare(f"{row}, {versus}", now, before, args.repeats)
    for quantity, group, measure in LARGE:
        if quantity == row:
            record = dict(title=f"{row} of a large step, {group}, {versus}")
            for name, folder in ((row, ROOT), (f"reference_{row}", args.folder)):
                step = Step(folder, "h_ssl_loss", group, args.batch_size or 4096, args.device)
                record[name] = measure(step)
            yield record


def table_line(record):
    """A record's line of the table: ratios of medians, of minima, and of memory or error."""
    cells = [record["title"], "", "", "", "", ""]
    if "seconds" in record:
        times = record["seconds"]
        references = record["reference_seconds"]
        median = statistics.median(references)
        cells[1] = f"{statistics.median(times) / median:.2f}"
        cells[2] = f"{min(times) / min(references):.2f}"
        cells[3] = f"{1000 * median:,.1f}"
    for name in ("memory", "error"):
        if name in record:
            reference = record[f"reference_{name}"]
            cells[4] = f"{record[name] / reference:.2f}"
            cells[5] = f"{reference:.3g}"
    return report.line(*cells)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--against", metavar="REVISION", help="what to compare with (none)")
    add("--rows", nargs="+", choices=ROWS, help="(all; without --against a-ssl)")
    add("--device", choices=("cpu", device), default=device, help="(cuda if there is a GPU)")
    add("--batch-size", type=Number(2), help="images a step (step and a-ssl: 64, the others: 4096)")
    add("--repeats", type=Number(1), default=5, help="times of each side (5)")
    add("--results", metavar="FOLDER", help="folder of the JSON file to write (none)")
    args = parser.parse_args(argv)
    if args.rows is None:
        args.rows = ROWS if args.against else ["a-ssl"]
    if args.against is None and set(args.rows) != {"a-ssl"}:
        parser.error("without --against REVISION there is only --rows a-ssl")
    args.amp = ["float16"] if args.device == "cuda" else ["off", "bfloat16"]
    return args


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")    # the profiler looks for GPUs, and says so
    # Shapes stay, so a search is worth it; and float32 means float32.
    torch.backends.cudnn.benchmark = True
    torch.backends.fp32_precision = "ieee"
    titles = ("compared", "median times", "minimum times", "reference, ms", "memory or error",
              "reference, bytes or 1")
    records = []
    with tempfile.TemporaryDirectory() as args.folder:
        if args.against is not None:
            check_out(args.against, args.folder)
        print("\n".join(report.heading(*titles)))
        for row in args.rows:
            for record in records_of(row, args):
                print(table_line(record), flush=True)
                records.append(record)
    if args.results is not None:
        commit, dirty = tables.commit()
        about = dict(device=args.device, machine=tables.machine(args.device),
                     torch=torch.__version__, commit=commit, dirty=dirty, against=args.against,
                     batch_size=args.batch_size, repeats=args.repeats)
        tables.write_json(args.results, f"benchmark-{args.device}", about | dict(records=records))


if __name__ == "__main__":
    report.run(main)
