"""The command line, as a user meets it."""

import json
import platform
import stat
import subprocess
import sys

import click
import pytest
import torch
from click.testing import CliRunner
from matplotlib.text import Text
from safetensors import safe_open

import hesse
from hesse.cli import main
from hesse.report.figures import figure_of
from hesse.report.named import NamedResult
from oracle import hessian_matrix

MODEL = """
import torch
from torch import nn

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    return model, nn.functional.cross_entropy, inputs, torch.tensor([0, 1, 1, 0, 1])
"""
FUNCTION = """
import torch

def problem():
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    y = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    return (lambda x, y: (x**3).sum() * y.prod() + y.pow(4).sum()), (x, y)
"""
LOSS = MODEL.replace("import torch\n", "import hesse, torch\n", 1).replace(
    "return model, nn.functional.cross_entropy, inputs, torch.tensor([0, 1, 1, 0, 1])",
    """targets = torch.tensor([0, 1, 1, 0, 1])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=2)
    return hesse.Loss(model, nn.functional.cross_entropy, data)""",
)
FORMS = {"model": MODEL, "function": FUNCTION, "loss": LOSS}
NAMES = {
    "model": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "loss": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "function": ["inputs[0]", "inputs[1]"],
}
# Prints and returns nothing of interest; for what is asked before, or goes wrong after.
SQUARE = "import torch\ndef problem():\n    return (lambda x: (x * x).sum()), torch.tensor([1.0, 2.0])\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ask(folder, source, *arguments, question="diagonal"):
    (folder / "net.py").write_text(source)
    return invoke(question, "net.py:problem", *arguments)


