"""The diagonal of the Hessian, of a function or of a model's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from hesse.answer import AskedFlat, Options, Result, answer
from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.planning.plan import Plan
from hesse.problem import from_model
from hesse.runtime.progress import ProgressOption

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def hessian_diagonal(
    func: Callable[..., Tensor] | Loss,
    params: Any = ...,
    v: Any = ...,
    create_graph: bool = ...,
    strict: bool = ...,
    *,
    full_output: Literal[True],
    **options: Unpack[AskedFlat],
) -> Result: ...


@overload
def hessian_diagonal(
    func: Callable[..., Tensor] | Loss,
    params: Any = ...,
    v: Any = ...,
    create_graph: bool = ...,
    strict: bool = ...,
    *,
    full_output: Literal[False] = ...,
    **options: Unpack[AskedFlat],
) -> Any: ...


def hessian_diagonal(
    func: Callable[..., Tensor] | Loss,
    params: Any = None,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    method: str | Plan = "auto",
    check: bool | str = True,
    memory: int | str | None = None,
    progress: ProgressOption = None,
    full_output: bool = False,
    flat: bool = False,
) -> Any:
    r"""The diagonal of the Hessian, $\partial^2 f / \partial x_i^2$ for every coordinate.

    The arguments are those of torch-secorder's function of this name, and code written for it runs
    unchanged. Nothing is averaged or scaled: if `func` is a mean over samples, so is the diagonal.
    This is not the row sum that `grad(grad(f, x), x, ones)` gives.

    Args:
        func: a closure `func()` over the tensors in `params`, which is what it is taken for wherever it can
            be called with nothing (defaults, `*args`, a partial function, a module without arguments); or a
            function `func(*params)`.
        params: a tensor, or a tuple, list or dict of tensors, nested as you like; what gives them one by one
            (`model.parameters()`, `ParameterList`, `values()` of a dict) is a list, and
            `model.named_parameters()` a dict.
        v: multiplies elementwise: the result is $v_i H_{ii}$. As many elements for each tensor of `params`.
        create_graph: make a result that can be differentiated again.
        strict: raise where a tensor does not require grad (closure form) or does not influence
            the output; without it its diagonal is zero.
        method: "auto" takes what is predicted to be fastest: "sweep" (one walk back over the calls of
            `func`, no products), "taps" (one product per output of a layer) or "dense" (one per
            coordinate). A method that is named and does not apply gives way to the best that does, and
            what it cannot answer takes one product per coordinate; `full_output` says what was done and
            why. Or a `Plan`.
        check: certify, with products by plain autograd: one for every tapped weight and every dense
            tensor, three for a sweep. "differences": see `hessian`.
        memory: see `hessian`.
        progress: see `hessian`.
        full_output: see `hessian`.
        flat: the answer as one vector [P], with the coordinates in the order of `params`.

    Returns:
        The container of `params` with tensors of the same shapes, or a vector. Integer tensors, which have no
        derivative, and an empty container are allowed, as in torch-secorder, and get zeros, or nothing.

    Raises:
        HesseError: see `hessian`.

    Example:
        >>> import torch, hesse
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hesse.hessian_diagonal(lambda: x @ A @ x, [x])
        [tensor([4., 6.])]
    """
    problem = problem_of(func, params, argument="params", as_secorder=True)
    vectors = None if v is None else problem.unpack("v", v)
    options = Options(method, check, memory, progress, full_output, flat)

    def pack(diagonals: list[Tensor]) -> Any:
        if vectors is not None:
            diagonals = [d * vector for d, vector in zip(diagonals, vectors, strict=True)]
        return problem.flat(diagonals) if flat else problem.pack(diagonals)

    return answer("diagonal", problem, options, pack, create_graph, strict)


@overload
def model_hessian_diagonal(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    create_graph: bool = ...,
    strict: bool = ...,
    *,
    full_output: Literal[True],
    **options: Unpack[AskedFlat],
) -> Result: ...


@overload
def model_hessian_diagonal(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    create_graph: bool = ...,
    strict: bool = ...,
    *,
    full_output: Literal[False] = ...,
    **options: Unpack[AskedFlat],
) -> Any: ...


def model_hessian_diagonal(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    create_graph: bool = False,
    strict: bool = False,
    *,
    method: str | Plan = "auto",
    check: bool | str = True,
    memory: int | str | None = None,
    progress: ProgressOption = None,
    full_output: bool = False,
    flat: bool = False,
) -> Any:
    r"""The diagonal of the Hessian of `loss_fn(model(inputs), targets)` by the model's parameters.

    The model is left as it was: its gradients, its buffers (running statistics in train mode too)
    and the `requires_grad` of its parameters. The scale is that of `loss_fn`, so a mean over
    samples gives the diagonal of the mean.

    Args:
        model: the model; frozen parameters get zeros.
        loss_fn: gives a scalar of the model's output and the targets.
        inputs: what the model is called with, as its one argument.
        targets: what `loss_fn` is called with beside the output.
        create_graph: see `hessian_diagonal`, and so for all that follow.
        strict: see `hessian_diagonal`.
        method: see `hessian_diagonal`.
        check: see `hessian_diagonal`.
        memory: see `hessian`.
        progress: see `hessian`.
        full_output: see `hessian`.
        flat: the answer as one vector [P].

    Returns:
        A list with one tensor for every parameter, in the order and shapes of `model.parameters()`.

    Raises:
        HesseError: see `hessian`.

    Example:
        >>> import torch, hesse
        >>> model = torch.nn.Linear(10, 1)
        >>> inputs, targets = torch.randn(5, 10), torch.randn(5, 1)
        >>> diagonal = hesse.model_hessian_diagonal(
        ...     model, torch.nn.functional.mse_loss, inputs, targets)
        >>> [list(d.shape) for d in diagonal]
        [[1, 10], [1]]
        >>> torch.allclose(diagonal[0], 2 * inputs.square().mean(0, keepdim=True))
        True
    """
    problem = from_model(model, loss_fn, inputs, targets)
    options = Options(method, check, memory, progress, full_output, flat)
    return answer("diagonal", problem, options, problem.flat if flat else problem.pack, create_graph, strict)
