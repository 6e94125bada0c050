# The commands of this project; `make` alone lists them. Pip's and uv's own settings say where packages come from.

PYTHON ?= python3
# For a machine without uv; the Dockerfile names the same one.
UV_VERSION := 0.13.9

# After a crash, pytest-xdist may wait for ever for restarted workers: the first crash ends the run.
# In the order of the folders: if files with more tests came first, the longest one, which has one test, would run alone
# at the end.
WORKERS := --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

export PATH := $(PATH):$(CURDIR)/.venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-avx2 check lock clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-9s  %s\n", $$1, $$2}' Makefile

setup: .venv/installed  ## make .venv with everything in it, if it is not there yet (about 6 GB)

demo: setup  ## run the whole chain once: data, training, evaluation, report, registry
	@.venv/bin/d2r run

test: setup  ## run all tests
	@.venv/bin/python -m pytest $(WORKERS)

test-fast: setup  ## run the tests that are not marked slow
	@.venv/bin/python -m pytest $(WORKERS) -m 'not slow'

test-avx2: setup  ## run the tests of d2r_core with the kernels of CPUs without AVX-512
	@ONEDNN_MAX_CPU_ISA=AVX2 .venv/bin/python -m pytest $(WORKERS) tests/d2r_core

check: setup  ## check format, style and types; change nothing
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

lock: .venv/bin/pip  ## bring requirements.lock up to date with pyproject.toml
	@uv pip compile --quiet --no-header --no-emit-index-url --generate-hashes --universal --python-version 3.11 \
		--extra dev --output-file requirements.lock pyproject.toml

clean:  ## remove .venv and the tools' caches; data, models, reports, runs and DVC's cache stay
	@rm -rf .venv build d2r.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -path './.*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

# The last thing that venv makes is pip, so that a creation which was interrupted is repeated.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'error: D2R needs Python 3.11 or later, and $(PYTHON) is not: try make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@command -v uv >/dev/null || $@ install --quiet uv==$(UV_VERSION)

# Bytecode is compiled here: where Python may not write it, each process would compile all that it imports, which takes
# longer than the rest of its start.
.venv/installed: requirements.lock pyproject.toml | .venv/bin/pip
	@uv pip sync --require-hashes --compile-bytecode --python .venv/bin/python requirements.lock
	@uv pip install --quiet --no-deps --no-build-isolation --python .venv/bin/python --editable .
	@touch $@
