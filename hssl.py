"""Homomorphic self-supervised learning: views of an image, read from its features by moving along the group.

First the objectives and what they need, then the groups. Each group has

    T(g, x)             T_g on images (B, C, H, W), background 0; exact for shifts and quarter turns, else bilinear
    Γ(g, z)             Γ_g on features (B, C, G, H, W): (Γ_g z)(g0) = z(g⁻¹ g0); a ValueError if they do not fit
    base(z)             the fibers over the base space G0, which are all that h sees
    view(g, z)          base(Γ(g, z)), reading no more than it needs
    elements            every g that may be drawn
    distance(g1, g2)    the topographic distance ‖g1⁻¹ g2‖

where g is an integer tensor that holds one group element per image, on the images' device; elements are on the CPU.

Letters: B batch, C channels, G length of the group axis, H W space, D numbers per projection, M elements that may be
drawn, P pairs of them, V views, S base-space size along the group axis.
"""
import math

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------ the objectives
@torch.no_grad()
def equivariance_error(f, group, x, elements=None, on_base=False):
    """How far Eq. (1) is from holding: ‖f(T_g x) - Γ_g f(x)‖ / ‖Γ_g f(x)‖ for each g, (M,).

    0 up to rounding is exact; unrelated features whose mean is 0 give about √2. f is any function of images x (B, C,
    H, W) to features (B, C', G, H', W'), in evaluation mode if it has batch norm; elements (M, ...) are some of the
    group's (default: all). on_base compares on the base space alone, clear of borders and axis ends.
    """
    z, errors = f(x), []
    for g in group.elements if elements is None else elements:
        g = g.to(x.device).expand(len(x), *g.shape)
        left, right = f(group.T(g, x)).double(), group.Γ(g, z).double()        # f(T_g x) = Γ_g f(x)         Eq. (1)
        if on_base:
            left, right = group.base(left), group.base(right)
        errors.append((left - right).norm() / right.norm())
    return torch.stack(errors)


def a_ssl_loss(f, h, I, group, x, g1, g2, *more):
    """L_A: each view is a transformed copy of the image, and all copies pass through the encoder.

    Args:
        f: the encoder, (B, C, H, W) -> (B, C', G, H', W'). All copies pass it as one batch, for batch norm to see.
        h, I: the head, a view -> (B, D), and the objective, projections (B, D) of all views -> its mean over the batch.
        group, x: one of the groups below, and images (B, C, H, W).
        g1, g2, *more: what moves each view, one group element per image: (B, ...).
    """
    z1, z2, *others = f(torch.cat([group.T(g, x) for g in (g1, g2, *more)])).chunk(2 + len(more))
    # L_A = mean over i of I( h(f(T_g1 x_i)), h(f(T_g2 x_i)) )                                               Eq. (2)
    return I(h(group.base(z1)), h(group.base(z2)), *[h(group.base(z)) for z in others])


def h_ssl_loss(f, h, I, group, x, g1, g2, *more):
    """L_H: the image passes through the encoder once, and all its views are read from its features.

    Arguments as for `a_ssl_loss`. Where Eq. (1) holds exactly, both losses are equal, and so are their gradients. With
    |G0| = 1 on translation this is the local patch-against-patch loss of Deep InfoMax (local), CPC, Greedy InfoMax.
    """
    z = f(x)
    # L_H = mean over i of I( h(Γ_g1 f(x_i)), h(Γ_g2 f(x_i)) )                                               Eq. (3)
    return I(h(group.view(g1, z)), h(group.view(g2, z)), *[h(group.view(g, z)) for g in more])


def allowed_pairs(group, max_distance=None, equal=False):
    """List the pairs of elements at most max_distance apart; g1 = g2, which gives one view twice, only if equal: (P, 2)
    indices into group.elements. Raises a ValueError if there are none."""
    distance = group.distance(group.elements[:, None], group.elements[None, :])                      # (M, M)
    allowed = (distance >= (0 if equal else 1)) & (distance <= (math.inf if max_distance is None else max_distance))
    if not allowed.any():
        apart = "" if max_distance is None else f" at most {max_distance} apart"
        raise ValueError(f"a positive pair needs two group elements{apart}, and these settings leave "
                         f"{len(group.elements)}: take a smaller base space, more elements or a larger distance")
    return allowed.nonzero()


