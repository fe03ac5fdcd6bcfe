"""Train an encoder by homomorphic self-supervised learning (H-SSL), or by one of the methods it is compared with.

    python train.py                                                     glyphs on a laptop's CPU, 1 to 2 minutes
    torchrun --nproc_per_node=8 train.py --dataset mnist                the paper's configuration
    python train.py --dataset mnist --help                              every setting, with its default for MNIST

Exit status: 0 finished, 1 diverged, 2 bad input or no room to save, 143 or 130 saved and stopped by SIGTERM or SIGINT.

Letters: b images of this process in a step, C channels, H W space, D numbers per projection, P pairs of elements.
"""
import copy
import json
import math
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import probe
import run
from hssl import ProjectionHead, a_ssl_loss, allowed_pairs, augmented, drawn_sets, h_ssl_loss, readout
from lars import LARS
from losses import Predictor, byol, move_target, multi_view_nt_xent, nt_xent, simsiam

# Defaults that depend on data set and group; --help shows all in force. PAPER and its epochs are the paper's, but for
# the trust coefficient, which it does not state; the README says why the others are what they are.
PAPER = dict(group="translation", batch_size=4096, warmup_epochs=10, temperature=0.1, trust_coefficient=0.001)
MNIST = dict(backbone="mnist", widths=[32, 63, 95], kernel_size=7, base_space=4, grid=0, probe_grid=2)
RESIDUAL = dict(backbone="residual", widths=[16, 128, 256, 512], kernel_size=7, base_space=4, grid=4, probe_grid=1)
DATASETS = {
    "glyphs": MNIST | dict(group="rotation", epochs=8, batch_size=256, warmup_epochs=1, temperature=1.0,
                           trust_coefficient=0.01, widths=[4, 8, 16]),
    "mnist": PAPER | MNIST | dict(epochs=500),
    "cifar10": PAPER | RESIDUAL | dict(epochs=1300),
    "tiny-imagenet": PAPER | RESIDUAL | dict(epochs=1300, base_space=8),
    "folder": PAPER | MNIST | dict(epochs=100, batch_size=256, trust_coefficient=0.01, grid=4, widths=[16, 32, 64],
                                   kernel_size=5),
}
GROUPS = dict(translation=dict(group_size=1), rotation=dict(group_size=4, base_space=1),
              scale=dict(group_size=3, base_space=1))


