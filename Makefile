# raysandbox: what to do with the source tree. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# Ray has wheels for 3.10 to 3.13; 3.11 is what this is developed with.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10 python3,\
    $(shell command -v $(p))))
# By its whole path: what tests start behind walls has no other way to it.
CHECK := "$(CURDIR)/.venv/bin/python"
PIP := .venv/bin/python -m pip -qq --disable-pip-version-check
SOURCES := pyproject.toml setup.py MANIFEST.in $(wildcard profiles/*.toml) \
    $(wildcard native/*.c native/*.h native/proxy/*.c native/proxy/*.h native/Makefile) \
    $(shell find raysandbox -type f \( -name '*.py' -o -name '*.toml' -o -name '*.lua' \
        -o -name '*.yml' -o -name py.typed \) \
        -not -path 'raysandbox/_*/*')
# Arguments for pytest: make test ARGS='-k seccomp'
ARGS ?=
# Versions of Ray to try; each gets an environment of its own.
RAY ?= 2.60.0
# Side by side: what keeps a processor busy, and what waits. LANES= runs one by one.
LANES ?= -n 2

help:  ## list the targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
	    awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup:  ## system packages (Debian, as root) and the kernel for QEMU
	@PYTHON='$(PYTHON)' ./setup.sh

.venv: .venv/.installed  ## Python environment with the built wheel and all that tests need

native: ## launcher and library into raysandbox/_bin, to work in the source tree
	@$(MAKE) -C native OUT=../raysandbox/_bin

lint: .venv/.installed  ## ruff, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Tests run in build/check, which has links to the tests and not to the package:
# what they import is what the wheel installed.
test: setup .venv/.installed build/check/tests  ## everything, lint and types included
	@status=0; $(MAKE) lint || status=1; \
	$(MAKE) -C native sanitize || status=1; \
	cd build/check && $(CHECK) -m pytest $(LANES) $(ARGS) || status=1; \
	if [ $$status -ne 0 ]; then echo 'make test: FAILED (see above)' >&2; fi; exit $$status

quick: .venv/.installed build/check/tests  ## tests without Ray, machines, images, other kernels
	@cd build/check && $(CHECK) -m pytest \
	    -m 'not ray and not cluster and not image and not qemu' $(ARGS)

demo: setup .venv/.installed  ## the same attacks on stock Ray and in the sandbox
	@cd build && ../.venv/bin/raysandbox demo $(ARGS)

bench: setup .venv/.installed build/check/tests  ## figures, to build/bench.json
	@cd build/check && $(CHECK) -m tests.bench $(ARGS)

versions: .venv/.installed native  ## try other Rays: make versions RAY='2.55.0'
	@$(CHECK) -m tests.node.versions $(RAY)

clean:  ## remove everything that was built, .venv too
	rm -rf .venv build raysandbox/_bin *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup .venv native lint test quick demo bench clean

.venv/.created:
	@echo "creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install --upgrade pip 'setuptools>=77'
	@touch $@

# setuptools would carry files of an older build over: build/lib* goes first.
build/wheel/.built: $(SOURCES) | .venv/.created
	@echo 'building the wheel'
	@rm -rf build/wheel build/lib* build/bdist.* raysandbox.egg-info
	@$(PIP) wheel --no-deps --no-build-isolation --no-index --wheel-dir build/wheel .
	@touch $@

.venv/.installed: build/wheel/.built
	@echo 'installing the wheel and what tests need into .venv'
	@wheel=$$(echo "$$PWD"/build/wheel/raysandbox-*.whl); \
	$(PIP) install --no-deps --no-index --force-reinstall "$$wheel"; \
	$(PIP) install "raysandbox[dev] @ file://$$wheel"
	@touch $@

build/check/tests:
	@mkdir -p build/check
	@ln -sfn ../../tests build/check/tests
	@ln -sfn ../../pyproject.toml build/check/pyproject.toml
