"""Group convolutions with steerable filters, and the encoders built from them, for which f(T_g x) = Γ_g f(x).

The filters follow SESN (Sosnovik et al., ICLR 2020): a learned combination of fixed Hermite-Gaussian functions, sampled
once for every orientation or scale. The weights are shared; only the samples differ. Translation has one sample,
rotation turns the functions, scale widens them. Two backbones follow, and two networks with the structure removed.

Letters: B batch, C channels, G length of the group axis, H W space, K basis functions, E extent of a filter along G,
k kernel side. Features are (B, C, G, H, W). In memory G comes before C, so that folding G into the batch (pooling,
norms) or the channels (convolutions) copies nothing; only `Untied` returns another order."""
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------- the fixed basis
def default_filters(group, kernel_size):
    """The default (effective_size, sigma): SESN's for translation, else what a search found with 8 orientations or 3
    scales 1.41 apart (experiments/filters.py). More scales need a larger kernel or a smaller sigma."""
    if group == "rotation":
        return (kernel_size + 3) // 2, 0.55 * kernel_size**0.5 - 0.5
    return 3, kernel_size / 10 if group == "scale" else 0.9


def hermite_orders(group, effective_size):
    """The orders (n, m): n, m < effective_size is SESN's basis "A"; n + m < effective_size is closed under turns."""
    limit = 2 * effective_size - 1 if group != "rotation" else effective_size
    return [(n, m) for n in range(effective_size) for m in range(effective_size) if n + m < limit]


def hermite_gaussian(t, order, sigma):
    """He_order(t/σ) exp(-t²/2σ²)/σ at points t in pixels; a basis function is one in x times one in y."""
    previous, current = torch.zeros_like(t), torch.ones_like(t)
    for j in range(order):                 # probabilists' Hermite polynomials: He_{j+1} = t He_j - j He_{j-1}
        previous, current = current, t / sigma * current - j * previous
    return current * torch.exp(-t**2 / (2 * sigma**2)) / sigma


def steerable_basis(group, group_size, kernel_size, effective_size=None, sigma=None, scale_step=1.41):
    """Sample the basis functions for every orientation or scale: (K, G, k, k) in float64.

    Translation has SESN's samples. But a kernel cuts a function off, in other places for each orientation or scale. So
    for these it is the least-squares fit that responds to noise most like the whole function: to white noise blurred by
    1 pixel, in which values d pixels apart correlate by exp(-d²/4), and a little that is not blurred. Each
    function is divided by its norm at the first of them (SESN: at the smallest scale). Raises a ValueError for an
    unknown group or sizes that make no basis.

    Args:
        group: "translation", "rotation" or "scale". kernel_size: k, odd, in pixels.
        group_size: G, how many orientations (360/G degrees apart, counter-clockwise) or scales; 1 for translation.
        effective_size: number of Hermite orders, see `hermite_orders`. None: see `default_filters`.
        sigma: width of the functions in pixels; for scale, the smallest width. None: see `default_filters`.
        scale_step: ratio of neighbouring widths, for scale only. SESN's STL-10 network has 0.9 * 1.41**i, i < 3."""
    if group not in ("translation", "rotation", "scale"):
        raise ValueError(f"group is {group!r}, but must be one of translation, rotation, scale")
    if group_size < 1 or (group == "translation" and group_size != 1):
        raise ValueError(f"group_size is {group_size}, but must be exactly 1 for translation, else at least 1")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, but must be odd and positive")
    given = zip((effective_size, sigma), default_filters(group, kernel_size))
    effective_size, sigma = (default if value is None else value for value, default in given)
    if effective_size < 1 or sigma <= 0 or scale_step <= 1:
        raise ValueError(f"need effective_size >= 1, sigma > 0, scale_step > 1: {effective_size, sigma, scale_step}")

    t = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    y, x = torch.meshgrid(t, t, indexing="ij")                                                       # rows point down
    samples = []
    for i in range(group_size):
        u, v, width = x, y, sigma * scale_step**i if group == "scale" else sigma
        if group == "rotation":            # a turned function is read at the point turned back
            cos, sin = (round(f(2 * math.pi * i / group_size), 15) for f in (math.cos, math.sin))      # exact at 90°
            u, v = cos * x - sin * y, sin * x + cos * y
        # The noise's correlation is a blur, and the functions, derivatives of a Gaussian, are only widened by it.
        blurred = width if group == "translation" else (width**2 + 2) ** 0.5
        samples.append(torch.stack([
            hermite_gaussian(u, n, blurred) * hermite_gaussian(v, m, blurred) * (width / blurred) ** (n + m)
            for n, m in hermite_orders(group, effective_size)]))
    basis = torch.stack(samples, dim=1)                                        # (K, G, k, k)
    if group != "translation":
        correlation = torch.exp(-(t[:, None] - t) ** 2 / 4)
        noise = torch.kron(correlation, correlation)                           # (k², k²)
        noise.diagonal().add_(0.005)
        basis = (basis.flatten(2) @ noise.inverse()).view_as(basis)            # least squares
    norm = basis[:, :1].square().sum((2, 3), keepdim=True).sqrt()
    if not (norm > 1e-12).all():                                               # also catches nan
        raise ValueError(f"a basis function vanishes on a {kernel_size}x{kernel_size} kernel with sigma {sigma}: "
                         "take a larger kernel_size or a smaller effective_size")
    return basis / norm