def succeed(*arguments, **keywords):
    done = ask(*arguments, **keywords)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def fail(done, *texts):
    """The command ended with one line that holds the texts."""
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("hesse: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    for text in texts:
        assert text in done.stderr


def exact(source):
    """The tensors and the Hessian matrix of a target, by plain autograd."""
    space = {}
    exec(MODEL if source == LOSS else source, space)  # a loss over batches is that of all samples
    problem = space["problem"]()
    if len(problem) == 2:
        func, tensors = problem
    else:
        model, loss_fn, inputs, targets = problem
        names, tensors = zip(*model.named_parameters(), strict=True)

        def func(*values):
            state = dict(zip(names, values, strict=True))
            return loss_fn(torch.func.functional_call(model, state, (inputs,)), targets)

    return [t.detach() for t in tensors], hessian_matrix(func, tuple(t.detach() for t in tensors))


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("place", ["net.py", "nets.{form}_module"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", ["diagonal", "hessian", "trace"])
def test_numbers_and_files(folder, question, form, place):
    names, (tensors, matrix) = NAMES[form], exact(FORMS[form])
    place = place.format(form=form)
    path = folder / (place if place.endswith(".py") else place.replace(".", "/") + ".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(FORMS[form])
    before = sys.path.copy()
    done = invoke(question, f"{place}:problem", "--out", "result.safetensors", "--plot", "result.png")
    sys.modules.pop("nets", None)  # the next test has a package of this name in another folder
    assert (done.exit_code, done.stderr) == (0, "")
    assert sys.path == before

    found, metadata = read("result.safetensors")
    diagonals = dict(zip(names, matrix.diagonal().split([t.numel() for t in tensors]), strict=True))
    if question == "hessian":
        assert sorted(found) == sorted(f"{row}|{column}" for row in names for column in names)
        rows = [
            torch.cat([found[f"{r}|{c}"].reshape(s.numel(), -1) for c in names], dim=1)
            for r, s in zip(names, tensors, strict=True)
        ]
        torch.testing.assert_close(torch.cat(rows), matrix, rtol=1e-12, atol=1e-12)
        values = torch.linalg.eigvalsh(matrix)
        assert f"largest {values[-1]:.4g}, smallest {values[0]:.4g}\n" in done.stdout
    elif question == "diagonal":
        expected = {n: d.view_as(t) for (n, d), t in zip(diagonals.items(), tensors, strict=True)}
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(found, {n: d.sum() for n, d in diagonals.items()})
        assert f"{matrix.trace():.6g}" in done.stdout

    assert json.loads(metadata["names"]) == names
    assert json.loads(metadata["shapes"]) == [list(t.shape) for t in tensors]
    assert metadata["hesse"] == hesse.__version__
    assert metadata["torch"] == torch.__version__
    assert metadata["python"] == platform.python_version()
    assert metadata["question"] == question
    assert int(metadata["passes"]) > 0
    assert float(metadata["seconds"]) > 0
    assert float(metadata["certificate_deviation"]) <= float(metadata["certificate_bound"])
    assert all(name in done.stdout for name in names)
    last = done.stdout.splitlines()[-1]
    assert f"method {metadata['method']}, passes {metadata['passes']}, seconds " in last
    assert "within bound" in last
    assert drawn("result.png") > 20


def drawn(path):
    """Number of colours in a picture."""
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 150
    return len({tuple(pixel) for pixel in pixels[::3, ::3].reshape(-1, pixels.shape[-1]).tolist()})


def test_table(folder):
    source = """
import torch
def problem():
    weights = {'a': torch.tensor([-1.0, 1.0, 2.0, 4.0]), 'b': torch.zeros(0)}
    return (lambda w: (w['a'] ** 3).sum() + w['b'].sum()), weights
"""
    out = succeed(folder, source)
    head, _, a, b, _ = out.splitlines()
    assert head.split() == ["tensor", "shape", "min", "mean", "max", "negative"]
    assert a.split() == ["inputs['a']", "[4]", "-6", "9", "24", "25.0%"]
    assert b.split() == ["inputs['b']", "[0]", "-", "-", "-", "-"]


def test_no_negative_zero(folder):
    source = SQUARE.replace("(x * x).sum()", "-(0 * x * x).sum()")
    assert "-0" not in succeed(folder, source)


@pytest.mark.parametrize("question", ["diagonal", "hessian", "trace"])
def test_options(folder, question):
    options = ["--memory", "1GiB", "--method", "dense", "--no-check", "--no-progress"]
    out = succeed(folder, SQUARE, *options, "--out", "result", question=question)
    assert out.splitlines()[-1].endswith(", not checked")
    _, metadata = read("result")
    assert "certificate_deviation" not in metadata
    assert metadata["method"] == "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["model", "function"])
def test_dtype(folder, form, dtype):
    source = FORMS[form].replace(".double()", "").replace(", dtype=torch.float64", "")
    succeed(folder, source, "--dtype", str(dtype).removeprefix("torch."), "--out", "result")
    found, _ = read("result")
    assert {value.dtype for value in found.values()} == {dtype}
    _, matrix = exact(source)
    torch.testing.assert_close(
        torch.cat([found[n].flatten() for n in NAMES[form]]).double(),
        matrix.diagonal().double(),
        rtol=1e-3,
        atol=1e-5,
    )


def test_dtype_reaches_what_a_closure_reads(folder):
    source = """
import torch
def problem():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    return (lambda: (x**3).sum()), [x]
"""
    succeed(folder, source, "--dtype", "float64", "--out", "result")
    torch.testing.assert_close(
        read("result")[0], {"inputs[0]": torch.tensor([6.0, 12.0], dtype=torch.float64)}
    )


def test_dtype_reaches_a_penalty_on_the_weights(folder):
    source = """
import torch
def problem():
    model = torch.nn.Linear(2, 1)
    def loss_fn(out, targets):
        return (out - targets).square().sum() + sum(5 * p.square().sum() for p in model.parameters())
    return model, loss_fn, torch.zeros(3, 2), torch.zeros(3, 1)
"""
    succeed(folder, source, "--dtype", "float64", "--out", "result")
    expected = {"weight": torch.full((1, 2), 10.0), "bias": torch.full((1,), 16.0)}
    found, _ = read("result")
    torch.testing.assert_close(found, {name: value.double() for name, value in expected.items()})


def test_inputs_from_an_iterator(folder):
    source = """
import torch
def problem():
    model = torch.nn.Linear(2, 1)
    ones = model.weight.new_ones(1, 2)
    return (lambda: (model(ones.to(model.weight)) ** 2).sum()), model.parameters()
"""
    succeed(folder, source, "--dtype", "float64", "--out", "result", question="hessian")
    expected = {"0|0": [[[[2, 2], [2, 2]]]], "0|1": [[[2], [2]]], "1|0": [[[2, 2]]], "1|1": [[2]]}
    for name, value in read("result")[0].items():
        name = name.replace("inputs[", "").replace("]", "")
        torch.testing.assert_close(value, torch.tensor(expected[name]).double().view_as(value))


def test_target_may_import_what_lies_beside_it(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "beside_the_target.py").write_text("SCALE = 2.0\n")
    source = SQUARE.replace("import torch", "import torch\nfrom beside_the_target import SCALE")
    (folder / "sub" / "random.py").write_text(source.replace("(x * x)", "(SCALE * x * x)"))
    import random

    done = invoke("trace", "sub/random.py:problem")
    del sys.modules["beside_the_target"]
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2].split()[-1] == "8"
    assert sys.modules["random"] is random


def test_dataclass_in_a_target(folder):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    head += "@dataclass\nclass A:\n    a: int\n"
    succeed(folder, head + SQUARE)


def test_out_takes_the_place_of_an_old_file_with_its_mode(folder):
    (folder / "real").write_text("old")
    (folder / "real").chmod(0o640)
    (folder / "link").symlink_to("real")
    succeed(folder, SQUARE, "--out", "link")
    assert (folder / "link").is_symlink()
    assert stat.S_IMODE((folder / "real").stat().st_mode) == 0o640
    assert "inputs" in read("real")[0]


def test_hessian_larger_than_its_picture(folder):
    source = SQUARE.replace("torch.tensor([1.0, 2.0])", "torch.linspace(-1, 1, 1200)").replace(
        "x * x", "x**4"
    )
    succeed(folder, source, "--plot", "hessian.png", question="hessian")
    assert drawn("hessian.png") > 20


@pytest.mark.parametrize(
    ("question", "ask", "remark"),
    [
        ("diagonal", hesse.hessian_diagonal, "2 of 2 not finite"),
        ("hessian", hesse.hessian, "second derivative  (black: not finite)"),
        ("trace", hesse.hessian_diagonal, "nan"),
    ],
)
def test_figure_of_what_is_not_finite(question, ask, remark):
    """No scale is made up: a tick at zero alone, and a word on what is missing."""
    with pytest.warns(hesse.HesseWarning, match="NaN"):
        result = ask(lambda u: (u**3).sum() * float("nan"), torch.ones(2), full_output=True)
    figure = figure_of(NamedResult(question, ["u"], [torch.Size([2])], result))
    scale = figure.axes[0].child_axes[0].yaxis if question == "hessian" else figure.axes[0].xaxis
    assert list(scale.get_majorticklocs()) == [0]
    assert remark in {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("question", ["diagonal", "hessian", "trace"])
@pytest.mark.parametrize("func", ["(0 * x * x).sum()", "x.sqrt().sum()", "x[:0].sum()"])
def test_zero_and_infinite_results_can_be_shown(folder, question, func):
    source = f"import torch\ndef problem():\n    return (lambda x: {func}), torch.tensor([0.0, 1.0])\n"
    done = ask(folder, source, "--plot", "result.png", "--out", "result", question=question)
    assert done.exit_code == 0
    assert ("inf" in done.stdout or "nan" in done.stdout) == ("sqrt" in func)
    assert drawn("result.png") > 5


def test_many_tensors_can_be_drawn(folder):
    source = """
import torch
def problem():
    xs = [torch.randn(1 + i % 7) for i in range(60)]
    return (lambda *xs: sum((x**3).sum() for x in xs) * xs[0].sum()), xs
"""
    for question in ("hessian", "diagonal"):
        succeed(folder, source, "--plot", f"{question}.png", question=question)


def test_some_parameters_of_a_loss(folder):
    source = LOSS.replace("cross_entropy, data)", "cross_entropy, data, params=['2.*'])")
    table = succeed(folder, source).splitlines()[2:-1]
    assert [row.split()[0] for row in table] == ["2.weight", "2.bias"]
    plan = " ".join(succeed(folder, source, question="plan").split())
    assert "diagonal of 10 coordinates in 2 tensors" in plan
    assert "of the first of 3 batches" in plan


def test_loss_in_the_help():
    for command in ("diagonal", "hessian", "trace", "plan"):
        assert "hesse.Loss" in invoke(command, "--help").stdout


# Errors


@pytest.mark.parametrize("question", ["diagonal", "plan"])
def test_errors_of_a_loss(folder, question):
    fail(ask(folder, LOSS, "--dtype", "float32", question=question), "--dtype cannot reach the data")
    gone = LOSS.replace("cross_entropy, data)", "cross_entropy, iter(data))")
    fail(ask(folder, gone, question=question), "gone through only once")
    other = LOSS.replace(".double()", "")
    fail(ask(folder, other, question=question), "data hold tensors of torch.float64")


def wrong_return(value):
    return f"import torch\nx = torch.zeros(2)\ndef problem():\n    return {value}\n"


def broken_func(body):
    return f"import torch\ndef f(x):\n    {body}\ndef problem():\n    return f, torch.ones(2)\n"


FORM = "(func, inputs), (model, loss_fn, inputs, targets) or a hesse.Loss"


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("def problem(:\n", ["net.py cannot be imported: SyntaxError"]),
        ("import no_such_package\n", ["net.py cannot be imported", "No module named 'no_such_package'"]),
        ("raise SystemExit(3)\n", ["net.py cannot be imported: SystemExit: 3"]),
        ("def other(): pass\n", ["net.py has no function problem", "it has other"]),
        ("problem = 3\n", ["net.py has no function problem"]),
        (
            "def problem(): raise ValueError('two\\n  lines')\n",
            ["problem() of net.py failed: ValueError: two lines"],
        ),
        ("def problem(a): pass\n", ["problem() of net.py failed: TypeError", "'a'"]),
        ("def problem(): assert False\n", ["problem() of net.py failed: AssertionError\n"]),
        (wrong_return("None"), [FORM, "met NoneType"]),
        (wrong_return("(1, 2, 3)"), [FORM, "met 3 values"]),
        (wrong_return("3, x"), ["func must be callable"]),
        (wrong_return("torch.sum, 3"), ["must be a tensor"]),
        (wrong_return("torch.sum, []"), ["holds no tensor"]),
        (wrong_return("torch.sum, x.long()"), ["torch.int64"]),
        (wrong_return("x, torch.sum, x, x"), ["model must be a torch.nn.Module"]),
        (wrong_return("torch.nn.Linear(2, 1), 3, x, x"), ["loss_fn must be callable"]),
        (wrong_return("torch.nn.ReLU(), torch.dot, x, x"), ["model has no parameters"]),
        (broken_func("return x * 2"), ["scalar"]),
        (broken_func("return x.sum().item()"), ["must return a tensor"]),
        (broken_func("return (x * torch.rand(2)).sum()"), ["not deterministic"]),
        (broken_func("raise KeyError('x')"), ["net.py, line 3: KeyError: 'x'"]),
        (broken_func("return x @ torch.ones(3)"), ["net.py, line 3: RuntimeError: "]),
        (
            wrong_return("torch.nn.Linear(3, 2), torch.dot, x, x"),
            ["the function of TARGET failed: RuntimeError: "],
        ),
    ],
)
def test_error_in_the_target(folder, source, texts):
    before = set(sys.modules)
    fail(ask(folder, source), *texts)
    if "cannot be imported" in texts[0]:
        assert not [name for name in set(sys.modules) - before if "net" in name]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("nowhere.py:problem", "there is no file nowhere.py"),
        ("nowhere.at_all:problem", "there is no module nowhere.at_all"),
        ("net.py", "TARGET must be file.py:name or package.module:name"),
        ("net.py:", "TARGET must be"),
        (":problem", "TARGET must be"),
        (
            "importer:problem",
            "importer cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
    ],
)
def test_error_in_the_target_argument(folder, target, text):
    (folder / "net.py").write_text(SQUARE)
    (folder / "importer.py").write_text("import no_such_package\n")
    fail(invoke("diagonal", target), text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "magic"], "method must be"),
        (["--memory", "lots"], "memory must be"),
        (["--memory", "1B"], "the memory budget is 1 B"),
        (["--out", "nowhere/result"], "cannot write nowhere/result: No such file or directory"),
        (
            ["--out", "result.pt"],
            "cannot write result.pt: the name of a file of tensors ends in .safetensors",
        ),
        (["--out", "."], "cannot write .: it is no regular file"),
        (["--out", "/dev/null"], "cannot write /dev/null: it is no regular file"),
        (["--plot", "nowhere/result.png"], "cannot write nowhere/result.png: No such file or directory"),
        (["--plot", "result.xyz"], "cannot write result.xyz: a figure's name ends in .png"),
    ],
)
def test_error_in_the_options(folder, options, text):
    fail(ask(folder, SQUARE, *options), text)
    assert not (folder / "result.png").exists()


