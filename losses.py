"""The objectives I that compare two views: NT-Xent, then SimSiam and BYOL, which need no negatives.

With synchronised batch norm, the mean of the processes' gradients is the gradient of one process
that holds the whole batch.

Letters: N images of this process, R processes, D numbers per projection.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def nt_xent(h1, h2, temperature=0.1):
    """Normalised temperature-scaled cross-entropy, the paper's objective (SimCLR, Chen et al.
    2020).

    Each of the 2N projections is classified against the other 2N - 1 with logits cos/τ, its
    partner being right. When torch.distributed is initialised, h1 and h2 are this process's
    share, and the candidates are those of all R processes. Averaged over processes, as
    DistributedDataParallel averages gradients, loss and gradients are those of one process with
    the whole batch.

    Args:
        h1, h2: (N, D), projections of the two views, row i of both from image i; the same N on
            every process. Computed in float32 at least, whatever autocast says.
        temperature: τ > 0, a pure number.

    Returns the mean over this process's 2N projections, in nats. Raises a ValueError for other
    shapes or temperatures.
    """
    check_shapes(h1, h2)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    n = len(h1)
    h = torch.cat([at_least_float32(h1), at_least_float32(h2)])
    h = F.normalize(h, dim=1)    # (2N, D)
    candidates = h
    first = 0
    if dist.is_available() and dist.is_initialized():
        candidates = AllGather.apply(h)    # (R·2N, D)
        first = dist.get_rank() * 2 * n
    self_index = first + torch.arange(2 * n, device=h.device)    # each projection's own row
    # Row i of h1 and row i of h2 are partners: n rows apart, around the 2n.
    partner_index = self_index.roll(n)
    loss = 0.0
    with torch.autocast(h.device.type, enabled=False):
        # One view after the other takes less memory.
        for view in (slice(0, n), slice(n, 2 * n)):
            logits = (h[view] / temperature) @ candidates.T    # (N, R·2N): cos/τ
            logits.scatter_(1, self_index[view, None], float("-inf"))
            loss = loss + F.cross_entropy(logits, partner_index[view]) / 2
    return loss


class AllGather(torch.autograd.Function):
    """Concatenate the processes' (n, D) tensors to (R·n, D), and let the gradient flow back.

    Every process's loss reads every row, so a row's gradient is the sum of what all of them send
    back for it. A plain all_gather cuts it off.
    """

    @staticmethod
    def forward(ctx, h):
        gathered = [torch.empty_like(h) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, h.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        # Cloned, because autograd may use the incoming gradient elsewhere.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


# -------------------------------------------------------------------------------- without negatives

class Predictor(nn.Sequential):
    """q: (N, D) -> (N, D) predicts the other view's projection (Grill et al. 2020)."""

    def __init__(self, dimensions, hidden):
        super().__init__(
            nn.Linear(dimensions, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dimensions),
        )


def simsiam(p1, p2, h1, h2):
    """-½ mean cos(p1, stop(h2)) - ½ mean cos(p2, stop(h1)) (SimSiam, Chen and He 2021).

    p1 and p2 (N, D) are the `Predictor`'s outputs for the projections h1 and h2 (N, D), into which
    no gradient flows. Computed in float32 at least. From -1, where each view predicts the other,
    to 1. Raises a ValueError for other shapes.
    """
    check_shapes(p1, p2, h1, h2)
    with torch.autocast(p1.device.type, enabled=False):
        first = F.cosine_similarity(at_least_float32(p1), at_least_float32(h2.detach()))
        second = F.cosine_similarity(at_least_float32(p2), at_least_float32(h1.detach()))
    return -(first + second).mean() / 2


def byol(p1, p2, target1, target2):
    """Squared distance of normalised predictions and targets (BYOL, Grill et al. 2020, Eq. 2).

    As `simsiam`, but the targets (N, D) are projections by a slowly averaged copy of encoder and
    head. Both directions are summed. As ‖a - b‖² = 2 - 2 cos(a, b) for unit vectors, the value is
    4 + 4 times that of `simsiam`: 0 to 8.
    """
    return 4 + 4 * simsiam(p1, p2, target1, target2)


@torch.no_grad()
def move_target(target, online, decay, step, total):
    """Let BYOL's target, a copy of the online module, follow it after a step of total steps.

    The target's parameters become decay · target + (1 - decay) · online, the decay rising to 1
    along a cosine (Grill et al., section 3); after the first step, number 0, they are a copy.
    Batch norm's statistics are left alone: keep the target in training mode.
    """
    decay = 1 - (1 - decay) * (math.cos(math.pi * step / total) + 1) / 2
    if step == 0:
        decay = 0.0
    for slow, fast in zip(target.parameters(), online.parameters()):
        slow.lerp_(fast, 1 - decay)


def at_least_float32(h):
    return h.to(torch.promote_types(h.dtype, torch.float32))


def check_shapes(*projections):
    """Raise a ValueError unless all are (N, D) with the same N > 0 and D."""
    first = projections[0].shape
    for h in projections:
        if h.ndim != 2 or h.shape != first or len(h) == 0:
            shapes = ", ".join(str(tuple(h.shape)) for h in projections)
            raise ValueError(f"all projections must be (N, D), alike, but these are {shapes}")
