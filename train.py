"""Train an encoder by homomorphic self-supervised learning, or by a method it is compared with.

    python train.py                                         glyphs, in less than a minute on a CPU
    torchrun --nproc_per_node=8 train.py --dataset mnist    the paper's configuration

Exit status: 0 finished, 1 diverged, 2 bad input, or no room on the disk or in memory.

Letters: B images of this process in a step, C channels, H W space, D numbers per projection.
"""
import argparse
import copy
import io
import json
import math
import os
import re
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import probe
from hssl import (ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs,
                  h_ssl_loss, readout)
from lars import LARS
from losses import nt_xent


# ----------------------------------------------------------------------------------------- settings

# A group's values override its data set's, which override the defaults in `add_flags`. Those are
# the paper's for MNIST, where it states them.
RESIDUAL = dict(epochs=1300, widths=[16, 128, 256, 512], grid=4, probe_grid=1)
DATASETS = {
    "glyphs": dict(epochs=8, batch_size=256, warmup_epochs=1.0, temperature=0.5,
                   trust_coefficient=0.03, widths=[16, 32, 64], kernel_size=3, base_space=5,
                   grid=2),
    "mnist": dict(epochs=500),
    "cifar10": RESIDUAL,
    "tiny-imagenet": RESIDUAL,
    "folder": dict(epochs=100, batch_size=256, trust_coefficient=0.01, widths=[16, 32, 64],
                   kernel_size=5, grid=4, image_size=64),
}
GROUPS = {
    "translation": dict(group_size=1),
    "rotation": dict(group_size=4, base_space=1, kernel_size=7),
    "scale": dict(group_size=3, base_space=1, kernel_size=7),
}
# Settings that may differ when a run is resumed.
FREE = "resume out data_dir cache_dir device save_every log_every eval_every".split()


class Number:
    """A type for argparse: a number of the type of `least`, int or float, and not below it."""

    def __init__(self, least):
        self.least = least

    def __call__(self, text):
        try:
            value = type(self.least)(text)
        except ValueError:
            value = math.nan
        if not self.least <= value < 2**63:
            kind = "an integer" if isinstance(self.least, int) else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {kind} from {self.least} to 2**63")
        return value


