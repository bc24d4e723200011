"""The demo, as `make demo` runs it."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from hesse.cli import main

FILES = ["diagonal.safetensors", "hessian.safetensors", "figure.png"]


def test_demo(tmp_path):
    folder = tmp_path / "new" / "folder"
    done = subprocess.run(
        [sys.executable, "-c", "from hesse.cli import main; main()", "demo", "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-3:] == [str(folder / name) for name in FILES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)

    for line in (
        "accuracy 9",
        "method ",
        "* sweep",
        "largest deviation: ",
        "extrapolated",
        " of them negative",
        " apart",
    ):
        assert line in done.stdout
    assert "NOT WITHIN" not in done.stdout
    said = done.stdout.split("largest deviation: ")[1].split()[0]
    assert float(said) < 1e-12

    with safe_open(folder / "diagonal.safetensors", "pt") as file:
        diagonal = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["question"] == "diagonal"
    assert sum(value.numel() for value in diagonal.values()) > 100_000
    assert [list(value.shape) for name, value in sorted(diagonal.items()) if name == "0.weight"] == [
        [48, 1, 3, 3]
    ]
    with safe_open(folder / "hessian.safetensors", "pt") as file:
        assert len(file.keys()) == 16
        assert file.metadata()["question"] == "hessian"

    import matplotlib.image

    height, width = matplotlib.image.imread(folder / "figure.png").shape[:2]
    assert min(height, width) > 1000


@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib"])
def test_missing_package(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"hesse: error: {module} cannot be imported")
    assert done.stderr.endswith("pip install 'hesse[demo]'\n")
    assert done.stderr.count("\n") == 1


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "file" / "folder")])
    assert done.exit_code == 2
    assert done.stderr.startswith("hesse: error: cannot write ")
    assert done.stderr.count("\n") == 1
