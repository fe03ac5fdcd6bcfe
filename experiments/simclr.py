"""SimCLR (Chen et al. 2020), and H-SSL on augmented images, with the networks of train.py.

    python experiments/simclr.py --method {simclr,h-ssl} [flags of train.py]

Both encode two augmented copies of every image in a step. simclr compares the two by their whole
maps, so the group only chooses the network. h-ssl reads two views from the features of each copy,
and compares all four. One process only; what ended early starts again with --resume. The run's
folder is one that probe.py reads.

Letters: B images in a step, N projections of each of V views, D numbers per projection, C channels,
H W space, P pairs of group elements.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data as datasets    # noqa: E402
import probe    # noqa: E402
import train    # noqa: E402
from hssl import allowed_pairs    # noqa: E402
from lars import LARS    # noqa: E402
from losses import at_least_float32, check_shapes    # noqa: E402


def augment(x, generator=None):
    """Each of square, normalised images x (B, C, H, H) moved, bent and with noise, in its own way.

    An image is turned by up to 20 degrees, enlarged or shrunk by up to a quarter, stretched by up
    to a tenth, sheared by up to a fifth, shifted by up to 0.15 half image sides, bent by a smooth
    random field, and given Gaussian noise of up to 0.3. Background is 0. generator: on x's device.
    """
    count = len(x)
    side = x.shape[-1]
    options = dict(generator=generator, device=x.device, dtype=x.dtype)
    uniform = 2 * torch.rand(6, count, **options) - 1    # -1 to 1
    angle, size, stretch, shear, down, right = uniform.unbind()

    # Each output position, moved back, says where in the image to look.
    angle = angle * math.pi / 9
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    width = torch.exp(0.22 * size + 0.1 * stretch)
    height = torch.exp(0.22 * size - 0.1 * stretch)
    zero = torch.zeros_like(size)
    deform = torch.stack([width, 0.2 * shear, zero, height], 1).view(-1, 2, 2)
    shift = 0.15 * torch.stack([right, down], 1)[:, :, None]
    affine = torch.cat([turn @ deform, shift], 2)    # (B, 2, 3)
    grid = F.affine_grid(affine, (count, 1, side, side), align_corners=False)
    bend = 0.08 * torch.randn(count, 2, 4, 4, **options)
    bend = F.interpolate(bend, (side, side), mode="bicubic")
    moved = F.grid_sample(x, grid + bend.movedim(1, -1), align_corners=False)

    deviation = 0.3 * torch.rand(count, 1, 1, 1, **options)
    return moved + deviation * torch.randn(x.shape, **options)


def multi_view_nt_xent(*views, temperature=0.1):
    """NT-Xent for V views (N, D) of N images: each projection has V - 1 right partners.

    The loss is the mean over partners, and over projections, of -log softmax of cos/τ among the
    V·N - 1 others, as in the supervised contrastive loss (Khosla et al. 2020, Eq. 2) with each
    image for a class. For two views it is `nt_xent`. Computed in float32 at least.
    """
    check_shapes(*views)
    h = at_least_float32(torch.cat(views))
    h = F.normalize(h, dim=1)    # (V·N, D)
    rows = torch.arange(len(h), device=h.device)
    partners = []
    for view in range(1, len(views)):
        partners.append(rows.roll(view * len(views[0])))
    partner_index = torch.stack(partners, 1)    # (V·N, V - 1)
    with torch.autocast(h.device.type, enabled=False):
        logits = (h / temperature) @ h.T    # (V·N, V·N): cos/τ
        logits.fill_diagonal_(float("-inf"))
        log_probability = logits.log_softmax(1)
        return -log_probability.gather(1, partner_index).mean()


class SimCLR(train.SelfSupervised):
    """Encoder, head and NT-Xent of two copies of the same images."""

    def forward(self, copy1, copy2, g1, g2):    # (B, C, H, W) twice; g1 and g2 are not used
        h1 = self.head(self.encoder(copy1))    # (B, D)
        h2 = self.head(self.encoder(copy2))
        return self.compare(h1, h2)


class AugmentedHSSL(train.SelfSupervised):
    """The same with two views from the features of each copy, by the same g1 and g2."""

    def forward(self, copy1, copy2, g1, g2):    # g1 and g2: (B, ...)
        views = []
        for x in (copy1, copy2):
            z = self.encoder(x)
            for g in (g1, g2):
                views.append(self.head(self.group.view(g, z)))    # (B, D)
        return multi_view_nt_xent(*views, temperature=self.temperature)


def parse(argv=None):
    """train.py's settings, with method "simclr" or "h-ssl"."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="Other flags are train.py's.")
    parser.add_argument("--method", choices=("simclr", "h-ssl"), required=True)
    parser.add_argument("--out", help="the run's folder (runs/DATASET-augmented-METHOD-GROUP-SEED)")
    own, others = parser.parse_known_args(argv)
    args = train.parse(others)
    if args.objective != "nt-xent" or args.eval_every is not None or args.structure != "group":
        parser.error("--objective, --eval-every and --structure are train.py's alone")
    args.method = own.method
    args.out = own.out or f"runs/{args.dataset}-augmented-{args.method}-{args.group}-{args.seed}"
    return args


