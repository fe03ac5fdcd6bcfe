"""LARS: layer-wise adaptive rate scaling (You et al. 2017)."""
import torch


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step for each weight is scaled to that weight's own norm.

    For a weight w with gradient g, learning rate lr, momentum μ, weight decay λ and trust
    coefficient η:

        d = g + λ w
        d = η ‖w‖ / ‖d‖ · d          (ratio 1 where either norm is 0)
        m = μ m + d                  (m starts at 0)
        w = w - lr · m

    Parameters with ndim <= 1, biases and the scales of norms, are neither decayed nor adapted:
    d = g. The rate multiplies the momentum, as in PyTorch's SGD and the LARS of MoCo v3 and Barlow
    Twins. SimCLR's TensorFlow code has it inside, m = μ m + lr · d, which agrees while the rate
    stands still; so do You et al., who also divide by ‖g‖ + λ ‖w‖ in place of ‖d‖.

    Args:
        params: parameters or parameter groups, as for any torch.optim.Optimizer.
        lr, momentum, weight_decay, trust_coefficient: lr, μ, λ and η above, plain numbers.

    Raises a ValueError if lr, weight_decay or trust_coefficient is negative, or momentum is not in
    [0, 1).
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        if not (lr >= 0 and weight_decay >= 0 and trust_coefficient >= 0 and 0 <= momentum < 1):
            raise ValueError(
                "need lr, weight_decay, trust_coefficient >= 0 and 0 <= momentum < 1, but got "
                f"{lr}, {weight_decay}, {trust_coefficient} and {momentum}")
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step. closure, if given, recomputes the loss first; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                d = w.grad
                if w.ndim > 1:
                    d = d + group["weight_decay"] * w
                    w_norm = torch.linalg.vector_norm(w)
                    d_norm = torch.linalg.vector_norm(d)
                    ratio = group["trust_coefficient"] * w_norm / d_norm
                    # A branch would make every step wait for the GPU.
                    ratio = torch.where((w_norm > 0) & (d_norm > 0), ratio, 1.0)
                    d = ratio * d
                state = self.state[w]
                if "m" not in state:
                    state["m"] = torch.zeros_like(w)
                m = state["m"]
                m.mul_(group["momentum"]).add_(d)
                w.sub_(group["lr"] * m)
        return loss