def add_flags(add):
    # What is learned, and from what.
    add("--method", choices=["h-ssl", "a-ssl", "frozen", "supervised"], default="h-ssl",
        help="views from features, views from images, no training, or labels")
    add("--structure", choices=["group", "none"], default="group",
        help="none: the same activations, untied weights")
    add("--train-images", type=Number(2), help="how many to use, drawn by --seed; None: all")
    add("--validate", type=Number(1), help="training images to hold out in place of test images")
    add("--image-size", type=Number(4), help="side in pixels of your own images")
    # The encoder.
    add("--widths", type=Number(1), nargs="+", default=[32, 63, 95],
        help="channels of the stages: three for SESN's MNIST network, four for its residual one")
    add("--kernel-size", type=Number(3), default=7, help="side of the filters in pixels, odd")
    add("--padding", choices=["zeros", "circular"], default="zeros",
        help="of the convolutions, and of shifted images")
    add("--group-size", type=Number(1), help="orientations or scales of the encoder")
    add("--extent", type=Number(1),
        help="how many of them a filter spans; None: all orientations, one scale")
    add("--scale-step", type=Number(1.0), default=1.41, help="ratio of neighbouring scales")
    # The views and the head.
    add("--base-space", type=Number(1),
        help="size of G0: positions a side (None: half of the map's), orientations or scales")
    add("--max-distance", type=Number(1),
        help="largest topographic distance of two views; None: no limit")
    add("--grid", type=Number(0), default=0,
        help="average each map of a view to N x N cells for the head; 0 keeps all positions")
    add("--head-widths", type=Number(1), nargs=2, default=[512, 128], help="hidden and output")
    add("--temperature", type=Number(1e-6), default=0.1, help="of NT-Xent")
    # The optimizer.
    add("--epochs", type=Number(1), help="passes over the training images")
    add("--batch-size", type=Number(2), default=4096, help="images per step, over all processes")
    add("--lr", type=Number(0.0), default=0.1, help="peak learning rate of LARS")
    add("--warmup-epochs", type=Number(0.0), default=10.0,
        help="linear, by step; if longer than the training, --lr is never reached")
    add("--momentum", type=Number(0.0), default=0.9, help="of LARS")
    add("--weight-decay", type=Number(0.0), default=1e-4, help="of weights, not of vectors")
    add("--trust-coefficient", type=Number(0.0), default=0.001, help="of LARS")
    add("--seed", type=Number(0), default=0, help="of weights, order of images and views")
    # The measures, the run's folder, the machine.
    add("--probe-grid", type=Number(0), default=2, help="--grid for the detached classifier")
    add("--eval-every", type=Number(1),
        help="epochs between measures on training images; None: never")
    add("--save-every", type=Number(1), default=10, help="epochs between checkpoints")
    add("--log-every", type=Number(1), default=10, help="steps between lines of log.jsonl")
    add("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    add("--cache-dir", default="datasets", help="where decoded images are kept")
    add("--out", help="the run's folder; None: runs/DATASET-METHOD-GROUP-SEED")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--device", choices=["cpu", "cuda"], help="None: cuda if there is a GPU")
    add("--amp", choices=["float16", "bfloat16", "off"], help="half precision; None: float16 on "
        "cuda, off on cpu, where bfloat16 is slow without AMX or avx512_bf16")


def parse(argv=None):
    """Read the command line (argv, or the program's own); returns the settings."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=DATASETS, default="glyphs",
                       help="drawn, downloaded, or your own (folder)")
    first.add_argument("--group", choices=GROUPS, default="translation",
                       help="what views differ by")
    chosen, _ = first.parse_known_args(argv)
    parser = argparse.ArgumentParser(
        parents=[first], allow_abbrev=False,
        usage="train.py [--dataset NAME] [--method NAME] [--group NAME] [--FLAG VALUE ...]",
        description=f"The defaults are those of --dataset {chosen.dataset} --group {chosen.group}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser.add_argument)
    parser.set_defaults(**DATASETS[chosen.dataset] | GROUPS[chosen.group])
    args = parser.parse_args(argv)

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.amp is None:
        args.amp = "float16" if args.device == "cuda" else "off"
    if args.device == "cpu" and args.amp == "float16":
        parser.error("--amp float16 is for GPUs: on a CPU take bfloat16, or off, which is faster")
    if args.method == "frozen":
        args.epochs = 0
    return args


# ----------------------------------------------------------------------------------- the objectives

class SelfSupervised(nn.Module):
    """Encoder, head and objective as one module, so that DistributedDataParallel sees one pass."""

    def __init__(self, encoder, head, I, group, ssl_loss):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.I = I
        self.group = group
        self.ssl_loss = ssl_loss

    def forward(self, x, g1, g2):    # x: (B, C, H, W), g1 and g2: (B, ...)
        return self.ssl_loss(self.encoder, self.head, self.I, self.group, x, g1, g2)


class Supervised(nn.Module):
    """Encoder and linear classifier, and the cross-entropy of labels."""

    def __init__(self, encoder, classifier, grid):
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier
        self.grid = grid

    def forward(self, x, labels):    # x: (B, C, H, W), labels: (B,)
        scores = self.classifier(readout(self.encoder(x), self.grid))
        return F.cross_entropy(scores.float(), labels)


def make_group(args, stride):
    """The group that moves the features of an encoder with this stride, in pixels."""
    if args.group == "rotation":
        return Rotation(args.group_size, args.base_space)
    if args.group == "scale":
        return Scale(args.group_size, args.scale_step, args.base_space)
    side = args.image_shape[1] // stride
    base_size = args.base_space or math.ceil(side / 2)
    return Translation(side, base_size, stride, args.padding == "circular")


@torch.no_grad()
def make_objective(args, classes):
    """The method's encoder, head and loss as one module, on the CPU, and what g1 and g2 are drawn
    from, (P, 2, ...).

    Raises a ValueError where the settings do not fit each other or the images.
    """
    torch.manual_seed(args.seed)
    encoder = probe.make_encoder(vars(args)).eval()
    channels, side = args.image_shape
    image = torch.zeros(1, channels, side, side)
    # The features of one image tell how wide a classifier has to be, a view how wide the head.
    width = readout(encoder(image), args.probe_grid).shape[1]
    if args.method in ("supervised", "frozen"):
        classifier = nn.Linear(width, max(1, classes))
        objective = Supervised(encoder, classifier, args.probe_grid)
        return objective.train(), torch.zeros(1, 2)    # there are no views
    group = make_group(args, encoder.stride)
    view = group.base(encoder(group.T(group.elements[:1], image)))
    width = readout(view, args.grid).shape[1]
    head = ProjectionHead(width, *args.head_widths, args.grid)
    I = partial(nt_xent, temperature=args.temperature)
    ssl_loss = h_ssl_loss if args.method == "h-ssl" else a_ssl_loss
    objective = SelfSupervised(encoder, head, I, group, ssl_loss)
    return objective.train(), group.elements[allowed_pairs(group, args.max_distance)]


def schedule(step, warmup, total):
    """Factor on the learning rate: a linear warm-up over the first steps, then a cosine to zero,
    if steps are left."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ------------------------------------------------------------------------------------ the processes

def start_processes(args):
    """Join torchrun's processes, if it started this one. Only the first of them prints.

    Returns this process's device, and a group of all processes (None under python) whose timeout is
    a day, since the others wait while the first works alone.
    """
    if "RANK" not in os.environ:    # WORLD_SIZE alone may have been left by something else
        return choose_device(args.device, 0), None
    device = choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device, dist.new_group(backend="gloo", timeout=timedelta(days=1))


def rank_and_world():
    """This process's number, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def choose_device(name, local_rank):
    """The CPU, or the GPU of this process. Raises a ValueError for too few GPUs."""
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"each process needs a CUDA GPU, and PyTorch sees {count}: start fewer, "
                         "or take --device cpu")
    torch.backends.cudnn.benchmark = True    # shapes stay, so a search is worth it
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def synchronise_batch_norm(objective, device):
    """On GPUs, batch norm of all processes as one; on CPUs each has its own statistics."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    return objective


def wait(patient):
    if patient is not None:
        dist.barrier(patient)


def load_in_turn(args, device, patient):
    """Only the first process downloads and decodes; each machine's first comes next, then all."""
    rank, _ = rank_and_world()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    turn = (rank > 0) + (local_rank > 0)
    for now in range(3):
        if now == turn:
            data = probe.load_data(vars(args), device)
        wait(patient)
    return data


def mean_over_processes(loss):
    """A loss of this process, a scalar -> the mean over all processes, a number."""
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


# --------------------------------------------------------------------------------- the run's folder

def find_checkpoint(args):
    """The checkpoint that a run with these settings continues from, or None for a new run.

    Raises a ValueError for the folder of another run, or of one with other settings or images.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in out.iterdir()}
    if "checkpoint.pt" not in found and "probe.json" in found:
        raise ValueError(f"{out} holds the result of a run, but no checkpoint: take another --out")
    checkpoint = None
    if "checkpoint.pt" in found:
        checkpoint = probe.read_checkpoint(out / "checkpoint.pt")
        if not {"objective", "settings", "starts"} <= checkpoint.keys():
            raise ValueError(f"{out} holds an encoder, but no training that this version can "
                             "continue: take another --out")
    if found & {"checkpoint.pt", "config.json", "log.jsonl"} and not args.resume:
        raise ValueError(f"{out} holds a run: continue it with --resume, or take another --out")
    if checkpoint is None:
        return None
    for name, value in vars(args).items():
        before = checkpoint["settings"].get(name)
        if before != value and name not in FREE:
            raise ValueError(f"{out} was made with another {name} ({before}, not {value}): take "
                             "the same flags, images and version, or another --out")
    return checkpoint


def open_log(out, step):
    """log.jsonl, without the lines that come after the checkpoint's step."""
    path = Path(out, "log.jsonl")
    lines = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines(True):
            found = re.search(r'"step": (\d+),.*}\n', line)
            # A line that was cut off comes after every checkpoint.
            if found and int(found[1]) <= step:
                lines.append(line)
    probe.write_whole(path, "".join(lines).encode())
    return path.open("a", buffering=1)


# ----------------------------------------------------------------------------------------- training

class Diverged(Exception):
    """The training cannot go on."""


def check_data(args, data, world):
    """Add to the settings what follows from the images. Raises a ValueError where they do not fit
    each other."""
    count = len(data.train_images)
    if args.batch_size > count and args.epochs > 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {count} training images")
    if args.batch_size % world or args.batch_size < 2 * world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: "
                         "take a multiple that leaves each two images or more")
    if args.method == "supervised" and data.classes < 2:
        raise ValueError("--method supervised needs labels of two classes or more")
    args.image_shape = list(data.train_images.shape[1:3])
    args.mean = data.mean
    args.std = data.std
    args.images_hash = data.digest()