def make_objective(args):
    """The method's module, and all pairs that its views are drawn from, (P, 2, ...).

    Raises a ValueError where the settings do not fit.
    """
    encoder, group = train.make_encoder_and_group(args)
    channels, side = args.image_shape
    with torch.no_grad():
        z = encoder.eval()(torch.zeros(1, channels, side, side))
    encoder.train()
    if args.method == "h-ssl":
        objective = AugmentedHSSL(args, encoder, group, group.base(z))
        pairs = allowed_pairs(group, args.max_distance)
    else:
        objective = SimCLR(args, encoder, group, z)
        pairs = torch.zeros(1, 2, dtype=torch.int64)
    return objective, group.elements[pairs]


def run(args):
    """Train and measure; writes config.json, log.jsonl, checkpoint.pt and probe.json.

    Raises a ValueError or an OSError for bad input, or no room to save.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this is for one process: start it without torchrun")
    if args.amp == "off":
        torch.backends.fp32_precision = "ieee"    # as in train.py
    data = probe.load_data(vars(args), args.device)
    count = len(data.train_images)
    if args.batch_size > count:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {count} training images")
    args.image_shape = list(data.train_images.shape[1:3])
    args.mean = data.mean
    args.std = data.std
    torch.manual_seed(args.seed)
    objective, pairs = make_objective(args)
    objective.to(args.device)
    pairs = pairs.to(args.device)
    encoder = objective.encoder
    train.find_checkpoint(vars(args))    # refuses a folder that holds a finished run
    out = Path(args.out)
    config = json.dumps(vars(args) | dict(torch=torch.__version__)) + "\n"
    probe.write_whole(out / "config.json", config.encode())
    frozen = probe.evaluate(
        copy.deepcopy(encoder), data, args.probe_grid, args.amp, update_statistics=True)
    print("frozen encoder:", probe.in_words(frozen), flush=True)

    optimizer = LARS(objective.parameters(), args.lr, args.momentum, args.weight_decay,
                     args.trust_coefficient)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "float16")
    generator = torch.Generator(args.device).manual_seed(args.seed)
    steps = count // args.batch_size    # a last, incomplete batch is left out
    warmup = round(args.warmup_epochs * steps)
    step = 0
    log = train.open_log(out, step)
    for epoch in range(args.epochs):
        order, choice = datasets.epoch_plan(count, len(pairs), args.seed, epoch, args.device)
        start = time.perf_counter()
        losses = []
        for index in order.split(args.batch_size)[:steps]:    # (B,)
            x = data.batch(data.train_images, index)    # (B, C, H, W)
            copy1 = augment(x, generator)
            copy2 = augment(x, generator)
            g1, g2 = pairs[choice[index]].unbind(1)    # (B, ...) each

            lr = args.lr * train.schedule(step, warmup, args.epochs * steps)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = lr
            with probe.precision(args.device, args.amp):
                loss = objective(copy1, copy2, g1, g2)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            losses.append(loss.detach())

        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            sys.exit(f"simclr.py: the loss is {mean} in epoch {epoch + 1}: take a lower --lr")
        rate = round(steps * args.batch_size / (time.perf_counter() - start), 1)
        line = dict(epoch=epoch + 1, step=step, loss=mean, lr=lr, images_per_second=rate)
        log.write(json.dumps(line) + "\n")
        print(f"epoch {epoch + 1}/{args.epochs}  loss {mean:.4f}  {rate:,.0f} images/s", flush=True)
    log.close()

    result = probe.evaluate(encoder, data, args.probe_grid, args.amp, update_statistics=True)
    checkpoint = dict(encoder=encoder.state_dict(), settings=vars(args), epoch=args.epochs,
                      frozen=frozen)
    probe.write_checkpoint(out / "checkpoint.pt", checkpoint)
    probe.write_result(out, vars(args), result, frozen, args.epochs)
    print("trained encoder:", probe.in_words(result))


def main(argv=None):
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"simclr.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
