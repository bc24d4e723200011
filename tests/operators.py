"""Operators with known spectra, for what is made of products."""

import torch

SPECTRA = {
    "flat": lambda n: torch.linspace(1, 3, n).double(),
    "1/i": lambda n: 1 / torch.arange(1, n + 1).double(),
    "1/i²": lambda n: torch.arange(1, n + 1).double() ** -2,
    "0.7^i": lambda n: 0.7 ** torch.arange(1, n + 1).double(),
    "step": lambda n: torch.where(torch.arange(n) < n // 20, 1.0, 1e-3).double(),
    "outliers": lambda n: outliers(n),
    "tiny": lambda n: 1e-9 / torch.arange(1, n + 1).double(),
}


def outliers(n):
    """Ten eigenvalues from 10 to 100 over an indefinite bulk."""
    bulk = torch.randn(n - 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.linspace(10, 100, 10, dtype=torch.float64), bulk])


def rotated(values):
    """A matrix with these eigenvalues and random eigenvectors."""
    drawn = torch.randn(
        len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    q = torch.linalg.qr(drawn).Q.to(values)
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


class Diagonal:
    """An operator that is no tensor."""

    def __init__(self, values, transposed=False):
        self.values, self.transposed = values, transposed
        self.shape, self.dtype, self.device = (len(values), len(values)), values.dtype, values.device

    def __matmul__(self, vectors):
        assert vectors.dtype == self.dtype
        product = self.values[:, None] * vectors
        return product.T if self.transposed else product


class Counted:
    """A matrix that knows how often it is multiplied; it has no dtype and no device."""

    def __init__(self, matrix):
        self._matrix, self.shape, self.calls, self.columns = matrix, matrix.shape, 0, 0

    def __matmul__(self, vectors):
        self.calls, self.columns = self.calls + 1, self.columns + vectors.shape[1]
        return (self._matrix @ vectors.to(self._matrix)).to(vectors)