def save(args, states, progress):
    """Write checkpoint.pt, in the first process. Raises Diverged if a weight is not finite."""
    for parameter in states["objective"].parameters():
        if not parameter.isfinite().all():
            raise Diverged(f"the weights are not finite after step {progress['step']}")
    rank, _ = rank_and_world()
    if rank > 0:
        return
    checkpoint = dict(settings=vars(args), **progress)
    for name, owner in states.items():
        checkpoint[name] = owner.state_dict()
    content = io.BytesIO()    # torch.save to a file would hide a full disk
    torch.save(checkpoint, content)
    probe.write_whole(Path(args.out, "checkpoint.pt"), content.getvalue())


def resume(args, states, patient):
    """Go on from the checkpoint, if there is one, and write config.json: the settings, and for
    every start its step, torch's version and the number of processes. Returns the progress."""
    found = [None]
    rank, world = rank_and_world()
    if rank == 0:
        found = [find_checkpoint(args)]
    if patient is not None:
        dist.broadcast_object_list(found, group=patient)
    progress = dict(step=0, epoch=0, frozen=None, starts=[])
    checkpoint = found[0]
    if checkpoint is not None:
        for name, owner in states.items():
            owner.load_state_dict(checkpoint[name])
        for name in progress:
            progress[name] = checkpoint[name]
    start = dict(step=progress["step"], torch=str(torch.__version__), processes=world)
    progress["starts"].append(start)
    if rank == 0:
        config = vars(args) | dict(starts=progress["starts"])
        probe.write_whole(Path(args.out, "config.json"), json.dumps(config).encode())
    return progress


