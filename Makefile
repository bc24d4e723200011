# make demo    the main job on real embedded data, with a figure
# make test    the whole test suite
# make lint    style, docstrings and types
# make bench   measure beside the peers; writes benchmarks/results and docs/benchmarks.md
# make models  try models of other people's beside plain autograd; writes docs/models.md
# make audit   compare torch's own second derivatives with differences; writes docs/audit
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= hesse-demo
# laplace-torch and BackPACK, and what they import. They ask for torchvision too, which nothing here uses and which would
# replace torch, so they come without dependencies.
LAPLACE := laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops lightning-utilities \
	linear_operator opt_einsum torchmetrics unfoldNd

.PHONY: demo test lint bench models audit clean

demo: $(VENV)/.installed
	$(BIN)/hesse demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What curvlinops imports beside.
bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		jaxtyping wadler_lindig
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.table

# In an environment of their own: they bring some hundred packages.
models: $(VENV)-models/.installed
	$(VENV)-models/bin/python -m benchmarks.models.run
	$(VENV)-models/bin/python -m benchmarks.models.page

audit: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt expecttest
	$(BIN)/python -m benchmarks.audit

$(VENV)-models/.installed: pyproject.toml constraints.txt benchmarks/models/constraints.txt
	$(PYTHON) -m venv $(VENV)-models
	$(VENV)-models/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--constraint benchmarks/models/constraints.txt --editable '.[models]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps $(LAPLACE)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-models $(OUT)
