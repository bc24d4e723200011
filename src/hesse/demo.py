"""The main job on real data: exact second derivatives of networks that read handwritten digits."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hesse
from hesse.report import figures, save
from hesse.report.named import NamedResult
from hesse.report.table import by_tensor, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
_TRAIN, _CURVATURE, _SAMPLE = 1300, 300, 100  # images, images, coordinates


def run(folder: Path) -> None:
    """Train, ask, compare, and write the results and a figure to `folder`.

    Raises:
        HesseError: scikit-learn or matplotlib is missing, or the folder cannot be written.
    """
    save.require("demo", "sklearn.datasets", "matplotlib")
    with save.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

    with _reproducible():
        images, labels = _digits()
        print(f"{len(images):,} handwritten digits of 8x8 pixels, {_TRAIN:,} of them to train with")
        # Second derivatives are of the training loss on some of the images, in float64.
        inputs, targets = images[:_CURVATURE].double(), labels[:_CURVATURE]

        _headline("A residual network, and the plan for the diagonal of its Hessian")
        network = _trained(_residual(), images, labels, epochs=8)
        result = hesse.model_hessian_diagonal(network, cross_entropy, inputs, targets, full_output=True)
        diagonal = _named("diagonal", network, result)
        print(f"\n{result.plan}")

        _headline("That diagonal")
        print(by_tensor(diagonal))
        print(summary(result))

        _headline("The same diagonal by torch alone")
        plain_seconds = _compare(diagonal, network, inputs, targets)

        _headline("A smaller network, and its full Hessian")
        small = _trained(_perceptron(), images, labels)
        result = hesse.hessian(
            lambda: cross_entropy(small(inputs), targets), list(small.parameters()), full_output=True
        )
        hessian = _named("hessian", small, result)
        print(by_tensor(hessian))
        print(summary(result))
        steepest = _describe_spectrum(hessian)

    _headline("Written")
    paths = [folder / name for name in ("diagonal.safetensors", "hessian.safetensors", "figure.png")]
    save.save_tensors(paths[0], diagonal)
    save.save_tensors(paths[1], hessian)
    save.save_figure(paths[2], _figure(diagonal, plain_seconds, hessian, steepest))
    for path in paths:
        print(path)


@contextmanager
def _reproducible() -> Iterator[None]:
    """The same random numbers every time, and one thread.

    Networks this small gain nothing from more threads, and times by one are comparable: on a busy
    machine torch's threads wait for each other, which takes whom it hits, hesse or torch alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _digits() -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] from 0 to 1 and their labels, shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target)[order]


class _Block(nn.Module):
    """Two convolutions, added to what comes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(images + self.second(torch.relu(self.first(images))))


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        *(_Block(48) for _ in range(3)),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 48, CLASSES),
    )


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def _trained(network: nn.Module, images: Tensor, labels: Tensor, epochs: int = 30) -> nn.Module:
    """Train in float32, which is fast; give back a float64 copy, whose derivatives have all digits."""
    began = time.perf_counter()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(_TRAIN).split(64):
            optimizer.zero_grad()
            cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).double()
    print(
        f"{sum(p.numel() for p in network.parameters()):,} parameters, trained in "
        f"{time.perf_counter() - began:.1f} s; accuracy {right[:_TRAIN].mean():.1%} on the images it was "
        f"trained with, {right[_TRAIN:].mean():.1%} on the {len(right) - _TRAIN} others"
    )
    return copy.deepcopy(network).double()


def _named(question: str, network: nn.Module, result: hesse.Result) -> NamedResult:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return NamedResult(question, names, [parameter.shape for parameter in parameters], result)


def _compare(diagonal: NamedResult, network: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Some coordinates by plain double backward; seconds that all of them would take."""
    parameters = list(network.parameters())
    count = sum(diagonal.sizes)
    where = [(t, i) for t, size in enumerate(diagonal.sizes) for i in range(size)]
    sample = [where[k] for k in torch.randperm(count)[:_SAMPLE].tolist()]

    began = time.perf_counter()
    loss = cross_entropy(network(inputs), targets)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    graph_seconds = time.perf_counter() - began
    plain = [
        torch.autograd.grad(gradient[t].flatten()[i], parameters[t], retain_graph=True)[0].flatten()[i]
        for t, i in sample
    ]
    each = (time.perf_counter() - began - graph_seconds) / len(sample)

    expected = torch.stack(plain)
    found = torch.stack([diagonal.parts[t].flatten()[i] for t, i in sample])
    deviation = (found - expected).abs().max() / expected.abs().max()
    seconds, taken = graph_seconds + each * count, diagonal.result.seconds
    print(
        f"{len(sample)} coordinates drawn at random, by plain double backward, one product each\n"
        f"largest deviation: {deviation:.1e} of the largest entry\n"
        f"{1000 * each:.3g} ms a product: {seconds:.3g} s for all {count:,} "
        f"(measured on those {len(sample)}, extrapolated)\n"
        f"hesse took {taken:.3g} s, its check included: torch alone takes {seconds / taken:.3g} times that, "
        f"both on one thread"
    )
    return seconds


