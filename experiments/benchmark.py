"""Time a training step of A-SSL beside one of H-SSL, and compare their memory.

    python experiments/benchmark.py [--device cpu] [--batch-size 64] [--results FOLDER]

Networks are MNIST's, in their full width and for all three groups, and images are random. The two
sides of a row take turns in one process. Prints one Markdown table.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import report
import tables

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import probe    # noqa: E402
import train    # noqa: E402
from lars import LARS    # noqa: E402


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


class Step:
    """A training step as train.py takes it, on one batch that is in place."""

    def __init__(self, args, method, group_name, amp):
        settings = train.parse([
            "--dataset", "mnist", "--method", method, "--group", group_name, "--amp", amp])
        settings.image_shape = [1, 28]
        objective, pairs = train.make_objective(settings, classes=10)
        self.objective = objective.to(args.device)
        self.device = args.device
        self.amp = amp
        self.optimizer = LARS(objective.parameters(), 0.1)
        self.scaler = torch.amp.GradScaler(args.device, enabled=amp == "float16")
        drawn = pairs[torch.randint(len(pairs), (args.batch_size,))]
        g1, g2 = drawn.to(args.device).unbind(1)
        x = torch.rand(args.batch_size, 1, 28, 28, device=args.device)
        self.inputs = (x, g1, g2)

    def __call__(self):
        with probe.precision(self.device, self.amp):
            loss = self.objective(*self.inputs)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def compare_steps(args):
    """A-SSL's training step over H-SSL's, by group and precision: records of `compare`."""
    for group in ("translation", "rotation", "scale"):
        for amp in args.amp:
            a_ssl = Step(args, "a-ssl", group, amp)
            h_ssl = Step(args, "h-ssl", group, amp)
            title = f"A-SSL / H-SSL, {group}, {amp.replace('off', 'float32')}"
            yield compare(title, a_ssl, h_ssl, args)


def table_line(record):
    reference = statistics.median(record["reference_seconds"])
    ratio = statistics.median(record["seconds"]) / reference
    cells = [record["title"], f"{ratio:.2f}", f"{1000 * reference:,.1f}"]
    bytes_held = record["reference_memory"]
    cells += [f"{record['memory'] / bytes_held:.2f}", f"{bytes_held / 1e6:,.1f}"]
    return report.line(*cells)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="(cuda if there is a GPU)")
    add("--batch-size", type=int, help="images a step (cuda: 4096, cpu: 64)")
    add("--amp", nargs="+", choices=("off", "bfloat16", "float16"),
        help="(cuda: float16, cpu: off bfloat16)")
    add("--repeats", type=int, default=3, help="times of each side (3)")
    add("--results", metavar="FOLDER", help="folder of the JSON file to write (none)")
    args = parser.parse_args(argv)
    if args.device != device == "cpu":
        parser.error("PyTorch sees no GPU: take --device cpu")
    if args.batch_size is None:
        args.batch_size = 4096 if args.device == "cuda" else 64
    if args.amp is None:
        args.amp = ["float16"] if args.device == "cuda" else ["off", "bfloat16"]
    return args


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")    # the profiler looks for GPUs, and says so
    # Shapes stay, so a search is worth it; and float32 means float32.
    torch.backends.cudnn.benchmark = True
    torch.backends.fp32_precision = "ieee"
    titles = ["compared", "ratio of times", "reference, ms", "ratio of peak memory",
              "reference, MB"]
    print("\n".join(report.heading(*titles)))
    records = []
    for record in compare_steps(args):
        print(table_line(record), flush=True)
        records.append(record)
    if args.results is not None:
        commit, dirty = tables.commit()
        content = dict(device=args.device, machine=tables.machine(args.device),
                       torch=torch.__version__, commit=commit, dirty=dirty,
                       batch_size=args.batch_size, repeats=args.repeats, records=records)
        tables.write_json(args.results, f"benchmark-{args.device}", content)


if __name__ == "__main__":
    report.run(main)