def test_unwritable_output_is_noticed_before_the_work(folder):
    fail(ask(folder, "raise ValueError\n", "--out", "nowhere/result"), "cannot write")


def test_output_that_becomes_unwritable(folder):
    (folder / "results").mkdir()
    body = "import os\n    os.path.isdir('results') and os.rmdir('results')\n    return (x * x).sum()"
    done = ask(folder, broken_func(body), "--out", "results/result")
    assert done.exit_code == 2
    assert "method" in done.stdout  # the answer was shown all the same
    assert done.stderr == "hesse: error: cannot write results/result: No such file or directory\n"


def test_error_without_matplotlib(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fail(ask(folder, SQUARE, "--plot", "result.png"), "pip install 'hesse[plot]'")


@pytest.mark.parametrize("source", ["raise ValueError('gone')\n", broken_func("return x")])
def test_debug_shows_the_traceback(folder, source):
    done = ask(folder, source, "--debug")
    assert done.exit_code == 2
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hesse: error: ")
    assert "Traceback" not in ask(folder, source).stderr


def test_a_fault_of_ours_is_not_laid_on_the_target(folder, monkeypatch):
    monkeypatch.setattr("hesse.cli.plan_for", None)
    (folder / "net.py").write_text(SQUARE)
    fail(invoke("plan", "net.py:problem"), "a fault inside hesse; please report it", "TypeError")


def test_a_method_that_does_not_apply_is_said(folder):
    source = SQUARE.replace("(x * x)", "x.softmax(0)[:1]")
    done = ask(folder, source, "--method", "taps")
    assert done.exit_code == 0
    assert "method dense" in done.stdout
    refusal = "there is no layer whose weight is used by layers alone"
    assert done.stderr == f"hesse: warning: --method taps does not apply: {refusal}\n"
    assert ask(folder, source, "--method", "dense").stderr == ""


def test_interrupt(folder):
    done = ask(folder, broken_func("raise KeyboardInterrupt"))
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "hesse: stopped\n")