def drawn_sets(group, views, count=10_000):
    """For more than two views: random sets of different elements, (count, V) indices. A ValueError if too few."""
    if views > len(group.elements):
        raise ValueError(f"{views} views need as many group elements, and these settings leave {len(group.elements)}: "
                         "take fewer views, a smaller base space or more elements")
    return torch.rand(count, len(group.elements)).argsort(1)[:, :views]


def readout(view, grid=0):
    """Flatten a view (B, C, S, H, W) into what a head takes: (B, S·C·H·W), or (B, S·C·grid²) if grid > 0, which
    averages each map down to grid x grid. The layout stays: a view is a list of fibers, not their mean."""
    maps = view.transpose(1, 2).flatten(1, 2)                                                        # (B, S·C, H, W)
    return (F.adaptive_avg_pool2d(maps, grid) if grid else maps).flatten(1)


class ProjectionHead(torch.nn.Sequential):
    """h: a view -> its readout (B, width) -> linear, ReLU, linear -> (B, out); norm adds batch norm before the ReLU."""
    def __init__(self, width, hidden, out, grid=0, norm=False):
        between = [torch.nn.BatchNorm1d(hidden), torch.nn.ReLU()] if norm else [torch.nn.ReLU()]
        super().__init__(torch.nn.Linear(width, hidden), *between, torch.nn.Linear(hidden, out))
        self.grid = grid

    def forward(self, view):
        return super().forward(readout(view, self.grid))


# --------------------------------------------------------------------------------------------------------- translation
class Translation:
    """Shifts. g = (down, right) in positions; G0 is a square window of the map, in its middle for g = 0.

    Elements are the shifts that keep the window on the map, and T and Γ take only these; if circular, all shifts.
    Distance: the larger of the two coordinates' distances. Raises a ValueError if the window does not fit the map.

    Args:
        side, window: H = W of the feature map, and the side of the window, 1 to H; |G0| = window².
        stride: the encoder's, in pixels per position.
        circular: what leaves the map on one side enters on the other, as with circular padding; else zeros enter.
    """
    def __init__(self, side, window, stride, circular=False):
        if not 1 <= window <= side:
            raise ValueError(f"the window is {window}x{window} positions, but its side must be 1 to {side}, the map's")
        self.side, self.window, self.stride, self.circular = side, window, stride, circular
        self.corner = (side - window) // 2                                     # of the window at g = 0
        # The window of Γ_g z is the window of z at corner - g.
        first, last = (0, side - 1) if circular else (self.corner + window - side, self.corner)
        steps, self.reach = torch.arange(first, last + 1), max(-first, last)
        self.elements = torch.cartesian_prod(steps, steps)                                           # (M, 2)

    def T(self, g, x):
        return crop(x, -g * self.stride, x.shape[-2:], self.stride * self.reach, self.circular)

    def Γ(self, g, z):
        return self._read(z, -g, self.side, self.reach)

    def base(self, z):
        kept = slice(self.corner, self.corner + self.window)
        return z[..., kept, kept]

    def view(self, g, z):                                                                 # (B, C, G, window, window)
        return self._read(z, self.corner - g, self.window)

    def distance(self, g1, g2):
        apart = (g1 - g2).abs()
        if self.circular:
            apart = torch.minimum(apart, self.side - apart)
        return apart.amax(-1)

    def _read(self, z, corner, size, margin=0):
        if z.shape[-2:] != (self.side, self.side):
            raise ValueError(f"maps are {z.shape[-2]}x{z.shape[-1]}, but this group's are {self.side}x{self.side}")
        return on_maps(z, lambda maps: crop(maps, corner, [size] * 2, margin, self.circular))


