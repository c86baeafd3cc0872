PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: help install demo test test-all bench soak docs package check format clean
help:
	@echo "make demo      install into $(VENV), run the main job on phantom tissue, print the report's path"
	@echo "make test      install and run the tests (under 5 minutes on 2 cores)"
	@echo "make test-all  the tests and the longer ones"
	@echo "make bench     ratios of speed, held against those that are committed (2 minutes)"
	@echo "make soak      kill trainings, caches, slides and exports at random moments, 50 times each (long)"
	@echo "make package   wheel and sdist, looked into and installed with each extra (long)"
	@echo "make docs      the pages, into docs/_build/html; warnings are errors"
	@echo "make check     formatting, lint, types"
	@echo "make format    format and mend what can be mended"

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/histill demo --out $(OUT)

# The tests are many small things: processes of one thread each, as threads wait for one another more than they help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m "slow or not slow"

bench: install
	$(BIN)/python benchmarks/guard.py

# At moments of its own each time; it says how to have the same again.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills 50 --out benchmarks/results/soak.json

# -E -a: everything anew, as a page also depends on docstrings.
docs: install
	$(BIN)/sphinx-build -q -E -a -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

package: install
	$(BIN)/python benchmarks/package.py

check: install
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy

format: install
	$(BIN)/ruff format src tests benchmarks docs
	$(BIN)/ruff check --fix src tests benchmarks docs

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
