"""Conjugate gradients and MINRES for several right-hand sides, each with coefficients of its own.

Both improve a solution by what solves for its residual, and stop a column where their own idea of the
residual is small enough, where its curvature is not positive, or where nothing is left to go along. Only
columns that still run are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
Watch = Callable[[Tensor, Tensor], None]  # columns that still run, and the norms of their residuals


@dataclass
class Improved:
    """What an iteration made of the residuals [n, k] it was given.

    Attributes:
        x: [n, k], what to add to the solutions.
        direction: [n, k], directions without positive curvature; zeros where none was met.
        steps: how many products each column may have taken.
    """

    x: Tensor
    direction: Tensor
    steps: int


def conjugate_gradients(
    apply: Apply, invert: Apply, residual: Tensor, goals: Tensor, most: int, watch: Watch
) -> Improved:
    """By Hestenes and Stiefel; stops a column at a direction p with p'Ap <= 0, up to rounding."""
    eps = torch.finfo(residual.dtype).eps
    improved = Improved(torch.zeros_like(residual), torch.zeros_like(residual), 0)
    live = torch.arange(residual.shape[1], device=residual.device)
    r = residual
    p = z = invert(r)
    rz = _inner(r, z)
    largest = torch.zeros_like(rz)  # curvature for a unit vector so far: what rounding is relative to
    while len(live) and improved.steps < most:
        q = apply(p)
        improved.steps += 1
        curvature, squared = _inner(p, q), _inner(p, p)
        largest = torch.maximum(largest, (curvature / squared).abs())
        bad = curvature <= eps * largest * squared
        improved.direction[:, live[bad]] = p[:, bad]
        alpha = torch.where(bad, 0.0, rz / torch.where(bad, 1.0, curvature))
        improved.x[:, live] += alpha * p
        r = r - alpha * q
        norms = r.norm(dim=0)
        watch(live, norms)
        on = ~bad & (norms > goals[live])
        live, r, p, largest = live[on], r[:, on], p[:, on], largest[on]
        z, before = invert(r), rz[on]
        rz = _inner(r, z)
        p = z + rz / before * p
    return improved


def minres(apply: Apply, invert: Apply, residual: Tensor, goals: Tensor, most: int, watch: Watch) -> Improved:
    """By Paige and Saunders: the least residual of all combinations so far, for indefinite operators too."""
    eps = torch.finfo(residual.dtype).eps
    improved = Improved(torch.zeros_like(residual), torch.zeros_like(residual), 0)
    live = torch.arange(residual.shape[1], device=residual.device)
    lanczos = residual  # the newest vector of the Lanczos process, not yet of norm one, and the one before
    lanczos_before = torch.zeros_like(residual)
    y = invert(residual)
    beta = _inner(residual, y).sqrt()
    beta_before = torch.ones_like(beta)
    scale = residual.norm(dim=0) / beta  # from the norm that the preconditioner makes to the plain one
    cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
    delta_bar, epsilon = torch.zeros_like(beta), torch.zeros_like(beta)
    phi_bar, size = beta, torch.zeros_like(beta)
    w = w_before = torch.zeros_like(residual)
    while len(live) and improved.steps < most:
        v = y / beta
        y = apply(v)
        improved.steps += 1
        y = y - beta / beta_before * lanczos_before
        alpha = _inner(v, y)
        y = y - alpha / beta * lanczos
        lanczos_before, lanczos = lanczos, y
        y = invert(lanczos)
        beta_before, beta = beta, _inner(lanczos, y).clamp_min(0).sqrt()
        size = torch.maximum(size, torch.hypot(alpha, beta))

        # The next column of the tridiagonal matrix, turned by the last two rotations and by a new one.
        epsilon_before = epsilon
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = sine * delta_bar - cosine * alpha
        epsilon, delta_bar = sine * beta, -cosine * beta
        gamma = torch.hypot(gamma_bar, beta)
        singular = gamma <= eps * size
        safe = torch.where(singular, 1.0, gamma)
        cosine, sine = gamma_bar / safe, beta / safe
        phi = torch.where(singular, 0.0, cosine * phi_bar)
        phi_bar = torch.where(singular, phi_bar, sine * phi_bar)
        w, w_before = (v - epsilon_before * w_before - delta * w) / safe, w
        improved.x[:, live] += phi * w

        norms = phi_bar * scale
        watch(live, norms)
        on = (beta > eps * size) & ~singular & (norms > goals[live])
        live = live[on]
        lanczos, lanczos_before, y, w, w_before = (
            part[:, on] for part in (lanczos, lanczos_before, y, w, w_before)
        )
        beta, beta_before, cosine, sine, delta_bar, epsilon, phi_bar, size, scale = (
            part[on] for part in (beta, beta_before, cosine, sine, delta_bar, epsilon, phi_bar, size, scale)
        )
    return improved


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(0)
