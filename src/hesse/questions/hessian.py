"""The full Hessian and its diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.answer import Asked, AskedFlat, Options, Result, answer
from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError
from hesse.planning.plan import Plan
from hesse.problem import Problem
from hesse.runtime.progress import ProgressOption
from hesse.selection import Part, part_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def hessian(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = ...,
    create_graph: bool = ...,
    strict: bool = ...,
    vectorize: bool | None = ...,
    outer_jacobian_strategy: str | None = ...,
    *,
    rows: Any = ...,
    columns: Any = ...,
    square: bool = ...,
    full_output: Literal[True],
    **options: Unpack[AskedFlat],
) -> Result: ...


@overload
def hessian(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = ...,
    create_graph: bool = ...,
    strict: bool = ...,
    vectorize: bool | None = ...,
    outer_jacobian_strategy: str | None = ...,
    *,
    rows: Any = ...,
    columns: Any = ...,
    square: bool = ...,
    full_output: Literal[False] = ...,
    **options: Unpack[AskedFlat],
) -> Any: ...


def hessian(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = None,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool | None = None,
    outer_jacobian_strategy: str | None = None,
    *,
    method: str | Plan = "auto",
    check: bool | str = True,
    memory: int | str | None = None,
    progress: ProgressOption = None,
    full_output: bool = False,
    flat: bool = False,
    rows: Any = None,
    columns: Any = None,
    square: bool = False,
) -> Any:
    r"""The Hessian of a scalar function, $H_{ij} = \partial^2 f / \partial x_i \partial x_j$.

    The arguments are those of `torch.autograd.functional.hessian`, and code written for it runs
    unchanged. Nothing is averaged or scaled: if `func` is a mean over samples, so is its Hessian.

    Args:
        func: the function, in one of two forms: `func(*inputs)`, or a closure `func()` that reads
            the tensors in `inputs` themselves. It is taken as a closure when it cannot be called
            with the inputs but can with nothing. It returns a tensor with one element.
        inputs: a tensor, or a tuple, list or dict of tensors, nested as you like. A tuple or list is
            spread over the arguments of `func`, a tensor or dict is its only argument.
        create_graph: make a result that can be differentiated again.
        strict: raise, as torch does, where an input does not influence the output or only linearly, so
            that the gradient by it is constant (closure form: or does not require grad), or where a custom
            backward hides a part of the function; without it such entries are zero, and what is hidden is
            warned of.
        vectorize: accepted for torch's sake and without effect: products are always batched, in
            chunks whose size is found while working. Not together with `strict`, as in torch.
        outer_jacobian_strategy: likewise ("reverse-mode", "forward-mode" or None).
        method: "auto" takes what is predicted to be fastest: "taps" (from one product per output of a
            layer) or "dense" (one per coordinate); for `hessian_blocks` also "sweep" (no products). A
            method that is named and does not apply gives way to the best that does. Or a `Plan`.
        check: certify the result with one product by plain autograd. "differences": with central differences
            of the gradient instead, which also find what is wrong in torch's own second derivatives; about
            four gradients, of less precision, and not meant for points at a kink.
        memory: budget for all that the call uses beyond what was allocated before, the answer
            included, in bytes or as "2GiB"; None takes half of what is free.
        progress: None shows a bar on a terminal after two seconds; True, False, or a callable of
            `(passes done, passes to do)`.
        full_output: return a `Result` with `value`, `plan`, `certificate`, `passes`, `seconds`, and the
            `names` and `shapes` of the tensors.
        flat: the answer as one matrix [P, P], with the coordinates in the order of the inputs.
        rows: only these rows, at a cost in proportion: an index of the input tensor as in `x[rows]`
            (integers, a mask, a slice, or a tuple of these); for several inputs a container of such
            indices, or a dict with those of some inputs, by name or position; with `flat` also an index
            of the [P] coordinates.
        columns: only these columns, likewise; None takes all.
        square: take the same columns as rows.

    Returns:
        For a tensor of shape `s` a tensor of shape `[*s, *s]`; for a container the same container
        twice nested, entry `[i][j]` of shape `[*s_i, *s_j]` being the derivative by inputs i and j,
        in the dtype of input j. With `rows` and `columns` what indexing that answer by them would
        give: for a tensor a shape `[*x[rows].shape, *x[columns].shape]`, for several inputs the
        containers of `rows` and `columns`. With `flat` a matrix.

    Raises:
        HesseError: one of its kinds, also derived from what torch raises: `OutputError` where the
            output is no scalar, `DtypeError` for integer or complex inputs, `NotATensorError`,
            `ArgumentError`, `IndependentError` (strict), `NotDeterministicError` (dropout in train
            mode), `NotTwiceDifferentiableError`, `BudgetError` (a `MemoryError`).

    Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6
    (1994), for the products; R. Freivalds (1977) for the check.

    Example:
        >>> import torch, hesse
        >>> hesse.hessian(lambda x: (2 * x**3 - x**2).sum(), torch.tensor([2.0, 3.0, 4.0]))
        tensor([[22.,  0.,  0.],
                [ 0., 34.,  0.],
                [ 0.,  0., 46.]])
        >>> x, y = torch.tensor([2.0]), torch.tensor([-3.0])
        >>> hesse.hessian(lambda x, y: (2 * x * y**2 + x**3 - 10).sum(), (x, y))
        ((tensor([[12.]]), tensor([[-12.]])), (tensor([[-12.]]), tensor([[8.]])))
        >>> hesse.hessian(lambda x: x.prod() ** 2, torch.tensor([1.0, 2.0, 3.0]), rows=[0, 2])
        tensor([[72., 72., 48.],
                [48., 24.,  8.]])
        >>> hesse.hessian(lambda x, y: (2 * x * y**2 + x**3 - 10).sum(), (x, y), flat=True)
        tensor([[ 12., -12.],
                [-12.,   8.]])
    """
    if outer_jacobian_strategy not in (None, "reverse-mode", "forward-mode"):
        raise ArgumentError(
            f'outer_jacobian_strategy must be "reverse-mode", "forward-mode" or None, '
            f"met {outer_jacobian_strategy!r}"
        )
    if strict and vectorize:
        raise ArgumentError(
            "strict=True and vectorize=True are not supported together, as in torch; leave one out"
        )
    problem = problem_of(func, inputs)
    options = Options(method, check, memory, progress, full_output, flat)
    part = part_of(problem, rows, columns, square, flat)

    def pack(blocks: list[list[Tensor]]) -> Any:
        if flat:
            return joined(blocks, problem, part)
        if part is None:
            return problem.pack([problem.pack(row) for row in blocks])
        inner = [pytree.tree_unflatten(row, part.columns.spec) for row in blocks]
        return pytree.tree_unflatten(inner, part.rows.spec)

    return answer("hessian", problem, options, pack, create_graph, strict, part)


def joined(blocks: list[list[Tensor]], problem: Problem, part: Part | None) -> Tensor:
    """Blocks as one matrix."""
    if part is None:
        down = across = list(problem.sizes)
    else:
        down, across = ([c.numbers.numel() for c in side.chosen] for side in (part.rows, part.columns))
    if len(down) == len(across) == 1:
        matrix = blocks[0][0].reshape(down[0], across[0])
    elif not (down and across):
        matrix = problem.tensors[0].new_zeros(sum(down), sum(across))
    else:
        matrix = torch.cat(
            [
                torch.cat([block.reshape(m, n) for block, n in zip(row, across, strict=True)], 1)
                for row, m in zip(blocks, down, strict=True)
            ]
        )
    if part is not None and part.rows.order is not None:
        matrix = matrix[part.rows.order]
    if part is not None and part.columns.order is not None:
        matrix = matrix[:, part.columns.order]
    return matrix


@overload
def hessian_blocks(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = ...,
    create_graph: bool = ...,
    strict: bool = ...,
    *,
    full_output: Literal[True],
    **options: Unpack[Asked],
) -> Result: ...


@overload
def hessian_blocks(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = ...,
    create_graph: bool = ...,
    strict: bool = ...,
    *,
    full_output: Literal[False] = ...,
    **options: Unpack[Asked],
) -> Any: ...


def hessian_blocks(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    method: str | Plan = "auto",
    check: bool | str = True,
    memory: int | str | None = None,
    progress: ProgressOption = None,
    full_output: bool = False,
) -> Any:
    r"""The diagonal blocks of the Hessian: for every input tensor its own Hessian.

    Block i is $\partial^2 f / \partial x_i \partial x_i$, what `hessian` gives at `[i][i]`, without
    the time and memory for the blocks between different tensors. Arguments, options and errors are
    those of `hessian`.

    Returns:
        The container of the inputs; a tensor of shape `s` is replaced by one of shape `[*s, *s]`.

    Example:
        >>> import torch, hesse
        >>> weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> hesse.hessian_blocks(lambda w: (w["a"] ** 2).sum() * w["b"] ** 2, weights)
        {'a': tensor([[18.,  0.],
                [ 0., 18.]]), 'b': tensor(10.)}
    """
    problem = problem_of(func, inputs)
    options = Options(method, check, memory, progress, full_output)
    return answer("blocks", problem, options, problem.pack, create_graph, strict)