def test_interrupt_while_torch_is_imported(folder):
    (folder / "torch.py").write_text("raise KeyboardInterrupt\n")
    program = "import hesse_command; hesse_command.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "hesse: stopped\n")


def test_closed_pipe_is_no_error_of_ours(folder):
    done = ask(folder, broken_func("raise BrokenPipeError(32, 'Broken pipe')"))
    assert done.stderr == ""


def test_warning_in_one_line(folder):
    done = ask(
        folder, "import torch\ndef problem():\n    return (lambda x: x.sqrt().sum()), torch.zeros(2)\n"
    )
    assert done.exit_code == 0
    assert done.stderr.startswith("hesse: warning: ")
    assert done.stderr.count("\n") == 1
    assert ".py:" not in done.stderr


def test_same_warning_is_printed_once(folder):
    done = ask(folder, SQUARE.replace("[1.0, 2.0]", "[1.0, 2.0], dtype=torch.float16"))
    assert done.stderr.count("hesse: warning: ") == 1


def test_usage_errors_are_clicks_own(folder):
    for arguments in (["diagonal"], ["diagonal", "net.py:problem", "--dtype", "int8"], ["nonsense"]):
        done = invoke(*arguments)
        assert done.exit_code == 2
        assert "Usage: " in done.stderr