# ------------------------------------------------------------------------------------------------- convolution layers
class SteerableConv2d(nn.Module):
    """What both layers below share: weights over the basis, the filters they make, padding and bias. The basis is not
    in the state_dict: load weights into a layer with the same. Raises a ValueError for another extent or padding mode.

    Args:
        in_channels, out_channels: C and C'.
        basis: (K, G, k, k), from `steerable_basis`.
        extent: E, how many neighbouring orientations or scales a filter spans, 1 to G; the lifting layer has 1.
        padding_mode: "zeros" or "circular" (k // 2 at most the map's side); the map keeps its size.
        bias: one number per channel, the same along G."""
    def __init__(self, in_channels, out_channels, basis, extent=1, padding_mode="zeros", bias=True):
        super().__init__()
        if not 1 <= extent <= basis.shape[1]:
            raise ValueError(f"extent is {extent}, but must be 1 to {basis.shape[1]}, the length of the group axis")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode is {padding_mode!r}, but must be 'zeros' or 'circular'")
        self.extent, self.padding_mode = extent, padding_mode
        self.group_size, self.padding = basis.shape[1], basis.shape[2] // 2
        self.register_buffer("basis", basis.to(torch.get_default_dtype()), persistent=False)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, extent, basis.shape[0]))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight.view(out_channels, -1), a=5**0.5)                       # as SESN does

    def filters(self):
        """Learned combinations of the basis, for an extent of 1: (G·C', C, k, k)."""
        return torch.tensordot(self.weight.squeeze(2), self.basis, dims=1).permute(2, 0, 1, 3, 4).flatten(0, 1)

    def convolve(self, x, kernel, groups=1):
        """(B, G·C or C, H, W) -> (B, C', G, H, W): one conv2d for the whole group axis, kernel (G·C', ..., k, k)."""
        bias = None if self.bias is None else self.bias.repeat(self.group_size)
        if self.padding_mode == "circular":
            y = F.conv2d(F.pad(x, [self.padding] * 4, mode="circular"), kernel, bias, groups=groups)
        else:
            y = F.conv2d(x, kernel, bias, padding=self.padding, groups=groups)
        return y.unflatten(1, (self.group_size, -1)).transpose(1, 2)                                 # (B, C', G, H, W)


class LiftingConv2d(SteerableConv2d):
    """From an image to a function on the group, (B, C, H, W) -> (B, C', G, H, W): output g is the image seen by the
    filters turned (or widened) by g. Arguments: see `SteerableConv2d`."""
    def __init__(self, in_channels, out_channels, basis, padding_mode="zeros", bias=True):
        super().__init__(in_channels, out_channels, basis, 1, padding_mode, bias)

    def forward(self, x):
        return self.convolve(x, self.filters())


class GroupConv2d(SteerableConv2d):
    """From a function on the group to another: (B, C, G, H, W) -> (B, C', G, H, W).

    Output g reads the inputs g, g + 1, ..., g + E - 1 through filters turned (or widened) by g. After the last input
    comes the first again if cyclic (rotation), else zero (scale). With E = 1 this is one grouped convolution, else one
    dense convolution in which inputs out of reach get zero weights. Other arguments: see `SteerableConv2d`."""
    def __init__(self, in_channels, out_channels, basis, extent=1, cyclic=False, padding_mode="zeros", bias=True):
        super().__init__(in_channels, out_channels, basis, extent, padding_mode, bias)
        g, h = torch.meshgrid(torch.arange(self.group_size), torch.arange(self.group_size), indexing="ij")
        offset = (h - g) % self.group_size if cyclic else h - g                # of input h, as output g sees it
        reached = (offset >= 0) & (offset < extent)
        # Which of the E + 1 weights, the last of them zero, connects g with h.
        self.register_buffer("place", torch.where(reached, offset, extent).flatten(), persistent=False)

    def forward(self, x):
        x = x.transpose(1, 2).flatten(1, 2)                                                          # (B, G·C, H, W)
        if self.extent == 1:
            return self.convolve(x, self.filters(), groups=self.group_size)
        # The weights go to their places before they become filters, which are far larger.
        weight = F.pad(self.weight, (0, 0, 0, 1)).index_select(2, self.place)                        # (C', C, G·G, K)
        kernel = torch.einsum("ocghk,kgij->gohcij", weight.unflatten(2, (self.group_size, -1)), self.basis)
        return self.convolve(x, kernel.flatten(2, 3).flatten(0, 1))                                # (G·C', G·C, k, k)


