"""The command line: `hesse diagonal|hessian|trace|plan TARGET` and `hesse demo`.

The commands are a third of this file; the rest says whose fault an error is, and finds targets.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

import click
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hesse
from hesse.answer import Options, plan_for
from hesse.data.problem import problem_of
from hesse.errors import HesseError, HesseWarning
from hesse.methods.base import Question
from hesse.problem import Problem, from_model
from hesse.report import figures, save
from hesse.report.named import NamedResult
from hesse.report.table import describe


class TargetError(HesseError):
    """TARGET does not lead to a problem."""


class Failure(click.ClickException):
    """Ends the program with one line on stderr."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"hesse: {self.message}", file=file, err=True)


class Stopped(Failure):
    """Ends the program after Ctrl-C."""

    exit_code = 130


class Command(click.Command):
    """A command that says in one line what went wrong; `--debug` shows the traceback too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        debug = ctx.params.pop("debug")
        try:
            with _warnings_in_one_line():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own, and `hesse ... | head`
        except KeyboardInterrupt:
            raise Stopped("stopped") from None
        except Exception as error:
            if debug:
                click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            message = " ".join(str(error).split()) if isinstance(error, HesseError) else _whose(error)
            raise Failure(f"error: {message}") from error


class Group(click.Group):
    """The commands of hesse."""

    command_class = Command


@click.group(
    cls=Group, epilog="\b\nExamples:\n  hesse demo\n  hesse diagonal net.py:problem --plot diagonal.png"
)
@click.version_option(hesse.__version__, prog_name="hesse")
def main() -> None:
    """Exact second derivatives of PyTorch functions.

    An answer is checked against plain automatic differentiation before it is shown. `hesse COMMAND
    --help` says more about a command.
    """


_TARGET = """\b
TARGET is file.py:name or package.module:name: a function that takes nothing
and returns (func, inputs), (model, loss_fn, inputs, targets), or a hesse.Loss
for a model's loss over many batches.

\b
Example: with a file net.py that says

\b
  import torch
  def problem():
      model = torch.nn.Linear(10, 1)
      loss_fn = torch.nn.functional.mse_loss
      return model, loss_fn, torch.randn(5, 10), torch.randn(5, 1)

\b
ask
  hesse {question} net.py:problem --out {question}.safetensors --plot {question}.png
"""

_FILE = click.Path(path_type=Path)
_OPTIONS = (
    click.argument("target"),
    click.option(
        "--out", type=_FILE, metavar="FILE.safetensors", help="Write the result, by parameter name."
    ),
    click.option("--plot", type=_FILE, metavar="FILE.png", help="Draw the result (.png, .pdf or .svg)."),
    click.option("--memory", metavar="SIZE", help="Memory to work in, say 2GiB. [default: half of the free]"),
    click.option("--dtype", type=click.Choice(["float64", "float32"]), help="Compute in this precision."),
    click.option("--method", default="auto", show_default=True, metavar="NAME", help="How to compute it."),
    click.option("--no-check", is_flag=True, help="Skip the check against plain automatic differentiation."),
    click.option("--no-progress", is_flag=True, help="Show no progress bar."),
)


def _question(command: Callable[..., None]) -> click.Command:
    """Make a command that asks the question it is named after."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return main.command(epilog=_TARGET.format(question=command.__name__))(command)


@_question
def diagonal(**request: Any) -> None:
    """The diagonal of the Hessian."""
    _ask("diagonal", **request)


@_question
def hessian(**request: Any) -> None:
    """The full Hessian.

    The table shows its diagonal blocks, one for each tensor.
    """
    _ask("hessian", **request)


@_question
def trace(**request: Any) -> None:
    """The exact trace of the Hessian.

    The table shows what each tensor contributes.
    """
    _ask("trace", **request)


@main.command(epilog=_TARGET.split("ask\n")[0] + "say\n  hesse plan net.py:problem --question diagonal\n")
@click.argument("target")
@click.option(
    "--question",
    type=click.Choice(["diagonal", "blocks", "hessian", "trace"]),
    default="diagonal",
    show_default=True,
    help="What would be asked.",
)
@click.option("--memory", metavar="SIZE", help="Memory to work in, say 2GiB. [default: half of the free]")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), help="Compute in this precision.")
@click.option("--method", default="auto", show_default=True, metavar="NAME", help="How to compute it.")
@click.option("--no-check", is_flag=True, help="Leave the check out of the plan.")
def plan(
    target: str, question: str, memory: str | None, dtype: str | None, method: str, no_check: bool
) -> None:
    """What a question would take, without answering it.

    The table compares the methods (passes, operations, memory, predicted seconds), says which one is
    chosen and why, and how each tensor is answered.
    """
    with _found(target) as problem:
        if dtype:
            _cast(problem, getattr(torch, dtype))
        options = Options(method, not no_check, memory)
        asked = cast(Question, "diagonal" if question == "trace" else question)
        click.echo(plan_for(asked, _known(problem), options))


@main.command(epilog="\b\nExample:\n  hesse demo --out hesse-demo")
@click.option(
    "--out", type=_FILE, default="hesse-demo", show_default=True, metavar="DIR", help="Where to write."
)
def demo(out: Path) -> None:
    """Exact curvature of digit-reading networks.

    Trains a small network on scikit-learn's handwritten digits and shows the diagonal of its
    Hessian, compares it with torch alone, shows the full Hessian of a smaller network, and writes
    the results and a figure. Takes some seconds.
    """
    from hesse.demo import run

    run(out)


