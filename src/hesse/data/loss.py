"""A model's loss over data: one function of its parameters, that is the weighted sum of those of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from hesse.data import batches, checks
from hesse.data.parameters import selected
from hesse.errors import ArgumentError, NotATensorError, NotDeterministicError, OutputError
from hesse.look.evaluation import glanced, value_and_gradient
from hesse.problem import ModelOutput, Problem, Summand, require_usable, scalar
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.total import Total

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class AtOutput:
    """A batch where the model ends and its loss begins.

    Attributes:
        output: what the model gives.
        loss: of an output, and of other targets than the batch has, if that is wanted.
        targets: those that the batch has.
        number: of the batch.
        count: of its samples.
        told: by the caller's own rule.
    """

    output: Tensor
    loss: Callable[..., Tensor]
    targets: Any
    number: int
    count: int
    told: bool


OfOutput = Callable[[AtOutput], Tensor]
"""The scalar whose curvature by the output counts."""


class Loss:
    r"""The loss of a model over data, as a function of its parameters $\theta$.

    With batches b of $n_b$ samples, and $L_b$ what `loss_fn` gives for one of them, it is

    $$L(\theta) = \sum_b \frac{n_b}{N} L_b(\theta), \quad N = \sum_b n_b, \qquad \text{or} \qquad
      L(\theta) = \sum_b L_b(\theta),$$

    for a `loss_fn` that is a mean or a sum over samples. However the samples lie in batches, it is the same
    function. Every question takes it in place of a function and its inputs, and answers with dicts by
    parameter name: `hessian_diagonal(loss)`, `hessian(loss)`, `hvp(loss, v)`, `plan("diagonal", loss)`.

    Args:
        model: the model; it stays as it is, in the mode that it is in.
        loss_fn: gives a scalar of the model's output and the targets; where a batch is no pair, of the output
            and the whole batch. None: the model gives its loss itself, as `output.loss`, `output["loss"]`, or
            as its output.
        data: one batch, or batches that can be gone through several times (a list, a DataLoader). A batch is
            a pair of inputs and targets; or a dict, or an object like one, of keyword arguments; or any other
            object that the model takes. Inputs of a pair that are a tuple, list or dict are spread over the
            model's arguments. Tensors are moved to the model's device as they come. A single batch that might
            be taken for several is put into a list.
        params: what to differentiate by: None for all parameters that require grad; or names, patterns of
            names ("layers.*.weight"), modules, parameters, or a list of these.
        reduction: what `loss_fn` does over the samples of a batch, "mean" or "sum". Where there are several
            batches this is checked with the first one, cut in two.
        forward: a function of model and batch that gives the output, for batches that the model cannot be
            called with.
        samples: a function of a batch that gives the number of samples to weight it by; without it, the
            leading dimension of the targets, else of the batch's first tensor, or `batch.num_graphs`. For a
            mean over tokens, their number.

    Raises:
        HesseError: `ArgumentError` for data that can be gone through only once, is empty or disagrees with
            the model's dtype, for a reduction that is not what was said, for params that match nothing;
            `NotDeterministicError` where the data are others at the second pass.

    Example:
        >>> import torch, hesse
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(10, 3), torch.randn(10, 1)
        >>> batches = list(zip(x.split(4), y.split(4)))  # of 4, 4 and 2 samples
        >>> loss = hesse.Loss(model, torch.nn.functional.mse_loss, batches)
        >>> diagonal = hesse.hessian_diagonal(loss)
        >>> torch.allclose(diagonal["weight"], 2 * x.square().mean(0, keepdim=True))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        data: Any,
        *,
        params: Any = None,
        reduction: Reduction = "mean",
        forward: Callable[[nn.Module, Any], Any] | None = None,
        samples: batches.Count | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise NotATensorError(f"model must be a torch.nn.Module, met {type(model).__name__}")
        for name, function in (("loss_fn", loss_fn), ("forward", forward), ("samples", samples)):
            if function is not None and not callable(function):
                raise ArgumentError(f"{name} must be callable or None, met {type(function).__name__}")
        if reduction not in ("mean", "sum"):
            raise ArgumentError(f'reduction must be "mean" or "sum", met {reduction!r}')
        self.model, self.loss_fn, self.reduction = model, loss_fn, reduction
        self.params = selected(model, params)
        self._data, self._forward, self.rule = _batches_of(data), forward, samples
        self._checked = self._same = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device

    def value(self) -> Tensor:
        """The loss."""
        total = Total()
        with random_state_kept():
            for summand in self.problem().summands or ():
                total.add(summand.weight, glanced(summand.problem).value)
        found: Tensor = total.value
        return found

    def gradient(self) -> dict[str, Tensor]:
        """The gradient, by parameter name."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its gradient by parameter name."""
        value, full = value_and_gradient(self.problem())
        return value, dict(zip(self.params, full, strict=True))

    def problem(self, of_output: OfOutput | None = None) -> Problem:
        """The loss as a problem; its Hessian is that of the loss, or a Gauss-Newton matrix `of_output`."""
        slot = None if of_output is None else ModelOutput()
        make = partial(self._of_batch, of_output, slot)
        whole = replace(self._as_problem(lambda leaves: self.value(), slot), summands=_Batches(self, make))
        require_usable("params", whole)
        return whole

    def of_batch(self, batch: Any) -> Problem:
        """The loss of one batch by itself."""
        return self._of_batch(None, None, batch, 0, 0)

    def _as_problem(self, evaluate_at: Callable[[Any], Tensor], slot: ModelOutput | None) -> Problem:
        tensors = tuple(self.params.values())
        return Problem(tensors, self._spec, evaluate_at, True, lambda: list(self.params), {}, slot)

    @cached_property
    def _spec(self) -> pytree.TreeSpec:
        return pytree.tree_flatten(self.params)[1]

    def _of_batch(
        self, of_output: OfOutput | None, slot: ModelOutput | None, batch: Any, number: int, count: int
    ) -> Problem:
        """The function of one batch: which one, of so many samples."""

        def evaluate_at(leaves: Any) -> Tensor:
            with checks.dtypes_explained(self.model, batch):
                output = self._output(batch)
                if of_output is None or slot is None:
                    return scalar(self._loss(output, batch))
                at = self._at_output(output, batch, number, count)
                slot.leave(at.output)
                return scalar(of_output(at))

        return self._as_problem(evaluate_at, slot)

    def _output(self, batch: Any) -> Any:
        """What the model gives."""
        if self._forward is not None:
            return self._forward(self.model, batch)
        return batches.called(self.model, batch)

    def _loss(self, output: Any, batch: Any) -> Any:
        """What is to be differentiated."""
        if self.loss_fn is not None:
            return self.loss_fn(output, batches.targets(batch))
        if isinstance(output, Tensor):
            return output
        found = getattr(output, "loss", None)
        if found is None and hasattr(output, "get"):
            found = output.get("loss")
        if found is None:
            raise OutputError(
                f"loss_fn is None, so model must give its loss, as output.loss or a scalar; met a "
                f"{type(output).__name__} without one: pass loss_fn, or labels with the batch"
            )
        return found

    def _at_output(self, output: Any, batch: Any, number: int, count: int) -> AtOutput:
        """The output tensor, and the loss as a function of it."""
        if self.loss_fn is None:
            raise ArgumentError(
                "loss_fn is None: where the model ends and its loss begins cannot be told, which a "
                "Gauss-Newton or Fisher matrix needs; pass loss_fn, and forward= for an output of no tensor"
            )
        if not isinstance(output, Tensor):
            raise ArgumentError(
                f"the model gives a {type(output).__name__}, where a Gauss-Newton or Fisher matrix needs one "
                f"tensor that the loss is a function of; pass forward=lambda model, batch: ... that gives it"
            )
        loss_fn, own = self.loss_fn, batches.targets(batch)

        def loss(z: Tensor, targets: Any = None) -> Tensor:
            return scalar(loss_fn(z, own if targets is None else targets))

        return AtOutput(output, loss, own, number, count, self.rule is not None)

    @cached_property
    def _look(self) -> _Look:
        """What there is to know of the data before they are used."""
        return _look(self._data, self.rule)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._look.counts)

    @property
    def samples(self) -> int:
        """Number of samples, N."""
        return sum(self._look.counts)

    def batches(self) -> Iterator[tuple[Any, int]]:
        """The batches on the model's device, each with its number of samples.

        Raises:
            NotDeterministicError: at the end, where they are others than at first.
        """
        look, traits = self._look, torch.zeros(3, dtype=torch.float64)
        again = self._same  # at the first pass it was seen whether they are
        if not self._checked:
            self._checked = True
            checks.check(self, look.first)
        number = 0
        for number, batch in enumerate(self._data, 1):  # noqa: B007
            traits += 0 if again else batches.traits(batch)
            yield batches.moved(batch, self.device), batches.counted(batch, self.rule)
        same = again or torch.allclose(traits, look.traits, rtol=1e-8, atol=0.0, equal_nan=True)
        if number != len(look.counts) or not same:
            raise NotDeterministicError(
                "data are not the same at every pass: turn off random augmentation, and shuffling where "
                "drop_last=True leaves out others each time"
            )
        self._same = True

    def __repr__(self) -> str:
        """What it is of."""
        of = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        count = sum(parameter.numel() for parameter in self.params.values())
        return f"Loss({type(self.model).__name__}, {of}, {count:,} parameters, reduction={self.reduction!r})"


