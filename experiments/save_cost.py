"""What saving a checkpoint costs: time, size, and memory above that of the training state.

    python experiments/save_cost.py [--rounds 5] [--folder .]

Each size in a process of its own, so that its peak is its own. The state is weights, batch norm and LARS's momentum.
"""
import argparse
import io
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lars import LARS                                                                                # noqa: E402
from layers import MNISTBackbone                                                                     # noqa: E402
from probe import write_whole                                                                        # noqa: E402

# As many numbers as SESN's residual network for 32x32 and 64x64 images has: depth 16, widths 16-128-256-512.
BLOCKS = [(3, 16), (16, 128), (128, 128), *[(128, 128)] * 2, (128, 256), (256, 256), *[(256, 256)] * 2, (256, 512), (512, 512), *[(512, 512)] * 2]
NETWORKS = {
    "MNIST, rotation (filters span 4 orientations)": lambda: MNISTBackbone("rotation", 4),
    "residual, 9 numbers per filter": lambda: nn.ModuleList(nn.Conv2d(a, b, 3) for a, b in BLOCKS),
    "residual, 60 numbers per filter (rotation)": lambda: nn.ModuleList(nn.Conv2d(a, b, (6, 10)) for a, b in BLOCKS),
}


def memory(which):
    """Resident memory now ("VmRSS") or at its peak ("VmHWM"), MiB (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def measure(name, rounds, folder):
    model = NETWORKS[name]()
    optimizer = LARS(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    path, times = Path(folder) / "save_cost.pt", []
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")              # the peak starts anew
    for _ in range(rounds):
        start = time.perf_counter()
        content = io.BytesIO()
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), content)
        made = time.perf_counter()
        write_whole(path, content.getbuffer())
        times.append((made - start, time.perf_counter() - made))
        size = content.getbuffer().nbytes
        del content
    extra = memory("VmHWM") - before
    path.unlink()
    pack, write = (statistics.median(t) for t in zip(*times))
    print(f"| {name} | {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M | {size / 2**20:.1f} MiB | {pack:.2f} s | {write:.2f} s | {extra:.0f} MiB |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk to measure")
    args = parser.parse_args()
    print(f"torch {torch.__version__}\n| network | parameters | checkpoint | packing | writing, to the disk | memory above |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in NETWORKS:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, args.rounds, args.folder))
        process.start(), process.join()


if __name__ == "__main__":
    main()
