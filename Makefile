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

.PHONY: demo test lint bench models audit clean

demo: $(VENV)/.installed
	$(BIN)/hesse demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# BackPACK asks for torchvision, which it does not use here and which would replace torch; curvlinops asks for it too.
bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		backpack-for-pytorch einops einconv unfoldNd curvlinops-for-pytorch linear-operator jaxtyping opt-einsum wadler_lindig
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
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-models $(OUT)
