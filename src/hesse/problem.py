"""The problem: a scalar function and the tensors it is differentiated by.

Callers have three forms of it (`func(*inputs)`, a closure `func()` over leaf tensors, a model with
its loss); all become one `Problem` here, and the rest of the code never asks which it was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from hesse.errors import (
    ArgumentError,
    DtypeError,
    IndependentError,
    IndependentWarning,
    NotATensorError,
    OutputError,
    OutputTypeError,
    PrecisionWarning,
    StructureMismatchError,
    warn,
)


class ModelOutput:
    """Where a function leaves what its model gives, before the loss is taken of it.

    Attributes:
        like: what was left last, without its graph.
        edge: where in autograd's graph it was made; None where it has no graph.
    """

    like: Tensor | None = None
    edge: GradientEdge | None = None

    def leave(self, tensor: Tensor) -> None:
        """Called by the function, with what its model gives."""
        self.like = tensor.detach()
        self.edge = get_gradient_edge(tensor) if tensor.requires_grad else None

    def taken(self) -> ModelOutput:
        """What was left, and nothing is any more."""
        found = ModelOutput()
        found.like, found.edge = self.like, self.edge
        self.like = self.edge = None
        return found


@dataclass(frozen=True)
class Summand:
    """A function that is a part of a sum.

    Attributes:
        weight: what it is multiplied by.
        problem: the function, of the same tensors as the sum.
        form: those of one form look the same, as far as is known, so that the plan for one serves the others.
    """

    weight: float
    problem: Problem
    form: Hashable


class Summands(Protocol):
    """The functions that a function is the weighted sum of; they can be gone through several times."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Summand]:
        """One after the other, always in the same order."""


