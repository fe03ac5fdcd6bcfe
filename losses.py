"""The objective I that compares two views: NT-Xent, with the negatives of all processes.

Letters: N images of this process, R processes, D numbers per projection.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def nt_xent(h1, h2, temperature=0.1):
    """Normalised temperature-scaled cross-entropy, the paper's objective (SimCLR, Chen et al.
    2020).

    Each of the 2N projections is classified against the other 2N - 1 with logits cos/τ, its
    partner being the correct class. When torch.distributed is initialised, h1 and h2 are this
    process's share, and the candidates are those of all R processes. Averaged over processes, as
    DistributedDataParallel averages gradients, loss and gradients are those of one process with
    the whole batch.

    Args:
        h1, h2: (N, D), projections of the two views, row i of both from image i; the same N on
            every process. Computed in float32 at least, even under autocast.
        temperature: τ > 0.

    Returns the mean over this process's 2N projections, in nats. Raises a ValueError for other
    shapes or temperatures.
    """
    if h1.ndim != 2 or h1.shape != h2.shape or len(h1) == 0:
        raise ValueError(f"h1 and h2 must both be (N, D), N at least 1, but are "
                         f"{tuple(h1.shape)} and {tuple(h2.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    n = len(h1)
    h = torch.cat([h1, h2])
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    h = F.normalize(h, dim=1)    # (2N, D)
    candidates = h
    first = 0
    if dist.is_available() and dist.is_initialized():
        candidates = AllGather.apply(h)    # (R·2N, D)
        first = dist.get_rank() * 2 * n
    own_column = first + torch.arange(2 * n, device=h.device)
    # Row i of h1 and row i of h2 are partners: n rows apart, around the 2n.
    partner_column = own_column.roll(n)
    with torch.autocast(h.device.type, enabled=False):
        logits = (h / temperature) @ candidates.T    # (2N, R·2N): cos/τ
        logits.scatter_(1, own_column[:, None], float("-inf"))
        return F.cross_entropy(logits, partner_column)


class AllGather(torch.autograd.Function):
    """Concatenate the processes' (n, D) tensors to (R·n, D), and let the gradient flow back.

    Every process's loss reads every row, so a row's gradient is the sum of what all of them send
    back for it. A plain all_gather cuts it off. Second derivatives raise a RuntimeError.
    """

    @staticmethod
    def forward(ctx, h):
        gathered = [torch.empty_like(h) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, h.contiguous())
        return torch.cat(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # Cloned, because autograd may use the incoming gradient elsewhere.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
