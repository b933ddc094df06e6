# Each target makes what it needs: `make demo` on a fresh clone creates .venv, installs and runs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test drill lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) cli.py demo

test: setup
	$(RUN) -m pytest

drill: setup
	$(RUN) -m tools.drill.run_drill

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) demo-workspace .pytest_cache .ruff_cache .hypothesis *.egg-info
