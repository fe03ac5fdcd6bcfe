"""Steerable convolutions and the MNIST backbone: encoders f with f(T_g x) = Γ_g f(x) built in.

The filters follow SESN (Sosnovik et al., ICLR 2020): a learned combination of fixed Hermite-Gaussian functions,
sampled once for every element of the group. The weights are shared by all elements; only the samples differ.
Translation is the case of one element, rotation turns the functions, scale widens them.

Letters: B batch, C channels, G elements of the group, H W space, K basis functions, E extent along G, k kernel side.
Features have the shape (B, C, G, H, W). In memory G stands before C, so that folding G into the batch (for pooling
and norms) or into the channels (for convolutions) is a view and never a copy.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = ("translation", "rotation", "scale")


# ---------------------------------------------------------------------------------------------------- the fixed basis

def hermite_orders(group, effective_size):
    """List the orders (n, m) of the basis functions He_n(x) He_m(y).

    translation, scale   n, m < effective_size: SESN's basis "A", effective_size**2 functions.
    rotation             n + m <= 2 (effective_size - 1): the smallest set that holds the one above and that
                         rotation maps onto itself.
    """
    if group == "rotation":
        top = 2 * (effective_size - 1)
        return [(n, m) for n in range(top + 1) for m in range(top + 1 - n)]
    return [(n, m) for n in range(effective_size) for m in range(effective_size)]


def hermite_gaussian(t, order, sigma):
    """He_order(t/σ) exp(-t² / 2σ²) / σ at the points t, in pixels; a basis function is the product of one in x and one in y
    (paper.md section 2, SESN)."""
    previous, current = torch.zeros_like(t), torch.ones_like(t)
    for j in range(order):                 # probabilists' Hermite polynomials: He_{j+1} = t He_j - j He_{j-1}
        previous, current = current, t / sigma * current - j * previous
    return current * torch.exp(-t**2 / (2 * sigma**2)) / sigma


def steerable_taps(elements, kernel_size, effective_size, sigma, scale_step=1.41):
    """Sample the 1-D functions whose products are the basis of translation and scale: (G, O, k) in float64.

    taps[g, n] (x) · taps[g, m] (y) is the function of orders (n, m) at scale g. Arguments and norms: see `steerable_basis`.
    """
    t = torch.arange(-(kernel_size // 2), kernel_size // 2 + 1, dtype=torch.float64)
    taps = []
    for i in range(elements):
        width = sigma * scale_step**i
        window = int(kernel_size * width / (sigma * scale_step ** (elements - 1))) // 2 * 2 + 1
        taps.append(torch.stack([hermite_gaussian(t, n, width) * (t.abs() <= window // 2) for n in range(effective_size)]))
    taps = torch.stack(taps)
    return taps / taps[:1].square().sum(2, keepdim=True).sqrt()


def steerable_basis(group, elements, kernel_size, effective_size, sigma, scale_step=1.41):
    """Sample the basis functions at every element of the group.

    Args:
        group: "translation", "rotation" or "scale".
        elements: G, the number of orientations (360/G degrees apart, counter-clockwise) or of scales; translation has 1.
        kernel_size: k, odd, in pixels. For scale it is the window of the widest functions; the window of scale σ is
            the odd number at or below k σ/σ_max (+ 1 where that is even), zero-padded to k, as in SESN.
        effective_size: number of Hermite orders along each axis, see `hermite_orders`.
        sigma: width of the functions in pixels; for scale, the smallest width.
        scale_step: ratio of neighbouring widths, for scale only. SESN's STL-10 network has 0.9 * 1.41**i, i < 3.

    Returns:
        (K, G, k, k) in float64. Each function is divided by its norm at the first element (SESN: at the smallest
        scale), one number for all elements, so that steering stays linear.

    Raises:
        ValueError: for an unknown group or sizes that make no basis.
    """
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}, but must be one of {', '.join(GROUPS)}")
    if elements < 1 or (group == "translation" and elements != 1):
        raise ValueError(f"{group} cannot have {elements} elements: translation has exactly 1, the others at least 1")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, but must be odd and positive")
    if effective_size < 1 or sigma <= 0 or scale_step <= 1:
        raise ValueError(f"need effective_size >= 1, sigma > 0, scale_step > 1; got {effective_size}, {sigma}, {scale_step}")

    orders = hermite_orders(group, effective_size)
    if group == "rotation":
        half = kernel_size // 2
        y, x = torch.meshgrid(*[torch.arange(-half, half + 1, dtype=torch.float64)] * 2, indexing="ij")   # rows point down
        samples = []
        for i in range(elements):
            # Turning ψ counter-clockwise by θ reads it at the point turned back; rounding makes quarter turns exact.
            cos, sin = (round(t(2 * math.pi * i / elements), 15) for t in (math.cos, math.sin))
            u, v = cos * x - sin * y, sin * x + cos * y
            samples.append(torch.stack([hermite_gaussian(u, n, sigma) * hermite_gaussian(v, m, sigma) for n, m in orders]))
        basis = torch.stack(samples, dim=1)                                                         # (K, G, k, k)
    else:
        taps = steerable_taps(elements, kernel_size, effective_size, sigma, scale_step)
        basis = torch.stack([taps[:, m, :, None] * taps[:, n, None, :] for n, m in orders])
    norm = basis[:, :1].square().sum((2, 3), keepdim=True).sqrt()
    if not (norm > 1e-12).all():                                # nor is any nan
        raise ValueError(f"a basis function vanishes on a {kernel_size}x{kernel_size} kernel with sigma {sigma}: "
                         "take a larger kernel_size or a smaller effective_size")
    return basis / norm


# ------------------------------------------------------------------------------------------------- convolution layers

def separable_conv2d(x, weight, taps, circular=False):
    """Convolve with filters Σ weight[.., n, m] taps[g, n](x) taps[g, m](y): along the columns, across channels, along the rows.

    Equal but for rounding to conv2d with these filters, for O² and a few products per weight and position in place of k²,
    and keeping O times its input for the backward pass.

    Args:
        x: (B, C, G, H, W).
        weight: (C', C, O, O), the same at every element.
        taps: (G, O, k).
        circular: what stands beyond the map: its other side, or zeros. It keeps its size.

    Returns:
        (B, C', G, H, W).
    """
    def bands(size):                                           # correlating a line with a tap, as a matrix: (G, O, size, size)
        points = torch.eye(size, dtype=taps.dtype, device=x.device)[:, None]
        points = F.pad(points, [taps.shape[2] // 2] * 2, mode="circular" if circular else "constant")
        return F.conv1d(points, taps.flatten(0, 1)[:, None]).unflatten(1, taps.shape[:2]).permute(1, 2, 0, 3)

    y = torch.einsum("bcghw,gmhv->bgmcvw", x, bands(x.shape[3]))
    y = torch.einsum("bgmchw,ocnm->bgnohw", y, weight)
    return torch.einsum("bgnohw,gnwv->bgohv", y, bands(x.shape[4])).transpose(1, 2)


class SteerableConv2d(nn.Module):
    """What both layers below share: weights over the basis, the filters they make, padding and bias.

    Args:
        in_channels, out_channels: C and C'.
        basis: (K, G, k, k), from `steerable_basis`.
        extent: E, the number of neighbouring elements that a filter of the group layer spans, 1 to G.
        padding_mode: "zeros" or "circular"; the map keeps its size.
        bias: one number per channel, the same for all elements.
    """

    def __init__(self, in_channels, out_channels, basis, extent=1, padding_mode="zeros", bias=True):
        super().__init__()
        if not 1 <= extent <= basis.shape[1]:
            raise ValueError(f"extent is {extent}, but must be 1 to {basis.shape[1]}, the number of elements")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode is {padding_mode!r}, but must be 'zeros' or 'circular'")
        self.extent, self.padding_mode = extent, padding_mode
        self.elements, self.padding = basis.shape[1], basis.shape[2] // 2
        self.register_buffer("basis", basis.to(torch.get_default_dtype()), persistent=False)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, extent, basis.shape[0]))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight.view(out_channels, -1), a=5**0.5)                      # as SESN does

    def filters(self):
        """Learned combinations of the basis: (C', C, E, G, k, k)."""
        return torch.tensordot(self.weight, self.basis, dims=1)

    def convolve(self, x, kernel, groups=1):
        """(B, G·C or C, H, W) -> (B, C', G, H, W): one conv2d for all elements, kernel (G·C', ..., k, k)."""
        bias = None if self.bias is None else self.bias.repeat(self.elements)
        if self.padding_mode == "circular":
            y = F.conv2d(F.pad(x, [self.padding] * 4, mode="circular"), kernel, bias, groups=groups)
        else:
            y = F.conv2d(x, kernel, bias, padding=self.padding, groups=groups)
        return y.unflatten(1, (self.elements, -1)).transpose(1, 2)                                  # (B, C', G, H, W)


class LiftingConv2d(SteerableConv2d):
    """From an image to a function on the group: (B, C, H, W) -> (B, C', G, H, W).

    Output element g is the image seen by the filters turned (or widened) by g. See `SteerableConv2d` for arguments.
    """

    def forward(self, x):
        kernel = self.filters().squeeze(2).permute(2, 0, 1, 3, 4).flatten(0, 1)                     # (G·C', C, k, k)
        return self.convolve(x, kernel)


class GroupConv2d(SteerableConv2d):
    """From a function on the group to another: (B, C, G, H, W) -> (B, C', G, H, W).

    Output element g reads the input elements g, g + 1, ..., g + E - 1, through filters turned (or widened) by g.
    What lies beyond the last element is the first one again if `cyclic` (rotation), else zero (scale).
    With E = 1 this is one grouped convolution, else one dense convolution; elements out of reach get zero weights.
    With `taps`, from `steerable_taps` (translation or scale with E = 1), it is a `separable_conv2d`.
    See `SteerableConv2d` for the other arguments.
    """

    def __init__(self, in_channels, out_channels, basis, extent=1, cyclic=False, padding_mode="zeros", bias=True, taps=None):
        super().__init__(in_channels, out_channels, basis, extent, padding_mode, bias)
        if taps is not None and (extent > 1 or cyclic):
            raise ValueError("only filters of translation, and of scale with extent 1, are separable: leave taps out")
        self.register_buffer("taps", None if taps is None else taps.to(torch.get_default_dtype()), persistent=False)
        g, h = torch.meshgrid(torch.arange(self.elements), torch.arange(self.elements), indexing="ij")
        offset = (h - g) % self.elements if cyclic else h - g                  # input element h, as output element g sees it
        reached = (offset >= 0) & (offset < extent)
        # Which of the E + 1 weights, the last of them zero, stands between g and h.
        self.register_buffer("place", torch.where(reached, offset, extent).flatten(), persistent=False)

    def forward(self, x):
        if self.taps is not None:
            y = separable_conv2d(x, self.weight.squeeze(2).unflatten(2, (self.taps.shape[1], -1)), self.taps, self.padding_mode == "circular")
            return y if self.bias is None else y + self.bias[:, None, None, None]
        x = x.transpose(1, 2).flatten(1, 2)                                                         # (B, G·C, H, W)
        if self.extent == 1:
            kernel = self.filters().squeeze(2).permute(2, 0, 1, 3, 4).flatten(0, 1)                 # (G·C', C, k, k)
            return self.convolve(x, kernel, groups=self.elements)
        # The weights are put in their places first: they are fewer than the filters' values.
        weight = F.pad(self.weight, (0, 0, 0, 1)).index_select(2, self.place).unflatten(2, (self.elements, self.elements))
        kernel = torch.einsum("ocghk,kgij->gohcij", weight, self.basis)                             # (G, C', G, C, k, k)
        return self.convolve(x, kernel.flatten(2, 3).flatten(0, 1))                                 # (G·C', G·C, k, k)


class PerElement(nn.Sequential):
    """Apply ordinary 2-D modules at every element of the group alike: (B, C, G, H, W) -> (B, C', G, H', W').

    The elements join the batch. So nn.BatchNorm2d in here takes its statistics per channel over (B, G, H, W), which
    no movement along the group changes, and nn.SyncBatchNorm.convert_sync_batchnorm finds it.
    """

    def forward(self, x):
        elements = x.shape[2]
        y = super().forward(x.transpose(1, 2).flatten(0, 1))                                        # (B·G, C', H', W')
        return y.unflatten(0, (-1, elements)).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------- backbone

class MNISTBackbone(nn.Sequential):
    """SESN's MNIST network, lifted: three stages of convolution -> ReLU -> 2x2 max-pool -> batch norm.

    (B, in_channels, H, W) -> (B, widths[2], G, H/4, W/4), H and W divisible by 4. The third stage does not pool, so
    that 28x28 images keep a 7x7 map for views to move in (SESN pools it to 2x2). Pooling, not striding: 2x2 pooling of
    an even map commutes with quarter turns.

    Args:
        group, elements, kernel_size, effective_size, sigma, scale_step: see `steerable_basis`.
        widths: channels of the three stages; SESN has 32, 63, 95.
        extent: elements that a filter spans along the group; None for SESN's 1 for scale, and all for rotation.
        padding_mode: "zeros", or "circular" to make shifts by the stride, 4 pixels, exact.

    Raises:
        ValueError: for sizes that do not fit, here or, for the image, in the forward pass.
    """

    stride = 4

    def __init__(self, group="translation", elements=1, widths=(32, 63, 95), in_channels=1, kernel_size=7,
                 effective_size=3, sigma=0.9, scale_step=1.41, extent=None, padding_mode="zeros"):
        basis = steerable_basis(group, elements, kernel_size, effective_size, sigma, scale_step)
        if len(widths) != 3 or min(widths) < 1:
            raise ValueError(f"widths are {tuple(widths)}, but must be three positive numbers")
        if extent is None:
            extent = elements if group == "rotation" else 1
        span = dict(extent=extent, cyclic=group == "rotation", padding_mode=padding_mode)
        one, two, three = widths
        super().__init__(
            LiftingConv2d(in_channels, one, basis, padding_mode=padding_mode),
            PerElement(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(one)),
            GroupConv2d(one, two, basis, **span),
            PerElement(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(two)),
            GroupConv2d(two, three, basis, **span),
            PerElement(nn.ReLU(), nn.BatchNorm2d(three)),
        )
        self.out_channels, self.elements = three, elements

    def forward(self, x):
        check_sides(x, self.stride)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """SESN's pre-activation block, from its STL-10 network: (B, C, G, H, W) -> (B, C', G, H, W), or H/2, W/2 if `down`.

    Where SESN strides, 2x2 means are taken before both branches. A stride reads one corner of each 2x2 cell, which a
    quarter turn moves to another corner; the mean of the cell stays. The work is the same.

    Args:
        in_channels, out_channels: C and C'. Where they differ a 1x1 convolution, the same at every element, makes the shortcut.
        down: whether to halve the map.
        convolution: makes a group convolution from C and C'.
    """

    def __init__(self, in_channels, out_channels, down, convolution):
        super().__init__()
        self.activate = PerElement(nn.BatchNorm2d(in_channels), nn.ReLU(), nn.AvgPool2d(2) if down else nn.Identity())
        self.first = convolution(in_channels, out_channels)
        self.between = PerElement(nn.BatchNorm2d(out_channels), nn.ReLU())
        self.second = convolution(out_channels, out_channels)
        changes = down or in_channels != out_channels
        self.shortcut = PerElement(nn.Conv2d(in_channels, out_channels, 1, bias=False)) if changes else None

    def forward(self, x):
        y = self.activate(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.second(self.between(self.first(y)))


class ResidualBackbone(nn.Sequential):
    """SESN's wide residual network for STL-10 without its classifier, for any of the groups.

    (B, in_channels, H, W) -> (B, widths[3], G, H/4, W/4), H and W divisible by 4: a lifting convolution, three stages of
    (depth - 4) / 6 `ResidualBlock`s, the second and third of which halve the map, batch norm and ReLU. SESN takes the
    maximum over scales before the last two; views need the group axis, so here it stays.

    Args:
        group, elements, kernel_size, effective_size, sigma, scale_step: see `steerable_basis`.
        widths: channels of the lifting layer and of the three stages; SESN has 16, 128, 256, 512.
        depth: 6n + 4; SESN has 16.
        extent, padding_mode: as for `MNISTBackbone`.
        separable_from: translation, and scale with extent 1, convolve by `separable_conv2d` where layers have at least so
            many channels on both sides; 0 for nowhere.

    Raises:
        ValueError: for sizes that do not fit, here or, for the image, in the forward pass.
    """

    stride = 4

    def __init__(self, group="translation", elements=1, widths=(16, 128, 256, 512), in_channels=3, kernel_size=7,
                 effective_size=3, sigma=0.9, scale_step=1.41, extent=None, padding_mode="zeros", depth=16, separable_from=0):
        basis = steerable_basis(group, elements, kernel_size, effective_size, sigma, scale_step)
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths are {tuple(widths)}, but must be four positive numbers")
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth is {depth}, but must be 10, 16, 22, ...: 6n + 4")
        if extent is None:
            extent = elements if group == "rotation" else 1

        separable = separable_from > 0 and extent == 1 and group != "rotation"
        taps = steerable_taps(elements, kernel_size, effective_size, sigma, scale_step) if separable else None

        def convolution(channels, out_channels):
            wide = min(channels, out_channels) >= separable_from
            return GroupConv2d(channels, out_channels, basis, extent, group == "rotation", padding_mode, False, taps if wide else None)

        layers = [LiftingConv2d(in_channels, widths[0], basis, padding_mode=padding_mode, bias=False)]
        for stage in range(3):
            for block in range((depth - 4) // 6):
                channels = widths[stage + (block > 0)]
                layers.append(ResidualBlock(channels, widths[stage + 1], stage > 0 and block == 0, convolution))
        super().__init__(*layers, PerElement(nn.BatchNorm2d(widths[3]), nn.ReLU()))
        self.out_channels, self.elements = widths[3], elements
        for module in self.modules():                                                               # as SESN does
            if isinstance(module, (SteerableConv2d, nn.Conv2d)):
                nn.init.normal_(module.weight, std=(2 * module.weight.shape[1] / module.weight.numel()) ** 0.5)

    def forward(self, x):
        check_sides(x, self.stride)
        return super().forward(x)


# ------------------------------------------------------------------------------------------------ the structure removed

class Untied(nn.Module):
    """An ordinary network with a lifted one's activations, but no weight shared along the group (paper.md section 4, experiment 2).

    network is a backbone for translation with G = `elements` times the channels: (B, C_in, H, W) -> (B, G·C, 1, H', W').
    Its channels, which have no order, are then called G elements of C channels: (B, C, G, H', W').
    """

    def __init__(self, network, elements):
        super().__init__()
        self.network, self.elements, self.stride = network, elements, network.stride

    def forward(self, x):
        return self.network(x).squeeze(2).unflatten(1, (-1, self.elements))


class DenseBackbone(nn.Sequential):
    """A network with the activations of `MNISTBackbone` for translation, but no weight shared between positions.

    (B, in_channels, side, side) -> (B, widths[2], 1, side/4, side/4), side divisible by 4: three stages of linear layer -> ReLU
    -> batch norm, of as many numbers as the convolution network's stages end with. Raises a ValueError unless there are 3 widths.
    """

    stride = 4

    def __init__(self, side, widths=(32, 63, 95), in_channels=1):
        if len(widths) != 3 or min(widths) < 1:
            raise ValueError(f"widths are {tuple(widths)}, but must be three positive numbers")
        units = [in_channels * side**2, widths[0] * (side // 2) ** 2, widths[1] * (side // 4) ** 2, widths[2] * (side // 4) ** 2]
        stages = [layer for i in range(3) for layer in (nn.Linear(units[i], units[i + 1]), nn.ReLU(), nn.BatchNorm1d(units[i + 1]))]
        super().__init__(nn.Flatten(), *stages, nn.Unflatten(1, (widths[2], 1, side // 4, side // 4)))


def check_sides(x, stride):
    """Raise a ValueError unless images (B, C, H, W) have sides that a backbone can divide by its stride."""
    if x.shape[-2] % stride or x.shape[-1] % stride:
        raise ValueError(f"images are {x.shape[-2]}x{x.shape[-1]}, but both sides must be divisible by {stride}")
