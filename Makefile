# The two commands of the README, `make demo` and `make test`; `make test-all` adds what is slow. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: demo test test-all matrix docs
demo: $(VENV)/installed
	$(BIN)/python train.py --config configs/demo.py
	$(BIN)/python eval.py --checkpoint runs/demo --data scenes --output runs/demo/eval --save-images
	$(BIN)/python -m aecr_jax dehaze runs/demo/eval/hazy/scene1-000[0-2].png --output runs/demo/dehazed --checkpoint runs/demo --overwrite

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-all: test
	$(BIN)/python -m pytest -m slow

# Installs the package into fresh environments with several versions of Python, jax and flax, and uses it there; takes many minutes.
matrix:
	$(PYTHON) tests/matrix.py

docs: $(VENV)/installed-test
	$(BIN)/python docs/architecture.py
	$(BIN)/mkdocs build --quiet --strict

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: use make PYTHON=python3.11" >&2; exit 2; }
	@echo "installing into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) -r requirements-test.txt
	@touch $@
