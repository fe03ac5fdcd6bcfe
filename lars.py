"""LARS: layer-wise adaptive rate scaling (You et al. 2017)."""
import torch


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step for each weight is scaled to that weight's own norm.

    For a weight w with gradient g, learning rate lr, momentum μ, weight decay λ, trust coefficient η:

        d = g + λ w
        d = η ‖w‖ / ‖d‖ · d          (ratio 1 where either norm is 0)
        m = μ m + d                  (m starts at 0)
        w = w - lr · m

    Parameters with ndim <= 1, biases and the scales of norms, are neither decayed nor adapted: d = g. The rate
    multiplies the momentum, as in PyTorch's SGD and the LARS of MoCo v3 and Barlow Twins. You et al. and SimCLR's
    TensorFlow code have it inside, m = μ m + lr · d, which agrees while the rate stands still.

    No step waits for a GPU, nor does torch.amp.GradScaler for this class: it hands over its scale and whether a
    gradient overflowed as tensors, and a step with an overflow leaves weights and momentum as they were.

    params are parameters or parameter groups, as for any torch.optim.Optimizer; lr, momentum, weight_decay and
    trust_coefficient are lr, μ, λ and η above, plain numbers. Raises a ValueError if lr, weight_decay or
    trust_coefficient is negative, or momentum is outside [0, 1).
    """
    _step_supports_amp_scaling = True      # makes GradScaler set grad_scale and found_inf for the time of a step

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and trust_coefficient >= 0):
            raise ValueError("need lr, weight_decay, trust_coefficient >= 0 and 0 <= momentum < 1; got "
                             f"{lr}, {weight_decay}, {trust_coefficient} and {momentum}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step. closure, if given, recomputes the loss and is called first; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None and w.ndim > 1]
            vectors = [w for w in group["params"] if w.grad is not None and w.ndim <= 1]
            if not weights + vectors:
                continue
            for w in weights + vectors:
                if "momentum" not in self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
            m = [self.state[w]["momentum"] for w in weights + vectors]
            g = [w.grad for w in weights + vectors]
            if scale is not None:
                g = torch._foreach_div(g, scale)
            changed = weights + vectors + m
            before = [t.clone() for t in changed] if found_inf is not None else []

            torch._foreach_mul_(m, group["momentum"])
            if weights:
                d = torch._foreach_add(g[:len(weights)], weights, alpha=group["weight_decay"])
                w_norm, d_norm = norms(weights), norms(d)
                ratio = torch.where((w_norm > 0) & (d_norm > 0), group["trust_coefficient"] * w_norm / d_norm, 1.0)
                torch._foreach_addcmul_(m[:len(weights)], d, list(ratio.unbind()))
            if vectors:
                torch._foreach_add_(m[len(weights):], g[len(weights):])
            torch._foreach_add_(weights + vectors, m, alpha=-group["lr"])
            for now, old in zip(changed, before):
                now.copy_(torch.where(found_inf > 0, old, now))                # no step where a gradient overflowed
        return loss


def norms(tensors):
    """2-norms, (len(tensors),), in float32 at least. By dot products: on a CPU half the time of torch._foreach_norm."""
    flat = [t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([t.dot(t) for t in flat]).sqrt()
