"""What train.py and probe.py refuse, through their real command lines, and the table of it.

    python -m pytest -s tests/test_bad_input.py

Every case must end with exit status 2, one line on stderr that holds the words given here, no traceback, and every file
of the run and of the data as it was.
"""
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import data as datasets
from test_data import write_cifar10, write_tiny_imagenet
from test_interruption import Harmful

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--device cpu --train-images 200 --batch-size 64 --epochs 2 --widths 2 3 4 --probe-epochs 1".split()

# train.py FLAGS: what the message must say
FLAGS = {
    "--epoch 3": "unrecognized", "--dataset imagenet": "invalid choice", "--method simsiam": "invalid choice", "--group mirror": "invalid choice",
    "--backbone residual": "four positive", "--backbone residual --widths 2 2 2 2 --depth 12": "6n + 4",
    "--epochs 0": "at least 1", "--epochs 1.5": "invalid int", "--batch-size 4096": "more than the 200 training",
    "--lr nan": "above 0", "--temperature 0": "above 0", "--temperature -1": "above 0", "--momentum 1": "below 1",
    "--seed -1": "at least 0", "--widths 4 8": "three positive", "--widths 0 8 16": "at least 1", "--kernel-size 4": "odd", "--kernel-size 29": "28x28",
    "--sigma 1e-300": "vanishes", "--sigma 1e300": "floating point", "--widths 99999 99999 99999": "not enough memory", "--scale-step 1": "above 1",
    "--elements 1": "two group elements", "--extent 5": "1 to 4", "--base-space 5": "1 to 4",
    "--group translation --base-space 8": "1 to 7", "--group scale --base-space 3": "two group elements", "--max-distance 0": "at least 1",
    "--grid 8": "at most 7", "--probe-grid 9": "at most 7", "--train-images 20000": "10000 training images",
    "--views 1": "at least 2", "--views 5": "fewer views", "--views 3 --objective byol": "needs --objective nt-xent", "--objective vicreg": "invalid choice",
    "--target-decay 1.5": "at most 1", "--crop": "a-ssl --group translation", "--group translation --window 4": "--base-space",
    "--window 8": "1 to 7", "--structure none --group translation --backbone residual --widths 2 2 2 2": "take mnist",
}


