"""What train.py and probe.py refuse, and the table of it.

    python -m pytest -s tests/test_bad_input.py

Every case must end with exit status 2, one line on stderr that holds the words given here, no traceback, and every file
of the run and of the data as it was. The programs are called in this process; the cases in COMMAND_LINES start them as
processes of their own.
"""
import contextlib
import functools
import io
import os
import shutil
import struct
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import data as datasets
import probe
import run as runs
import train
from helpers import ROOT, SMALL, train_here
from test_data import write_cifar10, write_tiny_imagenet
from test_interruption import Harmful

NO_NETWORK = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")

# train.py FLAGS: what the message must say
FLAGS = {
    "--epoch 3": "unrecognized", "--window 4": "unrecognized", "--dataset imagenet": "invalid choice",
    "--method simsiam": "invalid choice", "--group mirror": "invalid choice", "--objective vicreg": "invalid choice",
    "--backbone residual": "4 positive", "--backbone residual --widths 2 2 2 2 --depth 12": "6n + 4",
    "--epochs 0": "at least 1", "--epochs 1.5": "invalid int", "--batch-size 4096": "more than the 200 training",
    "--train-images 1": "at least 2", "--train-images 20000": "10000 training images",
    "--nuisance mirror": "invalid choice", "--nuisance translation --kernel-size 41": "40x40",
    "--nuisance translation --grid 11": "at most 10",
    "--nuisance translation --group translation --base-space 11": "1 to 10",
    "--lr nan": "above 0", "--temperature 0": "above 0", "--temperature -1": "above 0", "--momentum 1": "below 1",
    "--seed -1": "at least 0", "--seed 9223372036854775808": "below 2**63",
    "--padding circular --kernel-size 17": "at most 15 for",
    "--widths 4 8": "3 positive", "--widths 0 8 16": "at least 1", "--widths 99999 99999 99999": "not enough memory",
    "--kernel-size 4": "odd", "--kernel-size 29": "28x28",
    "--sigma 1e-300": "vanishes", "--sigma 1e300": "floating point", "--scale-step 1": "above 1",
    "--group-size 1": "two group elements", "--extent 5": "1 to 4", "--base-space 5": "1 to 4",
    "--group translation --base-space 8": "1 to 7", "--group scale --base-space 3": "two group elements",
    "--max-distance 0": "at least 1", "--grid 8": "at most 7", "--probe-grid 9": "at most 7",
    "--views 1": "at least 2", "--views 5": "fewer views", "--views 3 --objective byol": "needs --objective nt-xent",
    "--views 3 --max-distance 1": "for two views", "--target-decay 1.5": "at most 1",
    "--augment 1 --method supervised": "for --method h-ssl or a-ssl", "--augment 0": "at least 1",
    "--augment 2 --method a-ssl": "take --augment 1", "--augment 2 --objective byol": "take --augment 1",
    "--crop": "a-ssl --group translation", "--group translation --crop": "a-ssl --group translation",
    "--group translation --method a-ssl --crop --structure none": "--structure group",
    "--structure none --group translation --backbone residual --widths 2 2 2 2": "too large",
}


