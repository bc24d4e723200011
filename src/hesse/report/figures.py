"""Results as figures.

Every panel is a function that draws into given axes, so that figures of several panels use the same
ones. Positive curvature is blue and negative red everywhere; second derivatives range over many
decades on both sides of zero, so every scale is logarithmic on both sides and linear close to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from hesse.report.named import NamedResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

POSITIVE, NEGATIVE, INK, FAINT = "#2166ac", "#b2182b", "#222222", "#d9d9d9"
_DECADES = 6  # what is smaller than the largest entry by more than this is drawn as zero
_MOST_DOTS = 1500  # of one tensor
_MOST_PIXELS = 1000  # of one side of a matrix


def figure_of(named: NamedResult) -> Figure:
    """The figure of a result: distributions, a matrix or bars."""
    from matplotlib.figure import Figure

    tall = 1.6 + 0.34 * len(named.names)
    draw: Callable[[Axes, NamedResult], None]
    size, title, draw = {
        "diagonal": ((9, tall), "Diagonal of the Hessian", draw_diagonal),
        "hessian": ((9.5, 8), "Hessian", draw_hessian),
        "trace": ((8, tall), "Trace of the Hessian, by tensor", draw_trace),
    }[named.question]
    # "compressed" is the layout that leaves room for the names beside a square matrix.
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.add_subplot()
    draw(axes, named)
    entitle(axes, f"{title}  ({sum(named.sizes):,} coordinates)")
    return figure


def entitle(axes: Axes, title: str) -> None:
    """Give a panel its title."""
    axes.set_title(title, loc="left", fontweight="bold", pad=10)


def draw_diagonal(axes: Axes, named: NamedResult) -> None:
    """The entries of every tensor as dots, with their median and the middle half as a bar."""
    values = [_finite(part).sort().values for part in named.parts]
    for row, (entries, size) in enumerate(zip(values, named.sizes, strict=True)):
        if len(entries) < size:
            _remark(axes, row, f"{size - len(entries):,} of {size:,} not finite")
        if not len(entries):
            continue
        shown = entries[torch.linspace(0, len(entries) - 1, min(len(entries), _MOST_DOTS)).long()]
        # The golden ratio spreads neighbours evenly over the row's height, without random numbers.
        height = (torch.arange(len(shown)) * 0.618034 % 1 - 0.5) * 0.62
        axes.scatter(
            shown.numpy(),
            (row + height).numpy(),
            s=7,
            c=_colours(shown),
            alpha=0.4,
            linewidths=0,
            rasterized=True,
        )
        low, middle, high = (entries[round(share * (len(entries) - 1))].item() for share in (0.25, 0.5, 0.75))
        axes.plot([low, high], [row, row], color=INK, linewidth=1.6, solid_capstyle="round")
        axes.plot(middle, row, "o", color="white", markeredgecolor=INK, markersize=5, markeredgewidth=1.3)
    _symlog_axis(axes, "x", torch.cat(values))
    _tensor_rows(axes, named)
    axes.set_xlabel("second derivative  (white dot: median, bar: middle half)")


def draw_trace(axes: Axes, named: NamedResult) -> None:
    """One bar for every tensor."""
    values = torch.stack([part.double().cpu() for part in named.parts])
    lengths = values.nan_to_num(0.0, 0.0, 0.0).tolist()
    bars = axes.barh(range(len(values)), lengths, color=_colours(values), height=0.62)
    axes.bar_label(bars, [f"{value:.3g}" for value in values.tolist()], padding=4, fontsize=9)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.12)
    if not any(lengths):
        axes.set_xticks([0])
    _tensor_rows(axes, named)
    axes.set_xlabel("contribution to the trace")


def draw_hessian(axes: Axes, named: NamedResult, lines: int = 44) -> None:
    """The matrix as a heat map, with the borders between tensors and their names.

    Args:
        axes: where to draw.
        named: the result of the question "hessian".
        lines: how many lines of text fit beside the matrix.
    """
    from matplotlib import colormaps
    from matplotlib.colors import SymLogNorm

    size = sum(named.sizes)
    picture = _pooled(torch.nan_to_num(named.matrix.double().cpu(), math.nan, math.nan, math.nan))
    blank = bool(picture.isnan().any())
    threshold, largest = _symlog_range(picture, share=0.5)
    image = axes.imshow(
        picture.numpy(),
        cmap=colormaps["RdBu"].with_extremes(bad="black"),
        norm=SymLogNorm(threshold, vmin=-largest, vmax=largest),
        extent=(0, size, size, 0),
        interpolation="nearest",
    )
    borders = [0, *accumulate(named.sizes)]
    axes.hlines(borders[1:-1], 0, size, color=INK, linewidth=0.4, alpha=0.6)
    axes.vlines(borders[1:-1], 0, size, color=INK, linewidth=0.4, alpha=0.6)
    _name_bands(axes, named.names, borders, lines)
    axes.set_xticks([])
    bar = _colour_bar(axes, image)
    shown = picture.nan_to_num(0.0).any()
    bar.set_ticks(_symlog_ticks(threshold, -largest, largest) if shown else [0.0])
    bar.ax.minorticks_off()
    if blank:
        bar.set_label("second derivative  (black: not finite)")


def draw_eigenvalues(axes: Axes, eigenvalues: Tensor, marked: Collection[int]) -> None:
    """All eigenvalues by rank, the largest first; marks how far they fall after some of the ranks."""
    values = eigenvalues.flip(0).cpu()
    axes.scatter(
        range(1, len(values) + 1), values.tolist(), s=16, c=_colours(values), alpha=0.8, linewidths=0
    )
    axes.set_xscale("log")
    _symlog_axis(axes, "y", values)
    for line, rank in enumerate(sorted(marked)):
        place = math.sqrt(rank * (rank + 1))  # half way to the next, on a logarithmic axis
        axes.axvline(place, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"after rank {rank}: {values[rank - 1] / values[rank]:.3g} times smaller",
            (max(marked) * 1.25, 0.97 - 0.05 * line),
            xycoords=("data", "axes fraction"),
            verticalalignment="top",
            fontsize=9,
        )
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_pixels(axes: Axes, pixels: Tensor) -> None:
    """A small picture of numbers above zero, dark where they are large."""
    image = axes.imshow(pixels.numpy(), cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    _colour_bar(axes, image)


def draw_seconds(axes: Axes, seconds: dict[str, float]) -> None:
    """Times as bars, the first of them highlighted."""
    bars = axes.barh(
        range(len(seconds)),
        list(seconds.values()),
        color=[POSITIVE, *["#bdbdbd"] * (len(seconds) - 1)],
        height=0.3,
    )
    axes.bar_label(bars, [f"{value:.3g} s" for value in seconds.values()], padding=4, fontweight="bold")
    for row, label in enumerate(seconds):
        axes.annotate(label, (0, row - 0.2), xytext=(3, 0), textcoords="offset points", fontsize=10)
    axes.set_yticks([])
    axes.set_ylim(len(seconds) - 0.5, -0.7)
    axes.margins(x=0.2)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)


def _colour_bar(axes: Axes, image: AxesImage) -> Colorbar:
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label("second derivative")
    return bar


def _remark(axes: Axes, row: int, text: str) -> None:
    """Text at the right end of a tensor's row."""
    axes.annotate(
        text,
        (1, row),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="center",
        fontsize=9,
        color=NEGATIVE,
    )


