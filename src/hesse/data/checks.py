"""What is checked of a loss over data before it is used, with the first batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hesse.data import batches
from hesse.errors import ArgumentError, DataWarning, warn
from hesse.look.evaluation import glanced
from hesse.runtime.random_state import random_state_kept

if TYPE_CHECKING:
    from hesse.data.loss import Loss


def check(loss: Loss, first: Any) -> None:
    """Where there are several batches: is the loss a mean, or a sum, over samples, as was said?

    Raises:
        ArgumentError: it is the other one.
    """
    if len(loss) == 1:
        return
    if any(isinstance(module, _BatchNorm) and module.training for module in loss.model.modules()):
        warn(
            DataWarning,
            "batch norm in train mode norms every batch by itself, so the loss of the data depends on how "
            "they lie in batches, and what hesse gives is true of these; call model.eval() or pass one batch",
        )
        return
    values = _of_halves(loss, first)
    if values is None:
        return
    whole, one, other, share, rounding = values
    fits = {
        "mean": _close(whole, share * one + (1 - share) * other, rounding, one, other),
        "sum": _close(whole, one + other, rounding, one, other),
    }
    if fits[loss.reduction]:
        return
    wrong = next((name for name, fit in fits.items() if fit), None)
    if wrong is not None:
        raise ArgumentError(
            f"reduction={loss.reduction!r} is not what loss_fn does: of the first batch, cut in two, it "
            f"gives the {wrong} over samples; pass reduction={wrong!r}"
        )
    warn(
        DataWarning,
        f"loss_fn is no {loss.reduction} over samples: the first batch has {whole:.6g}, its halves {one:.6g} "
        f"and {other:.6g}, so the loss of the data depends on how they lie in batches; for a mean over "
        f"tokens or nodes pass samples=, a function of a batch that gives their number",
    )


def _of_halves(loss: Loss, first: Any) -> tuple[float, float, float, float, float] | None:
    """The loss of a batch, of its halves, the share of the first, and rounding; None where it is not cut."""
    batch = batches.moved(first, loss.device)
    first_dim = next((len(tensor) for tensor in batches.tensors(batch) if tensor.dim()), 0)
    halves = batches.cut(batch, first_dim) if first_dim > 1 else None
    if halves is None:
        return None
    with (
        suppress(Exception),
        random_state_kept() as random_numbers,
    ):  # it may be a function of whole batches of this size alone
        values = [glanced(loss.of_batch(part)).value for part in (batch, *halves)]
        if random_numbers.used:  # dropout, say, of which the questions tell
            return None
        whole, one, other = (value.double().item() for value in values)
        counts = [batches.counted(half, loss.rule) for half in halves]
        return whole, one, other, counts[0] / sum(counts), torch.finfo(values[0].dtype).eps
    return None


def _close(found: float, expected: float, rounding: float, *parts: float) -> bool:
    return abs(found - expected) <= max(1e-3, 8 * rounding) * max(abs(found), *map(abs, parts))


@contextmanager
def dtypes_explained(model: nn.Module, batch: Any) -> Iterator[None]:
    """Say so where the model fails as it and its data are of different dtypes."""
    try:
        yield
    except RuntimeError as error:
        own = {parameter.dtype for parameter in model.parameters()}
        other = {tensor.dtype for tensor in batches.tensors(batch) if tensor.is_floating_point()} - own
        if "dtype" not in str(error) or not other or torch.is_autocast_enabled("cpu"):
            raise
        raise ArgumentError(
            f"data hold tensors of {_names(other)}, and the model's parameters are {_names(own)}; cast one "
            f"of them: model.to(dtype), or the data as they are loaded ({error})"
        ) from error


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, dtypes)))
