# Nothing is needed but Python 3.11 or newer and make. Each target makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

# what `make check` compares with: the changes since the last commit, or SINCE=REF
SINCE ?= HEAD
# with more workers than processors, what has a deadline comes too late
WORKERS := 2
PYTEST := $(BIN)/pytest -n $(WORKERS)

.PHONY: help install browser lint demo check test soak coverage lab bench sync clean

help:
	@echo "make demo      train on digits, judge, pack, serve, ask over HTTP"
	@echo "make check     what a change can have broken: lint, quick tests, the chapters that it touches; SINCE=REF"
	@echo "make test      lint, every notebook, every test"
	@echo "make soak      what is long by nature: a fleet that loses nodes"
	@echo "make coverage  every test, and which lines and branches none of them meets"
	@echo "make lab       JupyterLab on the notebooks"
	@echo "make bench     the measurements in benchmarks/"
	@echo "make sync      export and clean the notebooks, render README.md"
	@echo "make clean     remove .venv; models and runs stay"

# The stamp is written last: an interrupted installation is begun again, a finished one is not repeated.
$(BIN)/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

install: $(BIN)/.installed

demo: install
	$(BIN)/mlkit demo

# The page is tested in a real browser, if there is one or one may be installed; else the test says that it is not.
browser:
	@for p in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$p && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get; then \
	apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium || true; fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check nbs kernels tests benchmarks

check: lint
	$(PYTEST) --since $(SINCE)

test: lint browser
	$(PYTEST) --durations=25

soak: install
	$(BIN)/pytest tests/whole_fleet.py

coverage: install browser
	rm -rf .coverage_data && mkdir .coverage_data
	$(BIN)/coverage run -m pytest -n $(WORKERS)
	$(BIN)/coverage combine -q .coverage_data
	$(BIN)/coverage report --skip-covered --sort=cover

lab: install
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=. nbs/01_tour.ipynb

bench: install
	$(BIN)/python benchmarks/run.py

sync: install
	$(BIN)/nbdev_export
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-clean --fname kernels
	$(BIN)/python tests/readme.py

clean:
	rm -rf .venv
