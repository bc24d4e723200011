"""The spectral density of a symmetric operator and sums over its eigenvalues, by Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hesse.errors import BudgetError
from hesse.estimators.lanczos import Lanczos
from hesse.estimators.products import Draws, Products, positive
from hesse.runtime.memory import Budget, show
from hesse.runtime.progress import Progress, ProgressOption

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GRID = 400
_TAIL = 4.0  # widths of the smoothing that the grid goes beyond the outermost nodes


class Density(NamedTuple):
    """A smoothed density on a grid, all [points]: its error is a standard error over the probes."""

    grid: Tensor
    density: Tensor
    error: Tensor


@dataclass(frozen=True)
class Spectrum:
    """A quadrature of the spectrum for each probe: sums over eigenvalues without further products.

    Attributes:
        nodes: [probes, steps] in float64, where the quadratures have their weight; exact eigenvalues where
            the products reached the dimension.
        weights: [probes, steps] in float64, which sum to one for each probe.
        n: the dimension of the operator.
        products: how many products of the operator with a vector were taken.
        exact: whether the nodes are all eigenvalues.
        seed: of the probes.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    products: int
    exact: bool
    seed: int

    def mean(self, func: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        r"""The mean of a function over all eigenvalues, $\frac1n \sum_i f(\lambda_i)$, and its error.

        Args:
            func: from nodes to values of the same shape, or with dimensions in front.
        """
        values = (func(self.nodes) * self.weights).sum(-1)
        if self.exact:
            return values[..., 0], torch.zeros_like(values[..., 0])
        return values.mean(-1), values.std(-1) / math.sqrt(len(self.nodes))

    def density(self, grid: Tensor | None = None, width: float | None = None) -> Density:
        r"""The density $\frac1n \sum_i \delta(t - \lambda_i)$, smoothed by a normal density.

        Args:
            grid: the points t, [points]. None: 400 from end to end.
            width: the standard deviation of the normal density, in units of the eigenvalues. None: the
                distance from end to end divided by the steps.
        """
        used = self.nodes[self.weights > 0]
        low, high = used.min(), used.max()
        if width is None:
            span = (high - low).item() or high.abs().item() or 1.0
            width = span / max(20, self.nodes.shape[1])
        if grid is None:
            tail = _TAIL * width
            grid = torch.linspace(low.item() - tail, high.item() + tail, _GRID, dtype=torch.float64)
        points = grid.to(self.nodes)
        bell = torch.distributions.Normal(points[:, None, None], width)
        density, error = self.mean(lambda nodes: bell.log_prob(nodes).exp())
        return Density(points, density, error)

    def plot(self, grid: Tensor | None = None, width: float | None = None) -> Figure:
        """The density as a matplotlib figure, on a logarithmic scale, with a band of two standard errors.

        Args:
            grid: as for `density`.
            width: as for `density`.
        """
        from matplotlib.figure import Figure

        points, density, error = (part.cpu().numpy() for part in self.density(grid, width))
        floor = density.max() * 1e-2 / self.n
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(
            points,
            (density - 2 * error).clip(floor),
            (density + 2 * error).clip(floor),
            color="#2166ac",
            alpha=0.25,
        )
        axes.plot(points, density.clip(floor), color="#2166ac")
        axes.set(yscale="log", ylim=(floor, None), xlabel="eigenvalue", ylabel="density")
        axes.set_title(f"Spectral density  ({self.n:,} eigenvalues)", loc="left", fontweight="bold")
        return figure


def spectral_density(
    A: Any,
    *,
    steps: int = 80,
    probes: int = 8,
    seed: int = 0,
    memory: int | str | None = None,
    progress: ProgressOption = None,
) -> Spectrum:
    r"""The spectral density of a symmetric operator, $\frac1n \sum_i \delta(t - \lambda_i)$.

    For each probe, a vector of random signs $\omega / \sqrt n$, Lanczos finds a quadrature of as many nodes
    as steps: $\sum_j w_j f(\theta_j) \approx \frac1n \omega^\top f(A)\, \omega$, exact for polynomials of
    degree below twice the steps. Its mean over the probes is the mean of f over all eigenvalues; the probes'
    spread is the error. Where steps times probes reach n, A is multiplied with the identity, and the
    eigenvalues are exact.

    Args:
        A: a tensor [n, n], or what has `shape` (n, n) and `@` on tensors [n, k]. It must be symmetric.
        steps: the nodes of each quadrature: how fine the density is resolved. As many vectors are held for a
            probe.
        probes: how many quadratures: how small the error is.
        seed: of the probes. torch's own random numbers are left alone.
        memory: bytes for the vectors, or a text such as "2GiB"; None for half of what is free. It decides
            how many probes go together, and nothing else.
        progress: None for a bar on a terminal after two seconds, True, False, or a callable of (done, total).

    Returns:
        A `Spectrum`: smooth it by `density(grid, width)`, draw it by `plot()`, as often as you like.

    Raises:
        ArgumentError: `A` is no operator, or its products are not finite.
        BudgetError: the memory does not hold the vectors of one probe.

    Source: S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr f(A) via stochastic Lanczos quadrature, SIAM J.
    Matrix Anal. Appl. 38 (2017).

    Example:
        >>> import torch, hesse
        >>> spectrum = hesse.spectral_density(torch.diag(torch.linspace(0, 1, 1001)), steps=20, probes=4)
        >>> grid, density, error = spectrum.density(torch.tensor([0.5]), width=0.1)
        >>> abs(density.item() - 1) < 0.1
        True
        >>> spectrum.products
        80
    """
    for name, number in (("steps", steps), ("probes", probes)):
        positive(name, number)
    with Progress(progress) as bar:
        wrapped = Products(A, bar)
        n = wrapped.n
        if steps * probes >= n:
            wrapped.expect(n)
            nodes = torch.linalg.eigvalsh(wrapped.matrix().double())[None]
            return Spectrum(nodes, torch.full_like(nodes, 1 / n), n, wrapped.count, True, seed)
        wrapped.expect(steps * probes)
        room, probe = Budget(memory, wrapped.device).total, (steps + 5) * n * wrapped.dtype.itemsize
        if probe > room:
            raise BudgetError(
                f"{steps} steps hold {show(probe)} of vectors, and the budget is {show(room)}: "
                "take fewer steps, or raise memory"
            )
        draws = Draws(wrapped, seed)
        found: list[Tensor] = []
        while left := probes - len(found):
            starts = draws.signs(min(left, room // probe)).T[..., None]
            process = Lanczos(wrapped, starts, steps)
            while process.used < steps:
                process.step()
            found += process.t.unbind()
        nodes, vectors = torch.linalg.eigh(torch.stack(found))
        return Spectrum(nodes, vectors[:, 0].square(), n, wrapped.count, False, seed)