# ------------------------------------------------------------------------------------------------------------ rotation
class Rotation:
    """Turns by multiples of 360/G degrees, counter-clockwise. G0 is the first base_size orientations, at all positions.

    Γ_g moves the fibers along the orientation axis, which is cyclic, and turns the map. Distance: steps on the circle.
    Raises a ValueError if base_size is not 1 to the number of orientations.
    """
    def __init__(self, orientations, base_size=1):
        if not 1 <= base_size <= orientations:
            raise ValueError(f"the base space has {base_size} orientations, but must have 1 to {orientations}")
        self.orientations, self.base_size = orientations, base_size
        self.elements = torch.arange(orientations)                                                   # (M,)

    def T(self, g, x):
        return rotate(x, g, self.orientations)

    def Γ(self, g, z):
        return self._move(g, z, self.orientations)

    def base(self, z):
        return z[:, :, :self.base_size]

    def view(self, g, z):                                                                 # (B, C, base_size, H, W)
        return self._move(g, z, self.base_size)

    def distance(self, g1, g2):
        apart = (g1 - g2).abs()
        return torch.minimum(apart, self.orientations - apart)

    def _move(self, g, z, count):
        """The first count orientations of Γ_g z: (Γ_g z)(k, u) = z(k - g, u turned back)."""
        source = (torch.arange(count, device=z.device) - g[:, None]) % self.orientations             # (B, count)
        turn = lambda maps: rotate(maps, g, self.orientations, outside="border")
        return on_maps(along_group(z, source, self.orientations), turn)


# --------------------------------------------------------------------------------------------------------------- scale
class Scale:
    """Enlargements by step**g about the centre. G0 is the middle base_size scales, at all positions.

    Γ_g moves the fibers along the scale axis and enlarges the map. The axis ends, and what enters from beyond is not a
    view, so elements are those g whose views read existing scales only. Distance: the difference of exponents. step is
    the ratio of neighbouring scales, above 1. Raises a ValueError if base_size is not 1 to the number of scales.
    """
    def __init__(self, scales, step, base_size=1):
        if not 1 <= base_size <= scales:
            raise ValueError(f"the base space has {base_size} scales, but must have 1 to {scales}")
        self.scales, self.step, self.base_size, self.first = scales, step, base_size, (scales - base_size) // 2
        self.elements = torch.arange(self.first + base_size - scales, self.first + 1)                # (M,)

    def T(self, g, x):
        return zoom(x, self.step ** g.double())

    def Γ(self, g, z):
        return self._move(g, z, 0, self.scales)

    def base(self, z):
        return z[:, :, self.first:self.first + self.base_size]

    def view(self, g, z):                                                                 # (B, C, base_size, H, W)
        return self._move(g, z, self.first, self.base_size)

    def distance(self, g1, g2):
        return (g1 - g2).abs()

    def _move(self, g, z, first, count):
        """Scales first, first + 1, ... of Γ_g z: (Γ_g z)(s, u) = z(s - g, u / step**g); zero beyond the axis."""
        source = first + torch.arange(count, device=z.device) - g[:, None]                           # (B, count)
        exists = (source >= 0) & (source < self.scales)
        moved = along_group(z, source.clamp(0, self.scales - 1), self.scales) * exists[:, None, :, None, None]
        return on_maps(moved, lambda maps: zoom(maps, self.step ** g.double(), outside="border"))


# ------------------------------------------------------------------------------------------------------- A-SSL's crops
class Crops:
    """A-SSL's counterpart of Translation's window: T_g cuts out the pixels that the window of Γ_g z stands on.

    The encoder sees only these, and all their features are the base space, so there is no Γ and no view. The crop size
    is window · stride pixels, the largest displacement max_distance · stride. Arguments as for `Translation`.
    """
    def __init__(self, side, window, stride, circular=False):
        self.shifts = Translation(side, window, stride, circular)
        self.elements, self.distance = self.shifts.elements, self.shifts.distance

    def T(self, g, x):
        s = self.shifts
        return crop(x, (s.corner - g) * s.stride, [s.window * s.stride] * 2, circular=s.circular)

    def base(self, z):
        return z


# ---------------------------------------------------------------------------------- extension: ordinary augmentation
def augment(x, generator=None):
    """T_a x for square, normalised images x (B, C, H, W), a drawn for each: turned by up to 20 degrees, enlarged or
    shrunk by up to a quarter, stretched, sheared, shifted by up to a thirteenth of the side, bent, and with noise of up
    to 0.3 standard deviations. Background is 0. generator: on x's device.
    """
    b, (height, width) = len(x), x.shape[-2:]
    normal = dict(generator=generator, device=x.device, dtype=x.dtype)
    angle, size, stretch, shear, *shift = (2 * torch.rand(6, b, **normal) - 1).unbind()
    angle, row, column = angle * math.pi / 9, (0.22 * size + 0.1 * stretch).exp(), (0.22 * size - 0.1 * stretch).exp()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    deform = torch.stack([column, 0.2 * shear, torch.zeros_like(row), row], 1).view(-1, 2, 2)
    matrix = torch.cat([turn @ deform, 0.15 * torch.stack(shift, 1)[:, :, None]], 2)                 # (B, 2, 3)
    bend = F.interpolate(0.08 * torch.randn(b, 2, 4, 4, **normal), (height, width), mode="bicubic")
    grid = F.affine_grid(matrix, (b, 1, height, width), align_corners=False) + bend.movedim(1, -1)
    noise = 0.3 * torch.rand(b, 1, 1, 1, **normal) * torch.randn(x.shape, **normal)
    return F.grid_sample(x, grid, align_corners=False) + noise


