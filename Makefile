PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types docs dist clean

test: lint types
	$(BIN)/pytest

demo: $(READY)
	$(BIN)/int4-convert examples/tiny-llama demo-out --group-size 256 --overwrite
	$(BIN)/int4-inspect demo-out --verify
	$(BIN)/int4-eval demo-out --reference examples/tiny-llama --text examples/tiny-llama.heldout.txt \
		--seq-len 256 --batch-size 8

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/docs

dist: $(READY)
	rm -rf dist *.egg-info
	$(BIN)/python -m build --quiet --no-isolation
	$(BIN)/python tests/check_dist.py dist

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