def _ask(
    question: str,
    target: str,
    out: Path | None,
    plot: Path | None,
    memory: str | None,
    dtype: str | None,
    method: str,
    no_check: bool,
    no_progress: bool,
) -> None:
    """Find the problem, answer, show, write."""
    if out:
        save.require_tensors(out)
    if plot:
        save.require_figure(plot)
    with _found(target) as problem:
        if dtype:
            _cast(problem, getattr(torch, dtype))
        named = _answered(
            question,
            problem,
            method=method,
            check=not no_check,
            memory=memory,
            progress=False if no_progress else None,
            full_output=True,
        )
    click.echo(describe(named))
    plan = named.result.plan
    if method not in ("auto", plan.method):
        why = next(estimate.why_not for estimate in plan.estimates if estimate.method == method)
        click.echo(f"hesse: warning: --method {method} does not apply: {why}", err=True)
    if out:
        save.save_tensors(out, named)
    if plot:
        save.save_figure(plot, figures.figure_of(named))


def _answered(question: str, problem: tuple[Any, ...], **options: Any) -> NamedResult:
    is_model = len(problem) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HesseWarning)  # said again when the question is asked
        known = _known(problem)
    if is_model and question == "hessian":
        model, loss_fn, inputs, targets = problem
        result = hesse.hessian(lambda: loss_fn(model(inputs), targets), list(model.parameters()), **options)
    elif is_model:
        result = hesse.model_hessian_diagonal(*problem, **options)
    elif question == "hessian":
        result = hesse.hessian(*problem, **options)
    else:
        result = hesse.hessian_diagonal(*problem, **options)
    return NamedResult(question, known.names, [tensor.shape for tensor in known.tensors], result)


def _known(problem: tuple[Any, ...]) -> Problem:
    known = from_model(*problem) if len(problem) == 4 else problem_of(*problem)
    if not known.tensors:
        raise TargetError(
            "the model has no parameters; there is nothing to differentiate by"
            if len(problem) == 4
            else "inputs holds no tensor; pass at least one to differentiate by"
        )
    return known


def _cast(problem: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Change the precision of the problem's floating-point tensors.

    In place, and not by copies: a closure, or a loss with a penalty on the model's weights, reads
    the same tensors, and would go on to read the old ones. They were made for this process alone.
    """
    if isinstance(problem[0], hesse.Loss):
        raise TargetError(
            "--dtype cannot reach the data of a hesse.Loss, which come batch by batch; cast them and the "
            "model in the function of TARGET"
        )
    for part in problem:
        for leaf in pytree.tree_leaves(part):
            held = [*leaf.parameters(), *leaf.buffers()] if isinstance(leaf, torch.nn.Module) else [leaf]
            for tensor in held:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


@contextmanager
def _found(target: str) -> Iterator[tuple[Any, ...]]:
    """What the target's function returns; while it is in use, modules beside it can be imported."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(f"TARGET must be file.py:name or package.module:name, met {target!r}")
    is_file = place.endswith(".py")
    before = sys.path.copy()
    sys.path.insert(0, str(Path(place).resolve().parent if is_file else Path.cwd()))
    try:
        module = _file(Path(place)) if is_file else _module(place)
        yield _returned(module, place, name)
    finally:
        sys.path[:] = before


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    # A name of its own: a file called random.py must not take the place of the module random.
    name = f"hesse_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    try:
        with _blamed(f"{path} cannot be imported"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(name: str) -> ModuleType:
    with _blamed(f"{name} cannot be imported"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, one that it imports is not
            raise TargetError(f"there is no module {name}, looked for from {Path.cwd()}") from error


def _returned(module: ModuleType, place: str, name: str) -> tuple[Any, ...]:
    function = getattr(module, name, None)
    if not callable(function):
        others = [
            n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
        ]
        raise TargetError(
            f"{place} has no function {name}" + (f"; it has {', '.join(others)}" if others else "")
        )
    with _blamed(f"{name}() of {place} failed"):
        problem = function()
    if isinstance(problem, hesse.Loss):
        return problem, None  # it knows what it is differentiated by
    if not isinstance(problem, (tuple, list)) or len(problem) not in (2, 4):
        met = f"{len(problem)} values" if isinstance(problem, (tuple, list)) else type(problem).__name__
        raise TargetError(
            f"{name}() of {place} must return (func, inputs), (model, loss_fn, inputs, targets) or a "
            f"hesse.Loss, met {met}"
        )
    # An iterator, model.parameters() say, is read more than once.
    return tuple(list(part) if isinstance(part, Iterator) else part for part in problem)


@contextmanager
def _blamed(trouble: str) -> Iterator[None]:
    """Say in whose code an error arose."""
    try:
        yield
    except HesseError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"{trouble}: {_described(error)}") from error


def _whose(error: Exception) -> str:
    """An error that hesse does not know, with whose it is: the target's, torch's or ours."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.filename.startswith(_HESSE) for frame in frames].index(True)
    theirs = [frame for frame in frames[inside:] if not frame.filename.startswith((_HESSE, *_BETWEEN))]
    if theirs:
        return f"{theirs[-1].filename}, line {theirs[-1].lineno}: {_described(error)}"
    if any(frame.name == "evaluate_at" for frame in frames):
        return f"the function of TARGET failed: {_described(error)}"
    if frames[-1].filename.startswith(_TORCH):
        return f"torch could not differentiate the function of TARGET: {_described(error)}"
    return f"a fault inside hesse; please report it, with what --debug shows: {_described(error)}"


_HESSE, _TORCH, _CLICK = (
    f"{Path(file).parent}{os.sep}" for file in map(inspect.getfile, (hesse, torch, click))
)
_BETWEEN = _TORCH, _CLICK, contextlib.__file__, "<frozen"


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print hesse's own warnings without the source line that Python would add."""
    show = warnings.showwarning

    def show_in_one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, HesseWarning):
            click.echo(f"hesse: warning: {message}", err=True)
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("default", HesseWarning)
        warnings.showwarning = show_in_one_line
        yield
