"""Group convolutions with steerable filters, and the encoders f built from them.

The filters are SESN's (Sosnovik et al., ICLR 2020): a learned combination of fixed Hermite-Gaussian
functions, sampled once for every orientation or scale. The weights are shared; only the samples
differ. Translation has one sample, rotation turns the functions, scale widens them. Two backbones
follow, and two networks with the structure removed.

Letters: B batch, C channels, G length of the group axis, H W space, K basis functions, E extent of
a filter along G, k kernel side.

Features are (B, C, G, H, W). For translation, G = 1, channels come last in memory, which is
fastest. With a longer axis maps have PyTorch's default order, and batch norm, for (B, C, H, W·G),
copies.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------- the fixed basis

def hermite_orders(group, effective_size):
    """The orders (n, m) of the basis functions He_n(x) He_m(y).

    n, m < effective_size is SESN's basis "A". It is not closed under turns; n + m < effective_size,
    for rotation, is.
    """
    orders = []
    for n in range(effective_size):
        for m in range(effective_size):
            if group != "rotation" or n + m < effective_size:
                orders.append((n, m))
    return orders


def hermite_gaussian(t, order, sigma):
    """He_order(t/σ) exp(-t²/2σ²)/σ at points t in pixels: one factor of a basis function. He are
    the probabilists' Hermite polynomials."""
    s = t / sigma
    polynomial = torch.special.hermite_polynomial_he(s, order)
    return polynomial * torch.exp(-s**2 / 2) / sigma


def steerable_basis(group, group_size, kernel_size, effective_size=None, sigma=0.9,
                    scale_step=1.41):
    """Sample the basis functions for every orientation or scale: (K, G, k, k) in float64.

    Each function is divided by its norm at the first orientation or, as in SESN, the smallest
    scale. Raises a ValueError for an unknown group, or sizes that make no basis.

    Args:
        group: "translation", "rotation" or "scale".
        group_size: G, how many orientations (360/G degrees apart, counter-clockwise) or scales; 1
            for translation.
        kernel_size: k, odd, in pixels. For scale, the window of the widest functions; that of
            narrower ones is smaller in proportion, and zero-padded to k.
        effective_size: number of Hermite orders, see `hermite_orders`. None is SESN's 3, and 5 for
            rotation, the smallest closed set that has all of these.
        sigma: width of the functions in pixels; for scale, the smallest width.
        scale_step: ratio of neighbouring widths; SESN's STL-10 network has 0.9 · 1.41**i, i < 3.
    """
    if group not in ("translation", "rotation", "scale"):
        raise ValueError(f"group is {group!r}, but must be translation, rotation or scale")
    if group_size < 1 or (group == "translation" and group_size != 1):
        raise ValueError(f"group_size is {group_size}, but must be at least 1, for translation 1")
    if effective_size is None:
        effective_size = 5 if group == "rotation" else 3
    if kernel_size < 1 or kernel_size % 2 == 0 or effective_size < 1:
        raise ValueError("need an odd kernel_size and effective_size >= 1, but got "
                         f"{kernel_size} and {effective_size}")
    if not (0 < sigma < math.inf and 1 < scale_step < 100):
        raise ValueError("need 1 < scale_step < 100 and a finite sigma > 0, but got "
                         f"{scale_step} and {sigma}")

    t = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    y, x = torch.meshgrid(t, t, indexing="ij")    # rows point down
    samples = []
    for i in range(group_size):
        u = x
        v = y
        width = sigma
        window = kernel_size
        if group == "rotation":
            # A turned function is read at the point turned back. Rounding makes 90° exact.
            angle = 2 * math.pi * i / group_size
            cos = round(math.cos(angle), 15)
            sin = round(math.sin(angle), 15)
            u = cos * x - sin * y
            v = sin * x + cos * y
        if group == "scale":
            width = sigma * scale_step**i
            shrunk = kernel_size / scale_step ** (group_size - 1 - i)
            window = int(shrunk) // 2 * 2 + 1    # odd, rounded as SESN does
        inside = torch.maximum(x.abs(), y.abs()) <= window // 2
        for n, m in hermite_orders(group, effective_size):
            function = hermite_gaussian(u, n, width) * hermite_gaussian(v, m, width)
            samples.append(function * inside)
    basis = torch.stack(samples).unflatten(0, (group_size, -1)).transpose(0, 1)    # (K, G, k, k)
    norm = basis[:, :1].square().sum((2, 3), keepdim=True).sqrt()
    if not (norm > 1e-12).all():    # also where it is nan
        raise ValueError(f"a basis function vanishes on a {kernel_size}x{kernel_size} kernel with "
                         f"sigma {sigma}: take a larger kernel_size, a smaller effective_size, "
                         "or fewer scales, closer to each other")
    return basis / norm


