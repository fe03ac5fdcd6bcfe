"""Table 1: {frozen, A-SSL, H-SSL, supervised} for each data set and group, and experiment 2, the same with the structure removed.

    python experiments/table1.py mnist --budget cpu --jobs 2          (or cifar10, tiny-imagenet; or mnist-untied, ...)
"""
from report import METHODS
from runs import main

GROUPS = ("translation", "rotation", "scale")

# On a CPU a lifted network has as many channels in all as the plain one about, so that all cost alike.
MNIST_CPU = "--dataset mnist --device cpu --train-images 10000 --batch-size 512 --epochs 8 --warmup-epochs 1 --trust-coefficient 0.03"
RESIDUAL_CPU = "--device cpu --batch-size 256 --warmup-epochs 1 --depth 10 --probe-epochs 40 --widths 8 16 32 64 --trust-coefficient 0.01"
CPU = {
    ("mnist", "translation"): f"{MNIST_CPU} --widths 16 32 64 --kernel-size 5",
    ("mnist", "rotation"): f"{MNIST_CPU} --widths 4 8 16 --kernel-size 5 --temperature 1",
    ("mnist", "scale"): f"{MNIST_CPU} --widths 4 8 16 --kernel-size 7 --temperature 1",
    ("cifar10", "translation"): f"--dataset cifar10 --train-images 5000 {RESIDUAL_CPU} --epochs 8 --kernel-size 5 --grid 1",
    ("cifar10", "rotation"): f"--dataset cifar10 --train-images 5000 {RESIDUAL_CPU} --epochs 6 --kernel-size 5 --extent 1 --grid 0",
    ("cifar10", "scale"): f"--dataset cifar10 --train-images 5000 {RESIDUAL_CPU} --epochs 6 --kernel-size 7 --grid 1",
    ("tiny-imagenet", "translation"): f"--dataset tiny-imagenet --train-images 16000 {RESIDUAL_CPU} --epochs 3 --kernel-size 5 --grid 1",
}
GPU = {"mnist": "--epochs 50 --warmup-epochs 5 --batch-size 1024", "cifar10": "--epochs 100 --batch-size 512",
       "tiny-imagenet": "--epochs 100 --batch-size 256"}


def flags(dataset, group, budget):
    """What every run on a data set and group starts from, or None where a budget has no setting for it."""
    if budget == "cpu":
        return CPU.get((dataset, group)) and f"{CPU[dataset, group]} --group {group}"
    return f"--dataset {dataset} --group {group}" + (f" {GPU[dataset]}" if budget == "gpu" else "")


def rows(dataset, budget):
    return {f"{group} {method}": f"{base} --method {method}" for group in GROUPS for method in METHODS if (base := flags(dataset, group, budget))}


def untied(dataset, budget):
    """The rows of experiment 2. Without convolutions the residual network is too large: translation takes MNIST's."""
    found = {}
    for group in GROUPS:
        base = flags(dataset, group, budget)
        if base and not (dataset != "mnist" and group == "translation"):
            found |= {f"{group} {method}": f"{base} --method {method} --structure none" for method in ("a-ssl", "h-ssl")}
    return found


if __name__ == "__main__":
    main(__doc__, {dataset: lambda budget, d=dataset: rows(d, budget) for dataset in ("mnist", "cifar10", "tiny-imagenet")}
         | {f"{dataset}-untied": lambda budget, d=dataset: untied(d, budget) for dataset in ("mnist", "cifar10", "tiny-imagenet")})
