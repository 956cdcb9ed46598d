# Two commands: `make exam` and `make test`. Everything lives in .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: exam test lint types unit format clean

exam: .venv/exam.stamp
	$(BIN)/eyechart exam --out exam

test: lint types unit

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/test.stamp
	$(BIN)/pyright

unit: .venv/test.stamp
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamps, not the folder, say that an installation went through to its end.
.venv/exam.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "eyechart needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@echo "Installing eyechart into .venv; this takes a minute or more, once."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/test.stamp: .venv/exam.stamp
	@echo "Installing the test tools into .venv."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv exam .pytest_cache .ruff_cache .hypothesis