def _describe_spectrum(hessian: NamedResult) -> int:
    """Print what the eigenvalues show; the rank among the first after which they fall most."""
    values = hessian.eigenvalues.flip(0)
    falls = values[: 2 * CLASSES] / values[1 : 2 * CLASSES + 1]
    steepest = int(falls.argmax()) + 1
    total, trace = values.sum(), hessian.matrix.trace()
    print(
        f"{len(values)} eigenvalues, {int((values < 0).sum())} of them negative; largest {values[0]:.4g}, "
        f"smallest {values[-1]:.4g}\n"
        f"after rank {CLASSES}, the number of classes, they fall by a factor of {falls[CLASSES - 1]:.3g}; "
        f"most steeply after rank {steepest}, by {falls.max():.3g}\n"
        f"their sum is {total:.10g}, the trace of the matrix {trace:.10g}: {abs(total / trace - 1):.1e} apart"
    )
    return steepest


def _headline(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


def _figure(diagonal: NamedResult, plain_seconds: float, hessian: NamedResult, steepest: int) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(17, 10.5), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    figure.suptitle(
        "Exact second derivatives of two networks that read handwritten digits",
        fontsize=17,
        fontweight="bold",
    )
    grid = figure.add_gridspec(2, 3)
    size = sum(hessian.sizes)

    axes = figure.add_subplot(grid[0, :2])
    figures.draw_diagonal(axes, diagonal)
    figures.entitle(axes, f"Residual network: the {sum(diagonal.sizes):,} entries of its Hessian's diagonal")

    axes = figure.add_subplot(grid[0, 2])
    seconds = {
        "hesse, its check included": diagonal.result.seconds,
        f"torch alone, a product each (from {_SAMPLE} of them)": plain_seconds,
    }
    figures.draw_seconds(axes, seconds)
    figures.entitle(axes, "Time for that diagonal")

    axes = figure.add_subplot(grid[1, 0])
    figures.draw_hessian(axes, hessian, lines=22)
    axes.set_aspect("auto")  # keeps the panels of a row in line
    figures.entitle(axes, f"Smaller network: its full Hessian, {size} x {size}")

    axes = figure.add_subplot(grid[1, 1])
    figures.draw_eigenvalues(axes, hessian.eigenvalues, {CLASSES, steepest})
    figures.entitle(axes, f"Its {size} eigenvalues")

    axes = figure.add_subplot(grid[1, 2])
    of_weights = hessian.matrix.diagonal()[: hessian.sizes[0]].reshape(hessian.shapes[0])
    figures.draw_pixels(axes, of_weights.mean(0).reshape(8, 8))
    figures.entitle(axes, "Its mean diagonal entry by input pixel")
    return figure