@dataclass(frozen=True)
class Problem:
    """A scalar function of a flat list of tensors, and how to give answers back.

    Attributes:
        tensors: the caller's tensors, flat.
        spec: the caller's container.
        evaluate_at: the function, of the tensors to differentiate by.
        closure: the function takes nothing and reads `tensors` themselves.
        integers: tensors without a derivative, by their place in the container, where they are allowed.
        model_output: where the output of a model is left, up to which the function is taken for linear: its
            Hessian then is the Gauss-Newton matrix. None for the Hessian itself.
        summands: what it is a sum of, taken one by one; None for a function that is evaluated as a whole.
    """

    tensors: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    evaluate_at: Callable[[Sequence[Tensor]], Tensor]
    closure: bool
    _make_names: Callable[[], Sequence[str]]
    integers: Mapping[int, Tensor]
    model_output: ModelOutput | None = None
    summands: Summands | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What to call each tensor in messages and tables."""
        return tuple(name for i, name in enumerate(self._make_names()) if i not in self.integers)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(tensor.numel() for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Number of coordinates, P."""
        return sum(self.sizes)

    def leaves(self, connected: bool = False) -> tuple[Tensor, ...]:
        """The tensors to differentiate by.

        A closure reads the caller's own tensors, so it is differentiated by those; a function of its
        inputs gets fresh ones, which still lead back to the caller's when `connected`.
        """
        if self.closure:
            return self.tensors
        return tuple(
            t.view_as(t) if t.requires_grad and connected else _leaf(t.detach()) for t in self.tensors
        )

    def require_grad(self, leaves: Sequence[Tensor]) -> None:
        """Raise where one of the tensors to differentiate by does not require grad, or cannot."""
        lacking = [name for name, leaf in zip(self.names, leaves, strict=True) if not leaf.requires_grad]
        lacking += [self._make_names()[i] for i in self.integers]
        if lacking:
            raise IndependentError(
                f"{lacking[0]} does not require grad (One of the differentiated Tensors does not require "
                f"grad); call {lacking[0]}.requires_grad_() or use strict=False"
            )

    @contextmanager
    def moved(self, shifts: Mapping[int, Tensor]) -> Iterator[Problem]:
        """The problem at a point near by.

        The tensors of a closure are at that point for as long as this lasts, and are then what they were to
        the last bit; backward passes that are still to come do not notice.
        """
        if not self.closure:
            yield replace(
                self, tensors=tuple(t.detach() + shifts.get(i, 0) for i, t in enumerate(self.tensors))
            )
            return
        # A tensor that is there twice is moved by both shifts.
        places = {id(self.tensors[i]): self.tensors[i].data for i in shifts}
        contents = {key: place.clone() for key, place in places.items()}
        try:
            for i, shift in shifts.items():
                places[id(self.tensors[i])].add_(shift)
            yield self
        finally:
            for key, place in places.items():
                place.copy_(contents[key])

    def pack(self, values: Sequence[Any]) -> Any:
        """Put one value per tensor into the caller's container; tensors without a derivative get zeros."""
        if not self.integers:
            return pytree.tree_unflatten(list(values), self.spec)
        rest = iter(values)
        count = self.spec.num_leaves
        zeros = {i: torch.zeros_like(tensor) for i, tensor in self.integers.items()}
        return pytree.tree_unflatten(
            [zeros[i] if i in zeros else next(rest) for i in range(count)], self.spec
        )

    def leaves_of(self, packed: Any) -> list[Any]:
        """One value per tensor, of what `pack` gave."""
        flat = self.spec.flatten_up_to(packed)
        return [value for i, value in enumerate(flat) if i not in self.integers]

    def unpack(self, argument: str, container: Any) -> list[Tensor]:
        """Flatten a container shaped like the inputs (`v`, say), with its shapes checked."""
        values = self._flat(argument, container)
        return [self._like(i, argument, value, value.shape) for i, value in enumerate(values)]

    def unpack_many(self, argument: str, container: Any) -> tuple[list[Tensor], int | None]:
        """Containers shaped like the inputs: one, or several by a leading dimension of all, and how many."""
        values = self._flat(argument, container)
        counts = {
            len(value) if value.dim() and value.shape[1:] == tensor.shape != value.shape else None
            for value, tensor in zip(values, self.tensors, strict=True)
        }
        count = counts.pop() if len(counts) == 1 else None
        if count is None:
            return [self._like(i, argument, value, value.shape) for i, value in enumerate(values)], None
        return [self._like(i, argument, value, value.shape[1:]) for i, value in enumerate(values)], count

    def split(self, argument: str, flat: Any) -> Any:
        """A vector [P], or several [k, P], as a container shaped like the inputs."""
        if not isinstance(flat, Tensor) or flat.dim() not in (1, 2) or flat.shape[-1] != self.parameters:
            met = f"shape {list(flat.shape)}" if isinstance(flat, Tensor) else type(flat).__name__
            raise ArgumentError(
                f"{argument} must be a vector of {self.parameters:,} coordinates, or several by a leading "
                f"dimension, for flat=True; met {met}"
            )
        parts = flat.split(self.sizes, -1)
        lead = flat.shape[:-1]
        return self.pack([p.reshape((*lead, *t.shape)) for p, t in zip(parts, self.tensors, strict=True)])

    def flat(self, values: Sequence[Tensor], lead: int = 0) -> Tensor:
        """One value per tensor, each behind `lead` other dimensions, as one: [*lead, P]."""
        parts = [value.reshape((*value.shape[:lead], -1)) for value in pytree.tree_leaves(self.pack(values))]
        return torch.cat(parts, lead) if parts else torch.zeros(0)

    def _flat(self, argument: str, container: Any) -> list[Tensor]:
        container = as_container(container)
        flat, spec = pytree.tree_flatten(container)
        alone = len(flat) == self.spec.num_leaves == 1
        if spec != self.spec and not alone and not _both_sequences(spec, self.spec):
            raise StructureMismatchError(
                f"{argument} must have the same structure as the inputs: {self.spec.num_leaves} "
                f"tensor(s) in {_container(self.spec)}, met {len(flat)} in {_container(spec)}"
            )
        _require_tensors(argument, container)
        return [value for i, value in enumerate(flat) if i not in self.integers]

    def _like(self, index: int, argument: str, value: Tensor, shape: torch.Size) -> Tensor:
        """A part of a vector in the shape and dtype of its tensor; `shape`: without a leading dimension."""
        tensor = self.tensors[index]
        if not value.is_complex() and shape.numel() == tensor.numel() and value.device == tensor.device:
            lead = value.shape[: value.dim() - len(shape)]
            return value.to(tensor.dtype).reshape((*lead, *tensor.shape))
        name = argument + self._place_of(index)
        if value.is_complex():
            raise DtypeError(f"{name} is complex; pass a real tensor")
        if shape.numel() != tensor.numel():
            raise ArgumentError(
                f"{name} has shape {list(value.shape)}, but {self.names[index]} has shape "
                f"{list(tensor.shape)}; they must have as many elements"
            )
        raise ArgumentError(
            f"{name} is on {value.device}, but {self.names[index]} is on {tensor.device}; move it there"
        )

    def _place_of(self, index: int) -> str:
        """Where in its container a tensor is: `[0]`, or nothing for a tensor by itself."""
        name = self.names[index]
        return name[name.index("[") :] if "[" in name else ""


