"""The exact trace of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from hesse.answer import Asked, Options, Result, answer
from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.planning.plan import Plan
from hesse.runtime.progress import ProgressOption
from hesse.runtime.total import total

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def hessian_trace(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = ...,
    *,
    create_graph: bool = ...,
    strict: bool = ...,
    full_output: Literal[True],
    **options: Unpack[Asked],
) -> Result: ...


@overload
def hessian_trace(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = ...,
    *,
    create_graph: bool = ...,
    strict: bool = ...,
    full_output: Literal[False] = ...,
    **options: Unpack[Asked],
) -> Tensor: ...


def hessian_trace(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = None,
    *,
    create_graph: bool = False,
    strict: bool = False,
    method: str | Plan = "auto",
    check: bool | str = True,
    memory: int | str | None = None,
    progress: ProgressOption = None,
    full_output: bool = False,
) -> Any:
    r"""The trace of the Hessian, $\sum_i \partial^2 f / \partial x_i^2$: exact, no estimate.

    Arguments, options and errors are those of `hessian`; it costs what `hessian_diagonal` costs and
    takes the same methods.

    Returns:
        A tensor without dimensions. Half precision is summed, and given back, in float32.

    Example:
        >>> import torch, hesse
        >>> hesse.hessian_trace(lambda x: (2 * x**3 - x**2).sum(), torch.tensor([2.0, 3.0, 4.0]))
        tensor(102.)
    """
    problem = problem_of(func, inputs, as_secorder=True)
    options = Options(method, check, memory, progress, full_output)
    return answer("diagonal", problem, options, total, create_graph, strict)
