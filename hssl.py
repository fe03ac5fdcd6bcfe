"""Homomorphic self-supervised learning: views of an image, read from its features by moving along the group.

Each group below knows the same four things:

    T(g, x)       T_g on images (B, C, H, W); exact for shifts and quarter turns, else bilinear
    Γ(g, z)       Γ_g on features (B, C, G, H, W): (Γ_g z)(g0) = z(g⁻¹ g0), and f(T_g x) = Γ_g f(x) is Eq. (1)
    view(g, z)    the fibers of Γ_g z over the base space G0, all that h sees: equal to base(Γ(g, z)), but reading no more
    elements      every g that may be drawn, and distance(g1, g2), the topographic distance ‖g1⁻¹ g2‖

g is an integer tensor with one element of the group per image. Images are taken to have 0 as their background.

Letters: B batch, C channels, G group axis, H W space, M elements that may be drawn, S size of the base space.
"""
import math

import torch
import torch.nn.functional as F


# -------------------------------------------------------------------------------------------- the objectives

def a_ssl_loss(f, h, I, group, x, *g):
    """L_A: a transformed copy of each image for each of the views g1, g2 (or more), all of them through the encoder.

    f encodes (B, C, H, W) to (B, C', G, H', W'), h projects a view to (B, D), I is an objective that takes as many
    projections as there are g and its mean over the batch. The copies pass f as one batch, so that batch norm sees all of
    them. Returns what I returns.
    """
    z = f(torch.cat([group.T(gk, x) for gk in g])).chunk(len(g))
    # L_A = mean over i of I( h(f(T_g1 x_i)), h(f(T_g2 x_i)) )                              Eq. (2)
    return I(*[h(group.base(zk)) for zk in z])


def h_ssl_loss(f, h, I, group, x, *g):
    """L_H: each image through the encoder once, and all its views read from its features.

    Arguments as for `a_ssl_loss`. Where f(T_g x) = Γ_g f(x) exactly, the two are equal, and so are their gradients. With a
    base space of one position, |G0| = 1 on translation, this is the family of local patch-against-patch losses: Deep
    InfoMax (local), CPC, Greedy InfoMax.
    """
    z = f(x)
    # L_H = mean over i of I( h(Γ_g1 f(x_i)), h(Γ_g2 f(x_i)) )                              Eq. (3)
    return I(*[h(group.view(gk, z)) for gk in g])


def allowed_pairs(group, max_distance=None):
    """List the pairs (g1, g2), g1 ≠ g2, of elements at most max_distance apart: (P, 2) indices into group.elements.

    To draw a pair uniformly, draw its index below P. Pairs of equal elements are left out: both views would be one.

    Raises:
        ValueError: if no pair is left.
    """
    g1, g2 = group.elements[:, None], group.elements[None, :]
    distance = group.distance(g1, g2)                                                               # (M, M)
    allowed = distance > 0
    if max_distance is not None:
        allowed &= distance <= max_distance
    if not allowed.any():
        apart = "" if max_distance is None else f" at most {max_distance} apart"
        raise ValueError(f"a positive pair needs two group elements{apart}, and these settings leave "
                         f"{len(group.elements)}: take a smaller base space, more elements or a larger distance")
    return allowed.nonzero()


def allowed_sets(group, views, max_distance=None):
    """List the sets of `views` elements of which any two are an allowed pair: (P, views) indices, each set once.

    Raises:
        ValueError: if no set is left.
    """
    pairs = allowed_pairs(group, max_distance)
    fits = torch.zeros(len(group.elements), len(group.elements), dtype=torch.bool)
    fits[pairs[:, 0], pairs[:, 1]] = True
    fits, sets = fits.triu(), torch.arange(len(fits))[:, None]
    for _ in range(views - 1):                                  # add every element beyond the last that fits all before
        row, new = fits[sets].all(1).nonzero().unbind(1)
        sets = torch.cat([sets[row], new[:, None]], 1)
    if not len(sets):
        raise ValueError(f"{views} views need as many group elements, any two of which make a pair, and of these {len(fits)} no such set "
                         "can be formed: take fewer views, a smaller base space, more elements or a larger distance")
    return sets


