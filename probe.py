"""The detached classifier: one linear layer on the representation of a frozen encoder.

    python probe.py RUN

reads RUN/checkpoint.pt, which train.py wrote, trains the classifier, and writes RUN/probe.json. What both command lines
need, refusing bad input, whole files and reading checkpoints, is here too.

Letters: N images, D numbers per representation, C channels, G group axis, H W space.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

import data as datasets
from hssl import Crops, Product, Rotation, Scale, Translation, readout
from layers import DenseBackbone, MNISTBackbone, ResidualBackbone, Untied


def build(settings, channels, side):
    """Make the encoder, and the group that moves its features, from a run's settings.

    Args:
        settings: the parsed flags of train.py, or a run's config.json, as a dict.
        channels, side: C and H = W of the images.

    Raises:
        ValueError: for settings that fit neither each other nor the images.
    """
    s = settings
    residual = functools.partial(ResidualBackbone, depth=s["depth"], separable_from=s["separable_from"])
    network = residual if s["backbone"] == "residual" else MNISTBackbone
    untied = s["structure"] == "none"
    elements, widths = (1, [s["elements"] * width for width in s["widths"]]) if untied else (s["elements"], s["widths"])
    encoder = network("translation" if untied else s["group"], elements, widths, channels, s["kernel_size"], s["effective_size"],
                      s["sigma"], s["scale_step"], None if untied else s["extent"], s["padding"])
    if s["kernel_size"] > side:
        raise ValueError(f"--kernel-size {s['kernel_size']} is larger than the {side}x{side} images")
    if side % encoder.stride:
        raise ValueError(f"images are {side}x{side}, but the encoder needs a side divisible by {encoder.stride}")
    if untied and s["group"] == "translation":
        if s["backbone"] == "residual":
            raise ValueError("--structure none with translation makes every layer dense, too large for --backbone residual: take mnist")
        encoder = DenseBackbone(side, widths, channels)
    elif untied:
        encoder = Untied(encoder, s["elements"])

    window = s["base_space"] if s["group"] == "translation" else s["window"]
    if window is not None:
        shifts = (Crops if s["crop"] else Translation)(side // encoder.stride, window, encoder.stride, circular=s["padding"] == "circular")
    if s["group"] == "translation":
        return encoder, shifts
    group = Rotation(s["elements"], s["base_space"]) if s["group"] == "rotation" else Scale(s["elements"], s["scale_step"], s["base_space"])
    return encoder, group if window is None else Product(shifts, group)


def represent(z, grid):
    """The representation that is classified: all elements' maps, averaged to grid x grid: (B, C, G, H, W) -> (B, D)."""
    return readout(z, grid)


@torch.no_grad()
def extract(encoder, data, images, grid, batch_size=1000):
    """Represent images (N, C, H, W) uint8 by an encoder in evaluation mode: (N, D) float32."""
    index = torch.arange(len(images), device=images.device)
    return torch.cat([represent(encoder(data.batch(images, i)), grid).float() for i in index.split(batch_size)])