def idx(path, shape, kind=8, top=256):
    """Write an IDX file of random bytes; kind 8 says unsigned bytes."""
    values = torch.randint(top, shape, dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(struct.pack(f">I{len(shape)}I", 256 * kind + len(shape), *shape) + values)


def mnist(folder):
    """A small data set in MNIST's format; returns the paths of training images and labels."""
    raw = folder / "datasets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 20)):
        idx(raw / f"{part}-images-idx3-ubyte", (count, 28, 28))
        idx(raw / f"{part}-labels-idx1-ubyte", (count,), top=10)
    return raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def edit(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def only_archive(images):
    images.with_suffix(".gz").write_bytes(b"\x1f\x8bnot really")
    images.unlink()


# name: (what is done to a copy of a small MNIST, what the message must say)
FILES = {
    "no data, no network": (lambda images, labels: shutil.rmtree(images.parent), "train-images-idx3-ubyte"),
    "no file of labels, no network": (lambda images, labels: labels.unlink(), "train-labels-idx1-ubyte"),
    "images only as a corrupt archive, no network": (lambda images, labels: only_archive(images), "train-images-idx3-ubyte"),
    "images cut": (lambda images, labels: cut(images, 1000), "train-images-idx3-ubyte"),
    "images cut within the header": (lambda images, labels: cut(images, 6), "train-images-idx3-ubyte"),
    "images empty": (lambda images, labels: cut(images, 0), "train-images-idx3-ubyte"),
    "labels cut": (lambda images, labels: cut(labels, 50), "train-labels-idx1-ubyte"),
    "images with a wrong magic number": (lambda images, labels: images.write_bytes(b"\x89PNG" + images.read_bytes()[4:]), "train-images-idx3-ubyte"),
    "images that say they are floats": (lambda images, labels: idx(images, (200, 28, 28), kind=13), "train-images-idx3-ubyte"),
    "images and labels exchanged": (lambda images, labels: labels.write_bytes(images.read_bytes()), "train-labels-idx1-ubyte"),
    "fewer labels than images": (lambda images, labels: idx(labels, (199,), top=10), "199 labels up to 9 for images (200, 28, 28)"),
    "images of another size": (lambda images, labels: idx(images, (200, 27, 27)), "27"),
    "labels beyond 9": (lambda images, labels: labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b"), "11"),
    "no images": (lambda images, labels: (idx(images, (0, 28, 28)), idx(labels, (0,))), "train-images-idx3-ubyte"),
}


def decode(tree):
    """Leave only a finished cache."""
    datasets.load("tiny-imagenet", tree.parent)
    return tree.with_name("tiny-imagenet-200-decoded")


# The same for the other two data sets: (data set, what is done to its folder, what the message must say)
FOLDERS = {
    "no CIFAR-10, no network": ("cifar10", shutil.rmtree, "cifar-10-python.tar.gz"),
    "CIFAR-10 with an altered file, no network": ("cifar10", lambda folder: cut(folder / "data_batch_2", 5000), "data_batch_1"),
    "CIFAR-10 only as a corrupt archive, no network": (
        "cifar10", lambda folder: (folder.parent / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8bno"), "cifar-10-python.tar.gz"),
    "no Tiny ImageNet, no network": ("tiny-imagenet", shutil.rmtree, "tiny-imagenet-200.zip"),
    "Tiny ImageNet only as a corrupt archive, no network": (
        "tiny-imagenet", lambda tree: (shutil.rmtree(tree), tree.with_suffix(".zip").write_bytes(b"PK")), "tiny-imagenet-200.zip"),
    "Tiny ImageNet without val_annotations.txt": ("tiny-imagenet", lambda tree: (tree / "val" / "val_annotations.txt").unlink(), "val_annotations.txt"),
    "Tiny ImageNet with a class short of an image": (
        "tiny-imagenet", lambda tree: (tree / "train" / "n003" / "images" / "n003_1.JPEG").unlink(), "1 to 2 training images"),
    "Tiny ImageNet with a cut image": (
        "tiny-imagenet", lambda tree: cut(tree / "train" / "n003" / "images" / "n003_1.JPEG", 300), "n003_1.JPEG is missing or damaged"),
    "Tiny ImageNet without a validation image": ("tiny-imagenet", lambda tree: (tree / "val" / "images" / "val_9.JPEG").unlink(), "val_9.JPEG"),
    "Tiny ImageNet with a cut cache": (
        "tiny-imagenet", lambda tree: cut(decode(tree) / "train_images.npy", 100_000), "tiny-imagenet-200-decoded is damaged"),
    "Tiny ImageNet with half a cache": (
        "tiny-imagenet", lambda tree: (decode(tree) / "val_labels.npy").unlink(), "tiny-imagenet-200-decoded is damaged"),
    "Tiny ImageNet with a cache of other lengths": (
        "tiny-imagenet", lambda tree: shutil.copy(decode(tree) / "val_labels.npy", decode(tree) / "train_labels.npy"), "200 labels"),
}


def foreign(path):
    path.parent.mkdir(exist_ok=True)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def only_config(run):
    for name in ("checkpoint.pt", "log.jsonl", "probe.json"):
        (run / name).unlink()


def strange(run):
    only_config(run)
    (run / "thesis.tex").write_text("years of work")


def full(path):
    """Any write to path's temporary file meets a full disk."""
    Path(f"{path}.tmp").symlink_to("/dev/full")


def full_disk_at_first_save(run):
    only_config(run), (run / "config.json").unlink()
    full(run / "checkpoint.pt")


# name: (program and its flags, what is done to a copy of a finished run before it, what the message must say). RUN is the copy.
RUNS = {
    "a run is there": ("train.py --out RUN", lambda run: None, "--resume"),
    "other settings": ("train.py --out RUN --resume --seed 5", lambda run: None, "made with --seed 0"),
    "other files, no run": ("train.py --out RUN --resume", strange, "thesis.tex"),
    "out is a file": ("train.py --out RUN/config.json --resume", lambda run: None, "is a file"),
    "out cannot be made": ("train.py --out /proc/run", lambda run: None, "/proc/run"),
    "disk full at a save": ("train.py --out RUN --resume", full_disk_at_first_save, "No space left"),
    "cut checkpoint": ("train.py --out RUN --resume", lambda run: cut(run / "checkpoint.pt", 2000), "checkpoint.pt is damaged"),
    "foreign checkpoint": ("train.py --out RUN --resume", lambda run: foreign(run / "checkpoint.pt"), "not a checkpoint of train.py"),
    "malicious checkpoint": ("train.py --out RUN --resume", lambda run: torch.save(Harmful("harm"), run / "checkpoint.pt"), "was not loaded"),
    "batch of 64 for 3 processes": ("train.py --out RUN/new", lambda run: None, "cannot be shared by 3 processes"),
    "probe without a run": ("probe.py", lambda run: None, "required: run"),
    "probe with an unknown flag": ("probe.py RUN --fast", lambda run: None, "unrecognized"),
    "probe of no folder": ("probe.py RUN/nowhere", lambda run: None, "checkpoint.pt is missing"),
    "probe of an untrained run": ("probe.py RUN", only_config, "checkpoint.pt is missing"),
    "probe of a cut checkpoint": ("probe.py RUN", lambda run: cut(run / "checkpoint.pt", 2000), "checkpoint.pt is damaged"),
    "probe of a foreign checkpoint": ("probe.py RUN", lambda run: foreign(run / "checkpoint.pt"), "not a checkpoint of train.py"),
    "probe of a malicious checkpoint": ("probe.py RUN", lambda run: torch.save(Harmful("harm"), run / "checkpoint.pt"), "was not loaded"),
    "probe of weights of another encoder": (
        "probe.py RUN", lambda run: edit(run / "checkpoint.pt", lambda c: c["settings"].update(widths=[4, 4, 4])), "does not fit"),
    "probe of damaged settings": ("probe.py RUN", lambda run: edit(run / "checkpoint.pt", lambda c: c["settings"].pop("sigma")), "'sigma'"),
    "probe whose data are gone": (
        "probe.py RUN", lambda run: edit(run / "checkpoint.pt", lambda c: c["settings"].update(dataset="mnist")), "MNIST"),
    "probe with a full disk": ("probe.py RUN", lambda run: full(run / "probe.json"), "No space left"),
}
if not torch.cuda.is_available():
    FLAGS["--device cuda"] = "CUDA GPU"
    RUNS["probe on a GPU that is not there"] = ("probe.py RUN --device cuda", lambda run: None, "CUDA GPU")


def contents(folder):
    """Every file that must survive: all but an unfinished temporary one."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"}


def call(case, folder, finished):
    """Prepare a case in its folder and run it: (command, done, what is wrong with how it ended)."""
    environment = os.environ | dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", OMP_NUM_THREADS="1")   # no network
    folder.mkdir()
    if case in FLAGS:
        command, words = ["train.py", *SMALL, *case.split(), "--out", "run"], FLAGS[case]
    elif case in FILES:
        spoil, words = FILES[case]
        spoil(*mnist(folder))
        command = ["train.py", *SMALL, "--dataset", "mnist", "--data-dir", "datasets", "--out", "run"]
    elif case in FOLDERS:
        name, spoil, words = FOLDERS[case]
        (write_cifar10 if name == "cifar10" else write_tiny_imagenet)(folder / "datasets")
        spoil(folder / "datasets" / ("cifar-10-batches-py" if name == "cifar10" else "tiny-imagenet-200"))
        command = ["train.py", *SMALL, "--dataset", name, "--data-dir", "datasets", "--out", "run"]
    else:
        flags, spoil, words = RUNS[case]
        shutil.copytree(finished, folder / "run")
        spoil(folder / "run")
        flags = flags.replace("RUN", "run").split()
        command = [flags[0], *(SMALL if flags[0] == "train.py" else []), *flags[1:]]
        if "3 processes" in case:
            environment |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3")
    before = contents(folder)
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    after = contents(folder)
    wrong = [text for text, holds in (
        ("status", done.returncode == 2), ("one line", done.stderr.count("\n") == 1 and "Traceback" not in done.stderr),
        ("words", words in done.stderr), ("files", before.items() <= after.items()), ("harm", not (folder / "harm").exists()))
             if not holds]
    return " ".join(command).replace(" ".join(SMALL) + " ", ""), done, wrong


def test_table_of_bad_input(tmp_path):
    finished = tmp_path / "finished"
    subprocess.run([sys.executable, "train.py", *SMALL, "--out", finished], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    cases = [*FLAGS, *FILES, *FOLDERS, *RUNS]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda k: call(cases[k], tmp_path / str(k), finished), range(len(cases))))
    for case, (command, done, wrong) in zip(cases, results):
        print(command + ("" if case in FLAGS else f"   [{case}]") + f"\n    {done.stderr.strip()}")
    failures = [f"{case}: {wrong}, status {done.returncode}: {done.stderr}" for case, (_, done, wrong) in zip(cases, results) if wrong]
    assert len(cases) >= 30 and not failures, "\n".join(failures)