def readout(view, grid=0):
    """Flatten a view (B, C, S, H, W) into what a network head takes: (B, C·S·H·W).

    grid > 0 first averages each map down to grid x grid (then (B, C·S·grid²)); 0 keeps every position. The layout is
    kept in either case, for a view is a list of fibers, not their mean. A grid of 1 gives that mean: see the README for
    what it does to a representation.
    """
    maps = view.transpose(1, 2).flatten(1, 2)                                                       # (B, S·C, H, W)
    return (F.adaptive_avg_pool2d(maps, grid) if grid else maps).flatten(1)


class ProjectionHead(torch.nn.Sequential):
    """h: a view (B, C, S, H, W) -> its readout -> two linear layers -> (B, D). `width` is the readout's.

    `norm` puts batch norm between the two, as BYOL and SimSiam have it.
    """

    def __init__(self, width, hidden, out, grid, norm=False):
        between = [torch.nn.BatchNorm1d(hidden), torch.nn.ReLU()] if norm else [torch.nn.ReLU()]
        super().__init__(torch.nn.Linear(width, hidden), *between, torch.nn.Linear(hidden, out))
        self.grid = grid

    def forward(self, view):
        return super().forward(readout(view, self.grid))


# ------------------------------------------------------------------------------------------------------------- translation

class Translation:
    """Shifts. G0 is a window of side x side positions, in the middle of the map for g = 0; g = (down, right) in positions.

    Features are (B, C, G, H, W), G = 1 for a plain CNN; one position is stride pixels. Elements are the shifts that keep the
    window on the map, or, if circular, all of them; else T and Γ move by these only. The distance of two is the larger of
    their two coordinates' distances.

    Args:
        size: side H = W of the feature map.
        side: side of the window, 1 to size.
        stride: the encoder's, in pixels per position.
        circular: what leaves the map at one side enters at the other, as for an encoder with circular padding; else
            zeros enter.

    Raises:
        ValueError: if the window does not fit the map.
    """

    def __init__(self, size, side, stride, circular=False):
        if not 1 <= side <= size:
            raise ValueError(f"the window is {side}x{side} positions, but must have a side of 1 to {size}, the map's")
        self.size, self.side, self.stride, self.circular = size, side, stride, circular
        self.corner = (size - side) // 2                          # of the window at g = 0
        # The window of Γ_g z is the window of z at corner - g.
        first, last = (0, size - 1) if circular else (self.corner + side - size, self.corner)
        steps, self.reach = torch.arange(first, last + 1), max(-first, last)
        self.elements = torch.cartesian_prod(steps, steps)                                          # (M, 2)

    def T(self, g, x):
        return crop(x, -g * self.stride, x.shape[-2:], self.stride * self.reach, self.circular)

    def Γ(self, g, z):
        return on_maps(z, lambda maps: crop(maps, -g, z.shape[-2:], self.reach, self.circular))

    def view(self, g, z):                                                                           # (B, C, G, side, side)
        return on_maps(z, lambda maps: crop(maps, self.corner - g, (self.side, self.side), circular=self.circular))

    def base(self, z):
        window = slice(self.corner, self.corner + self.side)
        return z[..., window, window]

    def distance(self, g1, g2):
        apart = (g1 - g2).abs()
        if self.circular:
            apart = torch.minimum(apart, self.size - apart)
        return apart.amax(-1)


class Crops(Translation):
    """A-SSL's crops, counterpart of the window: T_g cuts from the image the pixels that the window of Γ_g z stands on.

    The encoder sees these alone: the crop size is side · stride pixels, the largest displacement max_distance · stride. The
    crop's features (B, C, G, side, side) are the base space. Arguments as for `Translation`; there is no Γ for it.
    """

    def T(self, g, x):
        return crop(x, (self.corner - g) * self.stride, (self.side * self.stride,) * 2, circular=self.circular)

    def base(self, z):
        return z


# ---------------------------------------------------------------------------------------------------------------- rotation