def idx(path, shape, kind=8, top=256):
    """Write an IDX file of random bytes; kind 8 says unsigned bytes."""
    values = torch.randint(top, shape, dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(struct.pack(f">I{len(shape)}I", 256 * kind + len(shape), *shape) + values)


def mnist(folder):
    """A small data set in MNIST's format; returns the paths of training images and labels."""
    raw = folder / "MNIST" / "raw"
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


def spoil_magic(images):
    images.write_bytes(b"\x89PNG" + images.read_bytes()[4:])


# name: (what is done to a copy of a small MNIST, what the message must say)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FILES = {
    "no data, no network": (lambda images, labels: shutil.rmtree(images.parent), IMAGES),
    "no file of labels, no network": (lambda images, labels: labels.unlink(), LABELS),
    "images only as a corrupt archive, no network": (lambda images, labels: only_archive(images), IMAGES),
    "images cut": (lambda images, labels: cut(images, 1000), IMAGES),
    "images cut within the header": (lambda images, labels: cut(images, 6), IMAGES),
    "images empty": (lambda images, labels: cut(images, 0), IMAGES),
    "labels cut": (lambda images, labels: cut(labels, 50), LABELS),
    "images with a wrong magic number": (lambda images, labels: spoil_magic(images), IMAGES),
    "images that say they are floats": (lambda images, labels: idx(images, (200, 28, 28), kind=13), IMAGES),
    "images and labels exchanged": (lambda images, labels: labels.write_bytes(images.read_bytes()), LABELS),
    "fewer labels than images": (
        lambda images, labels: idx(labels, (199,), top=10), "199 labels up to 9 for images (200, 28, 28)"),
    "images of another size": (lambda images, labels: idx(images, (200, 27, 27)), "27"),
    "labels beyond 9": (lambda images, labels: labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b"), "11"),
    "no images": (lambda images, labels: (idx(images, (0, 28, 28)), idx(labels, (0,))), IMAGES),
}


def decode(tree):
    """Leave only a finished cache."""
    datasets.load("tiny-imagenet", tree.parent)
    return tree.with_name("tiny-imagenet-200-decoded")


def an_image(tree):
    return tree / "train" / "n003" / "images" / "n003_1.JPEG"


# The same for the other two data sets: (data set, what is done to its folder, what the message must say)
FOLDERS = {
    "no CIFAR-10, no network": ("cifar10", shutil.rmtree, "cifar-10-python.tar.gz"),
    "CIFAR-10 with an altered file, no network": (
        "cifar10", lambda folder: cut(folder / "data_batch_2", 5000), "data_batch_1"),
    "CIFAR-10 only as a corrupt archive, no network": (
        "cifar10", lambda folder: (folder.parent / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8bno"),
        "cifar-10-python.tar.gz"),
    "no Tiny ImageNet, no network": ("tiny-imagenet", shutil.rmtree, "tiny-imagenet-200.zip"),
    "Tiny ImageNet only as a corrupt archive, no network": (
        "tiny-imagenet", lambda tree: (shutil.rmtree(tree), tree.with_suffix(".zip").write_bytes(b"PK")),
        "tiny-imagenet-200.zip"),
    "Tiny ImageNet without val_annotations.txt": (
        "tiny-imagenet", lambda tree: (tree / "val" / "val_annotations.txt").unlink(), "val_annotations.txt"),
    "Tiny ImageNet with a class short of an image": (
        "tiny-imagenet", lambda tree: an_image(tree).unlink(), "1 to 2 training images"),
    "Tiny ImageNet with a cut image": (
        "tiny-imagenet", lambda tree: cut(an_image(tree), 300), "n003_1.JPEG is missing or damaged"),
    "Tiny ImageNet without a validation image": (
        "tiny-imagenet", lambda tree: (tree / "val" / "images" / "val_9.JPEG").unlink(), "val_9.JPEG"),
    "Tiny ImageNet with a cut cache": (
        "tiny-imagenet", lambda tree: cut(decode(tree) / "images", 100_000),
        "tiny-imagenet-200-decoded is damaged"),
    "Tiny ImageNet with half a cache": (
        "tiny-imagenet", lambda tree: (decode(tree) / "about.json").unlink(),
        "tiny-imagenet-200-decoded is damaged"),
    "Tiny ImageNet with a cache that is too long": (
        "tiny-imagenet", lambda tree: shutil.copy(an_image(tree), decode(tree) / "images"),
        "tiny-imagenet-200-decoded is damaged"),
}


def foreign(run):
    torch.save(torch.nn.Linear(2, 2).state_dict(), run / "checkpoint.pt")


def malicious(run):
    torch.save(Harmful("harm"), run / "checkpoint.pt")


def only_config(run):
    for name in ("checkpoint.pt", "log.jsonl", "probe.json"):
        (run / name).unlink()


def strange(run):
    only_config(run)
    (run / "thesis.tex").write_text("years of work")


def old(run):
    """A checkpoint from before --elements became --group-size."""
    edit(run / "checkpoint.pt", lambda c: c["settings"].update(elements=c["settings"].pop("group_size")))


def full(path):
    """Any write to path's temporary file meets a full disk."""
    path.with_name(f"{path.name}.tmp").symlink_to("/dev/full")


def full_disk_at_first_save(run):
    only_config(run), (run / "config.json").unlink()
    full(run / "checkpoint.pt")


def settings(**changed):
    return lambda run: edit(run / "checkpoint.pt", lambda c: c["settings"].update(changed))


# name: (program and flags, what is done to a copy of a finished run before, what the message must say); RUN is the copy
RUNS = {
    "a run is there": ("train.py --out RUN", lambda run: None, "--resume"),
    "other settings": ("train.py --out RUN --resume --seed 5", lambda run: None, "made with --seed 0"),
    "other files, no run": ("train.py --out RUN --resume", strange, "thesis.tex"),
    "out is a file": ("train.py --out RUN/config.json --resume", lambda run: None, "is a file"),
    "out cannot be made": ("train.py --out /proc/run", lambda run: None, "/proc/run"),
    "disk full at a save": ("train.py --out RUN --resume", full_disk_at_first_save, "No space left"),
    "cut checkpoint": (
        "train.py --out RUN --resume", lambda run: cut(run / "checkpoint.pt", 2000), "checkpoint.pt is damaged"),
    "foreign checkpoint": ("train.py --out RUN --resume", foreign, "not a checkpoint of train.py"),
    "malicious checkpoint": ("train.py --out RUN --resume", malicious, "was not loaded"),
    "checkpoint of an old version": ("train.py --out RUN --resume", old, "made with no --group-size"),
    "batch of 64 for 3 processes": ("train.py --out RUN/new", lambda run: None, "cannot be shared by 3 processes"),
    "probe without a run": ("probe.py", lambda run: None, "required: run"),
    "probe with an unknown flag": ("probe.py RUN --fast", lambda run: None, "unrecognized"),
    "probe of no folder": ("probe.py RUN/nowhere", lambda run: None, "checkpoint.pt is missing"),
    "probe of an untrained run": ("probe.py RUN", only_config, "checkpoint.pt is missing"),
    "probe of a cut checkpoint": (
        "probe.py RUN", lambda run: cut(run / "checkpoint.pt", 2000), "checkpoint.pt is damaged"),
    "probe of a foreign checkpoint": ("probe.py RUN", foreign, "not a checkpoint of train.py"),
    "probe of a malicious checkpoint": ("probe.py RUN", malicious, "was not loaded"),
    "probe of a checkpoint of an old version": ("probe.py RUN", old, "'group_size'"),
    "probe of weights of another encoder": ("probe.py RUN", settings(widths=[4, 4, 4]), "does not fit"),
    "probe of damaged settings": (
        "probe.py RUN", lambda run: edit(run / "checkpoint.pt", lambda c: c["settings"].pop("sigma")), "'sigma'"),
    "probe whose data are gone": ("probe.py RUN", settings(dataset="mnist"), "MNIST"),
    "probe with a full disk": ("probe.py RUN", lambda run: full(run / "probe.json"), "No space left"),
}
if not torch.cuda.is_available():
    FLAGS["--device cuda"] = "CUDA GPU"
    RUNS["probe on a GPU that is not there"] = ("probe.py RUN --device cuda", lambda run: None, "CUDA GPU")

COMMAND_LINES = {"--epoch 3", "disk full at a save", "probe without a run", "probe of a malicious checkpoint"}
glyphs_once = functools.cache(datasets.glyphs)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """What the cases spoil copies of: the three data sets, and a finished run."""
    folder = tmp_path_factory.mktemp("originals")
    for name, write in (("mnist", mnist), ("cifar10", write_cifar10), ("tiny-imagenet", write_tiny_imagenet)):
        write(folder / name)
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(folder / "run")
    return folder


def contents(folder):
    """Every file that must survive: all but an unfinished temporary one."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"}


def prepare(case, folder, originals):
    """Make a case's folder: (its command, what its message must say)."""
    folder.mkdir()
    if case in FLAGS:
        return ["train.py", *SMALL, *case.split(), "--out", "run"], FLAGS[case]
    if case in RUNS:
        command, spoil, words = RUNS[case]
        shutil.copytree(originals / "run", folder / "run")
        spoil(folder / "run")
        program, *flags = command.replace("RUN", "run").split()
        return [program, *(SMALL if program == "train.py" else []), *flags], words
    name, spoil, words = FOLDERS[case] if case in FOLDERS else ("mnist", *FILES[case])
    shutil.copytree(originals / name, folder / "datasets")
    if name == "mnist":
        raw = folder / "datasets" / "MNIST" / "raw"
        spoil(raw / IMAGES, raw / LABELS)
    else:
        spoil(folder / "datasets" / dict(cifar10="cifar-10-batches-py").get(name, "tiny-imagenet-200"))
    return ["train.py", *SMALL, "--dataset", name, "--data-dir", "datasets", "--out", "run"], words


def as_a_process(command, folder, environment):
    environment = os.environ | environment | dict(OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=folder, env=environment,
                          capture_output=True, text=True)


def in_this_process(command, folder, environment):
    """The same without a new interpreter: what it would exit with, and what would be on its stderr."""
    program, status, printed = dict(train=train, probe=probe)[command[0].removesuffix(".py")], 0, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed), \
            contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("ignore", category=DeprecationWarning)         # as the interpreter does
        patch.chdir(folder)
        patch.setattr(sys, "argv", command)
        patch.setattr(datasets, "glyphs", glyphs_once)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            runs.call(program.main, program.parse())
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            status = 1
            traceback.print_exc()
    return SimpleNamespace(returncode=status, stderr=printed.getvalue() + "".join(f"{w.message}\n" for w in warned))


def check(case, folder, command, words):
    """Run a prepared case: (its stderr, what is wrong with how it ended)."""
    environment = NO_NETWORK | (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3") if "3 processes" in case else {})
    before = contents(folder)
    done = (as_a_process if case in COMMAND_LINES else in_this_process)(command, folder, environment)
    after = contents(folder)
    wrong = [text for text, holds in (
        ("status", done.returncode == 2),
        ("one line", done.stderr.count("\n") == 1 and "Traceback" not in done.stderr),
        ("program's name", done.stderr.startswith(command[0])), ("words", words in done.stderr),
        ("files", before.items() <= after.items()), ("harm", not (folder / "harm").exists())) if not holds]
    return done.stderr, f"{case}: {wrong}, status {done.returncode}: {done.stderr}" if wrong else ""


def test_table_of_bad_input(originals, tmp_path):
    cases = [*FLAGS, *FILES, *FOLDERS, *RUNS]
    assert len({*cases}) == len(cases) >= 30 and COMMAND_LINES < {*cases}
    folders = {case: tmp_path / str(k) for k, case in enumerate(cases)}
    with contextlib.redirect_stdout(io.StringIO()):
        prepared = {case: prepare(case, folders[case], originals) for case in cases}
    with ThreadPoolExecutor(2) as pool:
        waiting = {case: pool.submit(check, case, folders[case], *prepared[case]) for case in COMMAND_LINES}
        found = {case: check(case, folders[case], *prepared[case]) for case in cases if case not in COMMAND_LINES}
        found |= {case: future.result() for case, future in waiting.items()}
    for case in cases:
        command = " ".join(prepared[case][0]).replace(" ".join(SMALL) + " ", "")
        print(command + ("" if case in FLAGS else f"   [{case}]") + f"\n    {found[case][0].strip()}")
    failures = [wrong for _, wrong in found.values() if wrong]
    assert not failures, "\n".join(failures)