def from_function(
    func: Callable[..., Tensor], inputs: Any, argument: str = "inputs", as_secorder: bool = False
) -> Problem:
    """The functional form `func(*inputs)`, or the closure form `func()`.

    The closure form is taken when `func` cannot be called with the inputs but can with nothing; with
    `as_secorder` (the habits of torch-secorder) whenever it can with nothing, and integers get zeros. Only a
    function of any number of arguments is taken for one of tensors none of which requires grad.
    """
    if not callable(func):
        raise NotATensorError(f"func must be callable, met {type(func).__name__}")
    inputs = as_container(inputs)
    leaves, spec = pytree.tree_flatten(inputs)
    _require_tensors(argument, inputs)
    integers = {i: leaf for i, leaf in enumerate(leaves) if as_secorder and _is_integer(leaf)}
    tensors = [leaf for i, leaf in enumerate(leaves) if i not in integers]
    make_names = lambda: _names(argument, inputs)  # noqa: E731
    unpacked = isinstance(inputs, (tuple, list))
    positional = inputs if unpacked else (inputs,)
    direct, alone = _accepts(func, len(positional)), _accepts(func, 0)
    of_any = _takes_any_number(func) and not any(tensor.requires_grad for tensor in tensors)
    closure = alone and not (direct and (of_any or not as_secorder))
    if unpacked and inputs and not (closure or direct) and _accepts(func, 1):
        raise StructureMismatchError(
            f"func takes one argument, and {argument} is a {type(inputs).__name__} of {len(inputs)} whose "
            f"elements are spread over the arguments; pass ({argument},) for a function of one "
            f"{type(inputs).__name__}"
        )

    def evaluate_at(leaves: Sequence[Tensor]) -> Tensor:
        if closure:
            return scalar(_called_with_nothing(func) if direct else func())
        rest = iter(leaves)
        whole = [integers[i] if i in integers else next(rest) for i in range(spec.num_leaves)]
        arguments = pytree.tree_unflatten(whole, spec)
        return scalar(func(*arguments) if unpacked else func(arguments))

    problem = Problem(tuple(tensors), spec, evaluate_at, closure, make_names, integers)
    require_usable(argument, problem)
    return problem