def probe(encoder, data, grid=2, epochs=100, lr=0.01, batch_size=1000, seed=0):
    """Train the detached classifier on a frozen encoder and measure it on the whole test split.

    The representations are computed once, standardised by the training split's mean and deviation (a linear layer could
    do that itself; it only eases its training), and classified by one linear layer trained with Adam and a cosine
    schedule (paper.md section 3 leaves the classifier's optimizer open). The accuracy is the last epoch's.

    Returns:
        dict: top1 in percent, test_images, train_images, train_top1 in percent, dimensions (D).

    Raises:
        AssertionError: if a parameter or a batch-norm buffer of the encoder moved.
    """
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    was_training = encoder.training
    encoder.eval()
    x, x_test = (extract(encoder, data, images, grid) for images in (data.train_images, data.test_images))
    encoder.train(was_training)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std

    generator = torch.Generator().manual_seed(seed)
    classifier = torch.nn.Linear(x.shape[1], data.classes, device=x.device)
    for parameter in classifier.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            loss = F.cross_entropy(classifier(x[i]), data.train_labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    after = encoder.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    if moved:
        raise AssertionError(f"the encoder must stay frozen under the probe, but {', '.join(moved)} moved")
    with torch.no_grad():
        top1, train_top1 = (100 * (classifier(a).argmax(1) == labels).double().mean().item()
                            for a, labels in ((x_test, data.test_labels), (x, data.train_labels)))
    return dict(top1=round(top1, 3), test_images=len(x_test), train_images=len(x), train_top1=round(train_top1, 3),
                dimensions=x.shape[1])


def probe_as_set(settings, encoder, data):
    """`probe` with a run's own settings (a dict, see `build`)."""
    return probe(encoder, data, settings["probe_grid"], settings["probe_epochs"], settings["probe_lr"], seed=settings["seed"])


def write_result(run, settings, encoder, data, frozen_top1, epoch):
    """Probe a run's encoder as it is after `epoch` epochs, and write RUN/probe.json; returns what is written, a dict."""
    result = probe_as_set(settings, encoder, data) | dict(frozen_top1=frozen_top1, method=settings["method"], epoch=epoch)
    write_whole(Path(run) / "probe.json", json.dumps(result).encode() + b"\n")
    return result


# ------------------------------------------------------------------------------- files, and what the two commands refuse

def write_whole(path, content):
    """Write bytes to a file whole or not at all: to a temporary file beside it, flushed to the disk, then renamed.

    Whatever comes between, a kill or a full disk, path keeps its old content until the new one is complete.

    Raises:
        OSError: naming path, when it cannot be written.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)                  # the rename itself is on the disk once its folder is
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()                                      # give a full disk its room back
        raise OSError(error.errno, error.strerror, str(path)) from None


PARTS = ("encoder", "head", "others", "optimizer", "scheduler", "scaler")               # of a checkpoint: one state_dict each


def load_checkpoint(path):
    """Read a checkpoint of train.py to the CPU: a dict of PARTS, settings, step, epoch, epoch_loss, overflows,
    frozen_top1 and random.

    Only tensors and plain values are read (weights_only), so that no file can run code, and every stored checksum is
    compared.

    Raises:
        ValueError: in one line, if the file is missing, damaged, or not such a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum in {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: train.py has saved no checkpoint there yet, or this is not a run's folder") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values: it is not of train.py, and was not loaded") from None
    except Exception as error:                                      # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged or not a checkpoint ({error}): use a copy of it, or train again") from None
    keys = {*PARTS, "settings", "step", "epoch", "epoch_loss", "overflows", "frozen_top1", "random"}
    if not (isinstance(checkpoint, dict) and keys <= checkpoint.keys() and isinstance(checkpoint["settings"], dict)):
        raise ValueError(f"{path} is not a checkpoint of train.py, which holds {', '.join(sorted(keys))}")
    return checkpoint


def read_run(settings):
    """Find what a training with these settings (train.py's flags as a dict) goes on from: a checkpoint, None for a new run.

    Raises:
        ValueError: in one line, for a folder that is not to be written to, a spoilt checkpoint, or one of other settings.
    """
    out = Path(settings["out"])
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must name a folder")
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    # torchrun --max-restarts starts the same command again after it lost a process.
    if held and not (settings["resume"] or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
        raise ValueError(f"{out} is not empty: continue its run with --resume, or choose another --out")
    if "checkpoint.pt" not in held:
        strange = held - {"config.json", "log.jsonl", "config.json.tmp", "log.jsonl.tmp", "checkpoint.pt.tmp"}
        if strange:
            raise ValueError(f"{out} holds {min(strange)} but no checkpoint.pt, so no run to continue: choose another --out")
        return None
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    made_with, free = checkpoint["settings"], {"resume", "out", "data_dir", "device", "save_every", "log_every", "separable_from"}
    changed = [k for k, v in json.loads(json.dumps(settings)).items() if k not in free and made_with.get(k) != v]
    if changed:
        raise ValueError(f"{out} was made with " + ", ".join(f"--{k.replace('_', '-')} {made_with.get(k)}" for k in changed)
                         + ": continue it with these, or choose another --out")
    return checkpoint


class Log:
    """log.jsonl of a training, its line per epoch for people, and in a terminal a line that moves.

    Only the first process (`chief`) writes; after a resume the lines after the checkpoint's step come again.
    """

    def __init__(self, out, step, chief):
        self.chief, self.live, path = chief, chief and sys.stdout.isatty(), out / "log.jsonl"
        if chief:
            if path.exists():
                write_whole(path, b"".join(line for line in path.read_bytes().splitlines(True) if self.keeps(line, step)))
            self.file = path.open("ab", buffering=0)
        self.last_step, self.last_time, self.epoch_step, self.epoch_time = step, time.perf_counter(), step, time.perf_counter()

    @staticmethod
    def keeps(line, step):
        try:
            return json.loads(line)["step"] <= step
        except ValueError:                                     # the end of a line that was being written
            return False

    def step(self, epoch, step, loss, lr, overflows, batch, where):
        now = time.perf_counter()
        rate = (step - self.last_step) * batch / (now - self.last_time)
        self.last_step, self.last_time, self.lr, self.batch = step, now, lr, batch
        if self.chief:
            entry = dict(epoch=epoch + 1, step=step, loss=loss, lr=lr, images_per_second=round(rate, 1), overflows=overflows)
            self.file.write(json.dumps(entry).encode() + b"\n")
        if self.live:
            print(f"\r{where}  loss {loss:.4f}  {rate:,.0f} images/s\033[K", end="", flush=True)

    def epoch(self, epoch, epochs, loss):
        now, images = time.perf_counter(), (self.last_step - self.epoch_step) * self.batch
        took, self.epoch_time, self.epoch_step = now - self.epoch_time, now, self.last_step
        left = round(took * (epochs - epoch - 1))
        if self.chief:
            print(f"{chr(13) if self.live else ''}epoch {epoch + 1:{len(str(epochs))}d}/{epochs}  loss {loss:.4f}  lr {self.lr:.4g}  "
                  f"{images / took:,.0f} images/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
                  f"{chr(27) + '[K' if self.live else ''}", flush=True)


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is said in one line."""

    def error(self, message):
        stop(message)


def number(kind, low, above=False):
    """An argparse type: a finite int or float that is at least, or above, low."""
    def read(text):
        value = kind(text)
        if not (math.isfinite(value) and (value > low if above else value >= low)):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}")
        return value
    read.__name__ = kind.__name__                                   # argparse names it when kind(text) fails
    return read


def stop(message, status=2):
    """End the program with one line (none for None), under torchrun also naming the process, and a status (2: bad input)."""
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    if message is not None:
        print(f"{Path(sys.argv[0]).name}{process}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="a run's folder, the --out of train.py")
    parser.add_argument("--data-dir", help="folder of the data sets; the run's own when not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda needs a CUDA GPU, and PyTorch sees none: use --device cpu")
    try:
        checkpoint = load_checkpoint(Path(args.run) / "checkpoint.pt")
        settings = checkpoint["settings"]
        data = datasets.load(settings["dataset"], args.data_dir or settings["data_dir"], args.device, settings["train_images"])
        encoder, _ = build(settings, data.train_images.shape[1], data.train_images.shape[-1])
        encoder.load_state_dict(checkpoint["encoder"])
    except ValueError as error:
        stop(error)
    except (KeyError, TypeError, RuntimeError) as error:            # a file that only looks like a checkpoint
        stop(f"{args.run}/checkpoint.pt does not fit this program ({type(error).__name__}: {str(error)[:200]})")
    try:
        print(json.dumps(write_result(args.run, settings, encoder.to(args.device), data, checkpoint["frozen_top1"], checkpoint["epoch"])))
    except OSError as error:
        stop(error)


if __name__ == "__main__":
    main()
