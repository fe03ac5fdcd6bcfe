"""Homomorphic self-supervised learning: views of an image, read from its features by moving
along the group.

First the objectives, then the groups. Each group has

    T(g, x)             T_g on images (B, C, H, W), background 0; exact for shifts and quarter turns
    Γ(g, z)             Γ_g on features (B, C, G, H, W): (Γ_g z)(g0) = z(g⁻¹ g0)
    base(z)             the fibers over the base space G0, which are all that h sees
    view(g, z)          base(Γ(g, z))
    elements            every g that may be drawn, on the CPU
    distance(g1, g2)    the topographic distance ‖g1⁻¹ g2‖

where g is an integer tensor with one group element per image, on the images' device. The first
four raise a ValueError for images, features or elements that do not fit the group. (The values of
g are checked only on the CPU, because on a GPU every step would have to wait.)

Letters: B batch, C channels, G length of the group axis, H W space, D numbers per projection, M
elements that may be drawn, P pairs of them, S base-space size along the group axis.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# ----------------------------------------------------------------------------------- the objectives

@torch.no_grad()
def equivariance_error(f, group, x, elements=None, on_base=False):
    """How far Eq. (1) is from holding: ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖ for each g, (M,).

    0, up to rounding, where it holds exactly; about √2 for unrelated features of mean 0.

    Args:
        f: any function of images (B, C, H, W) to features (B, C', G, H', W'). In training mode
            batch norm's running statistics would move.
        group, x: one of the groups below, and images.
        elements: some of the group's elements, (M, ...); all of them if None.
        on_base: compare on the base space alone: for translation without the zeros that Γ_g moves
            in, for scale without the ends of the axis.
    """
    if elements is None:
        elements = group.elements
    z = f(x)
    errors = []
    for element in elements:
        g = element.to(x.device).expand(len(x), *element.shape)
        left = f(group.T(g, x)).double()
        right = group.Γ(g, z).double()
        if on_base:
            left = group.base(left)
            right = group.base(right)
        errors.append((left - right).norm() / right.norm())    # f(T_g x) = Γ_g f(x), Eq. (1)
    return torch.stack(errors)


def a_ssl_loss(f, h, I, group, x, g1, g2):
    """L_A: both views are transformed copies of the image, and each copy passes through the
    encoder.

    Args:
        f: the encoder, (B, C, H, W) -> (B, C', G, H', W').
        h: the head, a view -> (B, D).
        I: the objective, two projections (B, D) -> its mean over the batch.
        group, x: one of the groups below, and images (B, C, H, W).
        g1, g2: what moves the two views, one group element per image.
    """
    view1 = group.base(f(group.T(g1, x)))
    view2 = group.base(f(group.T(g2, x)))
    return I(h(view1), h(view2))    # Eq. (2)


def h_ssl_loss(f, h, I, group, x, g1, g2):
    """L_H: the image passes through the encoder once, and both views are read from its features.

    Arguments as for `a_ssl_loss`. Where Eq. (1) holds exactly, the two losses are equal, and so
    are their gradients. With |G0| = 1 on translation this is of the family of local
    patch-against-patch losses: Deep InfoMax (local), CPC, Greedy InfoMax.
    """
    z = f(x)
    view1 = group.view(g1, z)
    view2 = group.view(g2, z)
    return I(h(view1), h(view2))    # Eq. (3)


def allowed_pairs(group, max_distance=None):
    """All pairs of different elements at most max_distance apart: (P, 2) indices into
    group.elements.

    Raises a ValueError if there are none. (g1 = g2 would give one view twice.) Takes 16 bytes a
    pair, so memory grows with the fourth power of the map's side.
    """
    distance = group.distance(group.elements[:, None], group.elements[None, :])    # (M, M)
    allowed = distance > 0
    if max_distance is not None:
        allowed &= distance <= max_distance
    if not allowed.any():
        raise ValueError(f"no two of the {len(group.elements)} group elements make a pair (largest "
                         f"distance: {max_distance}): take a smaller base space, more elements or "
                         "a larger distance")
    return allowed.nonzero()


def readout(view, grid=0):
    """Flatten a view (B, C, S, H, W) into what a head takes: (B, S·C·H·W).

    With grid > 0 each map is averaged down to grid x grid: (B, S·C·grid²). The layout stays: a
    view is a list of fibers, not their mean.
    """
    check_features(view)
    maps = fold_group(view)
    if grid > 0:
        maps = F.adaptive_avg_pool2d(maps, grid)
    return maps.flatten(1)


class ProjectionHead(nn.Module):
    """h: a view -> its readout (B, width) -> linear, ReLU, linear -> (B, out); norm adds batch
    norm."""

    def __init__(self, width, hidden, out, grid=0, norm=False):
        super().__init__()
        self.grid = grid
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(hidden, out),
        )

    def forward(self, view):
        return self.layers(readout(view, self.grid))


# -------------------------------------------------------------------------------------- translation

class Translation:
    """Shifts. g = (down, right) in positions; G0 is a square window of the map, in its middle
    for g = 0.

    Elements are the shifts that keep the window on the map; if circular, all shifts. Distance:
    the larger of the two coordinates' distances.

    Args:
        side: H = W of the feature map.
        window: side of the window in positions, 1 to H; |G0| = window².
        stride: the encoder's, in pixels per position.
        circular: what leaves the map on one side enters on the other, as with circular padding;
            else zeros enter.
    """

    def __init__(self, side, window, stride, circular=False):
        if not 1 <= window <= side:
            raise ValueError(f"the window is {window} positions wide, but must have 1 to {side}")
        if stride < 1:
            raise ValueError(f"stride is {stride} pixels per position, but must be at least 1")
        self.side = side
        self.window = window
        self.stride = stride
        self.circular = circular
        # The window of Γ_g z is the window of z at corner - g, and is on the map while
        # 0 <= corner - g <= side - window.
        self.corner = (side - window) // 2
        first = self.corner - (side - window)
        last = self.corner
        self.limits = (first, last)
        self.image_side = None    # any
        if circular:
            # Shifts by the map's side and more come round again: all integers name an element.
            self.limits = (None, None)
            self.image_side = side * stride
            first = 0
            last = side - 1
        self.reach = max(-first, last)
        steps = torch.arange(first, last + 1)
        self.elements = torch.cartesian_prod(steps, steps)    # (M, 2)

    def T(self, g, x):
        check_images(x, self.image_side)
        check_elements(g, (len(x), 2), *self.limits)
        return crop(x, -g * self.stride, x.shape[-2:], self.reach * self.stride, self.circular)

    def Γ(self, g, z):
        return self.read(g, z, 0, self.side, margin=self.reach)

    def base(self, z):
        still = torch.zeros(len(z), 2, dtype=torch.int64, device=z.device)
        return self.view(still, z)

    def view(self, g, z):    # (B, C, G, window, window)
        # This is base(Γ(g, z)), but only reads the window.
        return self.read(g, z, self.corner, self.window)

    def distance(self, g1, g2):
        apart = (g1 - g2).abs()
        if self.circular:
            apart = apart % self.side
            apart = torch.minimum(apart, self.side - apart)
        return apart.amax(-1)

    def read(self, g, z, corner, size, margin=0):
        """The part of Γ_g z whose top left corner is (corner, corner): (B, C, G, size, size)."""
        check_features(z, side=self.side)
        check_elements(g, (len(z), 2), *self.limits)
        maps = fold_group(z)
        maps = crop(maps, corner - g, (size, size), margin, self.circular)
        return unfold_group(maps, z.shape[2])


# ----------------------------------------------------------------------------------------- rotation

class Rotation:
    """Turns by multiples of 360/G degrees, counter-clockwise. G0 is the first base_size
    orientations.

    Γ_g moves the fibers along the orientation axis, which is cyclic, and turns the map.
    Distance: steps on the circle. Raises a ValueError if base_size is not 1 to the number of
    orientations.
    """

    def __init__(self, orientations, base_size=1):
        if not 1 <= base_size <= orientations:
            raise ValueError(f"the base space has {base_size} orientations, but must have 1 to "
                             f"{orientations}")
        self.orientations = orientations
        self.base_size = base_size
        self.elements = torch.arange(orientations)    # (M,)

    def T(self, g, x):
        check_images(x, side=x.shape[-1])
        check_elements(g, (len(x),))
        return rotate(x, g, self.orientations)

    def Γ(self, g, z):
        return self.read(g, z, self.orientations)

    def base(self, z):
        check_features(z, self.orientations)
        return z[:, :, :self.base_size]

    def view(self, g, z):    # (B, C, base_size, H, W)
        # This is base(Γ(g, z)), but only turns the base space.
        return self.read(g, z, self.base_size)

    def distance(self, g1, g2):
        apart = (g1 - g2) % self.orientations
        return torch.minimum(apart, self.orientations - apart)

    def read(self, g, z, count):
        """The first count orientations of Γ_g z: (Γ_g z)(k, u) = z(k - g, u turned back)."""
        check_features(z, self.orientations, side=z.shape[-1])
        check_elements(g, (len(z),))
        orientation = torch.arange(count, device=z.device)
        source = (orientation - g[:, None]) % self.orientations    # (B, count)
        maps = fold_group(pick(z, source))
        maps = rotate(maps, g, self.orientations, outside="border")
        return unfold_group(maps, count)


# -------------------------------------------------------------------------------------------- scale

class Scale:
    """Enlargements by step**g about the centre. G0 is the middle base_size scales, at all
    positions.

    Γ_g moves the fibers along the scale axis and enlarges the map. The axis ends, and what
    enters from beyond is not a view, so elements are those g whose views read existing scales
    only. Distance: the difference of exponents. step is the ratio of neighbouring scales.
    Raises a ValueError unless step is finite and above 1, and base_size is 1 to the number of
    scales.
    """

    def __init__(self, scales, step, base_size=1):
        if not 1 <= base_size <= scales:
            raise ValueError(f"the base space has {base_size} scales, but must have 1 to {scales}")
        if not 1 < step < math.inf:
            raise ValueError(f"step, the ratio of neighbouring scales, is {step}, but must be "
                             "finite and above 1")
        self.scales = scales
        self.step = step
        self.base_size = base_size
        # The base space of Γ_g z is z's scales from first - g on, and they exist while
        # 0 <= first - g <= scales - base_size.
        self.first = (scales - base_size) // 2
        self.limits = (self.first + base_size - scales, self.first)
        self.elements = torch.arange(self.limits[0], self.limits[1] + 1)    # (M,)

    def T(self, g, x):
        check_images(x)
        check_elements(g, (len(x),), *self.limits)
        return zoom(x, self.step ** g.double())

    def Γ(self, g, z):
        return self.read(g, z, 0, self.scales)

    def base(self, z):
        check_features(z, self.scales)
        return z[:, :, self.first:self.first + self.base_size]

    def view(self, g, z):    # (B, C, base_size, H, W)
        # This is base(Γ(g, z)), but only enlarges the base space.
        return self.read(g, z, self.first, self.base_size)

    def distance(self, g1, g2):
        return (g1 - g2).abs()

    def read(self, g, z, first, count):
        """The scales of Γ_g z from first on, count of them: (Γ_g z)(s, u) = z(s - g, u / step**g),
        and zero beyond the axis."""
        check_features(z, self.scales)
        check_elements(g, (len(z),), *self.limits)
        scale = first + torch.arange(count, device=z.device)
        source = scale - g[:, None]    # (B, count)
        exists = (source >= 0) & (source < self.scales)
        moved = pick(z, source.clamp(0, self.scales - 1)) * exists[:, None, :, None, None]
        maps = zoom(fold_group(moved), self.step ** g.double(), outside="border")
        return unfold_group(maps, count)


# ------------------------------------------------------------------------------------ A-SSL's crops

class Crops(Translation):
    """A-SSL's counterpart of Translation's window: T_g cuts out the pixels that the window of
    Γ_g z stands on.

    The encoder sees only these, and all their features are the base space; Γ and view are of no
    use here. The crop is window · stride pixels wide, the largest displacement max_distance ·
    stride. Arguments as for `Translation`.
    """

    def T(self, g, x):
        check_images(x, side=self.side * self.stride)
        check_elements(g, (len(x), 2), *self.limits)
        size = self.window * self.stride
        return crop(x, (self.corner - g) * self.stride, (size, size), circular=self.circular)

    def base(self, z):
        check_features(z)
        return z


# ------------------------------------------------------------------------------------ what must fit

def check_images(x, side=None):
    """Raise a ValueError unless x is (B, C, H, W), with H = W = side if side is given."""
    if x.ndim != 4 or (side is not None and x.shape[2:] != (side, side)):
        raise ValueError(f"images must be (B, C, {side or 'H'}, {side or 'W'}), "
                         f"but these are {tuple(x.shape)}")


def check_features(z, group_size=None, side=None):
    """Raise a ValueError unless z is (B, C, G, H, W), with this G and H = W = side if given."""
    fits = z.ndim == 5
    if group_size is not None:
        fits = fits and z.shape[2] == group_size
    if side is not None:
        fits = fits and z.shape[3:] == (side, side)
    if not fits:
        raise ValueError(f"features must be (B, C, {group_size or 'G'}, {side or 'H'}, "
                         f"{side or 'W'}), but these are {tuple(z.shape)}")


def check_elements(g, shape, least=None, most=None):
    """Raise a ValueError unless g are integers of this shape, and on a CPU from least to most."""
    if g.shape != shape or g.dtype != torch.int64:
        raise ValueError(f"g must be a tensor of integers (int64) {tuple(shape)}, one group "
                         f"element per image, but is {g.dtype} {tuple(g.shape)}")
    if least is not None and g.device.type == "cpu" and not ((g >= least) & (g <= most)).all():
        raise ValueError(f"g must be elements of the group, {least} to {most}, but holds "
                         f"{g.min()} to {g.max()}")


# ------------------------------------------------------------ moving many maps, each in its own way

def fold_group(z):
    """(B, C, S, H, W) -> (B, S·C, H, W): all channels along the group axis as channels of one
    map."""
    return z.transpose(1, 2).flatten(1, 2)


def unfold_group(maps, size):
    """(B, S·C, H, W) -> (B, C, S, H, W) with S = size."""
    return maps.unflatten(1, (size, -1)).transpose(1, 2)


def pick(z, source):
    """Pick places on the group axis, for each image its own: z (B, C, G, H, W), source (B, S)."""
    first = torch.arange(len(z), device=z.device)[:, None] * z.shape[2]
    places = (first + source).flatten()    # (B·S,), in the B·G places of all images
    picked = z.transpose(1, 2).flatten(0, 1).index_select(0, places)    # (B·S, C, H, W)
    return picked.unflatten(0, source.shape).transpose(1, 2)    # (B, C, S, H, W)


def gather_positions(x, index):
    """Read positions of maps, for each image its own: x (B, C, H, W), index (B, n) into H·W ->
    (B, C, n). In memory the result, and the gradient of x, have channels last."""
    # As in the encoder: batch norm is slow on a CPU where layouts are mixed.
    fibers = x.flatten(2).transpose(1, 2)    # (B, H·W, C)
    index = index[:, :, None].expand(-1, -1, x.shape[1])
    return fibers.gather(1, index).transpose(1, 2)


def crop(x, corner, size, margin=0, circular=False):
    """Cut a window from each map: x (B, C, H, W), corner (B, 2) top left, size (h, w) -> (B, C,
    h, w).

    Beyond the map lie the positions of its other side if circular, else zeros, up to margin
    positions away.
    """
    if margin > 0 and not circular:
        x = F.pad(x, [margin] * 4)
        corner = corner + margin
    height, width = x.shape[-2:]
    rows = corner[:, :1] + torch.arange(size[0], device=x.device)    # (B, h)
    columns = corner[:, 1:] + torch.arange(size[1], device=x.device)    # (B, w)
    if circular:
        rows = rows % height
        columns = columns % width
    index = rows[:, :, None] * width + columns[:, None, :]    # (B, h, w)
    window = gather_positions(x, index.flatten(1))
    return window.unflatten(2, size)


def rotate(x, g, orientations, outside="zeros"):
    """Turn square maps (B, C, H, H) counter-clockwise by g · 360/orientations degrees, g (B,).

    Whole quarter turns permute positions, exactly; what remains of the angle is bilinear.
    outside: see `warp`.
    """
    side = x.shape[-1]
    # g is 4g/G quarter turns: whole ones, and a remainder in parts of 1/G.
    quarters = (4 * g // orientations) % 4
    remainder = (4 * g) % orientations
    positions = torch.arange(side * side, device=x.device).view(side, side)
    turns = torch.stack([positions.rot90(k).flatten() for k in range(4)])    # (4, H·H)
    x = gather_positions(x, turns.index_select(0, quarters)).unflatten(2, (side, side))
    if 4 % orientations == 0:    # 1, 2 or 4 orientations leave no remainder
        return x
    angle = remainder.double() * (math.pi / 2 / orientations)
    cos = angle.cos()
    sin = angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    turned = warp(x, matrix, outside)
    is_quarter = (remainder == 0)[:, None, None, None]
    return torch.where(is_quarter, x, turned)


def zoom(x, factor, outside="zeros"):
    """Enlarge maps (B, C, H, W) about their centre by factor (B,), bilinearly. outside: see
    `warp`."""
    identity = torch.eye(2, device=x.device, dtype=factor.dtype)
    return warp(x, identity / factor[:, None, None], outside)


def warp(x, matrix, outside):
    """Resample maps (B, C, H, W): the value at u is that at matrix @ u, u from the centre;
    matrix (B, 2, 2).

    outside: what lies beyond: "zeros" for images, "border" for features, which go on as at the
    border. Raises a ValueError for maps of integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"maps to be resampled must be floating-point, but are {x.dtype}")
    matrix = matrix.to(torch.promote_types(x.dtype, torch.float32))
    affine = F.pad(matrix, (0, 1))    # (B, 2, 3): no shift
    # Half precision would be too coarse for positions.
    with torch.autocast(x.device.type, enabled=False):
        grid = F.affine_grid(affine, x.shape, align_corners=False)    # (B, H, W, 2), -1 to 1
    warped = F.grid_sample(x.to(grid.dtype), grid, padding_mode=outside, align_corners=False)
    return warped.to(x.dtype)
