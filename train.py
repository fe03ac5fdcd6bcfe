"""Train an encoder by homomorphic self-supervised learning, or by a method it is compared with.

    python train.py                                         glyphs, a minute on a laptop's CPU
    torchrun --nproc_per_node=8 train.py --dataset mnist    the paper's configuration

Exit status: 0 finished, 1 diverged or nothing was trained, 2 bad input or no room to save.

Letters: B images of this process in a step, C channels, H W space, D numbers per projection.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import probe
from hssl import (Crops, ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs,
                  h_ssl_loss, readout)
from lars import LARS
from losses import Predictor, byol, move_target, nt_xent, simsiam


# ----------------------------------------------------------------------------------------- settings

# The defaults by data set and, where they differ, by group. PAPER, and the epochs of mnist, cifar10
# and tiny-imagenet, are the paper's, which does not state the trust coefficient. For the others see
# experiments/README.md.

PAPER = dict(batch_size=4096, warmup_epochs=10, temperature=0.1, trust_coefficient=0.001)
MNIST = dict(backbone="mnist", widths=[32, 63, 95], kernel_size=7, base_space=4, grid=0,
             probe_grid=2)
RESIDUAL = dict(backbone="residual", widths=[16, 128, 256, 512], kernel_size=7, base_space=4,
                grid=4, probe_grid=1)
GLYPHS = dict(epochs=8, batch_size=256, warmup_epochs=1, temperature=0.5, trust_coefficient=0.03,
              widths=[16, 32, 64], kernel_size=3, base_space=5, grid=2)
FOLDER = dict(epochs=100, batch_size=256, trust_coefficient=0.01, widths=[16, 32, 64],
              kernel_size=5, base_space=8, grid=4, image_size=64)
DATASETS = {
    "glyphs": MNIST | GLYPHS,
    "mnist": MNIST | PAPER | dict(epochs=500),
    "cifar10": RESIDUAL | PAPER | dict(epochs=1300),
    "tiny-imagenet": RESIDUAL | PAPER | dict(epochs=1300, base_space=8),
    "folder": MNIST | PAPER | FOLDER,
}
GROUPS = {
    "translation": dict(group_size=1),
    "rotation": dict(group_size=4, base_space=1, kernel_size=7),
    "scale": dict(group_size=3, base_space=1, kernel_size=7),
}


# What a flag may be, its default, and what it means. Where it is None, the default is in the
# tables above, or in brackets.
CHOICES = {
    "dataset": (DATASETS, "glyphs", "drawn, downloaded, or your own (folder)"),
    "method": (["h-ssl", "a-ssl", "frozen", "supervised"], "h-ssl",
               "views from features, views from images, no training, or labels"),
    "group": (GROUPS, "translation", "what views differ by"),
    "structure": (["group", "none"], "group", "none: the same activations, untied weights"),
    "objective": (["nt-xent", "simsiam", "byol"], "nt-xent", "what compares the views"),
    "backbone": (["mnist", "residual"], None, "three layers, or SESN's residual network"),
    "padding": (["zeros", "circular"], "zeros", "of the convolutions, and of shifted images"),
    "device": (["cpu", "cuda"], None, "where to train (cuda if there is a GPU)"),
    "amp": (["float16", "bfloat16", "off"], None,
            "half precision (float16 on cuda, off on cpu); on a CPU bfloat16 is 3 to 4 times as "
            "fast with AMX (lscpu | grep amx_bf16), but may be ten times slower without"),
}
# The least that a number may be, its default, and what it means; the type is that of the least.
NUMBERS = {
    "epochs": (1, None, "passes over the training images"),
    "batch-size": (2, None, "images per step, over all processes"),
    "lr": (0.0, 0.1, "peak learning rate of LARS"),
    "warmup-epochs": (0.0, None, "linear warm-up, by step"),
    "weight-decay": (0.0, 1e-4, "of weights, not of vectors"),
    "momentum": (0.0, 0.9, "of LARS"),
    "trust-coefficient": (0.0, None, "of LARS"),
    "temperature": (1e-6, None, "τ of NT-Xent"),
    "seed": (0, 0, "of weights, order of images and views"),
    "train-images": (2, None, "how many to use, drawn by --seed (all)"),
    "validate": (1, None, "how many training images to hold out in place of the test images"),
    "image-size": (4, None, "side in pixels of your own images"),
    "save-every": (1, 10, "epochs between checkpoints"),
    "log-every": (1, 10, "steps between lines of log.jsonl"),
    "eval-every": (1, None, "epochs between looks at accuracy and rank (never)"),
    "group-size": (1, None, "orientations or scales of the encoder"),
    "extent": (1, None, "how many of them a filter spans (rotation: all, scale: 1)"),
    "scale-step": (1.0, 1.41, "ratio of neighbouring scales"),
    "kernel-size": (1, None, "side of the filters in pixels"),
    "base-space": (1, None, "size of G0: positions a side, orientations or scales"),
    "max-distance": (1, None, "largest topographic distance of two views (no limit)"),
    "grid": (0, None, "average each map of a view to N x N cells for the head; 0 keeps all"),
    "probe-grid": (0, None, "the same for the detached classifier"),
}
# Settings that may differ when a run is resumed. (mean and std follow from the images, and older
# checkpoints lack them.)
FREE = "resume out data_dir cache_dir device save_every log_every eval_every mean std".split()


def parse(argv=None):
    """Read the command line (argv, or the program's own); returns the settings."""
    table = "defaults by data set, then by group:"
    for name, values in (DATASETS | GROUPS).items():
        table += f"\n  {name}: {values}"
    parser = argparse.ArgumentParser(
        usage="train.py [--dataset NAME] [--method NAME] [--group NAME] [--FLAG VALUE ...]",
        epilog=table,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    for name, (choices, default, meaning) in CHOICES.items():
        add(f"--{name}", choices=list(choices), default=default, help=meaning)
    for name, (least, default, meaning) in NUMBERS.items():
        add(f"--{name}", type=type(least), default=default, metavar="N", help=meaning)
    add("--widths", type=int, nargs="+", metavar="C", help="channels of the 3 or 4 stages")
    add("--head-widths", type=int, nargs=2, default=[512, 128], help="of the head: hidden, output")
    add("--crop", action="store_true", help="a-ssl, translation: views are crops of the images")
    add("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    add("--cache-dir", default="datasets", help="where decoded images are kept")
    add("--out", help="the run's folder (runs/DATASET-METHOD-GROUP-SEED)")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    args = parser.parse_args(argv)

    for name, value in (DATASETS[args.dataset] | GROUPS[args.group]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, (least, _, _) in NUMBERS.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} is {value}, but must be a number of at least {least}")
    if min(args.widths + args.head_widths) < 1:
        parser.error("--widths and --head-widths must be at least 1")
    if args.crop and (args.method, args.group, args.structure) != ("a-ssl", "translation", "group"):
        parser.error("--crop is for --method a-ssl --group translation --structure group")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.amp is None:
        args.amp = "float16" if args.device == "cuda" else "off"
    if args.out is None:
        args.out = f"runs/{args.dataset}-{args.method}-{args.group}-{args.seed}"
    return args


# ----------------------------------------------------------------------------------- the objectives

class SelfSupervised(nn.Module):
    """Encoder, head and NT-Xent as one module, so that DistributedDataParallel sees one pass.

    view is one of the group's views, of any number of images; it tells how wide the head's input
    is.
    """

    def __init__(self, args, encoder, group, view):
        super().__init__()
        hidden, out = args.head_widths
        width = readout(view, args.grid).shape[1]
        norm = args.objective != "nt-xent"
        self.encoder = encoder
        self.head = ProjectionHead(width, hidden, out, args.grid, norm)
        self.group = group
        self.temperature = args.temperature
        self.ssl_loss = h_ssl_loss if args.method == "h-ssl" else a_ssl_loss

    def forward(self, x, g1, g2):    # x: (B, C, H, W), g1 and g2: (B, ...)
        return self.ssl_loss(self.encoder, self.head, self.compare, self.group, x, g1, g2)

    def compare(self, h1, h2):    # (B, D) each
        return nt_xent(h1, h2, self.temperature)


class SimSiam(SelfSupervised):
    """The same with SimSiam's objective and its predictor."""

    def __init__(self, args, encoder, group, view):
        super().__init__(args, encoder, group, view)
        hidden, out = args.head_widths
        self.predictor = Predictor(out, hidden)

    def compare(self, h1, h2):
        return simsiam(self.predictor(h1), self.predictor(h2), h1, h2)


class BYOL(SimSiam):
    """The same with BYOL's objective, whose targets come from a slowly averaged copy."""

    def __init__(self, args, encoder, group, view):
        super().__init__(args, encoder, group, view)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, x, g1, g2):
        with torch.no_grad():
            # No loss here: the targets are the two projections themselves.
            self.targets = self.ssl_loss(
                self.target_encoder, self.target_head, pair, self.group, x, g1, g2)
        return super().forward(x, g1, g2)

    def compare(self, h1, h2):
        return byol(self.predictor(h1), self.predictor(h2), *self.targets)

    def after_step(self, step, total, decay=0.99):
        move_target(self.target_encoder, self.encoder, decay, step, total)
        move_target(self.target_head, self.head, decay, step, total)


def pair(h1, h2):
    return h1, h2


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


def make_encoder_and_group(args):
    """The encoder, and the group that moves its features. A ValueError where they do not fit."""
    encoder = probe.make_encoder(vars(args))
    if args.group == "rotation":
        return encoder, Rotation(args.group_size, args.base_space)
    if args.group == "scale":
        return encoder, Scale(args.group_size, args.scale_step, args.base_space)
    translation = Crops if args.crop else Translation
    side = args.image_shape[1] // encoder.stride
    circular = args.padding == "circular"
    return encoder, translation(side, args.base_space, encoder.stride, circular)


def make_objective(args, data):
    """The group, and the method's encoder, head and loss as one module, on the CPU.

    Raises a ValueError where the settings do not fit each other or the images.
    """
    encoder, group = make_encoder_and_group(args)
    # The features of one image tell how wide the head has to be.
    x = data.batch(data.train_images[:1].cpu(), torch.tensor([0]))
    if args.crop:
        x = group.T(group.elements[:1], x)
    with torch.no_grad():
        z = encoder.eval()(x)
    encoder.train()
    view = group.base(z)
    side = args.image_shape[1] // encoder.stride
    if args.grid > view.shape[-1] or args.probe_grid > side:
        raise ValueError(f"--grid must be at most {view.shape[-1]}, the view's side, and "
                         f"--probe-grid {side}, the map's")
    if args.method in ("supervised", "frozen"):
        width = readout(z, args.probe_grid).shape[1]
        classifier = nn.Linear(width, max(1, data.classes))
        return group, Supervised(encoder, classifier, args.probe_grid)
    objectives = {"nt-xent": SelfSupervised, "simsiam": SimSiam, "byol": BYOL}
    return group, objectives[args.objective](args, encoder, group, view)


def schedule(step, warmup, total):
    """Factor on the learning rate: a linear warm-up over the first steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ------------------------------------------------------------------------------------ the processes

def start_processes(args):
    """One process under python, several under torchrun.

    Returns the rank, the rank on this machine, the number of processes, the device, and a group of
    all processes (None under python) that waits for a day, for what the first process does alone.
    Raises a ValueError for a batch that they cannot share, or too few GPUs.
    """
    rank = 0
    local_rank = 0
    world = 1
    if "RANK" in os.environ:    # torchrun's; WORLD_SIZE alone may have been left by something else
        rank = int(os.environ["RANK"])
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world or args.batch_size < 2 * world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: "
                         "take a multiple that leaves each two images or more")
    device = torch.device(args.device)
    backend = "gloo"
    if args.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"each process needs a CUDA GPU, and PyTorch sees "
                             f"{torch.cuda.device_count()}: start fewer, or take --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True    # shapes stay, so a search is worth it
        backend = "nccl"
    if args.amp == "off":
        torch.backends.fp32_precision = "ieee"    # or GPUs would convolve in TF32
    patient = None
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart the store still holds the addresses of the processes before (pytorch
            # issue 135712). Those of one machine count restarts alike, which tells them apart.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return rank, local_rank, world, device, patient


def wait(patient):
    if patient is not None:
        dist.barrier(patient)


def mean_over_processes(loss):
    """A loss of this process, a scalar -> the mean over all processes, a number."""
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def end(message, status):
    """End the program with one line."""
    print("train.py:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


# --------------------------------------------------------------------------------- the run's folder

def find_checkpoint(settings):
    """The checkpoint that a run with these settings continues from, or None for a new run.

    Raises a ValueError for a folder with other content, or a run with other settings or images.
    """
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir()}
    if names and not settings["resume"]:
        raise ValueError(f"{out} is not empty: continue it with --resume, or take another --out")
    if "checkpoint.pt" not in names:
        written = {name.removesuffix(".tmp") for name in names}
        if not written <= {"config.json", "log.jsonl", "checkpoint.pt"}:
            raise ValueError(f"{out} holds other files, but no checkpoint.pt: take another --out")
        return None
    checkpoint = probe.read_checkpoint(out / "checkpoint.pt")
    if not {"objective", "settings"} <= checkpoint.keys():
        raise ValueError(f"{out / 'checkpoint.pt'} holds an encoder, but no training to continue")
    for name, value in settings.items():
        before = checkpoint["settings"].get(name)
        if before != value and name not in FREE:
            raise ValueError(f"{out} was made with {name} {before}, not {value}: take the same "
                             "flags and images, or another --out")
    return checkpoint


def open_log(out, step):
    """log.jsonl, without the lines that come after the checkpoint's step."""
    path = out / "log.jsonl"
    lines = []
    if path.exists():
        for line in path.read_text().splitlines(True):
            # A line that was cut off comes after every checkpoint.
            if line.endswith("}\n") and json.loads(line)["step"] <= step:
                lines.append(line)
    probe.write_whole(path, "".join(lines).encode())
    return path.open("a", buffering=1)


# ----------------------------------------------------------------------------------------- training

def load_in_turn(args, rank, local_rank, device, patient):
    """Only the first process downloads and decodes; each machine's first comes next, then all."""
    turn = min(rank, 1) + min(local_rank, 1)    # 0, 1 or 2
    for now in range(3):
        if now == turn:
            data = probe.load_data(vars(args), device)
        wait(patient)
    return data


def train(args):
    """The whole run. Raises a ValueError or an OSError for bad input, or no room to save."""
    # ---- processes, images, encoder, views, optimizer
    rank, local_rank, world, device, patient = start_processes(args)
    data = load_in_turn(args, rank, local_rank, device, patient)
    count = len(data.train_images)
    epochs = 0 if args.method == "frozen" else args.epochs
    if args.batch_size > count and epochs > 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {count} training images")
    if args.method == "supervised" and data.classes < 2:
        raise ValueError("--method supervised needs labels of two classes or more")
    args.image_shape = list(data.train_images.shape[1:3])
    args.mean = data.mean
    args.std = data.std
    torch.manual_seed(args.seed)    # after loading, which may draw random numbers
    group, objective = make_objective(args, data)
    pairs = torch.zeros(1, 2, dtype=torch.int64)    # of no use to frozen and supervised
    if args.method in ("h-ssl", "a-ssl"):
        pairs = allowed_pairs(group, args.max_distance)
    optimizer = LARS(objective.parameters(), args.lr, args.momentum, args.weight_decay,
                     args.trust_coefficient)
    path = Path(args.out) / "checkpoint.pt"
    found = [None]
    if rank == 0:
        args.images_hash = data.digest()
        found = [find_checkpoint(vars(args))]
        config = vars(args) | dict(torch=torch.__version__, processes=world)
        probe.write_whole(path.parent / "config.json", json.dumps(config).encode())
        name = torch.cuda.get_device_name(device) if args.device == "cuda" else "CPU"
        print(f"{name}: {world} x {args.batch_size // world} images a step, half precision "
              f"{args.amp}", flush=True)
        if args.warmup_epochs > epochs > 0:
            print(f"a warm-up of {args.warmup_epochs:g} of {epochs} epochs: the learning rate "
                  f"never reaches {args.lr}", flush=True)
    if patient is not None:
        dist.broadcast_object_list(found, group=patient)
    checkpoint = found[0]

    # ---- schedule, half precision
    objective.to(device)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "float16")
    steps = max(1, count // args.batch_size)    # a last, incomplete batch is left out
    warmup = round(args.warmup_epochs * steps)
    total = epochs * steps

    # ---- all measures are taken by the first process, on a plain copy of the encoder
    eval_encoder = copy.deepcopy(objective.encoder)

    def measure(dataset):
        eval_encoder.load_state_dict(objective.encoder.state_dict())
        return probe.evaluate(eval_encoder, dataset, args.probe_grid, args.amp, True)

    # ---- where to start
    step = 0
    skipped = 0
    frozen = None
    saved = "there is no checkpoint yet"
    if checkpoint is not None:
        objective.load_state_dict(checkpoint["objective"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step = checkpoint["step"]
        skipped = checkpoint["skipped"]
        frozen = checkpoint["frozen"]
        saved = f"the last checkpoint is of step {step}"
    elif rank == 0:
        frozen = measure(data)
        if args.eval_every is not None:
            frozen["held_out"] = measure(probe.split_training(data))
        print("frozen encoder:", probe.in_words(frozen), flush=True)
    wait(patient)
    model = objective
    if dist.is_initialized():
        device_ids = None
        if args.device == "cuda":    # on CPUs each process normalises by its own statistics
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            device_ids = [local_rank]
        model = DistributedDataParallel(model, device_ids)

    def save():
        nonlocal saved
        for parameter in objective.parameters():
            if not parameter.isfinite().all():
                end(f"the weights are not finite after step {step}; {saved}; try a lower --lr", 1)
        states = dict(
            encoder=objective.encoder.state_dict(),
            objective=objective.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            settings=vars(args),
            frozen=frozen,
            step=step,
            epoch=step // steps,
            skipped=skipped,
        )
        if rank == 0:
            probe.write_checkpoint(path, states)
        saved = f"the last checkpoint is of step {step}"

    # ---- training
    if rank == 0:
        log = open_log(path.parent, step)
    elements = group.elements.to(device)
    pairs = pairs.to(device)
    share = args.batch_size // world
    for epoch in range(step // steps, epochs):
        order, choice = datasets.epoch_plan(count, len(pairs), args.seed, epoch, device)
        logged_step = step
        start = time.perf_counter()
        for i in range(steps):
            first = i * args.batch_size + rank * share
            index = order[first:first + share]    # (B,)
            x = data.batch(data.train_images, index)    # (B, C, H, W)
            if args.method == "supervised":
                inputs = [data.train_labels[index]]
            else:
                drawn = pairs[choice[index]]    # (B, 2): each image's pair
                inputs = elements[drawn].unbind(1)    # g1 and g2, (B, ...) each

            lr = args.lr * schedule(step, warmup, total)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = lr
            with probe.precision(device, args.amp):
                loss = model(x, *inputs)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)    # leaves the step out where float16 overflows,
            scaler.update()    # and lowers the scale
            if scaler.get_scale() < scale:
                skipped += 1
            if isinstance(objective, BYOL):
                objective.after_step(step, total)
            step += 1

            last = i + 1 == steps
            if step % args.log_every == 0 or last:
                mean = mean_over_processes(loss)
                if not math.isfinite(mean):
                    end(f"the loss is {mean} at step {step}; {saved}; try a lower --lr", 1)
                images = (step - logged_step) * args.batch_size
                rate = round(images / (time.perf_counter() - start), 1)
                line = dict(epoch=epoch + 1, step=step, loss=mean, lr=lr, skipped=skipped,
                            images_per_second=rate)
                if rank == 0:
                    if last and args.eval_every and (epoch + 1) % args.eval_every == 0:
                        line["held_out"] = measure(probe.split_training(data))
                    log.write(json.dumps(line) + "\n")
                logged_step = step
                start = time.perf_counter()
        wait(patient)
        if rank == 0:
            text = f"epoch {epoch + 1}/{epochs}  loss {mean:.4f}  lr {lr:.4g}"
            text += f"  {rate:,.0f} images/s"
            if skipped > 0:
                text += f"  {skipped} steps skipped"
            if "held_out" in line:
                text += f"  held out: {probe.in_words(line['held_out'])}"
            print(text, flush=True)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == epochs:
            save()

    # ---- the trained encoder is measured, and saved with the statistics it was measured with
    if total > 0 and skipped == step:
        end("float16 overflowed at every step, so nothing was trained: take another --amp", 1)
    if rank == 0:
        result = measure(data)
        objective.encoder.load_state_dict(eval_encoder.state_dict())
        save()
        probe.write_result(args.out, vars(args), result, frozen, epochs)
        print("trained encoder:", probe.in_words(result))
    wait(patient)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(args):
    try:
        train(args)
    except (ValueError, OSError, OverflowError) as error:
        end(error, 2)


if __name__ == "__main__":
    main(parse())