class PerElement(nn.Sequential):
    """Apply ordinary 2-D modules along the group axis, which joins the batch: (B, C, G, H, W) -> (B, C', G, H', W').

    So nn.BatchNorm2d, and nn.SyncBatchNorm in its place, takes its statistics per channel over (B, G, H, W), which no
    turn of the features and no circular shift changes."""
    def forward(self, x):
        y = super().forward(x.transpose(1, 2).flatten(0, 1))                                       # (B·G, C', H', W')
        return y.unflatten(0, (-1, x.shape[2])).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- backbones
class Backbone(nn.Sequential):
    """(B, in_channels, H, W) -> (B, widths[-1], G, H/4, W/4). Raises a ValueError for sizes that do not fit."""
    stride = 4

    def forward(self, x):
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"images are {x.shape[-2]}x{x.shape[-1]}, but must have sides divisible by {self.stride}")
        return super().forward(x)


def check_widths(widths, count):
    if len(widths) != count or min(widths) < 1:
        raise ValueError(f"widths are {tuple(widths)}, but must be {count} positive numbers")


class MNISTBackbone(Backbone):
    """SESN's MNIST network, lifted: three stages of convolution -> ReLU -> 2x2 max-pool -> batch norm.

    The third stage does not pool (in SESN it does), so that 28x28 images keep a 7x7 map for views to move in. Pooling,
    not striding: 2x2 pooling of an even map commutes with quarter turns.

    Args:
        group, group_size, kernel_size, effective_size, sigma, scale_step: see `steerable_basis`.
        widths: channels of the three stages; SESN has 32, 63, 95.
        extent: orientations or scales that a filter spans; None for SESN's 1 for scale, and all for rotation.
        padding_mode: "zeros", or "circular" to make shifts by the stride, 4 pixels, exact."""
    def __init__(self, group="translation", group_size=1, widths=(32, 63, 95), in_channels=1, kernel_size=7,
                 effective_size=None, sigma=None, scale_step=1.41, extent=None, padding_mode="zeros"):
        basis = steerable_basis(group, group_size, kernel_size, effective_size, sigma, scale_step)
        check_widths(widths, 3)
        extent = extent if extent is not None else group_size if group == "rotation" else 1
        span = dict(extent=extent, cyclic=group == "rotation", padding_mode=padding_mode)
        one, two, three = widths
        super().__init__(
            LiftingConv2d(in_channels, one, basis, padding_mode=padding_mode),                     # (B, one, G, H, W)
            PerElement(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(one)),
            GroupConv2d(one, two, basis, **span),                                              # (B, two, G, H/2, W/2)
            PerElement(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(two)),
            GroupConv2d(two, three, basis, **span),                                          # (B, three, G, H/4, W/4)
            PerElement(nn.ReLU(), nn.BatchNorm2d(three)),
        )


class ResidualBlock(nn.Module):
    """SESN's pre-activation block, from its STL-10 network: (B, C, G, H, W) -> (B, C', G, H, W), or H/2, W/2 if down.

    Where SESN strides, 2x2 means are taken before both branches, for the same work. A stride reads one corner of each
    2x2 cell, which a quarter turn moves to another corner; the mean of the cell stays. convolution makes a group
    convolution from C and C'. Where these differ, the shortcut is a 1x1 convolution, the same along G."""
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


class CheckpointedBlock(ResidualBlock):
    """The same block, using less memory: only its input is kept, and the backward pass computes the rest again."""
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False,
                          context_fn=lambda: (contextlib.nullcontext(), statistics_kept(self)))


