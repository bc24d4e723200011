"""The independent route: plain double backward, one coordinate at a time, by torch alone."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def hessian_matrix(evaluate, tensors):
    """The P x P matrix of second derivatives of `evaluate(*tensors)`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        value = evaluate(*(leaf.clone() for leaf in leaves))
    gradient = [None] * len(leaves)
    if value.requires_grad:
        gradient = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    rows = []
    for leaf, part in zip(leaves, gradient, strict=True):
        for r in range(leaf.numel()):
            found = [None] * len(leaves)
            if part is not None and part.requires_grad:
                entry = part.reshape(-1)[r]
                found = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(x) if f is None else f).reshape(-1)
                        for x, f in zip(leaves, found, strict=True)
                    ]
                )
            )
    return torch.stack(rows) if rows else torch.zeros(0, 0)


def as_matrix(blocks, tensors):
    """hesse's nested answer as one P x P matrix."""
    return torch.cat(
        [
            torch.cat([b.reshape(x.numel(), y.numel()) for b, y in zip(row, tensors, strict=True)], dim=1)
            for row, x in zip(blocks, tensors, strict=True)
        ]
    )


def relative_error(found, expected):
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()
