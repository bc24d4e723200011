"""What a row of the page is made of: a model, its function, and the tensors it is differentiated by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A scalar function, `func()` over leaf tensors or, if it is no closure, `func(*tensors)`."""

    func: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    closure: bool = True

    def leaves(self) -> list[Tensor]:
        """The tensors that a gradient is taken by."""
        if self.closure:
            return list(self.tensors)
        return [tensor.detach().clone().requires_grad_() for tensor in self.tensors]

    def value(self, leaves: Sequence[Tensor]) -> Tensor:
        """The function of its leaves."""
        return self.func() if self.closure else self.func(*leaves)


@dataclass(frozen=True)
class Model:
    """A row.

    Attributes:
        name: `package/model`, what `--only` takes.
        what: what the page says of it.
        build: makes the problem; called after seeding, with `dtype` as the default.
        question: "diagonal" or "hessian".
        by: what it is differentiated by.
        dtype: float64, unless the model computes in float32 alone.
    """

    name: str
    what: str
    build: Callable[[], Problem]
    question: str = "diagonal"
    by: str = "parameters"
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Catalogue:
    """The models of one package.

    Attributes:
        package: its name in an import.
        distributions: what is installed for it.
        models: by name.
    """

    package: str
    distributions: tuple[str, ...]
    models: dict[str, Model] = field(default_factory=dict)

    def put(
        self,
        name: str,
        what: str,
        build: Callable[[], Problem],
        question: str = "diagonal",
        by: str = "parameters",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Add a model."""
        name = f"{self.package}/{name}"
        if name in self.models:
            raise ValueError(f"{name} is there twice")
        self.models[name] = Model(name, what, build, question, by, dtype)

    def row(
        self, what: str, question: str = "diagonal", by: str = "parameters"
    ) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
        """The decorated function builds a model of its own name."""

        def put(build: Callable[[], Problem]) -> Callable[[], Problem]:
            self.put(build.__name__.strip("_").replace("_", "-"), what, build, question, by)
            return build

        return put


def by_parameters(model: nn.Module, loss: Callable[[], Tensor], train: bool = False) -> Problem:
    """A loss by all parameters of its model that are trained, at a point that is no initialisation."""
    model.train(train)
    unsettle(model)
    return Problem(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


def by_inputs(func: Callable[..., Tensor], *tensors: Tensor) -> Problem:
    """A function of its arguments."""
    return Problem(func, tensors, closure=False)


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Move all parameters a little, and the statistics of norms.

    A model starts with biases of zero, norms that do nothing and layers that hardly matter, where much of
    its curvature is zero.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            size = parameter.square().mean().sqrt().item() if parameter.numel() else 0.0
            usual = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=0.2 * size if size > usual / 2 else usual / 2)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += 0.3 * torch.rand_like(buffer)
