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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lars import LARS                                                                                # noqa: E402
from layers import MNISTBackbone, ResidualBackbone                                                                     # noqa: E402
from probe import write_whole                                                                        # noqa: E402

NETWORKS = {
    "MNIST, rotation": lambda: MNISTBackbone("rotation", 4),
    "residual, translation": lambda: ResidualBackbone("translation"),
    "residual, scale": lambda: ResidualBackbone("scale", 3),
    "residual, rotation": lambda: ResidualBackbone("rotation", 4),
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
