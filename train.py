"""Train an encoder by homomorphic self-supervised learning (H-SSL), or by one of the methods it is compared with.

    python train.py                                                     glyphs on a laptop's CPU, minutes
    torchrun --nproc_per_node=8 train.py --dataset mnist                the paper's configuration

Exit status: 0 finished, 1 the loss diverged, 2 bad input or no room to save, 128 + signal when SIGTERM or SIGINT stopped
it with all its steps saved (143, 130).

Letters: B global batch, b batch of this process, C channels, H W space.
"""
import io
import json
import math
import os
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import data as datasets
from hssl import ProjectionHead, a_ssl_loss, allowed_pairs, allowed_sets, h_ssl_loss, readout
from lars import LARS
from losses import Predictor, averaged_target, byol, multi_view_nt_xent, simsiam
from probe import PARTS, Log, Parser, build, number, probe_as_set, read_run, represent, stop, write_result, write_whole

# What differs between data sets. But for glyphs, epochs to temperature are the paper's apart from the trust coefficient, which
# it does not state; window is translation's base space, positions a side. The README says why the others are what they are.
RESIDUAL = dict(group="translation", epochs=1300, batch_size=4096, warmup_epochs=10, trust_coefficient=0.001, temperature=0.1,
                backbone="residual", widths=(16, 128, 256, 512), kernel_size=7, grid=4, probe_grid=1)
DEFAULTS = {
    "glyphs": dict(group="rotation", epochs=8, batch_size=256, warmup_epochs=1, trust_coefficient=0.01, temperature=1.0,
                   backbone="mnist", widths=(4, 8, 16), kernel_size=5, window=4, grid=0, probe_grid=2),
    "mnist": dict(group="translation", epochs=500, batch_size=4096, warmup_epochs=10, trust_coefficient=0.001, temperature=0.1,
                  backbone="mnist", widths=(32, 63, 95), kernel_size=7, window=4, grid=0, probe_grid=2),
    "cifar10": RESIDUAL | dict(window=4),
    "tiny-imagenet": RESIDUAL | dict(window=8),
}
ELEMENTS = {"translation": 1, "rotation": 4, "scale": 3}                                            # of the encoder's group axis


