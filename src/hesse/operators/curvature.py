"""The Hessian, the Gauss-Newton matrix and the Fisher information of a loss over data, or of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Literal

from torch import Tensor

from hesse.answer import Options, Result, answer
from hesse.data.loss import Loss, OfOutput
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError
from hesse.methods.base import Question
from hesse.operators import outputs
from hesse.operators.base import Operator
from hesse.planning.plan import Plan
from hesse.problem import ModelOutput, Problem
from hesse.questions.hessian import joined
from hesse.questions.products import Practice, multiplied
from hesse.questions.trace import total
from hesse.runtime.progress import ProgressOption


class Curvature(Operator):
    """A matrix of second derivatives, at the point where the tensors are when it is asked.

    What was learned at one product serves the next: the plan of each question, the size of batches, and
    whether the function needs isolation.
    """

    def __init__(self, problem: Problem, memory: int | str | None, progress: ProgressOption) -> None:
        super().__init__(problem)
        self._memory, self._progress = memory, progress
        self._practice, self._plans = Practice(), dict[Question, Plan]()

    def multiply(
        self, vectors: Sequence[Tensor], count: int | None, into: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """See `Operator`: one pass over the data for all vectors, in batches within the budget."""
        return multiplied(
            self.structure,
            vectors,
            count,
            memory=self._memory,
            progress=self._progress,
            practice=self._practice,
            into=into,
        )

    def diagonal(self) -> Any:
        """The diagonal, exactly: `hessian_diagonal`."""
        return self._asked("diagonal", self.structure.pack)

    def blocks(self) -> Any:
        """The diagonal block of every tensor, exactly: `hessian_blocks`."""
        return self._asked("blocks", self.structure.pack)

    def trace(self) -> Tensor:
        """The trace, exactly: `hessian_trace`."""
        found: Tensor = self._asked("diagonal", total)
        return found

    def to_dense(self) -> Tensor:
        """The matrix [P, P], exactly: `hessian`."""
        found: Tensor = self._asked("hessian", partial(joined, problem=self.structure, part=None))
        return found

    def _asked(self, question: Question, pack: Callable[[list[Any]], Any]) -> Any:
        options = Options(
            self._plans.get(question, "auto"), True, self._memory, self._progress, True, question == "hessian"
        )
        result: Result = answer(question, self.structure, options, pack)
        self._plans[question] = result.plan
        return result.value


class HessianOperator(Curvature):
    r"""The Hessian of a loss over data, or of a function, as a linear operator.

    Args:
        func: a `Loss`; or a function, or closure, of `inputs`, see `hessian`.
        inputs: see `hessian`; not with a `Loss`.
        memory: budget for products with several vectors at once, and for the exact answers, see `hessian`.
        progress: over batches, see `hessian`.

    `A @ v` takes and gives a flat vector [P], a matrix of columns [P, k], or a container like the
    parameters'; `A + damping`, `c * A` and sums are operators too; `A.diagonal()`, `A.blocks()`, `A.trace()`
    and `A.to_dense()` are exact; `A.to_scipy()` is for scipy.

    Raises:
        HesseError: see `hessian` and `Loss`.

    Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Example:
        >>> import torch, hesse
        >>> A = hesse.HessianOperator(lambda x: (x[0] ** 2 * x[1]).sum(), torch.tensor([1.0, 2.0]))
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([4., 2.])
        >>> (A + 10) @ torch.eye(2)
        tensor([[14.,  2.],
                [ 2., 10.]])
    """

    def __init__(
        self,
        func: Callable[..., Tensor] | Loss,
        inputs: Any = None,
        *,
        memory: int | str | None = None,
        progress: ProgressOption = None,
    ) -> None:
        super().__init__(problem_of(func, inputs), memory, progress)


class GaussNewtonOperator(Curvature):
    r"""The generalised Gauss-Newton matrix $G = J^T\,\nabla^2_z L\,J$ as a linear operator.

    J is the derivative of the model's output z by the parameters, and $\nabla^2_z L$ the Hessian of the loss
    by the output, which is taken by autograd: any loss function will do, also one that is not convex. Of a
    loss over data it is the sum over batches that the loss is, with the same reduction. What the loss
    function does with the parameters besides (a penalty) does not count; `A + damping` adds that curvature.

    Args:
        func: a `Loss`; or a function, or closure, of `inputs` that gives the output z, a tensor.
        inputs: what a function is differentiated by, see `hessian`.
        of_output: with a function, the scalar loss of its output.
        memory: see `HessianOperator`; and so for all that it can do.
        progress: see `HessianOperator`.

    Raises:
        HesseError: see `hessian` and `Loss`.

    Source: N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
    Neural Computation 14 (2002).

    Example:
        >>> import torch, hesse
        >>> x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0])
        >>> G = hesse.GaussNewtonOperator(
        ...     lambda a: a * x, torch.tensor(2.0), of_output=lambda z: (z - y).square().sum())
        >>> G.to_dense()  # 2 (1 + 4 + 9)
        tensor([[28.]])
    """

    def __init__(
        self,
        func: Callable[..., Tensor] | Loss,
        inputs: Any = None,
        *,
        of_output: Callable[[Tensor], Tensor] | None = None,
        memory: int | str | None = None,
        progress: ProgressOption = None,
    ) -> None:
        if isinstance(func, Loss):
            if inputs is not None or of_output is not None:
                raise ArgumentError("inputs and of_output must be left out with a Loss, which knows its own")
            super().__init__(func.problem(outputs.itself), memory, progress)
            return
        if of_output is None:
            raise ArgumentError(
                "of_output is missing: pass the scalar loss of the function's output, or a hesse.Loss"
            )
        slot = ModelOutput()

        @wraps(func)
        def whole(*leaves: Any) -> Tensor:
            z = func(*leaves)
            if not isinstance(z, Tensor):
                raise ArgumentError(f"func must give the output, a tensor, met {type(z).__name__}")
            slot.leave(z)
            return of_output(z)

        super().__init__(replace(problem_of(whole, inputs), model_output=slot), memory, progress)


class FisherOperator(Curvature):
    r"""The Fisher information of a model's parameters as a linear operator.

    With $\ell_n$ the loss of one sample, the negative log-likelihood of its target given the model's output,

    $$F = c \sum_n \mathbb{E}_{y}\big[\nabla_\theta \ell_n(y)\, \nabla_\theta \ell_n(y)^T\big], \qquad
      c = \tfrac1N \text{ for a mean}, \quad c = 1 \text{ for a sum over samples}.$$

    Samples are the rows of the model's output, its leading dimension.

    Args:
        loss: a `Loss`.
        kind: "exact" takes the expectation over targets that the model itself predicts, and equals the
            Gauss-Newton matrix; "sampled" one target drawn from these for every sample, "empirical" the
            targets of the data. The squares are of the gradient of every sample by itself.
        seed: for "sampled": the same seed draws the same targets at every product (and in every batch of the
            same number).
        memory: see `HessianOperator`; and so for all that it can do.
        progress: see `HessianOperator`.

    Raises:
        HesseError: `ArgumentError` for the kinds "exact" and "sampled" where `loss_fn` is not cross entropy,
            binary cross entropy with logits, mean squared error or Poisson with log input, which are known to
            be log-likelihoods; see `Loss` for others.

    Source: F. Kunstner, L. Balles, P. Hennig, "Limitations of the empirical Fisher approximation for natural
    gradient descent", NeurIPS 2019; J. Martens, "New insights and perspectives on the natural gradient
    method", JMLR 21 (2020).

    Example:
        >>> import torch, hesse
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.randn(6, 2), torch.randn(6, 1)
        >>> loss = hesse.Loss(model, torch.nn.functional.mse_loss, (x, y))
        >>> slopes = 2 * (model(x) - y).detach() * x  # the gradient of each sample
        >>> F = hesse.FisherOperator(loss, kind="empirical").to_dense()
        >>> torch.allclose(F, slopes.T @ slopes / 6)
        True
    """

    def __init__(
        self,
        loss: Loss,
        kind: Literal["exact", "sampled", "empirical"] = "exact",
        *,
        seed: int = 0,
        memory: int | str | None = None,
        progress: ProgressOption = None,
    ) -> None:
        if not isinstance(loss, Loss):
            raise ArgumentError(f"loss must be a hesse.Loss, met {type(loss).__name__}")
        if kind not in ("exact", "sampled", "empirical"):
            raise ArgumentError(f'kind must be "exact", "sampled" or "empirical", met {kind!r}')
        of_output: OfOutput
        if kind == "empirical":
            of_output = partial(outputs.empirical, loss.reduction)
        else:
            likelihood = outputs.likelihood_of(loss.loss_fn)
            drawn = partial(outputs.sampled, loss.reduction, likelihood, seed)
            of_output = outputs.itself if kind == "exact" else drawn
        super().__init__(loss.problem(of_output), memory, progress)
