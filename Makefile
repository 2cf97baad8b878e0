# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help smoke test test-slow test-all test-gpu fuzz slurm sandbox lint bench clean

help:
	@echo "make smoke     train the default model on this machine (a few minutes on two cores)"
	@echo "make test      the tests (about 9 minutes on two cores)"
	@echo "make test-slow SHARD=1/4  a quarter of the slow tests; without SHARD all of them"
	@echo "make test-all  the tests and the slow ones"
	@echo "make slurm     install SLURM for the tests that need it (Debian, as root; part of test-slow and test-all)"
	@echo "make sandbox   install bubblewrap and a browser for the tests that need them (Debian, as root; part of the same)"
	@echo "make test-gpu  the tests that need a GPU"
	@echo "make fuzz MINUTES=120  feed damaged and hostile files to every parser, until one fails or the time is over"
	@echo "make lint      ruff and mypy"
	@echo "make bench     side-by-side measurements"
	@echo "make clean     remove the environment, the runs and what the tools left"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Leviathan needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# two ranks with expert parallelism where there are two cores and no GPU
SMOKE_RANKS = $(shell $(PYTHON) -c 'import glob, os; print("launch=torchrun launch.processes=2 parallel.ep=2" * ((os.cpu_count() or 1) > 1 and not glob.glob("/dev/nvidia[0-9]*")))')

smoke: $(STAMP)
	$(VENV)/bin/leviathan train experiment=smoke $(SMOKE_RANKS)

# two workers; a test's ranks are processes of their own
WORKERS ?= 2

test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-slow: $(STAMP) slurm sandbox
	PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n $(WORKERS) -m "slow and not gpu" $(if $(SHARD),--shard $(SHARD))

test-all: $(STAMP) slurm sandbox
	PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n $(WORKERS) -m "not gpu"

slurm:
	@command -v sbatch >/dev/null && command -v munge >/dev/null && test -x /usr/sbin/slurmctld || \
	  { apt-get update -qq; apt-get install -y -qq --no-install-recommends slurm-wlm munge; }

sandbox:
	@command -v bwrap >/dev/null && command -v chromium-headless-shell >/dev/null || \
	  { apt-get update -qq; apt-get install -y -qq --no-install-recommends bubblewrap chromium-headless-shell; }

test-gpu: $(STAMP)
	$(RUN) -m pytest -m gpu

MINUTES ?= 120

fuzz: $(STAMP)
	$(RUN) -m tests.fuzz $(MINUTES) $(TARGETS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(STAMP)
	$(RUN) -m bench

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