def parse(argv=None):
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)

    def add(flag, help, default=None, **options):
        p.add_argument(flag, help=help + ("" if default is None else " (default: %(default)s)"), default=default, **options)

    add("--dataset", choices=DEFAULTS, default="glyphs", help="glyphs is drawn on the spot, the others are downloaded")
    add("--method", choices=("h-ssl", "a-ssl", "frozen", "supervised"), default="h-ssl", help="views from features, views from images, no training, or labels")
    add("--group", choices=ELEMENTS, help="what views differ by; default: the data set's")
    add("--structure", choices=("group", "none"), default="group", help="none: the same activations from untied weights, without equivariance")
    add("--epochs", type=number(int, 1), help="passes over the training images; default: the data set's (mnist: 500)")
    add("--batch-size", type=number(int, 2), help="images per step, over all processes; default: the data set's (mnist: 4096)")
    add("--lr", type=number(float, 0, above=True), default=0.1, help="peak learning rate of LARS")
    add("--lr-per-256", action="store_true", default=False, help="--lr is meant per 256 images: multiply it by batch-size / 256")
    add("--warmup-epochs", type=number(float, 0), help="linear warm-up, by step; default: the data set's (mnist: 10)")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="of all weights with more than one dimension")
    add("--momentum", type=number(float, 0), default=0.9, help="of LARS")
    add("--trust-coefficient", type=number(float, 0, above=True), help="of LARS; default: the data set's (mnist: 0.001)")
    add("--temperature", type=number(float, 0, above=True), help="τ of NT-Xent; default: the data set's (mnist: 0.1)")
    add("--seed", type=number(int, 0), default=0, help="of weights, order of images and views")
    add("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    add("--train-images", type=number(int, 1), help="use only the first so many training images; default: all")
    add("--out", help="the run's folder; default: runs/DATASET-METHOD-GROUP-SEED")
    add("--resume", action="store_true", default=False, help="continue the run in --out from its checkpoint, if it has one")
    add("--save-every", type=number(int, 1), default=10, help="epochs between checkpoints")
    add("--log-every", type=number(int, 1), default=10, help="steps between lines of log.jsonl")
    add("--amp", choices=("float16", "bfloat16", "off"), help="half precision; default: float16 on cuda, off on cpu")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    # The encoder
    add("--backbone", choices=("mnist", "residual"), help="SESN's network for MNIST or for STL-10; default: the data set's")
    add("--depth", type=number(int, 1), default=16, help="layers of the residual network, 6n + 4")
    add("--widths", type=number(int, 1), nargs="+", metavar="C", help="channels of its 3 (mnist) or 4 (residual) stages; default: the data set's")
    add("--elements", type=number(int, 1), help="orientations or scales; default: 4 orientations, 3 scales")
    add("--extent", type=number(int, 1), help="elements that a filter spans along the group; default: all for rotation, 1 for scale")
    add("--kernel-size", type=number(int, 1), help="side of the filters in pixels; default: the data set's (mnist: 7)")
    add("--effective-size", type=number(int, 1), default=3, help="Hermite orders along each axis")
    add("--sigma", type=number(float, 0, above=True), default=0.9, help="width of the Hermite-Gaussian functions in pixels; for scale, the smallest")
    add("--scale-step", type=number(float, 1, above=True), default=1.41, help="ratio of neighbouring scales")
    add("--separable-from", type=number(int, 0), metavar="C", help="residual network, translation and scale: apply filters as 1-D ones between layers of at "
        "least so many channels, equal but for rounding; 0 for nowhere; default: 64 on cpu, 0 on cuda")
    add("--padding", choices=("zeros", "circular"), default="zeros", help="of the convolutions, and of shifted images")
    # Objective, views, projection head, detached classifier
    add("--objective", choices=("nt-xent", "simsiam", "byol"), default="nt-xent", help="what compares the views")
    add("--target-decay", type=number(float, 0), default=0.99, help="of the averages that are BYOL's target, at the start; 1 at the end")
    add("--views", type=number(int, 2), default=2, help="views of each image; more than two need nt-xent")
    add("--window", type=number(int, 1), metavar="S", help="rotation, scale: views are also shifted, and G0 is a window of S x S positions; default: no shifts")
    add("--crop", action="store_true", default=False, help="a-ssl, translation: the encoder sees only the pixels of the base space, 4 a position")
    add("--base-space", type=number(int, 1), help="size of G0: positions a side of a window (default: 4; tiny-imagenet: 8), or orientations or scales (default: 1)")
    add("--max-distance", type=number(int, 1), help="largest topographic distance of two views; default: no limit")
    add("--grid", type=number(int, 0), help="average each map of a view to so many cells a side before the head; 0 keeps all; default: the data set's (mnist: 0)")
    add("--head-widths", type=number(int, 1), nargs=2, default=(512, 128), metavar="D", help="hidden and output width of the projection head")
    add("--probe-grid", type=number(int, 0), help="average each map to so many cells a side for the detached classifier; 0 keeps all; default: the data set's (mnist: 2)")
    add("--probe-epochs", type=number(int, 1), default=100, help="of the detached classifier (Adam)")
    add("--probe-lr", type=number(float, 0, above=True), default=0.01, help="of the detached classifier (Adam)")
    args = p.parse_args(argv)

    args.group = args.group or DEFAULTS[args.dataset]["group"]
    defaults = DEFAULTS[args.dataset] | dict(elements=ELEMENTS[args.group])
    window = defaults.pop("window")
    defaults["base_space"] = window if args.group == "translation" else 1
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda needs a CUDA GPU, and PyTorch sees none: use --device cpu")
    if args.momentum >= 1:
        p.error(f"--momentum {args.momentum} must be below 1")
    if args.seed >= 2**63:
        p.error(f"--seed {args.seed} must be below 2**63")
    if args.views > 2 and args.objective != "nt-xent":
        p.error(f"--views {args.views} needs --objective nt-xent: {args.objective} compares two")
    if args.crop and (args.method, args.group) != ("a-ssl", "translation"):
        p.error("--crop is for --method a-ssl --group translation: h-ssl has the base space in its place")
    if args.window is not None and args.group == "translation":
        p.error("--window is for rotation and scale: with translation the window is --base-space")
    if args.target_decay > 1:
        p.error(f"--target-decay {args.target_decay} must be at most 1")
    if args.separable_from is None:
        args.separable_from = 64 if args.device == "cpu" else 0
    args.amp = args.amp or ("float16" if args.device == "cuda" else "off")
    args.out = args.out or f"runs/{args.dataset}-{args.method}-{args.group}-{args.seed}"
    return args


class Objective(nn.Module):
    """Encoder, head and loss as one module, so that DistributedDataParallel sees one forward pass per step.

    others: what the loss needs beside them: SimSiam's and BYOL's predictor, BYOL's target.
    """

    def __init__(self, encoder, head, loss, **others):
        super().__init__()
        self.encoder, self.head, self.others, self.loss = encoder, head, nn.ModuleDict(others), loss

    def forward(self, x, *target):
        """x (b, C, H, W) and its target: g1, g2, ... for a self-supervised method, labels for a supervised one."""
        return self.loss(self.encoder, self.head, x, *target)


def make_objective(args, encoder, group, data, total=1):
    """Put the method's head and loss behind an encoder (on the CPU, before training of so many steps in total)."""
    with torch.no_grad():                                      # to learn how wide the features are
        z = encoder.eval()(torch.zeros(1, *data.train_images.shape[1:]))
    encoder.train()
    if args.method in ("supervised", "frozen"):
        classifier = nn.Linear(represent(z, args.probe_grid).shape[1], data.classes)
        return Objective(encoder, classifier, lambda f, h, x, labels: F.cross_entropy(h(represent(f(x), args.probe_grid)), labels))
    width = readout(group.view(group.elements[:1], z), args.grid).shape[1]
    head = ProjectionHead(width, *args.head_widths, args.grid, norm=args.objective != "nt-xent")
    ssl_loss = {"h-ssl": h_ssl_loss, "a-ssl": a_ssl_loss}[args.method]
    if args.objective == "nt-xent":
        I = lambda *views: multi_view_nt_xent(views, args.temperature)                              # noqa: E731
        return Objective(encoder, head, lambda f, h, x, *g: ssl_loss(f, h, I, group, x, *g))
    hidden, dimensions = args.head_widths
    q = Predictor(dimensions, hidden)
    if args.objective == "simsiam":
        I = lambda h1, h2: simsiam(q(h1), q(h2), h1, h2)                                            # noqa: E731
        return Objective(encoder, head, lambda f, h, x, *g: ssl_loss(f, h, I, group, x, *g), predictor=q)

    target = averaged_target(nn.ModuleList([encoder, head]), args.target_decay, total)

    def loss(f, h, x, *g):
        with torch.no_grad():
            targets = ssl_loss(*target.module, lambda *views: views, group, x, *g)                  # both (b, D)
        return ssl_loss(f, h, lambda h1, h2: byol(q(h1), q(h2), *targets), group, x, *g)

    return Objective(encoder, head, loss, predictor=q, target=target)


def steps_per_epoch(args, data):
    return max(1, len(data.train_images) // args.batch_size)   # a last, incomplete batch is left out


def schedule(step, warmup, total):
    """Factor on the learning rate: linear warm-up over the first steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def prepare(args, rank, local_rank, world, device):
    """Everything that bad input can spoil: data, encoder, group, objective, and the run's folder with what it holds.

    Raises:
        ValueError: in one line.
    """
    turn = 0 if rank == 0 else 1 if local_rank == 0 else 2     # one process downloads, then one of each other machine, if it must
    for now in range(3):
        if now == turn:
            data = datasets.load(args.dataset, args.data_dir, device, args.train_images)
        if world > 1:
            dist.barrier()
    channels, side = data.train_images.shape[1], data.train_images.shape[-1]
    if args.batch_size > len(data.train_images) and args.method != "frozen":
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(data.train_images)} training images")
    encoder, group = build(vars(args), channels, side)
    cells = side // encoder.stride
    if max(args.grid, args.probe_grid) > cells:
        raise ValueError(f"--grid and --probe-grid must be at most {cells}, the side of the feature map")
    objective = make_objective(args, encoder, group, data, args.epochs * steps_per_epoch(args, data)).to(device)
    allowed = allowed_pairs(group, args.max_distance) if args.views == 2 else allowed_sets(group, args.views, args.max_distance)     # (P, views)

    out, found = Path(args.out), [read_run(vars(args)) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)                      # all go on from what the first process read
    if rank == 0:
        config = vars(args) | dict(torch=torch.__version__, processes=world)
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "config.json", json.dumps(config, indent=1).encode() + b"\n")
        except OSError as error:
            raise ValueError(f"cannot write into --out {out}: {error}") from None
    return data, group, objective, allowed, found[0]


def main(args):
    # ---- processes: one under python, several under torchrun
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = args.device == "cuda"
    if args.batch_size % world:
        stop(f"--batch-size {args.batch_size} cannot be shared by {world} processes: take a multiple of {world}")
    if cuda and local_rank >= torch.cuda.device_count():
        stop(f"{torch.cuda.device_count()} GPUs are too few for torchrun's --nproc_per_node: one process each, or --device cpu")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # After a restart torchrun's store still holds the addresses of the processes before (github.com/pytorch/pytorch/issues/135712).
        # One machine's processes count restarts alike and keep apart by them; several machines' do not: see the README.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, device_id=device if cuda else None)
    chief = rank == 0
    torch.manual_seed(args.seed)
    try:
        data, group, objective, allowed, checkpoint = prepare(args, rank, local_rank, world, device)
    except ValueError as error:
        stop(error)
    except OverflowError:
        stop("--sigma, --scale-step and --elements give filters of a size beyond floating point: take smaller ones")
    out, encoder, images = Path(args.out), objective.encoder, len(data.train_images)

    # ---- the frozen encoder: batch norm sees the training images once, then the detached classifier
    frozen_top1 = checkpoint["frozen_top1"] if checkpoint else None
    if not checkpoint:
        update_bn((data.batch(data.train_images, i) for i in torch.arange(images, device=device).split(1000)), encoder)
        if chief:
            frozen_top1 = probe_as_set(vars(args), encoder, data)["top1"]
            print(f"frozen encoder: top-1 {frozen_top1:.2f} %", flush=True)

    # ---- optimizer, schedule, half precision, processes
    epochs = 0 if args.method == "frozen" else args.epochs
    steps = steps_per_epoch(args, data)
    model = objective
    if dist.is_initialized():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if cuda else model
        model = DistributedDataParallel(model, device_ids=[local_rank] if cuda else None)
    peak = args.lr * (args.batch_size / 256 if args.lr_per_256 else 1)
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], peak, args.momentum, args.weight_decay, args.trust_coefficient)
    warmup = round(args.warmup_epochs * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, warmup, epochs * steps))
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "float16")
    # The scaler leaves out steps that overflow, usually the very first; PyTorch then takes the schedule to be ahead.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    # ---- checkpoints
    parts = dict(zip(PARTS, (encoder, objective.head, objective.others, optimizer, scheduler, scaler), strict=True))
    step, epoch_loss, overflows, last_saved = 0, 0.0, 0, None
    if checkpoint:
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["random"])          # nothing below draws from it; what is added may
            step, epoch_loss, overflows = int(checkpoint["step"]), float(checkpoint["epoch_loss"]), int(checkpoint["overflows"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            stop(f"{out / 'checkpoint.pt'} does not fit this program ({type(error).__name__}: {str(error)[:200]})")
        last_saved = step

    def fail(reason):
        """Stop a run that diverged. All processes come here at the same step; the first says why."""
        kept = f"the last good checkpoint, {out / 'checkpoint.pt'}, is of step {last_saved}" if last_saved else "there is no checkpoint yet"
        stop(f"{reason}; {kept}; a lower --lr may help" if chief else None, status=1)

    def save():
        nonlocal last_saved
        if not all(p.isfinite().all() for p in model.parameters()):
            fail(f"the weights are not finite after step {step}")
        if chief:
            content = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in parts.items()} | dict(
                settings=json.loads(json.dumps(vars(args))), step=step, epoch=step // steps, epoch_loss=epoch_loss,
                overflows=overflows, frozen_top1=frozen_top1, random=torch.get_rng_state()), content)
            os.fsync(log.file.fileno())                        # the log's lines up to here are as safe as the checkpoint
            write_whole(out / "checkpoint.pt", content.getbuffer())
        last_saved = step

    # ---- training
    log = Log(out, step, chief)
    elements, allowed, share = group.elements.to(device), allowed.to(device), args.batch_size // world
    online = nn.ModuleList([encoder, objective.head])          # what BYOL's target follows
    recent = []                                                # losses not looked at yet, on the device
    with Signals() as signals:
        for epoch in range(step // steps, epochs):
            order, choice = (t.to(device) for t in datasets.epoch_plan(images, len(allowed), args.seed, epoch))
            for i in range(step % steps, steps):
                index = order[i * args.batch_size + rank * share:][:share]                          # (b,)
                x = data.batch(data.train_images, index)                                            # (b, C, H, W)
                views = elements[allowed[choice[index]]].unbind(1)                                  # g1, g2, ...: an element per image
                target = [data.train_labels[index]] if args.method == "supervised" else views
                with torch.autocast(args.device, getattr(torch, args.amp, None), enabled=args.amp != "off"):
                    loss = model(x, *target)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scale, lr = scaler.get_scale(), scheduler.get_last_lr()[0]
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                if "target" in objective.others:
                    objective.others["target"].update_parameters(online)
                overflows += scaler.get_scale() < scale        # the scaler left this step out
                recent.append(loss.detach())
                step += 1

                last, received = i == steps - 1, signals.received_anywhere()
                if last or received or step % args.log_every == 0:
                    losses, recent = mean_over_processes(torch.stack(recent)), []
                    for k, value in enumerate(losses, step + 1 - len(losses)):
                        if not math.isfinite(value):
                            fail(f"the loss is {value} at step {k}, learning rate {peak * schedule(k - 1, warmup, epochs * steps):.4g}")
                    epoch_loss = sum(losses, epoch_loss)
                if last or step % args.log_every == 0:
                    log.step(epoch, step, losses[-1], lr, overflows, args.batch_size, f"epoch {epoch + 1}/{epochs}, step {i + 1}/{steps}")
                if last:
                    log.epoch(epoch, epochs, epoch_loss / steps)
                    epoch_loss = 0.0
                if received or last and (epoch + 1) % args.save_every == 0:
                    save()
                if received:
                    if dist.is_initialized():
                        dist.barrier()                         # nobody leaves before the first process has saved
                    stop(f"{signal.Signals(received).name}: saved after step {step}, continue with --resume" if chief else None, 128 + received)
    if step != last_saved:
        save()

    # ---- the detached classifier on the trained encoder
    if dist.is_initialized():
        dist.destroy_process_group()
    if chief:
        result = write_result(out, vars(args), encoder, data, frozen_top1, epochs)
        print(f"top-1 on {result['test_images']} test images: frozen {frozen_top1:.2f} %, {args.method} {result['top1']:.2f} %")


def mean_over_processes(values):
    """Average a vector over the processes; returns a list."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


class Signals:
    """Inside this context SIGTERM and SIGINT end nothing; they are noted, for the loop to finish its step and save."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None   # on the CPU: a GPU is not waited for
        return self

    def note(self, number, frame):
        self.received = number

    def received_anywhere(self):
        """The number of a signal that some process received, or 0; all processes learn the same at the same step."""
        if self.group is None:
            return self.received
        received = torch.tensor(self.received)
        dist.all_reduce(received, dist.ReduceOp.MAX, group=self.group)
        return received.item()

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    try:
        main(parse())
    except OSError as error:                                   # a full disk while training: probe.write_whole, Log
        stop(f"{error}; the last checkpoint is whole: make room and continue with --resume")
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        stop(f"not enough memory: take a smaller --batch-size or network, or more processes ({str(error)[:150]})")
