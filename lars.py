"""LARS: layer-wise adaptive rate scaling (You et al. 2017), in the form that SimCLR uses."""
import torch


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step for each weight is scaled to that weight's own norm.

    For a weight w with gradient g, learning rate lr, momentum μ, weight decay λ, trust coefficient η:

        d = g + λ w
        d = η ‖w‖ / ‖d‖ · d          (ratio 1 where either norm is 0)
        m = μ m + d                  (m starts at 0)
        w = w - lr · m

    Parameters with ndim <= 1, that is biases and the scales of norms, get neither decay nor adaptation: d = g.
    The learning rate multiplies the momentum, not the gradient, so a schedule acts at once (PyTorch's SGD does the same).
    Nothing here waits for the device: the norms stay tensors, and the two cases are chosen by `where`.

    Args:
        params: parameters or parameter groups, as for any torch.optim.Optimizer.
        lr, momentum, weight_decay, trust_coefficient: lr, μ, λ and η above, plain numbers.

    Raises:
        ValueError: if lr, weight_decay or trust_coefficient is negative, or momentum is outside [0, 1).
    """

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
        for group in self.param_groups:
            params = [w for w in group["params"] if w.grad is not None]
            # A CPU takes one weight at a time, so that what is in between stays in its cache; a GPU all at once, in few kernels.
            for some in [[w] for w in params] if not params or params[0].is_cpu else [params]:
                self._update(some, group["lr"], group["momentum"], group["weight_decay"], group["trust_coefficient"])
        return loss

    def _update(self, params, lr, momentum, weight_decay, trust_coefficient):
        for w in params:
            if "momentum" not in self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        weights, vectors = [w for w in params if w.ndim > 1], [w for w in params if w.ndim <= 1]
        momenta = [self.state[w]["momentum"] for w in weights + vectors]
        torch._foreach_mul_(momenta, momentum)
        if weights:
            d = torch._foreach_add([w.grad for w in weights], weights, alpha=weight_decay)
            w_norm, d_norm = norms(weights), norms(d)
            ratio = torch.where((w_norm > 0) & (d_norm > 0), trust_coefficient * w_norm / d_norm, 1.0)
            torch._foreach_addcmul_(momenta[:len(weights)], d, list(ratio.unbind()))
        if vectors:
            torch._foreach_add_(momenta[len(weights):], [w.grad for w in vectors])
        torch._foreach_add_(weights + vectors, momenta, alpha=-lr)


def norms(tensors):
    """2-norms of tensors, (len(tensors),): few kernels on a GPU; on a CPU dot products, which take half the time."""
    if not tensors[0].is_cpu:
        return torch.stack(torch._foreach_norm(tensors))
    flat = [t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([t.dot(t) for t in flat]).sqrt()
