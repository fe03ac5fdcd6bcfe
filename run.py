"""A run's folder, and how a program that writes one is refused or stopped.

    config.json      settings, torch version and number of processes, for people and other programs to read
    checkpoint.pt    all that --resume and probe.py need: states, settings, position
    log.jsonl        a line per logged step
    probe.json       what the detached classifier found
"""
import argparse
import contextlib
import datetime
import functools
import io
import json
import math
import os
import pickle
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from hssl import Crops, Rotation, Scale, Translation
from layers import DenseBackbone, MNISTBackbone, ResidualBackbone, ResNet18Backbone, Untied


def build(settings, channels, side):
    """Make the encoder, and the group that moves its features, from the flags of train.py (a dict), for images of C =
    channels and H = W = side. Raises a ValueError where these do not fit each other."""
    s = SimpleNamespace(**settings)
    shifts = functools.partial(Crops if s.crop else Translation, circular=s.padding == "circular")
    if s.backbone == "resnet18":
        if (s.group, s.structure) != ("translation", "group"):
            raise ValueError("--backbone resnet18 is for --group translation --structure group: it has no group axis")
        encoder = ResNet18Backbone(side, channels, s.padding)
        return encoder, shifts(side // encoder.stride, s.base_space, encoder.stride)
    network = {"mnist": MNISTBackbone, "residual": ResidualBackbone}[s.backbone]
    widest = 2 * (side // network.stride) + 1 if s.padding == "circular" else side          # or it wraps around twice
    if s.kernel_size > widest:
        raise ValueError(f"--kernel-size {s.kernel_size} must be at most {widest} for images of {side}x{side} pixels "
                         f"and --padding {s.padding}")
    if side % network.stride:
        raise ValueError(f"images are {side}x{side}, but the encoder needs a side divisible by {network.stride}")
    options = dict(in_channels=channels, kernel_size=s.kernel_size, effective_size=s.effective_size, sigma=s.sigma,
                   scale_step=s.scale_step, padding_mode=s.padding)
    if s.backbone == "residual":
        options |= dict(depth=s.depth, checkpoint_activations=s.checkpoint_activations)
    if s.structure == "group":
        encoder = network(s.group, s.group_size, s.widths, extent=s.extent, **options)
    elif s.group != "translation":
        widths = [s.group_size * width for width in s.widths]
        encoder = Untied(network("translation", 1, widths, **options), s.group_size)
    elif s.backbone == "mnist":
        encoder = DenseBackbone(side, s.widths, channels)
    else:
        raise ValueError("--structure none with translation makes --backbone residual dense and too large: take mnist")

    if s.group == "rotation":
        return encoder, Rotation(s.group_size, s.base_space)
    if s.group == "scale":
        return encoder, Scale(s.group_size, s.scale_step, s.base_space)
    return encoder, shifts(side // network.stride, s.base_space, network.stride)


# --------------------------------------------------------------------------------------------------------- checkpoints
PARTS = ("encoder", "head", "others", "optimizer", "scheduler", "scaler")      # whose states a checkpoint holds


def parts_of(objective, *rest):
    return dict(zip(PARTS, (objective.encoder, objective.head, objective.others, *rest), strict=True))


def save_checkpoint(path, parts, **values):
    """Write the states of parts, plain values, and the random state. Raises an OSError if they cannot be written."""
    states = {name: part.state_dict() for name, part in parts.items()}
    content = io.BytesIO()                                                     # torch.save to a file hides a full disk
    torch.save(states | values | dict(random=torch.get_rng_state()), content)
    write_whole(path, content.getbuffer())


def load_checkpoint(path, encoder_only=False):
    """Read a checkpoint of train.py to the CPU: the states of PARTS, settings, and the values that train.py saves.

    Only tensors and plain values are read (weights_only), so no file can run code, and every checksum is verified; with
    encoder_only the file need hold no more than encoder and settings, is mapped into memory, and is not verified.
    Raises a ValueError, in one line, if the file is missing, damaged, or not such a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = None if encoder_only else archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum in {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=encoder_only)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: train.py has saved no checkpoint there yet, or this is no run") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values and was not loaded") from None
    except Exception as error:                                                 # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged or not a checkpoint ({error}): use a copy of it, or train again") from None
    keys = {"encoder", "settings"}
    if not encoder_only:
        keys |= {*PARTS, "step", "epoch", "epoch_loss", "overflows", "frozen", "random"}
    if not (isinstance(checkpoint, dict) and keys <= checkpoint.keys() and isinstance(checkpoint["settings"], dict)):
        raise ValueError(f"{path} is not a checkpoint of train.py, which holds {', '.join(sorted(keys))}")
    return checkpoint


def load_encoder(folder, device="cpu"):
    """The trained encoder of a run's folder, in evaluation mode on the device, and the run's settings (the flags, a
    dict). Images (B, C, H, W) must be normalised as `data.Dataset.batch` does it. Of the checkpoint only the encoder's
    tensors are read. Raises a ValueError, in one line, for a checkpoint that is missing, foreign or of another version.
    """
    path = Path(folder) / "checkpoint.pt"
    checkpoint = load_checkpoint(path, encoder_only=True)
    with fitting(path), torch.random.fork_rng(devices=()):                     # the weights drawn at first do not count
        settings = checkpoint["settings"]
        encoder, _ = build(settings, *settings["image_shape"])
        encoder.load_state_dict(checkpoint["encoder"])
    return encoder.eval().to(device), settings


class Unfit(ValueError):
    """A checkpoint does not fit this version of the program; `call` ends the program with this line."""


@contextlib.contextmanager
def fitting(path):
    """In this context, whatever the checkpoint at path lacks or has wrong raises an `Unfit`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        message = f"{path} does not fit this version of the program ({type(error).__name__}: {str(error)[:200]})"
        raise Unfit(message) from None


def find_checkpoint(settings):
    """The checkpoint that a training with these settings continues from, or None for a new run. Raises a ValueError, in
    one line, for a folder with other content, a damaged checkpoint, or one of other settings."""
    out = Path(settings["out"])
    free = set("resume out data_dir device save_every log_every eval_every checkpoint_activations".split())
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must name a folder")
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))           # by torchrun, which lost a process
    if held and not (settings["resume"] or restarted):
        raise ValueError(f"{out} is not empty: continue its run with --resume, or choose another --out")
    if "checkpoint.pt" not in held:
        strange = held - {"config.json", "log.jsonl", "config.json.tmp", "log.jsonl.tmp", "checkpoint.pt.tmp"}
        if strange:
            raise ValueError(f"{out} holds {min(strange)} but no checkpoint.pt to continue from: choose another --out")
        return None
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    before = checkpoint["settings"]
    changed = [(f"--{name} {before[name]}" if name in before else f"no --{name}").replace("_", "-")
               for name, now in settings.items() if name not in free and (name not in before or before[name] != now)]
    if changed:
        raise ValueError(f"{out} was made with {', '.join(changed)}: take the same flags and version, or another --out")
    return checkpoint


def write_whole(path, content):
    """Write bytes to a temporary file beside path, flush it to the disk, and rename it. After a kill, or on a full disk
    (an OSError that names path), the old content is still there."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)                             # a rename is safe once its folder is
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()                                                 # give a full disk its room back
        raise OSError(error.errno, error.strerror, str(path)) from None


# ------------------------------------------------------------------------------------------------------------- the log
class Log:
    """log.jsonl of a training, and its line per epoch for people, which in a terminal moves with every logged step.

    Losses stay on the device until a line is due. Only the first process (chief) writes. A resumed run drops the lines
    after its checkpoint and writes them again. Every --eval-every epochs watch() measures the encoder and returns two
    dicts, the second of the frozen encoder.
    """
    def __init__(self, args, epochs, steps, step, epoch_loss, last_saved, chief, watch):
        self.out, self.every, self.batch_size, self.chief = Path(args.out), args.log_every, args.batch_size, chief
        self.watch, self.eval_every = watch, args.eval_every or epochs + 1
        self.epochs, self.steps, self.epoch_loss, self.last_saved = epochs, steps, epoch_loss, last_saved
        self.recent, path = [], self.out / "log.jsonl"
        if chief:
            if path.exists():
                lines = (line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n"))
                write_whole(path, b"".join(line for line in lines if json.loads(line)["step"] <= step))
            self.file = path.open("ab", buffering=0)
        self.start = self.last = step, time.perf_counter()

    def step(self, step, loss, lr, overflows, look=False):
        """Take a step's loss (a scalar on the device) and rate; look at the losses if a line is due, or if told to."""
        self.recent.append((loss.detach(), lr))
        epoch, done = (step - 1) // self.steps + 1, (step - 1) % self.steps + 1                      # in this epoch
        due = done == self.steps or step % self.every == 0
        if not (due or look):
            return
        losses = torch.stack([loss for loss, _ in self.recent])
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        losses = losses.tolist()
        for k, (value, (_, rate)) in enumerate(zip(losses, self.recent), step + 1 - len(losses)):
            if not math.isfinite(value):
                self.diverged(f"the loss is {value} at step {k}, learning rate {rate:.4g}")
        self.epoch_loss, self.recent = sum(losses, self.epoch_loss), []
        now = time.perf_counter()
        seen, frozen = self.watch() if done == self.steps and epoch % self.eval_every == 0 else ({}, {})
        if due and self.chief:
            rate = round((step - self.last[0]) * self.batch_size / (now - self.last[1]), 1)
            line = dict(epoch=epoch, step=step, loss=losses[-1], lr=lr, images_per_second=rate,
                        overflows=int(overflows)) | seen | {f"frozen_{name}": value for name, value in frozen.items()}
            self.file.write(json.dumps(line).encode() + b"\n")
            left = (self.epochs * self.steps - step) * (now - self.start[1]) / (step - self.start[0])
            if done == self.steps or sys.stdout.isatty():
                print(f"epoch {epoch:{len(str(self.epochs))}d}/{self.epochs}  loss {self.epoch_loss / done:.4f}  "
                      f"lr {lr:.4g}  {rate:,.0f} images/s  {datetime.timedelta(seconds=round(left))} left",
                      *(f" {name.replace('_', ' ')} {seen[name]} (frozen {frozen[name]})" for name in seen),
                      end="\n" if done == self.steps else "    \r", flush=True)
            self.last = step, time.perf_counter()                              # without the time that watching took
        if done == self.steps:
            self.epoch_loss = 0.0

    def diverged(self, reason):
        """Stop a run that diverged, with status 1. All processes come here at the same step; the first says why."""
        kept = f"the last good checkpoint, {self.out / 'checkpoint.pt'}, is of step {self.last_saved}"
        kept = kept if self.last_saved else "there is no checkpoint yet"
        leave_together(f"{reason}; {kept}; a lower --lr may help" if self.chief else None, status=1)


# ------------------------------------------------------------------------------------- refusing bad input, and stopping
class Parser(argparse.ArgumentParser):
    """argparse, but errors are one line."""
    def error(self, message):
        stop(message)


def number(kind, low, above=False):
    """An argparse type: a finite int or float that is at least, or above, low."""
    def read(text):
        value = kind(text)
        if not (math.isfinite(value) and (value > low if above else value >= low)):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}")
        return value
    read.__name__ = kind.__name__                                              # argparse names it when kind(text) fails
    return read


