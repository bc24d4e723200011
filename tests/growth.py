"""Run one function under a memory budget in a process of its own, and print by how much its memory grew."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import hesse


def pairs(atoms=120):
    """A pair potential, with formulas of many steps."""
    i, j = torch.triu_indices(atoms, atoms, 1)

    def energy(x):
        r = (x[i] - x[j]).square().sum(-1).sqrt() + 0.5
        return (4 * ((1 / r) ** 12 - (1 / r) ** 6) * torch.exp(-r)).sum()

    return energy, torch.rand(atoms, 3) * 8


def triples(atoms=20):
    """A three-body potential, as Stillinger and Weber's."""

    def energy(x):
        d = x[:, None] - x[None]
        r = (d.square().sum(-1) + torch.eye(atoms)).sqrt()
        cosine = (d[:, :, None] * d[:, None]).sum(-1) / (r[:, :, None] * r[:, None])
        cut = torch.exp(1 / (r + 1))
        return ((cosine + 1 / 3) ** 2 * cut[:, :, None] * cut[:, None]).sum() + (1 / r**4 - 1 / r).sum()

    return energy, torch.rand(atoms, 3) * 4


def formula(size=1200):
    A = torch.randn(4 * size, size) / size**0.5

    def func(x):
        h = A @ x
        return (F.silu(h) * torch.exp(-h * h) / (1 + h**2)).sum()

    return func, torch.randn(size)


def image():
    blocks = [(nn.Conv2d(c, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.GELU()) for c in (3, 12)]
    model = nn.Sequential(*blocks[0], *blocks[1], nn.Conv2d(12, 4, 3))
    return lambda x: model(x).square().sum().log(), torch.randn(1, 3, 16, 16)


def process(points=150):
    """A Gaussian process: what a decomposition takes inside of its kernel, nobody sees."""
    where = torch.randn(points, 4)
    near = torch.exp(-((where[:, None] - where[None]) ** 2).sum(-1))

    def func(x):
        lower = torch.linalg.cholesky(near + torch.eye(points) + x.exp().diag_embed())
        return (torch.cholesky_solve(x[:, None], lower).squeeze() * x).sum() + lower.diagonal().log().sum()

    return func, torch.randn(points)


def wide(size=1500):
    weights = torch.randn(400, size)
    return lambda x: (weights @ x / 40).tanh().pow(2).sum() + x.exp().mean() ** 2, torch.randn(size)


def network():
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 10))
    data, labels = torch.randn(256, 30), torch.randint(0, 10, (256,))
    return lambda: F.cross_entropy(model(data), labels), list(model.parameters())


def transformer():
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0, activation="gelu", batch_first=True)
    tokens = torch.randn(16, 24, 12)
    return lambda: layer(tokens).pow(3).sum(), list(layer.parameters())


def recurrent():
    cells = nn.LSTM(6, 10, batch_first=True)
    sequences = torch.randn(64, 30, 6)
    return lambda: cells(sequences)[0].pow(2).sum(), list(cells.parameters())


def deep():
    layers = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    data, labels = torch.randn(64, 256), torch.randint(0, 10, (64,))
    return lambda: F.cross_entropy(model(data), labels), list(model.parameters())


def of_batches(width=300):
    """Over batches of data."""
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 10))
    data, labels = torch.randn(512, 20), torch.randint(0, 10, (512,))
    batches = list(zip(data.split(128), labels.split(128), strict=True))
    return hesse.Loss(model, F.cross_entropy, batches), dict(model.named_parameters())


def columns(operator, count=300):
    """Products with many columns."""
    V = torch.randn(10_000, count)  # more than there are parameters

    def ask(loss, inputs, memory, full_output):
        A = operator(loss, memory=memory)
        found = A @ V[: A.shape[0]]
        return SimpleNamespace(plan=SimpleNamespace(method="dense"), value=found)

    return ask


CASES = {  # with three budgets each
    "pairs": (pairs, hesse.hessian, ("10MiB", "25MiB", "60MiB")),
    "triples": (triples, hesse.hessian, ("12MiB", "20MiB", "60MiB")),
    "formula": (formula, hesse.hessian, ("20MiB", "40MiB", "100MiB")),
    "image": (image, hesse.hessian, ("15MiB", "30MiB", "60MiB")),
    "process": (process, hesse.hessian, ("15MiB", "30MiB", "60MiB")),
    "wide": (wide, hesse.hessian, ("20MiB", "40MiB", "80MiB")),
    "network": (network, hesse.hessian, ("40MiB", "60MiB", "100MiB")),
    "transformer": (transformer, hesse.hessian, ("25MiB", "50MiB", "100MiB")),
    "recurrent": (recurrent, hesse.hessian_diagonal, ("20MiB", "40MiB", "80MiB")),
    "columns": (of_batches, columns(hesse.HessianOperator), ("40MiB", "60MiB", "120MiB")),
    "columns, gauss-newton": (of_batches, columns(hesse.GaussNewtonOperator), ("40MiB", "60MiB", "120MiB")),
    "deep": (deep, hesse.hessian_diagonal, ("20MiB", "40MiB", "80MiB")),
}


def resident(kind):
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(name, budget):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    build, ask, _ = CASES[name]
    func, inputs = build()
    small = nn.Linear(3, 3)
    for method in ("sweep", "taps", "dense"):  # what is loaded late is no part of it
        loss = lambda: small(torch.ones(9, 3)).tanh().sum()
        hesse.hessian_diagonal(loss, list(small.parameters()), method=method)
    hesse.hessian(lambda x: x.exp().sum() ** 2, torch.randn(40))
    vectors = torch.utils._pytree.tree_map(torch.ones_like, inputs)
    hesse.hvp(func, v=vectors) if isinstance(func, hesse.Loss) else hesse.hvp(func, inputs, vectors)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = ask(func, inputs, memory=budget, full_output=True)
    print(resident("VmHWM") - before, result.plan.method)


if __name__ == "__main__":
    main(*sys.argv[1:])
