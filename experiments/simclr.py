"""SimCLR (Chen et al. 2020), and H-SSL on augmented images, with the networks of train.py.

    python experiments/simclr.py --method {simclr,h-ssl} --out FOLDER [flags of train.py]

Both encode two augmented copies of every image in a step. simclr compares the two by their whole
maps, so the group only chooses the network. h-ssl reads two views from the features of each copy,
and compares all four. One process only.

Letters: B images in a step, N projections of each of V views, D numbers per projection, C channels,
H W space.
"""
import argparse
import math
import os
from functools import partial

import torch
import torch.nn.functional as F

import report    # comes first: it puts the project's folder on the path
import probe
import train
from hssl import ProjectionHead, allowed_pairs, readout


def augment(x, generator):
    """Each of square, normalised images x (B, C, H, H) moved, bent and with noise, in its own way.

    An image is turned by up to 20 degrees, enlarged or shrunk by up to a quarter, stretched by up
    to a tenth, sheared by up to a fifth, shifted by up to 0.15 half image sides, bent by a smooth
    random field, and given Gaussian noise of up to 0.3. Background is 0. generator: on x's device.
    """
    count = len(x)
    options = dict(generator=generator, device=x.device)
    uniform = 2 * torch.rand(6, count, **options) - 1    # -1 to 1
    angle, size, stretch, shear, down, right = uniform.unbind()

    # Each output position, moved back, says where in the image to look.
    angle = angle * math.pi / 9
    cosine = angle.cos()
    sine = angle.sin()
    width = torch.exp(0.22 * size + 0.1 * stretch)
    height = torch.exp(0.22 * size - 0.1 * stretch)
    shear = 0.2 * shear
    # A turn times [[width, shear], [0, height]], and the shift.
    top = [cosine * width, cosine * shear - sine * height, 0.15 * right]
    bottom = [sine * width, sine * shear + cosine * height, 0.15 * down]
    affine = torch.stack(top + bottom, 1).unflatten(1, (2, 3))    # (B, 2, 3)
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    bend = 0.08 * torch.randn(count, 2, 4, 4, **options)
    bend = F.interpolate(bend, x.shape[2:], mode="bicubic")
    moved = F.grid_sample(x, grid + bend.movedim(1, -1), align_corners=False)

    deviation = 0.3 * torch.rand(count, 1, 1, 1, **options)
    noise = torch.randn(x.shape, **options)
    return moved + deviation * noise


def multi_view_nt_xent(*views, temperature=0.1):
    """NT-Xent for V views (N, D) of N images: each projection has V - 1 right partners.

    The loss is the mean over partners, and over projections, of -log softmax of cos/τ among the
    V·N - 1 others, as in the supervised contrastive loss (Khosla et al. 2020, Eq. 2) with each
    image for a class. For two views it is `nt_xent`. Computed in float32 at least.
    """
    h = torch.cat(views)
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    h = F.normalize(h, dim=1)    # (V·N, D)
    (count,) = {len(view) for view in views}    # a ValueError if they differ
    image = torch.arange(len(h), device=h.device) % count    # (V·N,)
    partners = image == image[:, None]    # (V·N, V·N)
    partners.fill_diagonal_(False)
    with torch.autocast(h.device.type, enabled=False):
        logits = (h / temperature) @ h.T    # (V·N, V·N): cos/τ
        logits.fill_diagonal_(float("-inf"))
        log_probability = logits.log_softmax(1)
    return -log_probability[partners].mean()


class Augmented(train.SelfSupervised):
    """Encoder, head and loss of two augmented copies of the same images.

    With a group the views are two of each copy, by the same g1 and g2, else the copies' maps.
    """

    def __init__(self, encoder, head, I, group, seed):
        super().__init__(encoder, head, I, group, None)
        self.seed = seed
        # In the checkpoint, so that a resumed run draws what it would have drawn.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x, g1, g2):    # x: (B, C, H, W), g1 and g2: (B, ...)
        seed = (1_000_000 * self.seed + self.steps.item()) % 2**63
        generator = torch.Generator(x.device).manual_seed(seed)
        self.steps += 1
        views = []
        for _ in range(2):
            z = self.encoder(augment(x, generator))
            if self.group is None:
                views.append(self.head(z))    # (B, D)
            else:
                for g in (g1, g2):
                    views.append(self.head(self.group.view(g, z)))
        return self.I(*views)


@torch.no_grad()
def make_objective(args, classes):
    """The method's module, and the pairs that g1 and g2 are drawn from, as train.py makes them."""
    torch.manual_seed(args.seed)
    encoder = probe.make_encoder(vars(args)).eval()
    channels, side = args.image_shape
    view = encoder(torch.zeros(1, channels, side, side))
    group = None
    pairs = torch.zeros(1, 2)
    if args.method != "simclr":
        group = train.make_group(args, encoder.stride)
        view = group.base(view)
        pairs = group.elements[allowed_pairs(group, args.max_distance)]
    width = readout(view, args.grid).shape[1]
    head = ProjectionHead(width, *args.head_widths, args.grid)
    I = partial(multi_view_nt_xent, temperature=args.temperature)
    objective = Augmented(encoder, head, I, group, args.seed)
    return objective.train(), pairs


def parse(argv=None):
    """train.py's settings, with methods of its own, by which --resume tells the runs apart."""
    parser = argparse.ArgumentParser(epilog="Other flags are train.py's.", allow_abbrev=False)
    parser.add_argument("--method", choices=("simclr", "h-ssl"), required=True)
    own, others = parser.parse_known_args(argv)
    args = train.parse(others)
    args.method = own.method
    if own.method == "h-ssl":
        args.method = "h-ssl on copies"
    return args


def main(argv=None):
    args = parse(argv)
    if "RANK" in os.environ:
        raise ValueError("this is for one process: start it without torchrun")
    train.make_objective = make_objective    # which train.py calls
    train.main(args)


if __name__ == "__main__":
    report.run(main)