# ------------------------------------------------------------------------------- convolution layers

def fold_group(x):
    """(B, C, G, H, W) -> (B, G·C, H, W): the group axis as channels."""
    return x.transpose(1, 2).flatten(1, 2)


def unfold_group(maps, size):
    """(B, G·C, H, W) -> (B, C, G, H, W) with G = size."""
    return maps.unflatten(1, (size, -1)).transpose(1, 2)


class SteerableConv2d(nn.Module):
    """What both layers below share: weights over the basis, padding, bias.

    Raises a ValueError for an argument outside its range, for input with other axes, and for maps
    smaller than their circular padding.

    Args:
        in_channels, out_channels: C and C'.
        basis: (K, G, k, k), from `steerable_basis`. It is saved with the weights, which mean
            nothing without it, and is to change by load_state_dict alone.
        extent: E, how many neighbouring orientations or scales a filter spans, 1 to G.
        padding_mode: "zeros" or "circular"; the map keeps its size.
        bias: one number per channel, the same along G.
    """

    def __init__(self, in_channels, out_channels, basis, extent=1, padding_mode="zeros", bias=True):
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"a layer needs channels, but has {in_channels} and {out_channels}")
        functions, group_size, _, _ = basis.shape
        if not 1 <= extent <= group_size:
            raise ValueError(f"extent is {extent}, but must be 1 to {group_size}, the group axis")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode is {padding_mode!r}, but must be zeros or circular")
        self.extent = extent
        self.group_size = group_size
        self.padding_mode = padding_mode
        self.register_buffer("basis", basis.to(torch.get_default_dtype()))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, extent, functions))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)    # as SESN does
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))

    def filters(self):
        """Learned combinations of the basis, for an extent of 1: (G·C', C, k, k)."""
        filters = torch.tensordot(self.weight.squeeze(2), self.basis, dims=1)    # (C', C, G, k, k)
        return filters.permute(2, 0, 1, 3, 4).flatten(0, 1)

    def convolve(self, x, filters):
        """Maps (B, channels, H, W) by the filters of one or more group elements, (elements · C',
        channels, k, k) -> (B, elements · C', H, W)."""
        bias = None
        if self.bias is not None:
            bias = self.bias.repeat(len(filters) // len(self.bias))
        padding = filters.shape[-1] // 2
        if self.padding_mode == "circular":
            if padding > min(x.shape[-2:]):
                raise ValueError(f"circular padding by {padding} needs maps at least as wide, but "
                                 f"these are {x.shape[-2]}x{x.shape[-1]}: take a smaller kernel")
            x = F.pad(x, [padding] * 4, mode="circular")
            padding = 0
        return F.conv2d(x, filters, bias, padding=padding)


class LiftingConv2d(SteerableConv2d):
    """From an image to a function on the group: (B, C, H, W) -> (B, C', G, H, W).

    Output g is the image seen by the filters turned (or widened) by g. Arguments: see
    `SteerableConv2d`.
    """

    def __init__(self, in_channels, out_channels, basis, padding_mode="zeros", bias=True):
        super().__init__(in_channels, out_channels, basis, 1, padding_mode, bias)

    def forward(self, x):
        if x.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W), but these are {tuple(x.shape)}")
        maps = self.convolve(x, self.filters())
        return unfold_group(maps, self.group_size)