class Rotation:
    """Turns by multiples of 360/G degrees, counter-clockwise. G0 is the first `side` orientations, with all their positions.

    Γ_g moves the fibers along the orientation axis, which is cyclic, and turns the map. Distance: steps on that circle.

    Raises:
        ValueError: if side is not 1 to the number of orientations.
    """

    def __init__(self, orientations, side=1):
        if not 1 <= side <= orientations:
            raise ValueError(f"the base space holds {side} orientations, but must hold 1 to {orientations}, all there are")
        self.orientations, self.side = orientations, side
        self.elements = torch.arange(orientations)                                                  # (M,)

    def T(self, g, x):
        return rotate(x, g, self.orientations)

    def Γ(self, g, z):
        return self._move(g, z, self.orientations)

    def view(self, g, z):                                                                           # (B, C, side, H, W)
        return self._move(g, z, self.side)

    def base(self, z):
        return z[:, :, :self.side]

    def distance(self, g1, g2):
        apart = (g1 - g2).abs()
        return torch.minimum(apart, self.orientations - apart)

    def _move(self, g, z, count):
        """The first count orientations of Γ_g z: (Γ_g z)(k, u) = z(k - g, turned back u)."""
        source = (torch.arange(count, device=z.device) - g[:, None]) % self.orientations            # (B, count)
        return on_maps(take_elements(z, source), lambda maps: rotate(maps, g, self.orientations, outside="border"))


# ------------------------------------------------------------------------------------------------------------------- scale

class Scale:
    """Enlargements by step**g about the centre. G0 is `side` neighbouring scales from index `first`, with all positions.

    Γ_g moves the fibers along the scale axis and enlarges the map. The axis ends, and what enters from beyond it is not a
    view, so g runs over those elements that read existing scales only. Distance: the difference of exponents.

    Args:
        scales: number of scales, smallest first.
        step: ratio of neighbouring scales, above 1.
        side: scales in the base space, 1 to `scales`.
        first: index of its smallest; None for the middle of the axis.

    Raises:
        ValueError: if the base space does not fit the axis.
    """

    def __init__(self, scales, step, side=1, first=None):
        first = (scales - side) // 2 if first is None else first
        if not (1 <= side <= scales and 0 <= first <= scales - side):
            raise ValueError(f"the base space holds {side} scales from index {first}, but there are {scales}")
        self.scales, self.step, self.side, self.first = scales, step, side, first
        self.elements = torch.arange(first + side - scales, first + 1)                              # (M,)

    def T(self, g, x):
        return zoom(x, self.step ** g.double())

    def Γ(self, g, z):
        return self._move(g, z, 0, self.scales)

    def view(self, g, z):                                                                           # (B, C, side, H, W)
        return self._move(g, z, self.first, self.side)

    def base(self, z):
        return z[:, :, self.first:self.first + self.side]

    def distance(self, g1, g2):
        return (g1 - g2).abs()

    def _move(self, g, z, first, count):
        """Scales first, first + 1, ... of Γ_g z: (Γ_g z)(s, u) = z(s - g, u / step**g); zero beyond the axis."""
        source = first + torch.arange(count, device=z.device) - g[:, None]                          # (B, count)
        exists = (source >= 0) & (source < self.scales)
        moved = take_elements(z, source.clamp(0, self.scales - 1)) * exists[:, None, :, None, None]
        return on_maps(moved, lambda maps: zoom(maps, self.step ** g.double(), outside="border"))


# ---------------------------------------------------------------------------------------------------------------- products

class Product:
    """Translation together with rotation or scale: g = (down, right, r) is first r, then the shift.

    A lifted map holds both, and from f(T_r x) = Γ_r f(x) and f(T_t x) = Γ_t f(x) follows f(T_t T_r x) = Γ_t Γ_r f(x). G0 is a
    window of positions in the other group's base space. Distance: the larger of the two parts'.

    Args:
        shifts: a `Translation`.
        other: a `Rotation` or a `Scale`.
    """

    def __init__(self, shifts, other):
        self.shifts, self.other = shifts, other
        self.elements = torch.cat([shifts.elements.repeat_interleave(len(other.elements), 0),
                                   other.elements.repeat(len(shifts.elements))[:, None]], 1)        # (M, 3)

    def T(self, g, x):
        return self.shifts.T(g[:, :2], self.other.T(g[:, 2], x))

    def Γ(self, g, z):
        return self.shifts.Γ(g[:, :2], self.other.Γ(g[:, 2], z))

    def view(self, g, z):                                                                           # (B, C, S, side, side)
        return self.shifts.view(g[:, :2], self.other.view(g[:, 2], z))

    def base(self, z):
        return self.shifts.base(self.other.base(z))

    def distance(self, g1, g2):
        return torch.maximum(self.shifts.distance(g1[..., :2], g2[..., :2]), self.other.distance(g1[..., 2], g2[..., 2]))


