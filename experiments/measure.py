"""What other scripts here measure with: a training step, times in turn, memory, waits, a table of results."""
import contextlib
import importlib
import io
import multiprocessing
import statistics
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import runs                                                # noqa: F401, first: it finds the project's modules
import data as datasets
import run
import train
from hssl import allowed_pairs, drawn_sets
from lars import LARS

# Of training steps: images, and further flags; translation, whose network is that much smaller, takes four times the
# images. On a CPU the residual network is narrower.
FLAGS = {"cpu": {"mnist": (128, ""), "cifar10": (64, "--depth 10 --widths 8 16 32 64"),
                 "tiny-imagenet": (32, "--depth 10 --widths 4 8 16 32")},
         "cuda": {"mnist": (4096, ""), "cifar10": (128, ""), "tiny-imagenet": (32, "")}}


def flags_of(dataset, group, device):
    images, flags = FLAGS[device][dataset]
    return f"--dataset {dataset} --group {group} --batch-size {images * (4 if group == 'translation' else 1)} {flags}"


def training_step(flags, device):
    """A step as train.py takes it, the same step on one batch that is in place (two callables), and images per step."""
    args = train.parse(["--device", device, *flags.split()])
    torch.manual_seed(0)
    channels, side = datasets.SHAPES[args.dataset]
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
        with run.precision(device, args.amp):
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


class Held(TorchDispatchMode):
    """Add up the storages that are alive: the most at any time, in bytes (peak), and the elements of the largest."""
    def __init__(self):
        super().__init__()
        self.held, self.alive, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, tensor.numel())
                if storage._cdata not in self.held:
                    size = storage.nbytes()
                    self.held[storage._cdata] = weakref.finalize(storage, self.gone, storage._cdata, size)
                    self.alive += size
                    self.peak = max(self.peak, self.alive)
        return out

    def gone(self, key, size):
        del self.held[key]
        self.alive -= size


def step_memory(flags, images):
    """Shapes alone, nothing is computed: the most bytes that weights, momentum and a step's forward and backward pass
    hold at a time in half precision for so many images, and the elements of the largest tensor. A GPU adds what its
    convolutions work in."""
    args = train.parse(["--device", "cpu", *flags.split()])
    channels, side = datasets.SHAPES[args.dataset]
    encoder, group = run.build(vars(args), channels, side)
    one = torch.zeros(1, channels, side, side, dtype=torch.uint8)
    objective = train.make_objective(args, encoder, group, datasets.Dataset(one, None, one, None, 10, 0.0, 0.3))
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        states = {name: torch.empty(p.shape, requires_grad=p.requires_grad) for name, p in objective.named_parameters()}
        momentum = [torch.empty_like(p) for p in states.values()]                                    # noqa: F841
        states |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in objective.named_buffers()}
        g = torch.zeros(2, images, *group.elements.shape[1:], dtype=torch.long)
        with run.precision("cpu", "float16"):
            loss = torch.func.functional_call(objective, states, (torch.zeros(images, channels, side, side), *g))
        loss.backward()
    return held.peak, held.largest


# --------------------------------------------------------------------------------------------------------------- waits
class Reads(TorchDispatchMode):
    """Count the operations that read a tensor's values, for which the CPU would wait if they were on a GPU."""
    NAMES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero"}

    def __init__(self):
        super().__init__()
        self.count, tolist = 0, torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return tolist(tensor)
        self.patch = mock.patch.object(torch.Tensor, "tolist", counted)        # on a CPU it is no operation

    def __enter__(self):
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.stop()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = args[1] if name.startswith("aten::index") and isinstance(args[1], (list, tuple)) else ()
        self.count += name in self.NAMES or any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in masks)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_waits(device):
    """Yields a function: how often the CPU waited for the GPU since its last call, or would have (Reads) on a CPU."""
    if device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

            def count():
                found = sum("synchronizing" in str(warning.message) for warning in caught)
                caught.clear()
                return found
            try:
                yield count
            finally:
                torch.cuda.set_sync_debug_mode("default")
    else:
        with Reads() as reads:
            def count():
                found, reads.count = reads.count, 0
                return found
            yield count


def waits(flags, device):
    """Run train.main with --log-every larger than an epoch; returns the waits of each step, from the end of one to that
    of the next, without the epochs' ends, where the log reads all losses."""
    found = []

    class Signals(run.Signals):
        """train.main has its loop in this context."""
        def __enter__(self):
            self.counting = counted_waits(device)
            Log.count = staticmethod(self.counting.__enter__())
            return super().__enter__()

        def __exit__(self, *exception):
            self.counting.__exit__(*exception)
            super().__exit__(*exception)

    class Log(run.Log):
        def step(self, *given, **more):
            found.append(self.count())
            super().step(*given, **more)
            self.count()

    with mock.patch.object(run, "Signals", Signals), mock.patch.object(run, "Log", Log), \
            contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        train.main(train.parse([*flags.split(), "--device", device, "--log-every", "1000000", "--probe-iterations", "9",
                                "--out", f"{folder}/run"]))
    return found


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