def measure(encoder, plain_encoder, data, args):
    """`probe.evaluate` a plain copy of the encoder: one without SyncBatchNorm."""
    plain_encoder.load_state_dict(encoder.state_dict())
    return probe.evaluate(plain_encoder, data, args.probe_grid, args.amp, update_statistics=True)


def fit(args, data, model, pairs, plain_encoder, states, progress, patient):
    """Train for the epochs that are left, with a line of log.jsonl every few steps."""
    rank, world = rank_and_world()
    share = args.batch_size // world
    steps = len(data.train_images) // args.batch_size    # a last, incomplete batch is left out
    warmup = round(args.warmup_epochs * steps)
    total = args.epochs * steps
    optimizer = states["optimizer"]
    scaler = states["scaler"]
    step = progress["step"]
    if rank == 0:
        log = open_log(args.out, step)
    for epoch in range(progress["epoch"], args.epochs):
        order, choice = datasets.epoch_plan(
            len(data.train_images), len(pairs), args.seed, epoch, pairs.device)
        logged_step = step
        start = time.perf_counter()
        for i in range(steps):
            first = i * args.batch_size + rank * share
            index = order[first:first + share]    # (B,)
            x = data.batch(data.train_images, index)    # (B, C, H, W)
            if args.method == "supervised":
                inputs = [data.train_labels[index]]
            else:
                inputs = pairs[choice[index]].unbind(1)    # g1 and g2, (B, ...) each

            lr = args.lr * schedule(step, warmup, total)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = lr
            with probe.precision(x.device, args.amp):
                loss = model(x, *inputs)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)    # leaves the step out where float16 overflows
            scaler.update()
            step += 1

            last = i + 1 == steps
            if step % args.log_every == 0 or last:
                rate = (step - logged_step) * args.batch_size / (time.perf_counter() - start)
                line = dict(epoch=epoch + 1, step=step, loss=mean_over_processes(loss), lr=lr,
                            images_per_second=round(rate, 1))
                if not math.isfinite(line["loss"]):
                    raise Diverged(f"the loss is {line['loss']} at step {step}")
                # The scale begins at 2**16, and every overflow halves it.
                if scaler.is_enabled() and scaler.get_scale() <= 2.0 ** max(16 - total, -60):
                    raise Diverged(f"float16 still overflows after {step} steps, which --amp "
                                   "bfloat16 would not")
                if rank == 0:
                    if last and args.eval_every and (epoch + 1) % args.eval_every == 0:
                        part = probe.split_training(data)
                        line["held_out"] = measure(states["encoder"], plain_encoder, part, args)
                    log.write(json.dumps(line) + "\n")
                logged_step = step
                start = time.perf_counter()
        wait(patient)
        progress.update(step=step, epoch=epoch + 1)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            save(args, states, progress)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {line['loss']:.4f}  lr {lr:.4g}  "
              f"{rate:,.0f} images/s", flush=True)


