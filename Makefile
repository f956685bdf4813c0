# The two commands of the README. Each sets up what it needs and does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test
demo: $(VENV)/installed
	$(BIN)/python train.py --config configs/demo.py
	$(BIN)/python eval.py --checkpoint runs/demo --data scenes --output runs/demo/eval --save-images
	$(BIN)/python -m aecr_jax dehaze runs/demo/eval/hazy/scene1-000[0-2].png --output runs/demo/dehazed --checkpoint runs/demo --overwrite

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: use make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
