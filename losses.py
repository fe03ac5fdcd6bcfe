"""The objectives I that compare views: NT-Xent, with an extension to more views, then SimSiam and BYOL.

All give the same gradient on one process as on many. Letters: N images of this process, R processes, V views, D numbers
per projection.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def nt_xent(h1, h2, temperature=0.1):
    """Normalised temperature-scaled cross-entropy, the paper's objective (SimCLR, Chen et al. 2020, Eq. 1).

    Each of the 2N projections is classified against the other 2N - 1 with logits cos/τ, its partner being right. When
    torch.distributed is initialised, h1 and h2 are this process's share, and the candidates are those of all R
    processes. The mean over processes of the value, and of the gradients, which DistributedDataParallel takes, is then
    that of one process with the whole batch.

    Args:
        h1, h2: (N, D), projections of the two views, row i of both from image i; the same N on every process. Computed
            in float32 at least, whatever autocast says; float64 stays float64.
        temperature: τ > 0, a pure number.

    Returns the mean over this process's 2N projections, in nats. Raises a ValueError for other shapes or temperatures.
    """
    n = len(h1)
    h, candidates, own = on_sphere((h1, h2), temperature)                      # (2N, D), (R·2N, D), (2N,)
    partner = own.roll(n)                                                      # h1's are h2's, and h2's are h1's
    loss = 0.0
    with torch.autocast(h.device.type, enabled=False):
        for half in (slice(0, n), slice(n, 2 * n)):                            # one after the other: half the memory
            logits = (h[half] / temperature) @ candidates.T                    # (N, R·2N): cos/τ
            logits.scatter_(1, own[half, None], float("-inf"))                 # never against itself: 2N - 1 are left
            loss = loss + F.cross_entropy(logits, partner[half]) / 2
    return loss


def on_sphere(views, temperature):
    """Check the views and scale them to unit length. Returns them (V·N, D), those of all processes (R·V·N, D), and
    which rows of the latter the former are (V·N,)."""
    if len(views) < 2 or any(h.shape != views[0].shape or h.ndim != 2 for h in views):
        shapes = ", ".join(str(tuple(h.shape)) for h in views)
        raise ValueError(f"two or more views must all be (N, D), but these are {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    h = torch.cat([h.to(torch.promote_types(h.dtype, torch.float32)) for h in views])
    h = F.normalize(h, dim=1)
    rank, candidates = 0, h
    if dist.is_available() and dist.is_initialized():
        rank, candidates = dist.get_rank(), AllGather.apply(h)
    return h, candidates, rank * len(h) + torch.arange(len(h), device=h.device)


class AllGather(torch.autograd.Function):
    """Concatenate the processes' (n, D) tensors to (R·n, D), with the gradient that a plain all_gather cuts off: every
    process's loss reads every row, so a row's gradient is the sum of what all of them send back for it."""
    @staticmethod
    def forward(ctx, h):
        rows = [torch.empty_like(h) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, h.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)       # others may hold what came in
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


# --------------------------------------------------------------------------------------- extension: more than two views
def multi_view_nt_xent(*views, temperature=0.1):
    """NT-Xent of V views (N, D): each projection has V - 1 right partners, and the loss is their mean. Otherwise as
    `nt_xent`. This is the supervised contrastive loss (Khosla et al. 2020, Eq. 2) with each image as a class."""
    h, candidates, own = on_sphere(views, temperature)                         # (V·N, D), (R·V·N, D), (V·N,)
    with torch.autocast(h.device.type, enabled=False):
        logits = (h / temperature) @ candidates.T                              # (V·N, R·V·N)
        logits.scatter_(1, own[:, None], float("-inf"))
        partners = torch.stack([own.roll(k * len(views[0])) for k in range(1, len(views))], 1)     # (V·N, V - 1)
        return -logits.log_softmax(1).gather(1, partners).mean()


# ---------------------------------------------------------------------------------------------------- without negatives
class Predictor(nn.Sequential):
    """q: (N, D) -> (N, D) predicts the other view's projection: linear, batch norm, ReLU, linear (Grill et al.)."""
    def __init__(self, dimensions, hidden):
        between = nn.BatchNorm1d(hidden), nn.ReLU()
        super().__init__(nn.Linear(dimensions, hidden), *between, nn.Linear(hidden, dimensions))


def simsiam(p1, p2, h1, h2):
    """-½ mean cos(p1, stop(h2)) - ½ mean cos(p2, stop(h1)) (SimSiam, Chen and He 2021, Eqs. 3 and 4).

    p1 and p2 (N, D) are the `Predictor`'s outputs for the projections h1 and h2 (N, D), into which no gradient flows.
    Computed in float32 at least. From -1, where each view predicts the other, to 1; the mean over processes is exact.
    """
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, h1, h2 = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (p1, p2, h1.detach(), h2.detach()))
        return -(F.cosine_similarity(p1, h2) + F.cosine_similarity(p2, h1)).mean() / 2


def byol(p1, p2, target1, target2):
    """Squared distance of normalised predictions and targets, both directions summed (BYOL, Grill et al. 2020, Eq. 2).

    As `simsiam`, but the targets are projections by a slowly averaged copy of encoder and head. As ‖a - b‖² = 2 -
    2 cos(a, b) for unit vectors, the value is 4 + 4 times that of `simsiam`: 0 to 8.
    """
    return 4 + 4 * simsiam(p1, p2, target1, target2)


@torch.no_grad()
def move_target(target, online, decay, step, total):
    """Let BYOL's target, a copy of the online module, follow it after a step, counted from 0, of total steps.

    Its parameters become decay · target + (1 - decay) · online, the decay rising to 1 along a cosine (Grill et al.,
    section 3); after the first step they are a copy. Batch norm's statistics are left alone: keep the target in
    training mode.
    """
    now = 1 - (1 - decay) * (math.cos(math.pi * step / total) + 1) / 2 if step else 0
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - now)
