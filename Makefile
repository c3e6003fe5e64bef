# Every target makes the environment it needs. Versions are those of constraints.txt, the ones everything was run with.
PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

# Compiled Python is kept even where the environment says that it is not: without it every start compiles torch again,
# which takes longer than most tests that start a process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test coverage test-triton fuzz lint format docs clean

setup: $(DEV_STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by its exact version: left to the resolver it may be a build with gigabytes of CUDA libraries.
# Without bytecode: Python makes it on first use for what is imported; for the thousands of files that are not it takes
# as long as everything else.
INSTALL = $(PIP) install --quiet --no-compile --constraint constraints.txt
INSTALL_TORCH = $(INSTALL) "torch==$$(sed -n 's/^torch==//p' constraints.txt)"

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL_TORCH)
	$(INSTALL) --editable .
	touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL_TORCH)
	$(INSTALL) --editable ".[dev]"
	touch $(RUN_STAMP) $@

# Two language models from real abstracts, dense and 75 % sparse, then fine-tuning and soft prompts; ends with a report.
demo: $(RUN_STAMP)
	$(BIN)/sparsetrain pipeline experiment=demo

# torch with one thread per test process is as fast as the machine allows.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(DEV_STAMP)
	$(PYTEST) tests

# The same tests with their coverage of branches, which takes about twice as long.
coverage: $(DEV_STAMP)
	$(PYTEST) --cov --cov-report=term --cov-fail-under=85 tests

# Ten thousand mutated inputs for each reader of files; `make test` takes some of them.
fuzz: $(DEV_STAMP)
	SPARSETRAIN_FUZZ=10000 $(PYTEST) tests/fuzz

# The kernels for a GPU, where there is none: by Triton's interpreter.
test-triton: $(DEV_STAMP)
	$(INSTALL) --editable ".[dev,triton]"
	$(BIN)/python -m pytest tests/kernels/test_triton_bsr.py tests/kernels/test_triton_norm.py \
		tests/sparsity/backends/test_triton_backend.py

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of the documents, into site/. A warning is an error.
docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .kernels build dist site .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* htmlcov *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
