# Everything here sets up what it needs: a virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SECONDS ?= 3600

.PHONY: demo test test-slow test-system lint bench bench-gigabyte soak deb apt-repo clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	touch $@

demo: $(STAMP)            ## three nodes in a temporary folder, converging before your eyes
	$(BIN)/harmonylite demo

test: $(STAMP)            ## the quick tests; no root, no network
	$(BIN)/python -m pytest -m 'not slow and not system' -n 2

test-slow: $(STAMP)       ## long simulations and fault tests with real processes
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-system: $(STAMP)     ## Debian machines that install, replicate and suffer; needs root
	$(BIN)/python -m pytest -m system tests/system

lint: $(STAMP)            ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)           ## the figures in README.md and docs/performance.md; writes bench-results.json
	$(BIN)/python -m benchmarks --json bench-results.json

bench-gigabyte: $(STAMP)  ## catching up with a database of 1 GB; takes several GB in /var/tmp
	$(BIN)/python -m benchmarks --only catchup --gigabyte

soak: $(STAMP)            ## generated histories for SECONDS seconds (default one hour)
	$(BIN)/python -m tests.sim.soak --seconds $(SECONDS)

deb: $(STAMP)             ## dist/*.deb for Debian 12 and 13
	PYTHON=$(BIN)/python packaging/build-deb.sh

apt-repo: deb             ## dist/apt: a signed repository of them
	packaging/apt-repo.sh

clean:
	rm -rf $(VENV) build dist *.egg-info
