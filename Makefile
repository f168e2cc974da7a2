# Everything happens in .venv; `make demo` on a fresh machine installs first.
# PYTHON is the interpreter that .venv is made with: make install PYTHON=python3.12

PYTHON ?= python3
AUDIOCRAFT := audiocraft==1.3.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-model demo-dataset test test-long lint clean

help:
	@echo "make install   make $(VENV) and install everything in it (about 3 GB to download, 7 GB on disk)"
	@echo "make demo      fine-tune a tiny MusicGen on a small dataset, on any machine"
	@echo "make demo-dataset, make demo-model   make demo/dataset/, demo/model/ again: demo/README.md"
	@echo "make test      run the tests, in about 5 minutes"
	@echo "make test-long run the tests that take long"
	@echo "make lint      check style, types, imports and lengths"
	@echo "make clean     delete $(VENV), caches and demo/output/; models/ and generated/ stay"

install: $(INSTALLED)

# The stamp is written last: an install that was interrupted is taken up again.
$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v[:2] <= (3, 13) or sys.exit("Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d. Name another: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 3 GB to download, some minutes without a word."
	@# audiocraft's metadata pins torch 2.1, so pip must not see it while it installs the rest;
	@# what audiocraft really imports is in requirements.txt.
	@$(BIN)/python -m pip uninstall -qq --yes audiocraft
	@$(PIP) --requirement requirements.txt --requirement requirements-dev.txt
	@$(PIP) --no-deps $(AUDIOCRAFT)
	@touch $@
	@echo "Installed."

demo: install
	$(BIN)/python demo/demo.py

# How the demo's files were made; see demo/README.md. Delete demo/output/build/ to start afresh.
BUILD := demo/output/build

demo-dataset: $(BUILD)/.installed
	$(BIN)/python -m demo.build.music dataset

demo-model: $(BUILD)/.rendered
	$(BIN)/python -m demo.build.model
	$(BIN)/python -m demo.build.judge
	$(BIN)/python -m demo.build.report

$(BUILD)/.installed: $(INSTALLED) demo/build/requirements.txt
	$(PIP) --requirement demo/build/requirements.txt
	@mkdir -p $(BUILD)
	@touch $@

$(BUILD)/.rendered: $(BUILD)/.installed
	$(BIN)/python -m demo.build.music pretrain
	@touch $@

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: install
	$(PYTEST) -m "not long"

test-long: install
	$(PYTEST) -m long

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tests/imports.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