@dataclass(frozen=True)
class _Batches:
    """The functions of the batches: `problem.Summands`."""

    loss: Loss
    make: Callable[[Any, int, int], Problem]

    def __len__(self) -> int:
        return len(self.loss)

    def __iter__(self) -> Iterator[Summand]:
        whole = self.loss.samples if self.loss.reduction == "mean" else 0
        for number, (batch, count) in enumerate(self.loss.batches()):
            weight = count / whole if whole else 1.0
            yield Summand(weight, self.make(batch, number, count), batches.form(batch) or count)


@dataclass(frozen=True)
class _Look:
    """Of the data: how many samples every batch has, what they add up to, and the first batch."""

    counts: list[int]
    traits: Tensor
    first: Any


def _look(data: Iterable[Any], samples: batches.Count | None) -> _Look:
    counts: list[int] = []
    traits, first = torch.zeros(3, dtype=torch.float64), None
    for batch in data:
        first = batch if not counts else first
        counts.append(batches.counted(batch, samples))
        traits += batches.traits(batch)
        if counts[-1] <= 0:
            raise ArgumentError(f"batch {len(counts) - 1} of data has no samples; leave empty batches out")
    if not counts:
        raise ArgumentError("data is empty; pass at least one batch")
    return _Look(counts, traits, first)


def _batches_of(data: Any) -> Iterable[Any]:
    """Batches that can be gone through again."""
    if batches.is_batch(data):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ArgumentError(
            "data is a data set of single samples; pass torch.utils.data.DataLoader(data, batch_size=...)"
        )
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"data is a {type(data).__name__}, which can be gone through only once; pass a list or a "
            f"DataLoader"
        )
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"data must be a batch (a pair of inputs and targets, or a dict) or an iterable of batches, met "
            f"{type(data).__name__}"
        )
    return data  # type: ignore[no-any-return]