def choose_device(given):
    """The device that --device gave, or else a GPU if PyTorch sees one; for cuda without one the program ends."""
    found, world = "cuda" if torch.cuda.is_available() else "cpu", os.environ.get("WORLD_SIZE", "1")
    if given == "cuda" and found == "cpu":
        stop("--device cuda needs a CUDA GPU, and PyTorch sees none: use --device cpu")
    if given is None and found == "cpu" and world != "1" and os.environ.get("RANK") == "0":
        print(f"NO GPU FOUND: {world} processes train on the CPU. To use GPUs, check that their driver is as new as "
              f"CUDA {torch.version.cuda} needs (nvidia-smi); to use the CPU, add --device cpu.", flush=True)
    return given or found


def precision(device, amp):
    """The context of half precision that --amp names, on a torch.device or its type."""
    return torch.autocast(torch.device(device).type, getattr(torch, amp, None), enabled=amp != "off")


def stop(message, status=2):
    """End the program with one line (none for None), under torchrun naming the process; status 2 is bad input."""
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    if message is not None:
        print(f"{Path(sys.argv[0]).name}{process}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def leave_together(message, status):
    """`stop`, where all processes do."""
    if dist.is_initialized():
        dist.destroy_process_group()
    stop(message, status)


def call(main, args):
    """Run a program's main; a full disk, too little memory, or a tensor too large for PyTorch ends it in one line."""
    try:
        main(args)
    except Unfit as error:
        stop(error)
    except OSError as error:
        stop(f"cannot write: {error}; what was saved is intact: check folder and disk, and start again, with --resume")
    except RuntimeError as error:
        too_large = "allocate memory", "integer out of range", "32-bit", "CUDNN_STATUS_NOT_SUPPORTED"
        if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in too_large)):
            raise
        stop("not enough memory, or tensors that are too large: use more processes, a smaller --batch-size or network, "
             f"or, for the residual one, --checkpoint-activations ({str(error)[:150]})")


class Signals:
    """In this context SIGTERM and SIGINT are only noted, so that the loop can finish its step and save.

    group: processes that talk over gloo, on the CPU, so that no GPU waits; None if there is one process only.
    """
    def __init__(self, group):
        self.group, self.received, self.exchange = group, 0, None

    def __enter__(self):
        def note(number, frame):
            self.received = number
        self.before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def received_anywhere(self):
        """The number of a signal that any process received, or 0, the same for all. With several processes it is what
        they knew a step ago: each call starts an exchange for the next call to read, so that no step waits for it."""
        if self.group is None:
            return self.received
        known = self.finish_exchange()
        flag = torch.tensor(self.received)
        self.exchange = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return known

    def finish_exchange(self):
        if self.exchange is None:
            return 0
        work, flag = self.exchange
        work.wait()
        return flag.item()

    def leave(self, number, step, chief):
        """End all processes after a save, with the status that stands for the signal."""
        if self.group is not None:
            self.finish_exchange()
            dist.barrier(self.group)                                           # nobody leaves before the save
        saved = f"{signal.Signals(number).name}: saved after step {step}, continue with --resume"
        leave_together(saved if chief else None, 128 + number)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