def find_windows(layer, keys=None):
    """Note how wide a layer's filters are at each group element, without the zeros around them: by
    default 3x3 of 7x7 at the smallest of three scales."""
    side = layer.basis.shape[-1]
    offset = (torch.arange(side, device=layer.basis.device) - side // 2).abs()
    layer.windows = []
    for functions in layer.basis.unbind(1):    # (K, k, k)
        used = functions.any(0)    # (k, k)
        reach = offset * (used.any(0) | used.any(1))
        layer.windows.append(2 * reach.max().item() + 1)


class GroupConv2d(SteerableConv2d):
    """From a function on the group to another: (B, C, G, H, W) -> (B, C', G, H, W).

    Output g reads the inputs g, g + 1, ..., g + E - 1 through filters turned (or widened) by g.
    After the last input comes the first again if cyclic (rotation), else zero (scale). extent None
    is all inputs if cyclic, else one, as in most of SESN's networks. With E = 1 this is a
    convolution for each input, else one dense convolution in which inputs out of reach have zero
    weights. Other arguments: see `SteerableConv2d`.
    """

    def __init__(self, in_channels, out_channels, basis, extent=None, cyclic=False,
                 padding_mode="zeros", bias=True):
        if extent is None:
            extent = basis.shape[1] if cyclic else 1
        super().__init__(in_channels, out_channels, basis, extent, padding_mode, bias)
        # A cyclic axis is a circle of G places; one that ends has as many empty ones behind it.
        self.places = self.group_size if cyclic else 2 * self.group_size
        find_windows(self)
        self.register_load_state_dict_post_hook(find_windows)    # the basis is loaded, too

    def filters(self):
        """Learned combinations of the basis: (G·C', C, k, k), or (G·C', G·C, k, k) for an extent
        above 1."""
        if self.extent == 1:
            return super().filters()
        weight = F.pad(self.weight, (0, 0, 0, self.places - self.extent))    # (C', C, places, K)
        # Output g has the first output's weights, g places further on.
        weights = [weight.roll(g, 2)[:, :, :self.group_size] for g in range(self.group_size)]
        filters = torch.einsum("gochk,kgij->gohcij", torch.stack(weights), self.basis)
        return filters.flatten(2, 3).flatten(0, 1)

    def forward(self, x):
        if x.ndim != 5 or x.shape[2] != self.group_size:
            raise ValueError(f"features must be (B, C, {self.group_size}, H, W), "
                             f"but these are {tuple(x.shape)}")
        maps = fold_group(x)
        filters = self.filters()
        if self.extent == 1 and self.group_size > 1:
            maps = self.convolve_each(maps, filters)    # (B, G·C', H, W)
        else:
            maps = self.convolve(maps, filters)
        return unfold_group(maps, self.group_size)

    def convolve_each(self, maps, filters):
        """Each input by its own filters, of which only the window is used: maps (B, G·C, H, W),
        filters (G·C', C, k, k) -> (B, G·C', H, W)."""
        inputs = maps.chunk(self.group_size, 1)
        outputs = []
        for g, kernel in enumerate(filters.chunk(self.group_size)):    # (C', C, k, k)
            margin = (kernel.shape[-1] - self.windows[g]) // 2
            kernel = F.pad(kernel, [-margin] * 4)
            outputs.append(self.convolve(inputs[g], kernel))
        return torch.cat(outputs, 1)


class OnMaps(nn.Sequential):
    """2-D modules on the map of each channel and group element: (B, C, G, H, W) -> (B, C, G, H',
    W'). For pooling."""

    def forward(self, x):
        maps = fold_group(x)
        maps = super().forward(maps)    # (B, G·C, H', W')
        return unfold_group(maps, x.shape[2])


class OnFibers(nn.Sequential):
    """2-D modules that treat all fibers alike: (B, C, G, H, W) -> (B, C', G, H, W). For ReLU, 1x1
    convolutions and batch norm.

    Thus nn.BatchNorm2d, and nn.SyncBatchNorm in its place, takes its statistics per channel over
    (B, G, H, W), which no turn of the features and no circular shift changes.
    """

    def forward(self, x):
        fibers = x.permute(0, 1, 3, 4, 2).flatten(3)    # (B, C, H, W·G)
        fibers = super().forward(fibers)    # (B, C', H, W·G)
        return fibers.unflatten(3, (-1, x.shape[2])).permute(0, 1, 4, 2, 3)


# ---------------------------------------------------------------------------------------- backbones

class Backbone(nn.Module):
    """(B, in_channels, H, W) -> (B, widths[-1], G, H/4, W/4), by self.layers. Raises a ValueError
    for other axes, and for sides that are not multiples of 4.

    torch.compile takes it for images of one size: torch 2.14.1 fails on maps of unknown sides whose
    channels come last, as with dynamic=True or from a second size on.
    """
    stride = 4

    def forward(self, x):
        if x.ndim != 4 or x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"images must be (B, C, H, W), H and W divisible by {self.stride}, "
                             f"but these are {tuple(x.shape)}")
        # For G = 1 each layer keeps the order in memory of its input. (An image of one channel is
        # contiguous in both orders: .contiguous(memory_format=torch.channels_last) does nothing.)
        if self.channels_last:
            x = x.movedim(1, 3).clone(memory_format=torch.contiguous_format).movedim(3, 1)
        else:
            x = x.contiguous()
        return self.layers(x)


