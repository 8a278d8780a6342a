PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)/oldest
HARNESS := $(VENV)/harness

.PHONY: demo test oldest harness lint types docs dist clean

test: lint types
	$(BIN)/pytest

demo: $(READY)
	$(BIN)/int4-convert examples/tiny-llama demo-out --group-size 256 --overwrite
	$(BIN)/int4-inspect demo-out --verify
	$(BIN)/int4-eval demo-out --reference examples/tiny-llama --text examples/tiny-llama.heldout.txt \
		--seq-len 256 --batch-size 8

oldest: $(OLDEST)/.ready
	PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest \
		tests/test_transformers.py tests/test_architectures.py tests/test_hub.py tests/test_push.py tests/test_card.py

harness: $(HARNESS)/.ready
	PYTHONPATH=$(CURDIR) $(HARNESS)/bin/python -m pytest tests/test_lm_eval.py

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

# What is not installed here comes from the first environment, which stands behind these ones' own packages.
define borrow
	$(BIN)/python -m venv --clear --without-pip $(@D)
	cd $(@D)/lib/python*/site-packages && echo $(abspath $(VENV))/lib/python*/site-packages > lent.pth
	$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check $(1)
	touch $@
endef

$(OLDEST)/.ready: $(READY) constraints-oldest.txt
	$(call borrow,--requirement constraints-oldest.txt)

$(HARNESS)/.ready: $(READY)
	$(call borrow,--constraint constraints.txt lm-eval)

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
