# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHARDS ?= ../shared/data
EXTRAS := dev,export,tensorboard,near-duplicates

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:            ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## make .venv with the pinned versions
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "inherclip needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: setup      ## the whole pipeline on embedded data; leaves runs/demo/report.html
	$(BIN)/inherclip run configs/demo.yaml

lint: setup      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup    ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint       ## lint, types and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

bench: setup     ## the measurements behind docs/ (SHARDS=folder of Flickr8k, PEER=python with open_clip_torch[training]: see benchmarks/data.py)
	$(BIN)/python benchmarks/inheritance.py
	$(BIN)/python benchmarks/train.py overhead
	$(BIN)/python benchmarks/train.py chunks
	$(if $(PEER),$(BIN)/python benchmarks/train.py open_clip --shards $(SHARDS) --peer-python $(PEER))
	$(BIN)/python benchmarks/data.py verify --shards $(SHARDS)
	$(BIN)/python benchmarks/data.py read --shards $(SHARDS)
	$(BIN)/python benchmarks/data.py download --shards $(SHARDS)

clean:           ## remove caches (never runs/ or data)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