def _tensor_rows(axes: Axes, named: NamedResult) -> None:
    labels = [f"{name}  {list(shape)}" for name, shape in zip(named.names, named.shapes, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _name_bands(axes: Axes, names: Sequence[str], borders: Sequence[int], lines: int) -> None:
    """Names beside the bands of a matrix, pushed apart where bands are narrow, with leading lines."""
    size = borders[-1]
    gap = size / lines
    widest = sorted(range(len(names)), key=lambda i: borders[i] - borders[i + 1])[:lines]
    shown = sorted(widest)
    centres = [(borders[i] + borders[i + 1]) / 2 for i in shown]
    places: list[float] = []
    for centre in centres:
        places.append(max(centre, places[-1] + gap) if places else centre)
    limit = float(size)
    for k in reversed(range(len(places))):  # what was pushed over the edge pushes back
        places[k] = min(places[k], limit)
        limit = places[k] - gap
    for centre, place in zip(centres, places, strict=True):
        axes.plot([0, -size / 40], [centre, place], color=INK, linewidth=0.6, clip_on=False)
    axes.set_yticks(places, [names[i] for i in shown], fontsize=9)
    axes.tick_params(axis="y", length=0, pad=14)
    axes.set(xlim=(0, size), ylim=(size, 0))


def _symlog_axis(axes: Axes, which: str, values: Tensor) -> None:
    threshold, _ = _symlog_range(values)
    axis = axes.xaxis if which == "x" else axes.yaxis
    scale = axes.set_xscale if which == "x" else axes.set_yscale
    scale("symlog", linthresh=threshold, linscale=0.5)
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    axis.set_ticks(_symlog_ticks(threshold, low, high))
    if low == high:
        low, high = -threshold, threshold
    axis.set_ticks([], minor=True)
    transform = axis.get_transform()
    ends = torch.tensor(transform.transform([low, high]))
    ends += 0.05 * (ends[1] - ends[0]) * torch.tensor([-1, 1])
    axes.set(**{f"{which}lim": transform.inverted().transform(ends.numpy())})
    zero = axes.axvline if which == "x" else axes.axhline
    zero(0, color=INK, linewidth=0.8, zorder=0.9)


def _symlog_range(values: Tensor, share: float = 0.01) -> tuple[float, float]:
    """Where the logarithmic part of a scale begins (a power of ten), and the largest magnitude.

    `share`: how many of the magnitudes may be too small for the logarithmic part.
    """
    sizes = values.abs()[torch.isfinite(values) & (values != 0)]
    if not len(sizes):
        return 1.0, 1.0
    largest = sizes.max().item()
    low = max(sizes.kthvalue(1 + int(share * (len(sizes) - 1))).values.item(), largest / 10**_DECADES)
    return 10.0 ** math.floor(math.log10(low)), largest


def _symlog_ticks(threshold: float, low: float, high: float) -> list[float]:
    """Zero and at most four powers of ten on either side."""
    ticks = [0.0]
    first = round(math.log10(threshold))
    last = {sign: math.floor(math.log10(max(sign * end, threshold))) for sign, end in ((1, high), (-1, low))}
    step = max(1, math.ceil((max(last.values()) - first) / 3))
    for sign, end in ((1, high), (-1, low)):
        if sign * end >= threshold:
            ticks += [sign * 10.0**power for power in range(last[sign], first - 1, -step)]
    return sorted(ticks)


def _pooled(matrix: Tensor) -> Tensor:
    """A large matrix made smaller, each pixel the entry of largest magnitude: no line gets lost."""
    if len(matrix) <= _MOST_PIXELS:
        return matrix
    high, low = (adaptive_max_pool2d(m[None], _MOST_PIXELS)[0] for m in (matrix, -matrix))
    return torch.where(high >= low, high, -low)


def _finite(part: Tensor) -> Tensor:
    part = part.flatten().double().cpu()
    return part[torch.isfinite(part)]


def _colours(values: Tensor) -> list[str]:
    return [NEGATIVE if value < 0 else POSITIVE for value in values.tolist()]