@contextlib.contextmanager
def statistics_kept(module):
    """In this context batch norms add to copies of their running statistics, which then are dropped: a second pass over
    the same batch must not count."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    statistics = [(norm, name, value) for norm in norms for name, value in norm.named_buffers()]
    for norm, name, value in statistics:
        setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, name, value in statistics:
            setattr(norm, name, value)


class ResidualBackbone(Backbone):
    """SESN's wide residual network for STL-10 without its classifier, for any of the groups.

    A lifting convolution, three stages of (depth - 4) / 6 `ResidualBlock`s, the second and third of which halve the
    map, batch norm and ReLU. SESN takes the maximum over scales before the last two; here views need the group axis.

    Args:
        widths: channels of the lifting layer and of the stages; SESN has 16, 128, 256, 512. depth: 6n + 4; SESN has 16.
        checkpoint_activations: build the blocks as `CheckpointedBlock`. The others are as for `MNISTBackbone`."""
    def __init__(self, group="translation", group_size=1, widths=(16, 128, 256, 512), in_channels=3, kernel_size=7,
                 effective_size=None, sigma=None, scale_step=1.41, extent=None, padding_mode="zeros", depth=16,
                 checkpoint_activations=False):
        basis = steerable_basis(group, group_size, kernel_size, effective_size, sigma, scale_step)
        check_widths(widths, 4)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth is {depth}, but must be 10, 16, 22, ...: 6n + 4")
        extent = extent if extent is not None else group_size if group == "rotation" else 1

        def convolution(channels, out_channels):
            return GroupConv2d(channels, out_channels, basis, extent, group == "rotation", padding_mode, bias=False)

        kind = CheckpointedBlock if checkpoint_activations else ResidualBlock
        layers = [LiftingConv2d(in_channels, widths[0], basis, padding_mode=padding_mode, bias=False)]
        for stage in range(3):
            for block in range((depth - 4) // 6):
                channels = widths[stage + (block > 0)]
                layers.append(kind(channels, widths[stage + 1], stage > 0 and block == 0, convolution))
        super().__init__(*layers, PerElement(nn.BatchNorm2d(widths[3]), nn.ReLU()))
        for module in self.modules():                                                                # as SESN does
            if isinstance(module, (SteerableConv2d, nn.Conv2d)):
                nn.init.normal_(module.weight, std=(2 * module.weight.shape[1] / module.weight.numel()) ** 0.5)


class ResNet18Backbone(nn.Sequential):
    """torchvision's ResNet-18 without pooling and classifier, for translation: (B, C, H, H) -> (B, 512, 1, H/s, H/s).

    Images of 64 pixels and less get the 3x3 stem of work on CIFAR-10, and the stride s = 8; else s = 32. padding_mode:
    see `MNISTBackbone`; circular makes shifts by s exact. Raises a ValueError for a side H that s does not divide."""
    def __init__(self, side, in_channels=3, padding_mode="zeros"):
        from torchvision.models import resnet18                                # here, for it takes seconds
        network, small = resnet18(), side <= 64
        self.stride = 8 if small else 32
        if side % self.stride:
            raise ValueError(f"images are {side}x{side}, but ResNet-18 needs a side divisible by {self.stride}")
        kernel, stride = (3, 1) if small else (7, 2)
        stem = nn.Conv2d(in_channels, 64, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")                    # as in torchvision
        circular = nn.Sequential(nn.CircularPad2d(1), nn.MaxPool2d(3, 2))
        pool = nn.Identity() if small else circular if padding_mode == "circular" else network.maxpool
        super().__init__(stem, network.bn1, network.relu, pool, *list(network.children())[4:8])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = padding_mode

    def forward(self, x):
        return super().forward(x).unsqueeze(2)


# ---------------------------------------------------------------------- the structure removed (section 4 of the paper)
class Untied(nn.Module):
    """An ordinary network with a lifted one's activations, but no weight shared along the group.

    network is a backbone for translation with G times the channels: (B, C_in, H, W) -> (B, G·C, 1, H', W'). Its
    channels, which have no order, are then called G orientations or scales of C channels: (B, C, G, H', W')."""
    def __init__(self, network, group_size):
        super().__init__()
        self.network, self.group_size, self.stride = network, group_size, network.stride

    def forward(self, x):
        return self.network(x).squeeze(2).unflatten(1, (-1, self.group_size))


class DenseBackbone(nn.Sequential):
    """A network with the activations of `MNISTBackbone` for translation, but no weight shared between positions.

    (B, in_channels, side, side) -> (B, widths[2], 1, side/4, side/4), side divisible by 4: three stages of linear layer
    -> ReLU -> batch norm, each with as many outputs as the convolutional stage. Raises a ValueError unless 3 widths."""
    stride = 4

    def __init__(self, side, widths=(32, 63, 95), in_channels=1):
        check_widths(widths, 3)
        cells = [side**2, (side // 2) ** 2, (side // 4) ** 2, (side // 4) ** 2]
        units = [channels * cell for channels, cell in zip((in_channels, *widths), cells)]
        stages = [layer for n, m in zip(units, units[1:]) for layer in (nn.Linear(n, m), nn.ReLU(), nn.BatchNorm1d(m))]
        super().__init__(nn.Flatten(), *stages, nn.Unflatten(1, (widths[2], 1, side // 4, side // 4)))
