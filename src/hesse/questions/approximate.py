"""An approximate diagonal of the Hessian, for the price of a few gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError, OutputError, StructureError
from hesse.look.evaluation import errors_explained, evaluate
from hesse.methods import approximate
from hesse.problem import Problem
from hesse.runtime.isolation import isolated
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.total import Total
from hesse.structure import NoStructure, sought
from hesse.tape.record import Recorder


def approximate_diagonal(
    func: Callable[..., Tensor] | Loss, params: Any = None, kind: str = "hesscale"
) -> Any:
    r"""An approximation of the Hessian's diagonal, by one walk back without Hessian-vector products.

    For $v = \varphi(u, \dots)$, a call that `func` makes, with Jacobian $J_{ci} = \partial v_c/\partial u_i$
    and the exact gradient $g = \partial f/\partial v$, the diagonal k of the curvature is taken from v to u:

    $$k_{u_i} \mathrel{+}= \sum_c J_{ci}^2\, k_{v_c} + \sum_c g_c\,
      \frac{\partial^2 \varphi_c}{\partial u_i^2},$$

    summed over all calls that u goes into. What is dropped on the way is the curvature between two elements
    of one value and between two values: between the units of a layer, the positions that share a weight,
    the branches of a skip connection, the uses of a tied weight. Every parameter is a value like others, so
    a linear layer $v = a W^T$ has $k_{W_{oi}} = \sum_n k_{v_{no}} a_{ni}^2$.

    The two kinds differ in the softmax, and in nothing else:

    - "hesscale" takes it as above. The diagonal by the logits of a cross entropy is then the exact one,
      $p (1 - p)$ for one-hot targets, and so is the diagonal by the outputs of a network for all usual
      losses.
    - "becker-lecun" takes softmax and log-softmax as activation functions of every unit by itself, with
      slopes $p (1 - p)$ and $1 - p$, and cross entropy as log-softmax before a linear call. The diagonal by
      the logits is then $t\, p (1 - p)$ with targets t, zero for all classes but the right one.

    Both are exact for elementwise functions, for a linear layer before an elementwise loss (or, with
    "hesscale", a cross entropy), and where layers have a single unit and position. Elsewhere nothing bounds
    the error, and there is no check: docs/benchmarks.md sets them beside the exact diagonals of networks.

    It costs a few gradients, and memory for the gradients by all values. A call outside of the table in
    `hesse.calls.table` takes a product for every element of its result that touches others: batch norm in
    training, or a recurrent layer of many steps, can be slow.

    Args:
        func: a closure `func()` over the tensors in `params`, or a function `func(*params)`.
        params: a tensor, or a tuple, list or dict of tensors, nested as you like.
        kind: "hesscale" or "becker-lecun".

    Returns:
        The container of `params` with tensors of the same shapes; zeros where `func` does not depend on one,
        or (closure form) where one does not require grad.

    Raises:
        HesseError: `StructureError` where the calls of `func` cannot be seen or repeated (a custom autograd
            Function, a gradient taken inside, dropout that is on): `hessian_diagonal` needs no structure.
            See `hessian` for others.

    Sources:
        S. Becker, Y. LeCun: Improving the convergence of back-propagation learning with second-order
        methods. Proceedings of the 1988 Connectionist Models Summer School, 1989.

        M. Elsayed, H. Farrahi, F. Dangel, A. R. Mahmood: Revisiting scalable Hessian diagonal approximations
        for applications in reinforcement learning. ICML 2024, arXiv:2406.03276. Their code, too, compares
        with Becker and LeCun's by a log-softmax of every unit by itself.

    Example:
        >>> import torch, hesse
        >>> W = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> func = lambda x: (W @ x).square().square().sum()
        >>> x = torch.tensor([1.0, 1.0])
        >>> hesse.approximate_diagonal(func, x), hesse.hessian_diagonal(func, x)
        (tensor([108., 444.]), tensor([108., 444.]))
        >>> func = lambda x: (W.T @ (W @ x).square()).square().sum()
        >>> hesse.approximate_diagonal(func, x), hesse.hessian_diagonal(func, x)
        (tensor([ 548., 2276.]), tensor([ 548., 2468.]))
    """
    if kind not in approximate.KINDS:
        raise ArgumentError(f"kind must be one of {', '.join(map(repr, approximate.KINDS))}, met {kind!r}")
    problem = problem_of(func, params, argument="params", as_secorder=True)
    if problem.summands is None:
        return problem.pack(_diagonals(problem, kind))
    total = Total()
    with random_state_kept():  # data may be shuffled
        for summand in problem.summands:
            total.add(summand.weight, _diagonals(summand.problem, kind))
    return problem.pack(total.value)


def _diagonals(problem: Problem, kind: str) -> list[Tensor]:
    found = _walked(problem, kind)
    diagonals = [found.get(i, torch.zeros_like(tensor)) for i, tensor in enumerate(problem.tensors)]
    return [diagonal.detach() for diagonal in diagonals]


def _walked(problem: Problem, kind: str) -> dict[int, Tensor]:
    with random_state_kept() as random_numbers, isolated() as watch, errors_explained():
        leaves = problem.leaves()
        tape = Recorder(leaves)
        with tape:
            value = evaluate(problem, leaves, watch)
        if not value.requires_grad:
            if watch.ungraphed is not None:
                raise OutputError(
                    f"func computed its result while gradients were off (first at {watch.ungraphed}): "
                    f"remove torch.no_grad() or torch.inference_mode() from inside the function"
                )
            return {}
        # Calls that draw random numbers give another result when they are run again, and are refused.
        drawing = random_numbers.drawing() if random_numbers.used else nullcontext()
        try:
            with sought(), drawing:
                return approximate.diagonal(tape, value, kind)
        except NoStructure as error:
            raise StructureError(
                f"func cannot be followed call by call ({error}); ask for hessian_diagonal, which is exact "
                f"and needs no structure"
            ) from error
