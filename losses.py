"""The objectives I that compare views: NT-Xent, for two views or more, and without negatives SimSiam and BYOL.

All are exact on one process and on many. Letters: N images of this process, V views, D numbers per projection, R processes.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def nt_xent(h1, h2, temperature=0.1):
    """Normalised temperature-scaled cross-entropy (paper.md section 3; SimCLR, Chen et al. 2020).

    The 2N projections are l2-normalised. Each is classified against the other 2N - 1 with logits cos/τ, its partner
    being the right one; the loss is the mean over all 2N.

    When torch.distributed is initialised, h1 and h2 are this process's share and the candidates are those of all R
    processes. The value returned is the mean over this process's 2N projections; its mean over the processes, and the
    mean of the gradients that DistributedDataParallel forms, are those of one process holding the whole batch.

    Args:
        h1, h2: (N, D), projections of the two views, row i of both from image i. N is the same on every process.
            Computed in float32 at least, whatever autocast says; float64 stays float64.
        temperature: τ > 0, a pure number.

    Returns:
        Scalar tensor, in nats.

    Raises:
        ValueError: if h1 and h2 are not two (N, D) matrices of one shape, or temperature is not above 0.
    """
    return multi_view_nt_xent((h1, h2), temperature)


def multi_view_nt_xent(views, temperature=0.1):
    """NT-Xent of any number of views (as the supervised contrastive loss, Khosla et al. 2020, Eq. 2, an image being a class).

    Each of the V·N projections a is classified against the V·N - 1 others, of which the V - 1 other views of its image
    are right: the mean over a, and over its right ones p, of -log( e^(a·p/τ) / Σ_b e^(a·b/τ) ), all l2-normalised. Two
    views make `nt_xent`, and processes share the work as there.

    Args:
        views: V tensors (N, D), row i of each from image i.
        temperature: τ > 0, a pure number.

    Returns:
        Scalar tensor, in nats.

    Raises:
        ValueError: if views are not two or more (N, D) matrices of one shape, or temperature is not above 0.
    """
    if len(views) < 2 or any(h.shape != views[0].shape or h.ndim != 2 for h in views):
        raise ValueError(f"two or more views must all be (N, D), but these are {', '.join(str(tuple(h.shape)) for h in views)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    count, n, rank = len(views), len(views[0]), 0
    with torch.autocast(views[0].device.type, enabled=False):
        h = torch.cat(list(views))
        h = F.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=1)                  # (V·N, D)
        candidates = h
        if dist.is_available() and dist.is_initialized():
            rank, candidates = dist.get_rank(), AllGather.apply(h)                            # (R·V·N, D)
        columns = (rank * count * n + torch.arange(count * n, device=h.device)).view(count, n)     # of this process's projections
        loss = 0.0
        for view in range(count):                               # one after the other: less memory than all at once
            logits = (h[view * n:][:n] / temperature) @ candidates.T                               # (N, R·V·N)
            logits.scatter_(1, columns[view, :, None], float("-inf"))                              # never against itself
            right = torch.cat([columns[:view], columns[view + 1:]]).T                              # (N, V - 1)
            loss = loss - logits.log_softmax(1).gather(1, right).mean() / count
        return loss


class AllGather(torch.autograd.Function):
    """Concatenate the processes' (M, D) tensors to (R·M, D), with the gradient that a plain all_gather cuts off.

    Every process's loss reads every row, so a row's gradient is the sum of what all processes send back for it.
    """

    @staticmethod
    def forward(ctx, h):
        rows = h.new_empty(dist.get_world_size() * h.shape[0], h.shape[1])
        dist.all_gather_into_tensor(rows, h.contiguous())
        return rows

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


# ------------------------------------------------------------------------------------------------------ without negatives

class Predictor(nn.Sequential):
    """q: (N, D) -> (N, D), which predicts the other view's projection: linear, batch norm, ReLU, linear (Grill et al. 2020)."""

    def __init__(self, dimensions, hidden):
        super().__init__(nn.Linear(dimensions, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dimensions))


def simsiam(p1, p2, h1, h2):
    """Negative cosine similarity of predictions and stopped projections (SimSiam, Chen and He 2021, Eq. 2).

    -½ mean cos(p1, stop(h2)) - ½ mean cos(p2, stop(h1)), of which the mean over processes is the whole batch's.

    Args:
        p1, p2: (N, D), the `Predictor`'s outputs for h1 and h2. Computed in float32 at least; float64 stays float64.
        h1, h2: (N, D), projections of the two views. No gradient flows into them.

    Returns:
        Scalar tensor from -1, where each view predicts the other, to 1.
    """
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, h1, h2 = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (p1, p2, h1.detach(), h2.detach()))
        return -(F.cosine_similarity(p1, h2) + F.cosine_similarity(p2, h1)).mean() / 2


def byol(p1, p2, target1, target2):
    """Mean squared error of normalised predictions, both directions summed (BYOL, Grill et al. 2020, Eq. 2).

    As `simsiam`, but target1 and target2 are the projections of a slowly averaged copy of encoder and head. Since
    ||a - b||² = 2 - 2 cos(a, b) for unit vectors, the value is 4 + 4 times that of `simsiam`: 0 to 8.
    """
    return 4 + 4 * simsiam(p1, p2, target1, target2)


def averaged_target(online, decay, total):
    """BYOL's target: a copy of a module that follows it, by `target.update_parameters(online)` after each of `total` steps.

    After the first step a copy; then decay · target + (1 - decay) · online, the decay rising to 1 along a cosine (BYOL, section 3).
    """
    def average(target, online, step):
        now = 1 - (1 - decay) * (math.cos(math.pi * step.item() / total) + 1) / 2
        get_ema_multi_avg_fn(now)(target, online, step)

    return AveragedModel(online, multi_avg_fn=average).requires_grad_(False)