class MNISTBackbone(Backbone):
    """SESN's MNIST network, lifted: three stages of convolution, 2x2 max-pool, ReLU, batch norm.

    The widths are those of SESN's MNIST network, the filters those of its STL-10 network; SESN
    itself has a larger basis on MNIST, "B", and kernels of 13 or 15 pixels. An output sees 46
    pixels with kernel 7, 32 with 5, 18 with 3.

    In SESN ReLU comes before the pooling, which is the same function with the same gradients, as
    max(ReLU(x)) = ReLU(max(x)); after the pooling it is a quarter of the work. The third stage does
    not pool (in SESN it does), so that 28x28 images keep a 7x7 map for views to move in. Pooling,
    not striding: 2x2 pooling of an even map commutes with quarter turns.

    Args:
        group, group_size, kernel_size, scale_step: see `steerable_basis`.
        widths: channels of the three stages; SESN has 32, 63, 95.
        extent: orientations or scales that a filter spans, see `GroupConv2d`.
        padding_mode: "zeros", or "circular" to make shifts by the stride, 4 pixels, exact.
    """

    def __init__(self, group="translation", group_size=1, widths=(32, 63, 95), in_channels=1,
                 kernel_size=7, scale_step=1.41, extent=None, padding_mode="zeros"):
        cyclic = group == "rotation"
        super().__init__()
        basis = steerable_basis(group, group_size, kernel_size, scale_step=scale_step)
        one, two, three = widths
        self.layers = nn.Sequential(
            LiftingConv2d(in_channels, one, basis, padding_mode),    # (B, one, G, H, W)
            OnMaps(nn.MaxPool2d(2)),
            OnFibers(nn.ReLU(), nn.BatchNorm2d(one)),
            GroupConv2d(one, two, basis, extent, cyclic, padding_mode),    # (B, two, G, H/2, W/2)
            OnMaps(nn.MaxPool2d(2)),
            OnFibers(nn.ReLU(), nn.BatchNorm2d(two)),
            GroupConv2d(two, three, basis, extent, cyclic, padding_mode),  # (B, three, G, H/4, W/4)
            OnFibers(nn.ReLU(), nn.BatchNorm2d(three)),
        )
        self.channels_last = group_size == 1


