"""Homomorphic self-supervised learning: views of an image, read from its features by moving
along the group.

First the objectives, then the groups. Each group has

    T(g, x)             T_g on images (B, C, H, W), background 0; exact for shifts and quarter turns
    Γ(g, z)             Γ_g on features (B, C, G, H, W): (Γ_g z)(g0) = z(g⁻¹ g0)
    base(z)             the fibers over the base space G0, which are all that h sees
    view(g, z)          base(Γ(g, z)), but only the base space is computed
    elements            all elements that may be drawn: a CPU tensor, (M,) or (M, 2)
    distance(g1, g2)    the topographic distance ‖g1⁻¹ g2‖

where g is an integer tensor with one group element per image, on the images' device. The first
four raise a ValueError for images, features or elements that do not fit the group. (The values of
g are checked on the CPU alone, because on a GPU every step would have to wait.)

Letters: B batch, C channels, G length of the group axis, H W space, D numbers per projection, M
elements that may be drawn, P pairs of them, S length of a view's group axis.
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
        f: any function of images (B, C, H, W) to features (B, C', G, H', W'). In training mode,
            calling it moves batch norm's running statistics.
        group, x: one of the groups below, and images.
        elements: some of the group's elements, (M, ...); all of them if None.
        on_base: compare on the base space alone, which leaves out the zeros that Γ_g moves in from
            beyond the map or the scale axis.
    """
    if elements is None:
        elements = group.elements
    z = f(x)
    errors = []
    for element in elements:
        g = element.to(x.device).expand(len(x), *element.shape)
        left = f(group.T(g, x)).cpu().double()    # not every device has float64
        right = group.Γ(g, z).cpu().double()
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
        g1, g2: the elements that move the two views, one of each per image.
    """
    view1 = group.base(f(group.T(g1, x)))
    view2 = group.base(f(group.T(g2, x)))
    return I(h(view1), h(view2))    # Eq. (2)


def h_ssl_loss(f, h, I, group, x, g1, g2):
    """L_H: the image passes through the encoder once, and both views are read from its features.

    Arguments as for `a_ssl_loss`. Where Eq. (1) holds exactly, the two losses are equal, and so
    are their gradients. With |G0| = 1 on translation this belongs to the local losses, which
    compare patch with patch: Deep InfoMax (local), CPC, Greedy InfoMax.
    """
    z = f(x)
    view1 = group.view(g1, z)
    view2 = group.view(g2, z)
    return I(h(view1), h(view2))    # Eq. (3)


def allowed_pairs(group, max_distance=None):
    """All pairs of different elements at most max_distance apart: (P, 2) indices into
    group.elements.

    Raises a ValueError if there are none. (g1 = g2 would give one view twice.) For translation
    their number grows with the fourth power of the map's side.
    """
    distance = group.distance(group.elements[:, None], group.elements[None, :])    # (M, M)
    allowed = distance > 0
    if max_distance is not None:
        allowed &= distance <= max_distance
    if not allowed.any():
        raise ValueError(f"no two of the {len(group.elements)} group elements make a pair: take a "
                         "smaller base space, more elements or a larger distance")
    return allowed.nonzero()


def readout(view, grid=0):
    """Flatten a view (B, C, S, H, W) into what a head takes: (B, S·C·H·W).

    With grid > 0 each map is averaged down to grid x grid: (B, S·C·grid²). The layout stays: a
    view is a list of fibers, not their mean. Raises a ValueError for another shape, or a grid finer
    than the map.
    """
    check_shape("a view", view, "B", "C", "S", "H", "W")
    if grid > min(view.shape[-2:]):
        raise ValueError(f"a grid of {grid}x{grid} cells is finer than the map of "
                         f"{view.shape[-2]}x{view.shape[-1]} positions: take a smaller one")
    maps = fold_group(view)
    if grid > 0:
        maps = F.adaptive_avg_pool2d(maps, grid)
    return maps.flatten(1)


class ProjectionHead(nn.Module):
    """h: a view -> its readout (B, width) -> linear, ReLU, linear -> (B, out)."""

    def __init__(self, width, hidden, out, grid=0):
        super().__init__()
        self.grid = grid
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, out),
        )

    def forward(self, view):
        return self.layers(readout(view, self.grid))


# --------------------------------------------------------------------------------------- the groups

class Group:
    """What the groups share: an axis of `size` places, which are the positions of a side, the
    orientations or the scales, and may be a circle. G0 is base_size of them, from `first` on.

    Raises a ValueError unless base_size is 1 to size.
    """

    def __init__(self, size, base_size, circular=False):
        if not 1 <= base_size <= size:
            raise ValueError(f"base_size is {base_size}, but must be 1 to {size}")
        self.size = size
        self.base_size = base_size
        self.first = (size - base_size) // 2    # G0 lies in the middle
        self.circular = circular
        if circular:    # any integer names an element of a circle
            self.limits = (None, None)
            self.elements = torch.arange(size)    # (M,)
        else:
            # Over G0, Γ_g z holds z from first - g on. For these g all of that exists.
            self.limits = (self.first + base_size - size, self.first)
            self.elements = torch.arange(self.limits[0], self.limits[1] + 1)    # (M,)

    def distance(self, g1, g2):
        apart = (g1 - g2).abs()
        if self.circular:
            apart = apart % self.size
            apart = torch.minimum(apart, self.size - apart)
        return apart

    def Γ(self, g, z):
        return self.read(g, z, 0, self.size)

    def view(self, g, z):
        return self.read(g, z, self.first, self.base_size)


class Translation(Group):
    """Shifts. g = (down, right) in positions; G0 is a square window in the middle of the map.

    Elements are the shifts that keep the window on the map; if circular, all shifts. Distance:
    the larger of the two coordinates' distances.

    Args:
        side: H = W of the feature map.
        base_size: side of the window in positions, 1 to H; |G0| = base_size².
        stride: the encoder's, in pixels per position. A wrong one moves images too far or not far
            enough, which, unless circular, only `equivariance_error` shows.
        circular: what leaves the map on one side enters on the other, as with circular padding;
            else zeros enter.
    """

    def __init__(self, side, base_size, stride, circular=False):
        super().__init__(side, base_size, circular)
        if stride < 1:
            raise ValueError(f"stride is {stride} pixels per position, but must be at least 1")
        self.stride = stride
        self.elements = torch.cartesian_prod(self.elements, self.elements)    # (M, 2)

    def T(self, g, x):
        side = self.size * self.stride
        axes = (side, side) if self.circular else ("H", "W")
        check_shape("images", x, "B", "C", *axes)
        check_elements(g, (len(x), 2), *self.limits)
        return crop(x, -g * self.stride, x.shape[-2:], self.circular)

    def base(self, z):    # (B, C, G, base_size, base_size)
        check_shape("features", z, "B", "C", "G", self.size, self.size)
        window = slice(self.first, self.first + self.base_size)
        return z[:, :, :, window, window]

    def distance(self, g1, g2):
        return super().distance(g1, g2).amax(-1)

    def read(self, g, z, first, count):
        """The rows and columns of Γ_g z from first on, count of each: (Γ_g z)(u) = z(u - g)."""
        check_shape("features", z, "B", "C", "G", self.size, self.size)
        check_elements(g, (len(z), 2), *self.limits)
        maps = crop(fold_group(z), first - g, (count, count), self.circular)
        return unfold_group(maps, z.shape[2])


class Rotation(Group):
    """Turns by multiples of 360/G degrees, counter-clockwise. G0 holds the first base_size
    orientations (1 to G), at all positions.

    Γ_g moves the fibers along the orientation axis, which is cyclic, and turns the map.
    Distance: steps on the circle.
    """

    def __init__(self, orientations, base_size=1):
        super().__init__(orientations, base_size, circular=True)
        self.first = 0    # a circle has no middle

    def T(self, g, x):
        check_shape("images", x, "B", "C", "H", "H")
        check_elements(g, (len(x),))
        return rotate(x, g, self.size)

    def base(self, z):    # (B, C, base_size, H, H)
        check_shape("features", z, "B", "C", self.size, "H", "H")
        return z[:, :, :self.base_size]

    def read(self, g, z, first, count):
        """The orientations of Γ_g z from first on, count of them: (Γ_g z)(k, u) = z(k - g, u
        turned back)."""
        check_shape("features", z, "B", "C", self.size, "H", "H")
        check_elements(g, (len(z),))
        orientation = first + torch.arange(count, device=z.device)
        source = (orientation - g[:, None]) % self.size    # (B, count)
        maps = fold_group(pick(z, source))
        maps = rotate(maps, g, self.size, outside="border")
        return unfold_group(maps, count)


class Scale(Group):
    """Enlargements by step**g about the centre. G0 holds the middle base_size scales (1 to G), at
    all positions.

    Γ_g moves the fibers along the scale axis and enlarges the map. The axis ends, and what
    enters from beyond is not a view, so elements are those g whose views read existing scales
    only. Distance: the difference of exponents. step, the ratio of neighbouring scales, is finite
    and above 1.
    """

    def __init__(self, scales, step, base_size=1):
        super().__init__(scales, base_size)
        if not 1 < step < math.inf:
            raise ValueError(f"step, the ratio of neighbouring scales, is {step}, but must be "
                             "finite and above 1")
        self.step = step

    def T(self, g, x):
        check_shape("images", x, "B", "C", "H", "W")
        check_elements(g, (len(x),), *self.limits)
        return zoom(x, g, self.step)

    def base(self, z):    # (B, C, base_size, H, W)
        check_shape("features", z, "B", "C", self.size, "H", "W")
        return z[:, :, self.first:self.first + self.base_size]

    def read(self, g, z, first, count):
        """The scales of Γ_g z from first on, count of them: (Γ_g z)(s, u) = z(s - g, u / step**g),
        and zero beyond the axis."""
        check_shape("features", z, "B", "C", self.size, "H", "W")
        check_elements(g, (len(z),), *self.limits)
        scale = first + torch.arange(count, device=z.device)
        source = scale - g[:, None]    # (B, count)
        exists = (source >= 0) & (source < self.size)
        moved = pick(z, source.clamp(0, self.size - 1)) * exists[:, None, :, None, None]
        maps = zoom(fold_group(moved), g, self.step, outside="border")
        return unfold_group(maps, count)


# ------------------------------------------------------------------------------------ what must fit

def check_shape(what, tensor, *axes):
    """Raise a ValueError unless a tensor has these axes: a number is a length, and a letter stands
    for any length, but the same one everywhere."""
    found = type(tensor).__name__
    fits = False
    if torch.is_tensor(tensor):
        found = tuple(tensor.shape)
        length_of = dict(zip(axes, found))
        expected = []
        for axis in axes:
            expected.append(axis if isinstance(axis, int) else length_of.get(axis))
        fits = found == tuple(expected)
    if not fits:
        raise ValueError(f"{what} must be ({', '.join(map(str, axes))}), but these are {found}")


def check_elements(g, shape, least=None, most=None):
    """Raise a ValueError unless g are int64 of this shape and, where they can be seen, least to
    most."""
    if not torch.is_tensor(g) or g.shape != shape or g.dtype != torch.int64:
        found = f"{getattr(g, 'dtype', type(g).__name__)} {list(getattr(g, 'shape', []))}"
        raise ValueError(f"g must be torch.int64 {list(shape)}, one group element per image, but "
                         f"is {found}")
    # Values cannot be seen while compiling, under torch.func, or on a GPU without waiting for it.
    hidden = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(g)
    if least is None or hidden or g.device.type != "cpu":
        return
    if ((g < least) | (g > most)).any():
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
    """Pick places on the group axis by indices that differ by image: z (B, C, G, H, W), source
    (B, S) -> (B, C, S, H, W)."""
    image = torch.arange(len(z), device=z.device)[:, None]
    return z[image, :, source].transpose(1, 2)


def crop(x, corner, size, circular=False):
    """Cut a window from each map: x (B, C, H, W), corner (B, 2) top left, size (h, w) -> (B, C,
    h, w). Beyond the map lie the positions of its other side if circular, else zeros."""
    height, width = x.shape[-2:]
    rows = corner[:, :1] + torch.arange(size[0], device=x.device)    # (B, h)
    columns = corner[:, 1:] + torch.arange(size[1], device=x.device)    # (B, w)
    if circular:
        rows = rows % height
        columns = columns % width
    nearest_row = rows.clamp(0, height - 1)
    nearest_column = columns.clamp(0, width - 1)
    on_map = (rows == nearest_row)[:, :, None] & (columns == nearest_column)[:, None, :]
    index = nearest_row[:, :, None] * width + nearest_column[:, None, :]    # (B, h, w)
    index = index.flatten(1)[:, :, None].expand(-1, -1, x.shape[1])    # (B, h·w, C)
    # With channels last, as in the encoder: batch norm is slow on a CPU where layouts are mixed.
    fibers = x.flatten(2).transpose(1, 2)    # (B, H·W, C)
    window = fibers.gather(1, index).transpose(1, 2).unflatten(2, size)
    return window.where(on_map[:, None], 0)


def rotate(x, g, orientations, outside="zeros"):
    """Turn square maps (B, C, H, H) counter-clockwise by g · 360/orientations degrees, g (B,).

    Whole quarter turns permute positions, exactly; what remains of the angle is bilinear.
    outside: see `warp`.
    """
    # 4g/G quarter turns are `quarters` whole ones and remainder/G of another.
    quarters = (4 * g // orientations)[:, None, None, None] % 4
    remainder = (4 * g) % orientations
    turned = x
    for k in (1, 2, 3):
        turned = torch.where(quarters == k, x.rot90(k, (2, 3)), turned)
    if 4 % orientations == 0:    # 1, 2 or 4 orientations leave no remainder
        return turned
    angle = remainder.to(precise(x)) * (math.pi / 2 / orientations)
    cos = angle.cos()
    sin = angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    is_quarter = (remainder == 0)[:, None, None, None]
    return torch.where(is_quarter, turned, warp(turned, matrix, outside))


def zoom(x, g, step, outside="zeros"):
    """Enlarge maps (B, C, H, W) about their centre by step**g, g (B,), bilinearly. outside: see
    `warp`."""
    factor = step ** g.to(precise(x))
    identity = torch.eye(2, device=x.device, dtype=factor.dtype)
    return warp(x, identity / factor[:, None, None], outside)


def precise(x):
    """The type for positions on a map: that of x, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def warp(x, matrix, outside):
    """Resample maps (B, C, H, W): the value at u is that at matrix @ u, u from the centre;
    matrix (B, 2, 2), of the type `precise` names.

    outside: what lies beyond: "zeros" for images, "border" for features, whose border repeats.
    Raises a ValueError for maps of integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"maps to be resampled must be floating-point, but are {x.dtype}")
    if len(x) == 0:    # PyTorch makes no grid for an empty batch
        return x
    affine = F.pad(matrix, (0, 1))    # (B, 2, 3): no shift
    # Half precision would be too coarse for positions.
    with torch.autocast(x.device.type, enabled=False):
        grid = F.affine_grid(affine, x.shape, align_corners=False)    # (B, H, W, 2), -1 to 1
    warped = F.grid_sample(x.to(grid.dtype), grid, padding_mode=outside, align_corners=False)
    return warped.to(x.dtype)
