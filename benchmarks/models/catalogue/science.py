"""Functions of the sciences, written out as their textbooks have them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.models.model import Catalogue, Problem, by_inputs, by_parameters

MODELS = Catalogue("science", ("torch",))

_LOG_2PI = math.log(2 * math.pi)


def _lattice(side: int, spacing: float) -> Tensor:
    """Atoms of a simple cubic lattice, moved a little."""
    places = torch.cartesian_prod(*[torch.arange(side) for _ in range(3)]).to(torch.get_default_dtype())
    return spacing * places + 0.05 * torch.randn(len(places), 3)


def _distances(positions: Tensor) -> Tensor:
    """Between all pairs of atoms."""
    i, j = torch.triu_indices(len(positions), len(positions), 1)
    return (positions[i] - positions[j]).norm(dim=-1)


@MODELS.row("Rosenbrock's chained function", "hessian", "inputs")
def rosenbrock() -> Problem:
    def func(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    return by_inputs(func, torch.randn(300))


@MODELS.row("Lennard-Jones energy of 27 atoms", "hessian", "positions")
def lennard_jones() -> Problem:
    def energy(positions: Tensor) -> Tensor:
        sixth = _distances(positions).pow(-6)
        return 4 * (sixth.square() - sixth).sum()

    return by_inputs(energy, _lattice(3, 1.1))


@MODELS.row("Stillinger-Weber energy of 8 silicon atoms, pairs and angles", "hessian", "positions")
def stillinger_weber() -> Problem:
    big_a, big_b, cutoff, angles, gamma = 7.049556277, 0.6022245584, 1.8, 21.0, 1.2

    def energy(positions: Tensor) -> Tensor:
        count = len(positions)
        apart = positions[None] - positions[:, None]
        others = ~torch.eye(count, dtype=torch.bool)
        r = torch.where(others, apart.square().sum(-1), torch.ones(())).sqrt()
        near = others & (r < cutoff)
        beyond = torch.where(near, r - cutoff, -torch.ones(()))
        pairs = torch.where(near, big_a * (big_b * r.pow(-4) - 1) * torch.exp(1 / beyond), torch.zeros(()))
        unit = apart / r[..., None]
        cosine = torch.einsum("ijx,ikx->ijk", unit, unit)
        weight = torch.where(near, torch.exp(gamma / beyond), torch.zeros(()))
        triples = angles * weight[:, :, None] * weight[:, None, :] * (cosine + 1 / 3).square()
        distinct = ~torch.eye(count, dtype=torch.bool)[None]
        return 0.5 * pairs.sum() + 0.5 * torch.where(distinct, triples, torch.zeros(())).sum()

    return by_inputs(energy, _lattice(2, 1.2))


@MODELS.row("Morse and bending energy of a chain of 12 beads", "hessian", "positions")
def bead_chain() -> Problem:
    def energy(positions: Tensor) -> Tensor:
        bonds = positions[1:] - positions[:-1]
        lengths = torch.linalg.vector_norm(bonds, dim=-1)
        morse = (1 - torch.exp(-2 * (lengths - 1))).square().sum()
        cosine = F.cosine_similarity(bonds[1:], bonds[:-1], dim=-1)
        return morse + 3 * (1 - cosine).sum()

    return by_inputs(energy, torch.randn(12, 3).cumsum(0))


@MODELS.row("Coulomb energy of 8 ions in a periodic box, by Ewald summation", "hessian", "positions")
def ewald() -> Problem:
    box, alpha = 4.0, 1.2
    charges = torch.tensor([1.0, -1.0]).repeat(4)
    waves = torch.cartesian_prod(*[torch.arange(-3, 4) for _ in range(3)]).to(charges.dtype)
    waves = 2 * math.pi / box * waves[waves.square().sum(1) > 0]
    squared = waves.square().sum(1)
    weights = torch.exp(-squared / (4 * alpha**2)) / squared

    def energy(positions: Tensor) -> Tensor:
        i, j = torch.triu_indices(8, 8, 1)
        apart = positions[i] - positions[j]
        apart = apart - box * torch.round(apart.detach() / box)
        r = apart.norm(dim=-1)
        near = (charges[i] * charges[j] * torch.erfc(alpha * r) / r).sum()
        phases = positions @ waves.T
        factor = (charges[:, None] * torch.polar(torch.ones_like(phases), phases)).sum(0)
        return near + 2 * math.pi / box**3 * (weights * factor.abs().square()).sum()

    return by_inputs(energy, box * torch.rand(8, 3))


@MODELS.row(
    "negative log likelihood of a linear Gaussian state space, by a Kalman filter", "hessian", "inputs"
)
def kalman_filter() -> Problem:
    steps, size = 40, 2
    observed = torch.randn(steps, size).cumsum(0)

    def likelihood(dynamics: Tensor, log_noises: Tensor) -> Tensor:
        identity = torch.eye(size)
        process, noise = (scale.exp() * identity for scale in log_noises)
        mean, covariance, total = torch.zeros(size), identity, torch.zeros(())
        for seen in observed:
            mean, covariance = dynamics @ mean, dynamics @ covariance @ dynamics.T + process
            spread = covariance + noise
            missed = seen - mean
            solved = torch.linalg.solve(spread, missed)
            total = total + 0.5 * (missed @ solved + torch.logdet(spread) + size * _LOG_2PI)
            gain = torch.linalg.solve(spread, covariance).T
            mean, covariance = mean + gain @ missed, covariance - gain @ covariance
        return total

    return by_inputs(likelihood, 0.9 * torch.eye(size) + 0.05 * torch.randn(size, size), torch.zeros(2))


@MODELS.row("negative log likelihood of a hidden Markov model, by the forward algorithm", "hessian", "inputs")
def hidden_markov() -> Problem:
    states, symbols, steps = 5, 6, 50
    seen = torch.randint(symbols, (steps,))

    def likelihood(start: Tensor, moves: Tensor, emissions: Tensor) -> Tensor:
        log_moves, log_emissions = moves.log_softmax(-1), emissions.log_softmax(-1)
        alpha = start.log_softmax(-1) + log_emissions[:, seen[0]]
        for symbol in seen[1:]:
            alpha = torch.logsumexp(alpha[:, None] + log_moves, 0) + log_emissions[:, symbol]
        return -torch.logsumexp(alpha, 0)

    return by_inputs(
        likelihood, torch.randn(states), torch.randn(states, states), torch.randn(states, symbols)
    )


@MODELS.row("negative log likelihood of a GARCH(1, 1) process", "hessian", "inputs")
def garch() -> Problem:
    returns = torch.randn(120)

    def likelihood(raw: Tensor) -> Tensor:
        omega, alpha, beta = F.softplus(raw).unbind()
        variance, total = returns.var(), torch.zeros(())
        for value in returns:
            total = total + 0.5 * (_LOG_2PI + variance.log() + value.square() / variance)
            variance = omega + alpha * value.square() + beta * variance
        return total

    return by_inputs(likelihood, torch.tensor([-2.0, -2.0, 0.3]))


@MODELS.row("misfit of a Lotka-Volterra system integrated by RK4", "hessian", "inputs")
def runge_kutta() -> Problem:
    steps, dt = 60, 0.1
    target = torch.rand(steps, 2) + 0.5

    def field(state: Tensor, rates: Tensor) -> Tensor:
        prey, hunters = state.unbind()
        a, b, c, d = rates.unbind()
        return torch.stack([a * prey - b * prey * hunters, c * prey * hunters - d * hunters])

    def misfit(rates: Tensor, start: Tensor) -> Tensor:
        state, total = start, torch.zeros(())
        for seen in target:
            k1 = field(state, rates)
            k2 = field(state + 0.5 * dt * k1, rates)
            k3 = field(state + 0.5 * dt * k2, rates)
            k4 = field(state + dt * k3, rates)
            state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + (state - seen).square().sum()
        return total

    return by_inputs(misfit, torch.tensor([1.1, 0.4, 0.1, 0.4]), torch.tensor([1.0, 1.0]))


@MODELS.row("loss of a logistic regression of 8 coefficients", "hessian", "inputs")
def logistic_regression() -> Problem:
    x, y = torch.randn(200, 8), torch.randint(2, (200,)).to(torch.get_default_dtype())

    def loss(beta: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ beta, y, reduction="sum") + 0.5 * beta.square().sum()

    return by_inputs(loss, torch.randn(8))


@MODELS.row("negative log likelihood of a Poisson regression with an offset", "hessian", "inputs")
def poisson_regression() -> Problem:
    x, exposure = torch.randn(200, 6), torch.rand(200) + 0.5
    counts = torch.poisson(exposure)

    def likelihood(beta: Tensor, intercept: Tensor) -> Tensor:
        rate = exposure * torch.exp(x @ beta + intercept)
        return -torch.distributions.Poisson(rate).log_prob(counts).sum()

    return by_inputs(likelihood, 0.1 * torch.randn(6), torch.zeros(()))


@MODELS.row("negative log likelihood of a negative binomial regression", "hessian", "inputs")
def negative_binomial() -> Problem:
    x, counts = torch.randn(150, 5), torch.poisson(3 * torch.rand(150))

    def likelihood(beta: Tensor, log_size: Tensor) -> Tensor:
        size, mean = log_size.exp(), torch.exp(x @ beta)
        share = mean / (mean + size)
        found = torch.lgamma(counts + size) - torch.lgamma(size) - torch.lgamma(counts + 1)
        return -(found + size * torch.log1p(-share) + counts * share.log()).sum()

    return by_inputs(likelihood, 0.2 * torch.randn(5), torch.zeros(()))


@MODELS.row("Cox's partial likelihood of 80 patients", "hessian", "inputs")
def cox_regression() -> Problem:
    x = torch.randn(80, 7)
    died = torch.rand(80) < 0.6

    def likelihood(beta: Tensor) -> Tensor:
        hazard = x @ beta
        at_risk = hazard.flip(0).logcumsumexp(0).flip(0)
        return -(hazard - at_risk)[died].sum()

    return by_inputs(likelihood, 0.3 * torch.randn(7))


@MODELS.row("negative log likelihood of a mixture of 4 Gaussians with full covariances", "hessian", "inputs")
def gaussian_mixture() -> Problem:
    kinds, size = 4, 3
    points = torch.randn(120, size)

    def likelihood(logits: Tensor, means: Tensor, factors: Tensor) -> Tensor:
        lower = factors.tril(-1) + torch.diag_embed(F.softplus(factors.diagonal(dim1=-2, dim2=-1)) + 0.1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits),
            torch.distributions.MultivariateNormal(means, scale_tril=lower),
        )
        return -mixture.log_prob(points).sum()

    return by_inputs(likelihood, torch.zeros(kinds), torch.randn(kinds, size), torch.randn(kinds, size, size))


@MODELS.row("marginal likelihood of a Gaussian process with 40 latent points", "hessian", "inputs")
def latent_process() -> Problem:
    targets, identity = torch.randn(40, 5), torch.eye(40)

    def func(latents: Tensor, logarithms: Tensor) -> Tensor:
        variance, length, noise = logarithms.exp().unbind()
        squared = (latents[:, None] - latents[None]).square().sum(-1)
        kernel = variance * torch.exp(-0.5 * squared / length**2) + noise * identity
        factor = torch.linalg.cholesky(kernel)
        whitened = torch.linalg.solve_triangular(factor, targets, upper=False)
        return (
            0.5 * whitened.square().sum() + 5 * factor.diagonal().log().sum() + 0.5 * latents.square().sum()
        )

    return by_inputs(func, torch.randn(40, 3), torch.tensor([0.0, 0.7, -1.5]))


def _field(width: int, inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )


@MODELS.row("residual of Burgers' equation, a physics-informed network")
def burgers_residual() -> Problem:
    model, points = _field(12, 2), torch.rand(40, 2)
    start = torch.rand(20, 2) * torch.tensor([1.0, 0.0])

    def loss() -> Tensor:
        at = points.clone().requires_grad_()
        u = model(at)
        (slope,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), at, create_graph=True)
        residual = slope[:, 1:] + u * slope[:, :1] - 0.01 * bend[:, :1]
        missed = model(start) + torch.sin(math.pi * start[:, :1])
        return residual.square().mean() + missed.square().mean()

    return by_parameters(model, loss)


@MODELS.row("residual of Poisson's equation by torch.func, a physics-informed network")
def poisson_residual() -> Problem:
    model, points = _field(10, 2), torch.rand(24, 2)

    def loss() -> Tensor:
        weights = dict(model.named_parameters())

        def u(point: Tensor) -> Tensor:
            return functional_call(model, weights, (point,)).squeeze()

        laplace = torch.func.vmap(lambda point: torch.func.hessian(u)(point).trace())(points)
        return (laplace + torch.sin(points).sum(1)).square().mean()

    return by_parameters(model, loss)


@MODELS.row("energies and forces of a pair network, fitted together")
def force_matching() -> Problem:
    model = _field(10, 1)
    positions, forces = _lattice(2, 1.2), torch.randn(8, 3)

    def loss() -> Tensor:
        at = positions.clone().requires_grad_()
        energy = model(_distances(at)[:, None]).sum()
        (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        return (slope + forces).square().mean() + (energy - 1).square()

    return by_parameters(model, loss)


@MODELS.row(
    "variational free energy of electrons in Gaussian orbitals, with an eigensolver", "hessian", "inputs"
)
def hueckel() -> Problem:
    def energy(positions: Tensor) -> Tensor:
        apart = (positions[:, None] - positions[None]).square().sum(-1)
        overlap = torch.exp(-0.25 * apart)
        hopping = -torch.exp(-0.5 * apart) - torch.diag(torch.linspace(0, 1, len(positions)))
        factor = torch.linalg.cholesky(overlap + 0.1 * torch.eye(len(positions)))
        half = torch.linalg.solve_triangular(factor, hopping, upper=False)
        whole = torch.linalg.solve_triangular(factor, half.T, upper=False)
        return 2 * torch.linalg.eigvalsh(whole)[: len(positions) // 2].sum()

    return by_inputs(energy, 1.5 * torch.randn(8, 3))


@MODELS.row("transport cost of 12 points on 15 others, by Sinkhorn's iteration", "hessian", "positions")
def sinkhorn() -> Problem:
    others = torch.randn(15, 2)

    def cost(points: Tensor) -> Tensor:
        distances = (points[:, None] - others[None]).square().sum(-1)
        log_kernel = -distances / 0.5
        f, g = torch.zeros(12), torch.zeros(15)
        for _ in range(20):
            f = -math.log(12) - torch.logsumexp(log_kernel + g, 1)
            g = -math.log(15) - torch.logsumexp(log_kernel + f[:, None], 0)
        return (torch.exp(log_kernel + f[:, None] + g) * distances).sum()

    return by_inputs(cost, torch.randn(12, 2))


@MODELS.row("wave equation solved by finite differences, misfit by the velocities", "hessian", "inputs")
def wave_inversion() -> Problem:
    cells, steps = 40, 60
    source = torch.exp(-0.5 * (torch.arange(cells) - 10.0).square() / 4)
    seen = 0.1 * torch.randn(steps)

    def misfit(velocity: Tensor) -> Tensor:
        before, now, total = source, source, torch.zeros(())
        for k in range(steps):
            bend = F.pad(now[2:] - 2 * now[1:-1] + now[:-2], (1, 1))
            before, now = now, 2 * now - before + 0.3 * velocity.square() * bend
            total = total + (now[30] - seen[k]).square()
        return total

    return by_inputs(misfit, 0.8 + 0.2 * torch.rand(cells))


@MODELS.row("free energy of an Ising model's mean field, with a graph of couplings", "hessian", "inputs")
def mean_field() -> Problem:
    couplings = torch.randn(30, 30)
    couplings = (couplings + couplings.T) / 60**0.5

    def free_energy(fields: Tensor) -> Tensor:
        m = torch.tanh(fields)
        up, down = (1 + m) / 2, (1 - m) / 2
        entropy = -(torch.xlogy(up, up) + torch.xlogy(down, down)).sum()
        return -0.5 * m @ couplings @ m - entropy

    return by_inputs(free_energy, 0.5 * torch.randn(30))


@MODELS.row("loss of a matrix factorisation with biases", "hessian", "inputs")
def matrix_factorisation() -> Problem:
    users, items = torch.randint(12, (90,)), torch.randint(10, (90,))
    stars = torch.randn(90)

    def loss(left: Tensor, right: Tensor, by_user: Tensor, by_item: Tensor) -> Tensor:
        found = (left[users] * right[items]).sum(-1) + by_user[users] + by_item[items]
        return F.mse_loss(found, stars) + 0.01 * (left.square().sum() + right.square().sum())

    return by_inputs(loss, torch.randn(12, 4), torch.randn(10, 4), torch.randn(12), torch.randn(10))


@MODELS.row("phase retrieval of a signal of 48 samples from its spectrum", "hessian", "inputs")
def phase_retrieval() -> Problem:
    seen = torch.fft.rfft(torch.randn(48), n=96).abs()

    def misfit(signal: Tensor) -> Tensor:
        return (torch.fft.rfft(signal, n=96).abs().square() - seen.square()).square().mean()

    return by_inputs(misfit, torch.randn(48))
