# make report   a curvature report of a small trained network:  reports/digits-cnn/report.html
# make test     formatting, lint, types and all tests
#
# Both set themselves up on a fresh machine with Python 3.11 or newer: a virtual environment in
# .venv, and everything that is needed inside it. Afterwards they only work.
#
#   make report OPEN=1                                   shown in the browser at once
#   make report PROBLEM=digits-resnet OUT=somewhere      another problem, another folder
#   make test TORCH="torch==2.13.0"                      another build of PyTorch
#   make bench [DATA=folder with MNIST]                  the tables of benchmarks/results/
#   make study DATA=folder with mnist/ and cifar10/      the numbers of docs/study.md
#   make docs                                            the documentation: site/index.html
#   make notebooks                                       execute notebooks/ in place

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch
PROBLEM ?= digits-cnn
OUT     ?= reports/$(PROBLEM)
DATA    ?=
OPEN    ?=
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(2, min(4, os.cpu_count() or 2)))")
PYTEST  ?=

BIN   := $(VENV)/bin
# Python compiles modules when they are first imported; to compile all of PyTorch's takes minutes.
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
# One stamp per choice of TORCH: asking for another one installs again.
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
TAG   := $(subst /,_,$(subst $(SPACE),_,$(subst >,-,$(subst <,-,$(subst =,-,$(TORCH))))))
BASE  := $(VENV)/.installed-$(TAG)
DEV   := $(VENV)/.installed-dev-$(TAG)

.PHONY: report test lint format types unit bench study notebooks docs clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^PYTHON/q;s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "curvscope needs Python 3.11 or newer; name one with make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)" -e .
	@rm -f $(VENV)/.installed-*
	@touch $@

# The environment for development has everything that the report needs, too.
$(DEV): pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)" -e ".[dev]"
	@rm -f $(VENV)/.installed-*
	@touch $(BASE) $@

report: $(BASE)
	$(BIN)/curvscope report $(PROBLEM) --out "$(OUT)" $(if $(DATA),--data "$(DATA)")$(if $(OPEN), --open)

test: lint types unit

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(DEV)
	$(BIN)/mypy

# One thread per test process: the processes share the cores, and results do not depend on how
# many there are. Tests of a file stay in one process, which then makes what they share once.
unit: $(DEV)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(PYTEST)

# Tables of benchmarks/results/; peers that are installed are measured beside curvscope.
BENCHMARKS ?= blocks eigenpairs optimizers products spectra monitor $(if $(DATA),kbfgs_mnist)
bench: $(DEV)
	@for name in $(BENCHMARKS); do \
	  echo "== $$name"; \
	  case $$name in kbfgs_mnist|monitor) data="$(DATA)";; *) data=;; esac; \
	  $(BIN)/python benchmarks/$$name.py $${data:+--data "$$data"} || exit 1; done

notebooks: $(DEV)
	$(BIN)/python notebooks/execute.py

# The documentation as a site: site/index.html
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "$(CURDIR)/site/index.html"

# The study of docs/study.md: its numbers, figures and page; goes on where it was interrupted.
study: $(DEV)
	$(BIN)/python benchmarks/study.py $(if $(DATA),--data "$(DATA)")

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find curvscope tests -name __pycache__ -type d -prune -exec rm -rf {} +
