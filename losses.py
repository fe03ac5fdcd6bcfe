"""NT-Xent, the contrastive objective I, exact on one process and on many.

Letters: N pairs of this process, D numbers per projection, R processes.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


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
    if h1.shape != h2.shape or h1.ndim != 2:
        raise ValueError(f"h1 and h2 must both be (N, D), but are {tuple(h1.shape)} and {tuple(h2.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    n, rank = len(h1), 0
    with torch.autocast(h1.device.type, enabled=False):
        h = torch.cat([h1, h2])
        h = F.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=1)                  # (2N, D)
        candidates = h
        if dist.is_available() and dist.is_initialized():
            rank, candidates = dist.get_rank(), AllGather.apply(h)                            # (R·2N, D)
        loss, here = 0.0, torch.arange(n, device=h.device)
        for view in range(2):                                   # one after the other: half the memory of both at once
            own, partner = (rank * 2 * n + v * n + here for v in (view, 1 - view))                 # (N,): columns
            logits = (h[view * n:][:n] / temperature) @ candidates.T                               # (N, R·2N)
            logits.scatter_(1, own[:, None], float("-inf"))                                        # never against itself
            loss = loss + F.cross_entropy(logits, partner) / 2
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