def parse(argv=None):
    """Read the command line (argv, or the program's own); returns the settings."""
    p = run.Parser(description=__doc__.split("\n")[0], add_help=False, allow_abbrev=False)
    p.add_argument("--dataset", choices=DATASETS, default="glyphs", help="drawn, downloaded, or your own (folder)")
    p.add_argument("--image-size", type=run.number(int, 4), metavar="S", help="folder: side of an image (default: 64)")
    p.add_argument("--group", choices=GROUPS, help="what views differ by (default: %(default)s)")
    p.add_argument("--backbone", choices=("mnist", "residual", "resnet18"), help="(default: %(default)s)")
    known, _ = p.parse_known_args(argv)
    defaults = DATASETS[known.dataset]
    p.set_defaults(group=defaults["group"], backbone=defaults["backbone"])
    side = known.image_size or 64 if known.dataset == "folder" else datasets.SHAPES[known.dataset][1]
    if known.dataset == "folder":
        p.set_defaults(image_size=side)
        defaults = defaults | dict(base_space=side // 8 or 1)                  # half the feature map's side, as below
    defaults = defaults | GROUPS[known.group or defaults["group"]]
    if known.backbone == "resnet18":
        defaults |= dict(base_space=side // (16 if side <= 64 else 64) or 1, grid=0)
    p.add_argument("--help", action="help", help="show this and the defaults in force for --dataset and --group")

    def add(flag, help, default=None, **options):
        default = defaults.get(flag[2:].replace("-", "_"), default)
        help += "" if default is None else " (default: %(default)s)"
        p.add_argument(flag, help=help, default=default, **options)

    count, cells, positive = run.number(int, 1), run.number(int, 0), run.number(float, 0, above=True)
    add("--method", choices=("h-ssl", "a-ssl", "frozen", "supervised"), default="h-ssl",
        help="views from features, views from images, no training, or labels")
    add("--structure", choices=("group", "none"), default="group", help="none: same activations, untied weights")
    add("--epochs", type=count, help="passes over the training images")
    add("--batch-size", type=run.number(int, 2), help="images per step, over all processes")
    add("--lr", type=positive, default=0.1, help="peak learning rate of LARS")
    add("--lr-per-256", action="store_true", default=False, help="multiply --lr by batch-size / 256")
    add("--warmup-epochs", type=run.number(float, 0), help="linear warm-up, by step")
    add("--weight-decay", type=run.number(float, 0), default=1e-4, help="of weights with more than one dimension")
    add("--momentum", type=run.number(float, 0), default=0.9, help="of LARS")
    add("--trust-coefficient", type=positive, help="of LARS")
    add("--temperature", type=positive, help="τ of NT-Xent")
    add("--seed", type=run.number(int, 0), default=0, help="of weights, order of images and views")
    add("--data-dir", default="datasets", help="where data sets are, or are downloaded to")
    add("--train-images", type=run.number(int, 2), help="use only N training images, drawn by --seed (default: all)")
    add("--validate", type=count, metavar="N", help="hold out the last N training images in place of the test split")
    add("--nuisance", choices=datasets.NUISANCES, help="each image turned, shrunk, or anywhere on a larger canvas")
    add("--out", help="the run's folder (default: runs/DATASET-METHOD-GROUP-SEED)")
    add("--resume", action="store_true", default=False, help="continue the run in --out, if there is one")
    add("--save-every", type=count, default=10, help="epochs between checkpoints")
    add("--log-every", type=count, default=10, help="steps between lines of log.jsonl")
    add("--eval-every", type=count, help="epochs between looks at accuracy, neighbours and rank (default: never)")
    add("--amp", choices=("float16", "bfloat16", "off"), help="half precision (default: float16 on cuda, off on cpu)")
    add("--device", choices=("cpu", "cuda"), help="where to train (default: cuda if there is a GPU)")
    # The encoder
    add("--depth", type=count, default=16, help="layers of the residual network, 6n + 4")
    add("--checkpoint-activations", action="store_true", default=False, help="residual: less memory, a third more work")
    add("--widths", type=count, nargs="+", metavar="C", help="channels of its 3 (mnist) or 4 (residual) stages")
    add("--group-size", type=count, help="orientations or scales of the encoder")
    add("--extent", type=count, help="how many of them a filter spans (default: all for rotation, 1 for scale)")
    add("--kernel-size", type=count, help="side of the filters in pixels")
    add("--effective-size", type=count, help="Hermite orders (default: by group and kernel size)")
    add("--sigma", type=positive, help="(smallest) width of the filters in pixels (default: by group and kernel size)")
    add("--scale-step", type=run.number(float, 1, above=True), default=1.41, help="ratio of neighbouring scales")
    add("--padding", choices=("zeros", "circular"), default="zeros", help="of the convolutions, and of shifted images")
    # Objective, views, projection head, detached classifier
    add("--objective", choices=("nt-xent", "simsiam", "byol"), default="nt-xent", help="what compares the views")
    add("--target-decay", type=run.number(float, 0), default=0.99, help="of BYOL's averages at the start; 1 at the end")
    add("--views", type=run.number(int, 2), default=2, help="views of each image; more than two need nt-xent")
    add("--augment", type=count, metavar="N", help="augment images as well; h-ssl reads views from N passes of each")
    add("--crop", action="store_true", default=False, help="a-ssl, translation: views are crops, 4 pixels a position")
    add("--base-space", type=count, help="size of G0: positions a side, orientations, or scales")
    add("--max-distance", type=count, help="largest topographic distance of two views (default: no limit)")
    add("--grid", type=cells, help="average each map of a view to N x N cells for the head; 0 keeps all")
    add("--head-widths", type=count, nargs=2, default=[512, 128], metavar="D", help="of the head: hidden, output")
    add("--probe-grid", type=cells, help="the same for the detached classifier")
    add("--probe-iterations", type=count, default=1000, help="at most, of the detached classifier (L-BFGS)")
    args = p.parse_args(argv)

    for wrong, message in (
            (args.momentum >= 1, f"--momentum {args.momentum} must be below 1"),
            (args.seed >= 2**63, f"--seed {args.seed} must be below 2**63"),
            (args.target_decay > 1, f"--target-decay {args.target_decay} must be at most 1"),
            (args.views > 2 and args.objective != "nt-xent", f"--views {args.views} needs --objective nt-xent"),
            (args.views > 2 and args.max_distance, "--max-distance is for two views: leave out one of these flags"),
            (args.augment and args.method not in ("h-ssl", "a-ssl"), "--augment is for --method h-ssl or a-ssl"),
            ((args.augment or 1) > 1 and (args.method, args.objective) != ("h-ssl", "nt-xent"),
             f"--augment {args.augment} needs --method h-ssl --objective nt-xent: other pairs take --augment 1"),
            (args.crop and (args.method, args.group, args.structure) != ("a-ssl", "translation", "group"),
             "--crop is for --method a-ssl --group translation --structure group: h-ssl has the base space instead")):
        if wrong:
            p.error(message)
    args.device = run.choose_device(args.device)
    args.amp = args.amp or ("float16" if args.device == "cuda" else "off")
    args.out = args.out or f"runs/{args.dataset}-{args.method}-{args.group}-{args.seed}"
    return args


# ------------------------------------------------------------------------------------------------------- the objective
class Objective(nn.Module):
    """Encoder, head and loss as one module, so that DistributedDataParallel sees one forward pass per step. others are
    further modules of the loss: SimSiam's and BYOL's predictor, BYOL's target."""
    def __init__(self, encoder, head, loss, others=(), after_step=lambda step: None):
        super().__init__()
        self.encoder, self.head, self.others = encoder, head, nn.ModuleDict(dict(others))
        self.loss, self.after_step = loss, after_step

    def forward(self, x, *given):
        """x (b, C, H, W) and what the loss is given with it: g1 and g2, or labels for the supervised method."""
        return self.loss(self.encoder, self.head, x, *given)


def make_objective(args, encoder, group, data, total=1):
    """Put the method's head and loss behind an encoder, on the CPU; total is the training's number of steps."""
    # How wide the features are, from shapes alone: on the meta device nothing is computed.
    f, x = copy.deepcopy(encoder).to("meta").eval(), torch.zeros(1, *data.train_images.shape[1:], device="meta")
    z = f(group.T(group.elements[:1].to("meta"), x) if args.crop else x)
    if args.method in ("supervised", "frozen"):
        classifier = nn.Linear(readout(z, args.probe_grid).shape[1], max(1, data.classes))
        return Objective(encoder, classifier,
                         lambda f, h, x, labels: F.cross_entropy(h(readout(f(x), args.probe_grid)), labels))

    ssl_loss = {"h-ssl": h_ssl_loss, "a-ssl": a_ssl_loss}[args.method]
    if args.augment:
        ssl_loss = augmented(ssl_loss, args.augment, probe.processes()[0])
    (hidden, out), width = args.head_widths, readout(group.base(z), args.grid).shape[1]
    head = ProjectionHead(width, hidden, out, args.grid, norm=args.objective != "nt-xent")
    if args.objective == "nt-xent":
        loss = nt_xent if args.views * (args.augment or 1) == 2 else multi_view_nt_xent
        I, others = lambda *h: loss(*h, temperature=args.temperature), {}
    else:
        q = Predictor(out, hidden)
        I, others = lambda h1, h2: simsiam(q(h1), q(h2), h1, h2), dict(predictor=q)
    if args.objective != "byol":
        return Objective(encoder, head, lambda f, h, x, *g: ssl_loss(f, h, I, group, x, *g), others)

    online = nn.ModuleList([encoder, head])
    others["target"] = target = copy.deepcopy(online).requires_grad_(False)

    def byol_loss(f, h, x, *g):
        with torch.no_grad(), torch.random.fork_rng(devices=()):               # with --augment both draw the same T_a
            t1, t2 = ssl_loss(*target, lambda *views: views, group, x, *g)                    # (b, D) each
        return ssl_loss(f, h, lambda h1, h2: byol(q(h1), q(h2), t1, t2), group, x, *g)
    return Objective(encoder, head, byol_loss, others,
                     after_step=lambda step: move_target(target, online, args.target_decay, step, total))


# ------------------------------------------------------------------------------------------------------------ training
def schedule(step, warmup, total):
    """Factor on the learning rate: a linear warm-up over the first steps, then a cosine to zero (the paper's)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def join_processes(args):
    """One process under python, several under torchrun: rank, rank on this machine, their number, device, CPU group."""
    defaults = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in defaults.items())
    if args.batch_size % world:
        run.stop(f"--batch-size {args.batch_size} cannot be shared by {world} processes: take a multiple of {world}")
    cuda, device, together = args.device == "cuda", torch.device(args.device), None
    if cuda:
        if local_rank >= torch.cuda.device_count():
            run.stop(f"torchrun needs a GPU per process, and there are {torch.cuda.device_count()}: start fewer "
                     "processes, or take --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True                                  # shapes stay, so a search is worth it
    if args.amp == "off":
        torch.backends.fp32_precision = "ieee"                                 # or GPUs would convolve in TF32
    if "RANK" in os.environ:
        # After a restart torchrun's store still holds the addresses of the processes before (pytorch issue 135712). The
        # processes of one machine count restarts alike, which tells them apart; for several see experiments/README.md.
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                                device_id=device if cuda else None)
        together = dist.new_group(backend="gloo", timeout=timedelta(days=1))   # patient with a chief that downloads
    if rank == 0:
        print(f"{torch.cuda.get_device_name(device) if cuda else 'CPU'}: {world} x {args.batch_size // world} images a "
              f"step, half precision {args.amp}", flush=True)
    return rank, local_rank, world, device, together


def prepare(args, rank, local_rank, world, device, together):
    """What bad input can stop, by a ValueError: data, encoder, group, objective, pairs of elements, run's folder."""
    turn = 0 if rank == 0 else 1 if local_rank == 0 else 2                     # who may download, here or elsewhere
    for now in range(3):
        if now == turn:
            data = datasets.load(*probe.data_of(vars(args), device))
        if world > 1:
            dist.barrier(together)
    if args.batch_size > len(data.train_images) and args.method != "frozen":
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(data.train_images)} training images")
    if args.method == "supervised" and not data.classes:
        raise ValueError(f"--method supervised needs labels: put the images into {args.data_dir}/train/CLASS/")
    args.image_shape = channels, side = list(data.train_images.shape[1:3])     # for who loads the encoder without data
    encoder, group = run.build(vars(args), channels, side)
    if max(args.grid, args.probe_grid) > side // encoder.stride:
        raise ValueError(f"--grid and --probe-grid must be at most {side // encoder.stride}, the feature map's side")
    steps = max(1, len(data.train_images) // args.batch_size)                  # a last, incomplete batch is left out
    objective = make_objective(args, encoder, group, data, args.epochs * steps).to(device)
    equal = args.augment if args.method == "a-ssl" else args.method != "h-ssl"       # T_a alone may make views differ
    pairs = allowed_pairs(group, args.max_distance, equal) if args.views == 2 else drawn_sets(group, args.views)

    checkpoint = [run.find_checkpoint(vars(args)) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(checkpoint, group=together)                 # all go on from what the chief read
    if rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        config = json.dumps(vars(args) | dict(torch=torch.__version__, processes=world))
        run.write_whole(Path(args.out) / "config.json", config.encode() + b"\n")
    return data, group, objective, pairs, steps, checkpoint[0]


def main(args):
    rank, local_rank, world, device, together = join_processes(args)
    chief, cuda = rank == 0, device.type == "cuda"
    torch.manual_seed(args.seed)
    try:
        data, group, objective, pairs, steps, checkpoint = prepare(args, rank, local_rank, world, device, together)
    except ValueError as error:
        run.stop(error)
    except OverflowError:
        run.stop("--sigma, --scale-step and --group-size give filters beyond floating point: take smaller ones")
    encoder, path, images = objective.encoder, Path(args.out) / "checkpoint.pt", len(data.train_images)
    frozen = checkpoint["frozen"] if checkpoint else probe.probe_frozen(vars(args), encoder, data)

    # ---- processes, optimizer, schedule, half precision
    model = objective
    if dist.is_initialized():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if cuda else model
        model = DistributedDataParallel(model, device_ids=[local_rank] if cuda else None)
        model.broadcast_buffers = False                                        # at each step: SyncBatchNorm's are equal
    epochs = 0 if args.method == "frozen" else args.epochs
    warmup, peak = round(args.warmup_epochs * steps), args.lr * (args.batch_size / 256 if args.lr_per_256 else 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = LARS(trained, peak, args.momentum, args.weight_decay, args.trust_coefficient)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, warmup, epochs * steps))
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "float16")
    overflows = torch.zeros((), device=device)                                 # counted there, so that no step waits
    optimizer.register_step_post_hook(lambda optimizer, *_: overflows.add_(getattr(optimizer, "found_inf", 0)))

    # ---- where to start, and what a save does
    parts, step, epoch_loss = run.parts_of(objective, optimizer, scheduler, scaler), 0, 0.0
    if checkpoint:
        with run.fitting(path):
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["random"])                          # nothing below draws; extensions may
            step, epoch_loss = int(checkpoint["step"]), float(checkpoint["epoch_loss"])
            overflows.fill_(int(checkpoint["overflows"]))
    log = run.Log(args, epochs, steps, step, epoch_loss, step if checkpoint else None, chief,
                  watch=lambda: (probe.watch(vars(args), encoder, data), frozen["held_out"]))

    def save():
        if not all(p.isfinite().all() for p in model.parameters()):
            log.diverged(f"the weights are not finite after step {step}")
        if chief:
            os.fsync(log.file.fileno())                                        # as safe as the checkpoint will be
            run.save_checkpoint(path, parts, settings=vars(args), step=step, epoch=step // steps,
                                epoch_loss=log.epoch_loss, overflows=int(overflows), frozen=frozen)
        log.last_saved = step

    # ---- training
    elements, pairs, share = group.elements.to(device), pairs.to(device), args.batch_size // world
    with run.Signals(together) as signals:
        for epoch in range(step // steps, epochs):
            order, choice = datasets.epoch_plan(images, len(pairs), args.seed, epoch, device)        # (N,) each
            for i in range(step % steps, steps):
                index = order[i * args.batch_size + rank * share:][:share]                           # (b,)
                x = data.batch(data.train_images, index)                                             # (b, C, H, W)
                g = elements[pairs[choice[index]]].unbind(1)                   # g1 and g2, each (b, ...)
                given = [data.train_labels[index]] if args.method == "supervised" else g

                with run.precision(device, args.amp):
                    loss = model(x, *given)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                lr = scheduler.get_last_lr()[0]
                scaler.step(optimizer)                                         # changes nothing where float16 overflows
                scaler.update()
                scheduler.step()
                objective.after_step(step)                                     # BYOL's target follows
                step += 1

                received = signals.received_anywhere()
                log.step(step, loss, lr, overflows, look=received)
                if received or step % (steps * args.save_every) == 0:
                    save()
                if received:
                    signals.leave(received, step, chief)

    # ---- the detached classifier on the trained encoder; all stay, for torchrun ends what outlasts the others
    probe.take_statistics(encoder, data, args.amp)
    save()
    result = probe.write_result(args.out, vars(args), encoder, data, frozen, epochs)
    if chief:
        print(probe.in_words(result))
    if dist.is_initialized():
        dist.barrier(together)
        dist.destroy_process_group()


if __name__ == "__main__":
    run.call(main, parse())