def train(args):
    """The whole run. Raises a ValueError or an OSError for bad input or no room to save, and
    Diverged if it cannot go on."""
    device, patient = start_processes(args)
    rank, world = rank_and_world()
    data = load_in_turn(args, device, patient)
    check_data(args, data, world)
    objective, pairs = make_objective(args, data.classes)
    objective.to(device)
    optimizer = LARS(objective.parameters(), args.lr, args.momentum, args.weight_decay,
                     args.trust_coefficient)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "float16")
    states = dict(
        encoder=objective.encoder, objective=objective, optimizer=optimizer, scaler=scaler)

    with probe.full_precision(args.amp):
        progress = resume(args, states, patient)
        plain_encoder = copy.deepcopy(objective.encoder)
        print(f"{device.type}: {world} x {args.batch_size // world} images a step, half precision "
              f"{args.amp}", flush=True)
        if rank == 0 and progress["frozen"] is None:
            progress["frozen"] = measure(objective.encoder, plain_encoder, data, args)
            if args.eval_every:
                part = probe.split_training(data)
                held_out = measure(objective.encoder, plain_encoder, part, args)
                progress["frozen"]["held_out"] = held_out
            print("frozen encoder:", probe.in_words(progress["frozen"]), flush=True)
        wait(patient)
        model = objective
        if dist.is_initialized():
            model = DistributedDataParallel(synchronise_batch_norm(objective, device))
        fit(args, data, model, pairs.to(device), plain_encoder, states, progress, patient)
        if rank == 0:
            result = progress["frozen"]
            if args.epochs > 0:
                result = measure(objective.encoder, plain_encoder, data, args)
            # Its batch norm now has the statistics of all training images.
            objective.encoder.load_state_dict(plain_encoder.state_dict())
            save(args, states, progress)
            probe.write_result(args.out, vars(args), result, progress["frozen"], progress["epoch"])
            if args.epochs > 0:
                print("trained encoder:", probe.in_words(result))
    wait(patient)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(args):
    """Train, by the settings of `parse`, whose method an experiment may have renamed."""
    if not args.out:
        args.out = f"runs/{args.dataset}-{args.method}-{args.group}-{args.seed}"
    args.out = os.path.expanduser(args.out)
    try:
        probe.run(train, args)
    except Diverged as error:
        probe.end(f"{error}: try a lower --lr (what was saved before stays)", 1)


if __name__ == "__main__":
    main(parse())
