"""What the parts of benchmark.py share: a training step, times in turn, memory, and a table of the results."""
import importlib
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import runs                                                # noqa: F401, first: it finds the project's modules
import data as datasets
import run
import train
from hssl import allowed_pairs, drawn_sets
from lars import LARS

# Of training steps. On a CPU the residual network is narrower.
FLAGS = {"cpu": {"mnist": "--batch-size 128", "cifar10": "--batch-size 64 --depth 10 --widths 8 16 32 64",
                 "tiny-imagenet": "--batch-size 32 --depth 10 --widths 4 8 16 32"},
         "cuda": {"mnist": "--batch-size 4096", "cifar10": "--batch-size 128", "tiny-imagenet": "--batch-size 32"}}


def training_step(dataset, flags, device):
    """A step as train.py takes it, the same step on one batch that is in place (two callables), and images per step."""
    args = train.parse(["--dataset", dataset, "--device", device, *flags.split()])
    args.batch_size *= 4 if args.group == "translation" else 1                 # its network is that much smaller
    torch.manual_seed(0)
    channels, side = datasets.SHAPES[dataset]
    images = torch.randint(256, (args.batch_size, channels, side, side), dtype=torch.uint8, device=device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    data = datasets.Dataset(images, labels, images, labels, 10, 0.0, 0.3)
    encoder, group = run.build(vars(args), channels, side)
    objective = train.make_objective(args, encoder, group, data).to(device)
    optimizer = LARS([p for p in objective.parameters() if p.requires_grad], 0.1)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "float16")
    sets = (allowed_pairs(group) if args.views == 2 else drawn_sets(group, args.views)).to(device)
    elements = group.elements.to(device)

    def batch():
        chosen = sets[torch.randint(len(sets), (args.batch_size,), device=device)]
        return data.batch(images, torch.randperm(args.batch_size, device=device)), *elements[chosen].unbind(1)

    def step(x, *g):
        with torch.autocast(device, getattr(torch, args.amp, None), enabled=args.amp != "off"):
            loss = objective(x, *g)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        objective.after_step(0)

    ready = batch()
    return lambda: step(*batch()), lambda: step(*ready), args.batch_size


def seconds(f, device):
    """The time of one call, until the GPU is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def compare(sides, rounds, device):
    """Time callables {name: f} in alternating order: {name: (median seconds, median of its ratios to the first)}."""
    for f in sides.values():
        f(), f()                                                               # by the second call all is allocated
    times = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[::1 if i % 2 else -1]:
            times[name].append(seconds(sides[name], device))
    first = next(iter(times.values()))
    return {name: (statistics.median(own), statistics.median(a / b for a, b in zip(own, first)))
            for name, own in times.items()}


def peak_memory(f, device):
    """The most memory that f() holds beyond what is held before, in bytes. In a process of its own, as memory that
    earlier work left behind would hide some of it; so f must be picklable."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, f, device).result()


def _peak_memory(f, device):
    def peak():
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])                                     # as Linux counts it

    f()                                                                        # what a first call sets up stays
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")                          # VmHWM restarts from what is held now
    before = peak()
    f()
    return peak() - before


def kept_memory(f):
    """Bytes that autograd keeps for the backward pass of f(), which returns a tensor; each storage counted once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f()                                                                # keeps them all alive for now
    return sum(storages.values()) if y.requires_grad else 0


def installed(name):
    """A module, or None if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def header(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
