# make demo   installs yolotrt for the CPU into .venv, builds an engine and detects in pictures
# make test   installs the test extras into .venv and runs the tests
# make lint   ruff and mypy
# make clean  removes what these commands made

PYTHON ?= python3
VENV ?= .venv
# Your own: make demo WEIGHTS=yolov5s.wts SOURCE="pictures/ more.jpg"
WEIGHTS ?=
SOURCE ?= samples/
PYTEST_ARGS ?=

BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed-cpu
	$(BIN)/python -m yolotrt -s $(if $(WEIGHTS),--weights "$(WEIGHTS)")
	$(BIN)/python -m yolotrt -d $(SOURCE)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One stamp an extra: a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed: name one, as in make demo PYTHON=python3.11' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs yolotrt.engine build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