def augmented(ssl_loss, passes=1, rank=0):
    """`a_ssl_loss` or `h_ssl_loss` with T_a x in the place of every x that the encoder sees.

    H-SSL reads all views from one T_a x; A-SSL draws an a for each T_g x. With more passes the encoder sees each image
    that often, and I is given all their views. Draws depend on torch's random state on the CPU and on the rank.
    """
    def loss(f, h, I, group, x, *g):
        def seen(x):
            seed = int(torch.randint(2**62, ())) + rank
            with torch.autocast(x.device.type, enabled=False):                 # half precision moves pixels
                x = augment(x, torch.Generator(x.device).manual_seed(seed))
            return f(x)
        x, *g = (torch.cat([given] * passes) for given in (x, *g))
        return ssl_loss(seen, h, lambda *h: I(*(part for view in h for part in view.chunk(passes))), group, x, *g)
    return loss


# ------------------------------------------------------------------------------ moving many maps, each in its own way
def read(x, index):
    """Read positions of maps, for each image its own: x (B, C, H, W), index (B, n) into H·W -> (B, C, n)."""
    return x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))


def crop(x, corner, size, margin=0, circular=False):
    """Cut a window from each map: x (B, C, H, W), corner (B, 2) top left, size (h, w) -> (B, C, h, w).

    Beyond the map lie the positions of its other side if circular, else zeros, up to margin positions away.
    """
    if margin and not circular:
        x, corner = F.pad(x, [margin] * 4), corner + margin
    height, width = x.shape[-2:]
    rows = corner[:, :1] + torch.arange(size[0], device=x.device)                                    # (B, h)
    columns = corner[:, 1:] + torch.arange(size[1], device=x.device)                                 # (B, w)
    if circular:
        rows, columns = rows % height, columns % width
    index = (rows * width)[:, :, None] + columns[:, None, :]                                         # (B, h, w)
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
    turns = torch.stack([positions.rot90(q).flatten() for q in range(4)])                            # (4, H·H)
    x = read(x, turns.index_select(0, quarters)).unflatten(2, (side, side))
    if 4 % orientations:                                                       # else rest is always 0
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

    outside: what lies beyond: "zeros" for images, "border" for features, where it shows what an empty background gives.
    """
    matrix = matrix.to(torch.promote_types(x.dtype, torch.float32))            # half precision would be too coarse
    row, column = (torch.arange(1 - n, n, 2, device=x.device, dtype=matrix.dtype) / n for n in x.shape[-2:])  # -1 to 1
    grid = matrix[:, :, :1, None] * column + matrix[:, :, 1:, None] * row[:, None]                   # (B, 2, H, W)
    return F.grid_sample(x.to(grid.dtype), grid.movedim(1, -1), padding_mode=outside, align_corners=False).to(x.dtype)


def along_group(z, source, length):
    """Pick places on the group axis, G = length, for each image its own: z (B, C, G, H, W), source (B, S)."""
    if z.shape[2] != length:
        raise ValueError(f"features have {z.shape[2]} places on the group axis, but this group has {length}")
    row = torch.arange(len(z), device=z.device)[:, None] * z.shape[2] + source                       # into B·G
    picked = z.transpose(1, 2).flatten(0, 1).index_select(0, row.flatten())                          # (B·S, C, H, W)
    return picked.unflatten(0, source.shape).transpose(1, 2)


def on_maps(z, move):
    """Apply a map-to-map function to all channels along the group axis: (B, C, S, H, W) -> (B, C, S, H', W')."""
    maps = move(z.transpose(1, 2).flatten(1, 2))                                                     # (B, S·C, H', W')
    return maps.unflatten(1, (z.shape[2], -1)).transpose(1, 2)
