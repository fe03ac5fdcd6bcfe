"""What a data set costs that is there already: time until it is ready, and host memory, for one process and for several.

    python experiments/load_cost.py DATASET [--data-dir datasets] [--processes 1 2]

Every process then reads all training images once, as an epoch does. Memory is the proportional set size (Linux): a page
that several processes share counts in parts, so that the sum over processes is what they really take. The same without
the data, mostly PyTorch, is printed beside it.
"""
import argparse
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as datasets                                                                              # noqa: E402


def held():
    """This process's proportional set size, MiB."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024


def work(name, folder, together, results):
    import torchvision                                         # noqa: F401, part of what any process takes
    together.wait()
    before = held()
    together.wait()
    start = time.perf_counter()
    data = datasets.load(name, folder)
    ready = time.perf_counter() - start
    sum(int(part.sum()) for part in data.train_images.split(1000))
    together.wait()
    results.put((ready, before, held()))
    together.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=("mnist", "cifar10", "tiny-imagenet"))
    parser.add_argument("--data-dir", default="datasets")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    args = parser.parse_args()
    data = datasets.load(args.dataset, args.data_dir)          # downloaded, decoded: from now on it is there
    size = sum(t.numel() * t.element_size() for t in (data.train_images, data.test_images, data.train_labels, data.test_labels))
    print(f"{args.dataset}: {len(data.train_images)} training images, {size / 2**20:.0f} MiB in all\n\n"
          "| processes | ready after | memory of all | without the data |\n| --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    for count in args.processes:
        together, results = context.Barrier(count), context.Queue()
        processes = [context.Process(target=work, args=(args.dataset, args.data_dir, together, results)) for _ in range(count)]
        for process in processes:
            process.start()
        ready, before, after = zip(*[results.get() for _ in processes])
        for process in processes:
            process.join()
        print(f"| {count} | {max(ready):.2f} s | {sum(after):.0f} MiB | {sum(before):.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
