"""SimCLR (Chen et al. 2020) with the networks of train.py.

    python experiments/simclr.py --out FOLDER [flags of train.py]

It encodes two augmented copies of every image in a step, and compares the whole maps: the group
only chooses the network. One process only. The augmentations, see `augment`, are for digits, and
have neither crops nor colours.

Letters: B images in a step, C channels, H W space.
"""
import math
import os
from functools import partial

import torch
import torch.nn.functional as F

import report    # comes first: it puts the project's folder on the path
import probe
import train
from hssl import ProjectionHead, readout
from losses import nt_xent


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


class Augmented(train.SelfSupervised):
    """Encoder, head and loss of two augmented copies of the same images."""

    def __init__(self, encoder, head, I, seed):
        super().__init__(encoder, head, I, group=None, ssl_loss=None)
        self.seed = seed
        # In the checkpoint, so that a resumed run draws what it would have drawn.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x, g1, g2):    # x: (B, C, H, W); g1 and g2 are not used
        seed = (1_000_000 * self.seed + self.steps.item()) % 2**63
        generator = torch.Generator(x.device).manual_seed(seed)
        self.steps += 1
        with torch.autocast(x.device.type, enabled=False):    # bfloat16: too coarse
            x1 = augment(x, generator)
            x2 = augment(x, generator)
        h1 = self.head(self.encoder(x1))
        h2 = self.head(self.encoder(x2))
        return self.I(h1, h2)


@torch.no_grad()
def make_objective(args, classes):
    """Encoder, head and loss as one module, and no pairs, as train.py makes them."""
    torch.manual_seed(args.seed)
    encoder = probe.make_encoder(vars(args)).eval()
    channels, side = args.image_shape
    maps = encoder(torch.zeros(1, channels, side, side))
    width = readout(maps, args.grid).shape[1]
    head = ProjectionHead(width, *args.head_widths, args.grid)
    I = partial(nt_xent, temperature=args.temperature)
    objective = Augmented(encoder, head, I, args.seed)
    return objective.train(), torch.zeros(1, 2)


def parse(argv=None):
    """train.py's settings, with a method of its own, by which --resume tells the runs apart."""
    args = train.parse(argv)
    if args.method != "h-ssl":
        raise ValueError("--method is train.py's: the method here is SimCLR")
    args.method = "simclr"
    return args


def main(argv=None):
    args = parse(argv)
    if "RANK" in os.environ:
        raise ValueError("this is for one process: start it without torchrun")
    train.make_objective = make_objective    # which train.py calls
    train.main(args)


if __name__ == "__main__":
    report.run(main)
