r"""Curvature for Laplace approximations with laplace-torch: exact diagonals and matrices by hesse.

Both classes go to `Laplace(..., backend=...)`, for `hessian_structure="diag"` and `"full"`, over all
parameters that require grad, the last layer, or (Gauss-Newton only, as laplace-torch wants it) a subnetwork.
What laplace-torch adds up over its batches is the sum, not the mean, over samples of the curvature of the
negative log-likelihood: cross entropy for classification, *half* the squared error for regression.

Example:
    >>> import torch
    >>> from laplace import Laplace
    >>> from hesse.integrations.laplace import HesseGGN
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.randn(6, 2), torch.randn(6, 1)
    >>> data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    >>> la = Laplace(model, "regression", "all", "full", prior_precision=2.0, backend=HesseGGN)
    >>> la.fit(data)
    >>> torch.allclose(la.posterior_precision, x.T @ x + 2 * torch.eye(2))
    True
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from laplace.curvature import CurvatureInterface, GGNInterface
from torch import Tensor

from hesse.data.loss import Loss
from hesse.errors import ArgumentError
from hesse.operators.base import Operator
from hesse.operators.curvature import FisherOperator, GaussNewtonOperator, HessianOperator


class _ByOperator(CurvatureInterface):  # type: ignore[misc]
    """What laplace-torch asks of a backend, by an operator of the loss of a batch."""

    @abstractmethod
    def operator(self, loss: Loss) -> Operator:
        """The curvature of a sum over samples."""

    def _loss(self, x: Any, y: Tensor) -> Loss:
        """Of one batch; the model takes a dict as it is, by the convention of laplace-torch."""
        return Loss(
            self.model,
            self.lossfunc,
            [(x, y)],
            params=self.params,
            reduction="sum",
            forward=lambda model, batch: model(batch[0]),
        )

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the diagonal [P] of its curvature."""
        loss = self._loss(x, y)
        parts = self.operator(loss).diagonal().values()
        diagonal = torch.cat([part.flatten() for part in parts])
        if self.subnetwork_indices is not None:
            diagonal = diagonal[self.subnetwork_indices]
        return self.factor * loss.value(), self.factor * diagonal

    def full(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its curvature [P, P]; of a subnetwork, by a product for each weight."""
        loss = self._loss(x, y)
        operator, chosen = self.operator(loss), self.subnetwork_indices
        if chosen is None:
            matrix = operator.to_dense()
        else:
            units = torch.zeros(operator.shape[0], len(chosen), dtype=operator.dtype, device=operator.device)
            units[chosen, torch.arange(len(chosen))] = 1
            matrix = (operator @ units)[chosen]
        return self.factor * loss.value(), self.factor * matrix

    def kron(self, x: Any, y: Tensor, N: int, **_: Any) -> Any:
        """Refused: factors of layers are an approximation.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            'hessian_structure="kron", the default of Laplace, is an approximation, and this backend is '
            'exact; pass hessian_structure="diag" or "full", or the backend CurvlinopsGGN'
        )


class HesseGGN(_ByOperator, GGNInterface):  # type: ignore[misc]
    r"""The generalised Gauss-Newton matrix, exactly, as a backend of laplace-torch.

    $$\sum_n J_n^T\,\Lambda_n\,J_n$$

    with J_n the Jacobian of the outputs of sample n by the parameters; $\Lambda_n$ is the identity for
    regression and $\mathrm{diag}(p) - p p^T$ for classification. With `backend_kwargs={"stochastic": True}`,
    the squared gradients at targets drawn from the model's predictions (by torch's random numbers), averaged
    over `num_samples` draws, whose expectation it is.

    Source: E. Daxberger et al., "Laplace Redux: Effortless Bayesian Deep Learning", NeurIPS 2021.
    """

    def operator(self, loss: Loss) -> Operator:
        """The Gauss-Newton matrix, or the Fisher information at drawn targets."""
        if not self.stochastic:
            return GaussNewtonOperator(loss)
        seeds: list[int] = torch.randint(2**62, (self.num_samples,)).tolist()
        first, *others = (FisherOperator(loss, "sampled", seed=seed) for seed in seeds)
        mean: Operator = sum(others, start=first * 1.0) * (1 / self.num_samples)
        return mean


class HesseHessian(_ByOperator):
    """The Hessian, exactly, as a backend of laplace-torch.

    It need not be positive where the loss is at no minimum, and a posterior precision must be; laplace-torch
    does not look. `HesseGGN` always is.

    Source: E. Daxberger et al., "Laplace Redux: Effortless Bayesian Deep Learning", NeurIPS 2021.
    """

    def operator(self, loss: Loss) -> Operator:
        """The Hessian."""
        return HessianOperator(loss)
