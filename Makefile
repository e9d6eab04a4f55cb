# Needs Python 3.10 or newer, git and make; the rest is set up on first use in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PYTHONUNBUFFERED := 1

# The first interpreter that starts and can make an environment; `make PYTHON=...` names another.
RUNS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3.13 python3; do \
	"$$p" -c '$(RUNS)' >/dev/null 2>&1 && echo "$$p" && break; done)
EXTRAS := dev,demo,diffusers,bench
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
TREE := build/typecheck

.PHONY: help install demo test lint typecheck pytest test-slow test-comfy soak-comfy bench-comfy coverage bench quality quality-full soak mutation clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## the environment and the package, editable

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer with the venv module was found; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python pyproject.toml setup.cfg setup.py constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## run examples/demo.py
	$(BIN)/python examples/demo.py $(ARGS)

test: lint typecheck pytest  ## ruff, mypy and the tests

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .

# mypy knows nothing of package_dir: it gets links under the names that the packages have when installed,
# and its messages name the folders again.
typecheck: $(STAMP)  ## mypy --strict
	@rm -rf $(TREE) && mkdir -p $(TREE)/cache_dit
	@cd $(TREE)/cache_dit && ln -s ../../../cache_dit/* ../../../passes ../../../comfy .
	set -o pipefail; cd $(TREE) && ../../$(BIN)/mypy --strict --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p cache_dit | sed -E 's#^cache_dit/(passes|comfy)/#\1/#'

pytest: $(STAMP)  ## the tests, a file at a time on each of two cores; ARGS="-k name" picks some
	$(BIN)/pytest -m 'not comfy and not slow' --durations=10 --numprocesses=2 --dist=loadfile $(ARGS)

test-slow: $(STAMP)  ## what takes longer: several processes, artifacts, inductor, generated models
	$(BIN)/pytest -m 'slow and not comfy' --durations=10 --numprocesses=2 --dist=loadfile $(ARGS)

# Outside of the checkout: 2 GB that every checkout can share.
COMFY ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cache_dit/comfy

# Sets ComfyUI up, then runs what follows in its environment; skipped where its packages cannot be had.
define in-comfy
	@$(PYTHON) tests/comfy/install.py $(COMFY); code=$$?; \
	if [ $$code -eq 3 ]; then echo "make $@: skipped, its packages cannot be installed here"; exit 0; fi; \
	[ $$code -eq 0 ] || exit $$code; \
	CACHE_DIT_COMFY_HOME=$(COMFY) $(COMFY)/env/bin/python
endef

test-comfy:  ## the nodes in two versions of ComfyUI and in a browser; ARGS="-k name" picks some
	$(in-comfy) -m pytest tests/comfy -m comfy --confcutdir=tests/comfy -rs --durations=10 \
		--numprocesses=2 --dist=loadgroup $(ARGS)

soak-comfy:  ## ten minutes of random prompts with interrupts in ComfyUI; ARGS="--minutes 60"
	$(in-comfy) tests/comfy/soak.py $(COMFY) $(ARGS)

bench-comfy:  ## seconds a picture in ComfyUI; ARGS="--part wait"
	$(in-comfy) benchmarks/comfyui.py $(COMFY) $(ARGS)

coverage: $(STAMP)  ## every transformer class of diffusers; writes docs/coverage.md
	$(BIN)/python benchmarks/coverage.py $(ARGS)

bench: $(STAMP)  ## measure speed and quality
	$(BIN)/python benchmarks/run.py $(ARGS)

quality: $(STAMP)  ## what each rule does to the pictures: the named part, half an hour; ARGS="--ci" minutes
	$(BIN)/python benchmarks/quality.py $(ARGS)

quality-full: $(STAMP)  ## the whole crossing of factors, hours; goes on where it was stopped
	$(BIN)/python benchmarks/quality.py --full $(ARGS)

soak: $(STAMP)  ## ten thousand calls with random events, and the tests that take minutes; ARGS="--calls 500"
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/soak.py $(ARGS)
	CACHE_DIT_SOAK=1 $(BIN)/pytest tests/reliability -m soak

mutation: $(STAMP)  ## changes to the runtime's code that tests must notice, hours; ARGS="clock --sample 50"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/mutation.py $(ARGS)

clean:  ## remove what was built, the environment too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
