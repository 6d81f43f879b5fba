# `make demo` and `make test` need Python >= 3.11 and git, nothing else: they make .venv once and use it again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, a file at a time: its fixtures and programs are made once. The order is that of tests/conftest.py.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-fast soak lint docs install install-report install-test clean

demo: install-report  ## the whole loop on 2 CPU cores in minutes: no network, no account
	$(BIN)/dno run configs/demo.yaml

test: install-test  ## what CI runs
	$(BIN)/python -m pytest -m "not soak" $(WORKERS) $(PYTEST_ARGS)

test-fast: install-test  ## what needs no compiled program, in some 3 minutes
	$(BIN)/python -m pytest -m "not soak and not compiles and not slow" $(WORKERS) $(PYTEST_ARGS)

soak: install-test  ## long runs and many kills
	$(PIP) install -q -e ".[test-bucket]"
	DNO_TEST_OPTIMISED=1 $(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

lint: install-test
	$(PIP) install -q -e ".[dev]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

docs: install-report  ## docs/ as a site, in site/
	$(PIP) install -q -e ".[docs]"
	$(BIN)/mkdocs build --strict

install: $(VENV)/.installed
install-report: $(VENV)/.installed-report
install-test: $(VENV)/.installed-test

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.installed-report: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e ".[report]"
	@touch $@ $(VENV)/.installed

# torch comes first and pinned: it is a test dependency, and the pinned release has a CPU build.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q torch==2.13.0
	$(PIP) install -q -e ".[test]"
	@touch $@ $(VENV)/.installed $(VENV)/.installed-report

clean:
	rm -rf $(VENV) runs site