def from_model(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> Problem:
    """The model form: `loss_fn(model(inputs), targets)`, by the model's parameters in their order."""
    if not isinstance(model, nn.Module):
        raise NotATensorError(f"model must be a torch.nn.Module, met {type(model).__name__}")
    if not callable(loss_fn):
        raise NotATensorError(f"loss_fn must be callable, met {type(loss_fn).__name__}")
    named = dict(model.named_parameters())

    def evaluate_at(leaves: Sequence[Tensor]) -> Tensor:
        return scalar(loss_fn(_output(model, inputs), targets))

    spec = pytree.tree_flatten(list(named.values()))[1]
    problem = Problem(tuple(named.values()), spec, evaluate_at, True, lambda: list(named), {})
    require_usable("model", problem)
    return problem


def as_container(inputs: Any) -> Any:
    """Tensors as a tensor, or a tuple, list or dict of tensors: what gives them one by one is a list.

    Of pairs of a name and a tensor (`model.named_parameters()`), a dict.
    """
    if isinstance(inputs, nn.ParameterDict):
        return dict(inputs.items())
    if isinstance(inputs, (Iterator, ValuesView, ItemsView, nn.ParameterList)):
        inputs = list(inputs)
    return dict(inputs) if isinstance(inputs, list) and inputs and all(map(_is_named, inputs)) else inputs


def _is_named(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)


def _leaf(tensor: Tensor) -> Tensor:
    """A tensor as one to differentiate by; inside of torch.func's transforms, by a graph of its own."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    return tensor.requires_grad_()


def _output(model: nn.Module, inputs: Any) -> Any:
    """What the model gives of its one argument."""
    try:
        return model(inputs)
    except (TypeError, AttributeError) as error:
        if isinstance(inputs, Tensor) or not isinstance(inputs, (tuple, list, Mapping)):
            raise
        call = "model(**inputs)" if isinstance(inputs, Mapping) else "model(*inputs)"
        raise ArgumentError(
            f"model cannot be called with inputs, a {type(inputs).__name__}, as its one argument ({error}); "
            f"for several or keyword inputs ask for hessian_diagonal(lambda: loss_fn({call}, targets), "
            f"list(model.parameters()))"
        ) from error


def _called_with_nothing(func: Callable[[], Any]) -> Any:
    """The closure form where the functional one would have been possible too."""
    try:
        return func()
    except Exception as error:
        if hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(
                "hesse called func() without arguments, as it can be; where it is meant as a function of its "
                "inputs, pass one that cannot: lambda x: func(x)"
            )
        raise


def _names(argument: str, container: Any) -> list[str]:
    return [argument + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(container)[0]]


def _is_integer(leaf: Any) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex())


def _require_tensors(argument: str, container: Any) -> None:
    for i, leaf in enumerate(pytree.tree_leaves(container)):
        if not isinstance(leaf, Tensor):
            raise NotATensorError(
                f"{_names(argument, container)[i]} must be a tensor (or a tuple, list or dict of "
                f"tensors), met {type(leaf).__name__}"
            )


def require_usable(argument: str, problem: Problem) -> None:
    """Raise, or warn, where the tensors have no derivatives, or only coarse ones."""
    tensors = problem.tensors
    for i, tensor in enumerate(tensors):
        name = lambda i=i: problem.names[i]  # noqa: E731
        if tensor.is_complex():
            raise DtypeError(
                f"{name()} is complex ({tensor.dtype}); write the function in its real and "
                f"imaginary parts (torch.view_as_real) and pass those"
            )
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{name()} has dtype {tensor.dtype}, which has no derivative; pass a "
                f"floating-point tensor (.float()), or leave it out and let the function capture it"
            )
        if tensor.layout != torch.strided:
            raise NotATensorError(
                f"{name()} has layout {tensor.layout}; only strided tensors are supported, "
                f"so pass its values and build the sparse tensor inside the function"
            )
        if tensor.is_inference():
            raise ArgumentError(
                f"{name()} was made under torch.inference_mode() and cannot be differentiated "
                f"by; pass its .clone() made outside of it"
            )
    devices = {tensor.device: i for i, tensor in enumerate(tensors)}
    if len(devices) > 1:
        where = ", ".join(f"{problem.names[i]} on {device}" for device, i in devices.items())
        raise ArgumentError(f"all of {argument} must be on one device, met {where}; move them")
    if problem.integers and not tensors:
        dtype = next(iter(problem.integers.values())).dtype
        warn(
            IndependentWarning,
            f"{argument} holds tensors of {dtype} alone, which have no derivative, so that the answer is "
            f"zero; pass floating-point tensors (.float())",
        )
    if problem.closure and tensors and not any(tensor.requires_grad for tensor in tensors):
        warn(
            IndependentWarning,
            f"none of the tensors of {argument} requires grad, so that all second derivatives are zero; pass "
            f"the tensors that func reads (list(model.parameters())), not copies of them (a state_dict())",
        )
    half = [i for i, t in enumerate(tensors) if t.dtype in (torch.float16, torch.bfloat16)]
    if half:
        dtype = tensors[half[0]].dtype
        warn(
            PrecisionWarning,
            f"{problem.names[half[0]]} is {dtype}: its second derivatives carry about "
            f"{-math.log10(torch.finfo(dtype).eps):.0f} digits (sums over coordinates are accumulated "
            f"in float32); pass float32 for more",
        )


def scalar(value: Any) -> Tensor:
    """What a function gave, as a tensor without dimensions; raises where it is no real scalar."""
    if not isinstance(value, Tensor):
        raise OutputTypeError(
            f"func must return a tensor with a single element, met {type(value).__name__}"
            + ("; .item() and float() cut the graph" if isinstance(value, (int, float)) else "")
        )
    if value.numel() != 1:
        raise OutputError(
            f"func must return a scalar, met a tensor of shape {list(value.shape)}; reduce it "
            f"(.sum() or .mean()), or ask for one output at a time"
        )
    if not value.is_floating_point():
        raise OutputError(f"func must return a real floating-point tensor, met {value.dtype}")
    return value.reshape(()) if value.dim() or value.is_leaf else value  # a view of a leaf has a graph


def _accepts(func: Callable[..., Any], count: int) -> bool:
    # A module's own signature takes everything; a compiled one hides the module that it was made of.
    module = getattr(func, "_orig_mod", func)
    try:
        inspect.signature(module.forward if isinstance(module, nn.Module) else func).bind(*(None,) * count)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: take it at the caller's word
        return count > 0
    return True


def _takes_any_number(func: Callable[..., Any]) -> bool:
    """Is it a function of `*args`?"""
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _both_sequences(one: pytree.TreeSpec, other: pytree.TreeSpec) -> bool:
    # A list of vectors for a tuple of tensors is no mistake worth an error.
    flat = all(spec.num_nodes == spec.num_leaves + 1 for spec in (one, other))
    return flat and one.num_leaves == other.num_leaves and {one.type, other.type} <= {list, tuple}


def _container(spec: pytree.TreeSpec) -> str:
    return "a tensor" if spec.is_leaf() else f"a {spec.type.__name__}"