class ResidualBlock(nn.Module):
    """SESN's pre-activation block, from its STL-10 network: (B, C, G, H, W) -> (B, C', G, H, W).

    If down, H and W are halved by 2x2 means before both branches, where SESN strides. A stride
    reads one corner of each 2x2 cell, which a quarter turn moves to another corner; the mean of
    the cell stays. convolution(C, C') returns a group convolution. The shortcut is a 1x1
    convolution, the same along G, where the shape changes.
    """

    def __init__(self, in_channels, out_channels, down, convolution):
        super().__init__()
        self.activate = nn.Sequential(OnFibers(nn.BatchNorm2d(in_channels), nn.ReLU()))
        if down:
            self.activate.append(OnMaps(nn.AvgPool2d(2)))
        self.first = convolution(in_channels, out_channels)
        self.between = OnFibers(nn.BatchNorm2d(out_channels), nn.ReLU())
        self.second = convolution(out_channels, out_channels)
        self.shortcut = None
        if down or in_channels != out_channels:
            self.shortcut = OnFibers(nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x):
        y = self.activate(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.first(y)
        y = self.second(self.between(y))
        return x + y


class ResidualBackbone(Backbone):
    """SESN's wide residual network for STL-10, 16 layers deep, without its classifier.

    A lifting convolution, three stages of two `ResidualBlock`s, the second and third of which halve
    the map, batch norm and ReLU. SESN takes the maximum over scales before the last two; here views
    need the group axis. SESN's dropout, 0.3 in each block, is left out.

    Args:
        widths: channels of the lifting layer and of the three stages; SESN has 16, 128, 256, 512.
            The others are as for `MNISTBackbone`.
    """

    def __init__(self, group="translation", group_size=1, widths=(16, 128, 256, 512), in_channels=3,
                 kernel_size=7, scale_step=1.41, extent=None, padding_mode="zeros"):
        cyclic = group == "rotation"
        super().__init__()
        basis = steerable_basis(group, group_size, kernel_size, scale_step=scale_step)

        def convolution(channels, out_channels):
            return GroupConv2d(
                channels, out_channels, basis, extent, cyclic, padding_mode, bias=False)

        zero, one, two, three = widths
        self.layers = nn.Sequential(
            LiftingConv2d(in_channels, zero, basis, padding_mode, bias=False),
            ResidualBlock(zero, one, False, convolution),
            ResidualBlock(one, one, False, convolution),
            ResidualBlock(one, two, True, convolution),
            ResidualBlock(two, two, False, convolution),
            ResidualBlock(two, three, True, convolution),
            ResidualBlock(three, three, False, convolution),
            OnFibers(nn.BatchNorm2d(three), nn.ReLU()),
        )
        self.channels_last = group_size == 1
        for module in self.modules():    # as SESN does
            if isinstance(module, (SteerableConv2d, nn.Conv2d)):
                fan_out = module.weight[:, 0].numel()
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)


# ---------------------------------------------------------------------------- the structure removed

class Untied(nn.Module):
    """An ordinary network with a lifted one's activations, but no weight shared along the group.

    network is a backbone for translation with G times the channels: (B, C_in, H, W) -> (B, G·C, 1,
    H', W'). Its channels, which have no order, are then called G orientations or scales of C
    channels: (B, C, G, H', W').
    """

    def __init__(self, network, group_size):
        super().__init__()
        self.network = network
        self.group_size = group_size
        self.stride = network.stride

    def forward(self, x):
        maps = self.network(x).squeeze(2)
        return maps.unflatten(1, (-1, self.group_size))


class DenseBackbone(Backbone):
    """`MNISTBackbone`'s activations for translation, but no weight shared between positions.

    (B, in_channels, side, side) -> (B, widths[2], 1, side/4, side/4), side divisible by 4: three
    stages of linear layer, ReLU, batch norm, each with as many outputs as the convolutional stage.
    """
    channels_last = False

    def __init__(self, side, widths=(32, 63, 95), in_channels=1):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten())
        units = in_channels * side**2
        for channels, reduction in zip(widths, (2, 4, 4), strict=True):
            next_units = channels * (side // reduction) ** 2
            self.layers.append(nn.Linear(units, next_units))
            self.layers.append(nn.ReLU())
            self.layers.append(nn.BatchNorm1d(next_units))
            units = next_units
        self.layers.append(nn.Unflatten(1, (widths[2], 1, side // 4, side // 4)))
