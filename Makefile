# `make` lists the targets. Each makes .venv first when it is missing or older than pyproject.toml or constraints.txt.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# DEMO_SERVE=0 ends the demo without the page; DEMO_STEPS=60 learns less, to see whether all works.
DEMO_SERVE ?= 1
DEMO_STEPS ?=
SHORTER := $(if $(DEMO_STEPS),steps=$(DEMO_STEPS))
# The commands that `make demo` runs, one a line. Interrupted, it goes on where it was.
define DEMO
$(BIN)/fnlm prepare demo
$(BIN)/fnlm train demo --resume $(SHORTER)
$(BIN)/fnlm finetune runs/demo data/demo-chat --resume $(SHORTER)
$(BIN)/fnlm sample runs/demo --seed 1
$(BIN)/fnlm eval runs/demo-chat --questions 500
endef

# One thread: the tests compare bits, and their tensors are too small to share. The fast ones are dealt to a process for each core,
# up to 4: each takes about 1 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
DEALT := --numprocesses=auto --maxprocesses=4 --dist=worksteal

.PHONY: help venv demo test test-all test-slow check format bench serve clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED)  ## install the project and its tools into .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fnlm needs Python 3.10 or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (torch is most of it; minutes on a slow network):"
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]" -c constraints.txt \
	  | awk '/^Collecting / { printf " %s", $$2; fflush(); n++ } END { if (n) print "" }'
	@$(BIN)/python -c 'import platform, torch; print("installed: python", platform.python_version(), "torch", torch.__version__)'
	@touch $@

demo: $(INSTALLED)  ## train a model on a small world, on one CPU, and talk with it
	$(DEMO)
ifneq ($(DEMO_SERVE),0)
	$(BIN)/fnlm serve runs --open
endif

test: $(INSTALLED)  ## the fast tests
	$(PYTEST) $(DEALT) -m "not slow"

test-all: $(INSTALLED)  ## every test
	$(PYTEST)

test-slow: $(INSTALLED)  ## only the tests that `make test` leaves out
	@status=0; $(PYTEST) -m slow --collect-only -q > /dev/null || status=$$?; \
	if [ $$status -eq 5 ]; then echo "no test is marked slow"; else $(PYTEST) -m slow; fi

check: $(INSTALLED)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict fnlm

format: $(INSTALLED)  ## rewrite the files as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## time a training step; AGAINST=path compares with an earlier result
	$(BIN)/fnlm bench step $(if $(AGAINST),--against $(AGAINST))

serve: $(INSTALLED)  ## chat with a run on http://127.0.0.1:8000; RUN=runs/name
	$(if $(RUN),,$(error which run? make serve RUN=runs/name))$(BIN)/fnlm serve $(RUN)

clean:  ## remove the environment and the caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