def test_version_and_help():
    assert invoke("--version").stdout == f"hesse, version {hesse.__version__}\n"
    assert "Example" in invoke("--help").stdout
    assert isinstance(main, click.Group)
    for name in main.commands:
        done = invoke(name, "--help")
        assert done.exit_code == 0
        assert f"hesse {name}" in done.stdout
        assert "Example" in done.stdout


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", ["diagonal", "blocks", "hessian", "trace"])
def test_plan(folder, form, question):
    out = succeed(folder, FORMS[form], "--question", question, question="plan")
    known = "diagonal" if question == "trace" else question
    count = sum(tensor.numel() for tensor in exact(FORMS[form])[0])
    assert out.startswith(f"{known} of {count} coordinates in {len(NAMES[form])} tensors; ")
    for name in NAMES[form]:
        assert f"\n  {name} " in out
    for method in ("dense", "taps"):
        assert f" {method} " in out


def test_plan_asks_for_the_diagonal_unless_told(folder):
    assert succeed(folder, FUNCTION, question="plan").startswith("diagonal of 5 coordinates")


def test_plan_of_a_method(folder):
    out = succeed(folder, MODEL, "--method", "dense", question="plan")
    assert "\n* dense " in out
    assert "\n  taps     not asked for\n" in out
    assert "the check takes 4 products" in " ".join(out.split())
    unchecked = succeed(folder, MODEL, "--no-check", "--method", "dense", question="plan")
    assert "the check takes 0 products" in " ".join(unchecked.split())


def test_plan_of_another_precision(folder):
    double, single = (
        succeed(folder, MODEL, "--dtype", dtype, question="plan").split("\n")[0]
        for dtype in ("float64", "float32")
    )
    assert double.endswith("takes 208 B")
    assert single.endswith("takes 104 B")


def test_plan_of_no_question(folder):
    done = ask(folder, MODEL, "--question", "gradient", question="plan")
    assert done.exit_code == 2
    assert "'gradient' is not one of" in done.stderr


def test_plan_of_no_method(folder):
    fail(ask(folder, MODEL, "--method", "fast", question="plan"), 'method must be "auto"', "'fast'")


def test_plan_of_too_little_memory_text(folder):
    fail(ask(folder, MODEL, "--memory", "much", question="plan"), "memory must be")