# --------------------------------------------------------------------------------- moving many maps, each in its own way

def read(x, index):
    """Read positions of maps, for each image its own: x (B, C, H, W), index (B, P) into H·W -> (B, C, P)."""
    return x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))


def crop(x, corner, size, margin=0, circular=False):
    """Cut a window from each map: x (B, C, H, W), corner (B, 2) top left, size (h, w) -> (B, C, h, w).

    Beyond the map stand the positions of its other side if circular, else zeros, up to `margin` positions away.
    """
    if margin and not circular:
        x, corner = F.pad(x, [margin] * 4), corner + margin
    height, width = x.shape[-2:]
    rows = corner[:, :1] + torch.arange(size[0], device=x.device)                                   # (B, h)
    columns = corner[:, 1:] + torch.arange(size[1], device=x.device)                                # (B, w)
    if circular:
        rows, columns = rows % height, columns % width
    index = (rows * width)[:, :, None] + columns[:, None, :]                                        # (B, h, w)
    return read(x, index.flatten(1)).unflatten(2, tuple(size))


def rotate(x, g, orientations, outside="zeros"):
    """Turn square maps (B, C, H, H) counter-clockwise by g · 360/orientations degrees, g (B,).

    Whole quarter turns permute positions, exactly; what remains of the angle is bilinear. outside: see `warp`.
    """
    side = x.shape[-1]
    if x.shape[-2] != side:
        raise ValueError(f"only square maps can be turned, but these are {x.shape[-2]}x{side}")
    quarters, rest = 4 * g // orientations % 4, 4 * g % orientations
    positions = torch.arange(side * side, device=x.device).view(side, side)
    turns = torch.stack([positions.rot90(q).flatten() for q in range(4)])                           # (4, H·H)
    x = read(x, turns.index_select(0, quarters)).unflatten(2, (side, side))
    if 4 % orientations:                                                                            # else rest is always 0
        angle = rest.double() * (math.pi / 2 / orientations)
        cos, sin = angle.cos(), angle.sin()
        turned = warp(x, torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1), outside)
        x = torch.where((rest == 0)[:, None, None, None], x, turned)
    return x


def zoom(x, factor, outside="zeros"):
    """Enlarge maps (B, C, H, W) about their centre by factor (B,), bilinearly. outside: see `warp`."""
    return warp(x, torch.eye(2, device=x.device, dtype=factor.dtype) / factor[:, None, None], outside)


def warp(x, matrix, outside):
    """Resample maps (B, C, H, W): the value at u is that at matrix @ u, u measured from the centre; matrix (B, 2, 2).

    outside: what stands beyond the map, "zeros" (images, whose background is 0) or "border" (features, where an empty
    background is whatever the encoder makes of it, and the border shows that).
    """
    matrix = matrix.to(torch.promote_types(x.dtype, torch.float32))                                 # half is too coarse for positions
    row, column = (torch.arange(1 - n, n, 2, device=x.device, dtype=matrix.dtype) / n for n in x.shape[-2:])     # u, from -1 to 1
    grid = matrix[:, :, :1, None] * column + matrix[:, :, 1:, None] * row[:, None]                  # (B, 2, H, W): matrix @ u
    return F.grid_sample(x.to(grid.dtype), grid.movedim(1, -1), mode="bilinear", padding_mode=outside, align_corners=False).to(x.dtype)


def take_elements(z, source):
    """Pick group elements, for each image its own: z (B, C, G, H, W), source (B, S) -> (B, C, S, H, W)."""
    elements = z.shape[2]
    row = torch.arange(len(z), device=z.device)[:, None] * elements + source                        # into (B·G)
    picked = z.transpose(1, 2).flatten(0, 1).index_select(0, row.flatten())                         # (B·S, C, H, W)
    return picked.unflatten(0, source.shape).transpose(1, 2)


def on_maps(z, move):
    """Apply a map-to-map function to every element's channels: (B, C, S, H, W) -> (B, C, S, H', W')."""
    maps = move(z.transpose(1, 2).flatten(1, 2))                                                    # (B, S·C, H', W')
    return maps.unflatten(1, (z.shape[2], -1)).transpose(1, 2)
