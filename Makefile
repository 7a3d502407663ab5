# make quickstart   set up, then train the embedded text-to-image pipeline and report what it learned
# make test         set up, then run the tests, all but the slow ones and those that need a network
# make lint         set up, then ruff and pyright
# Everything is installed into .venv, once: a stamp remembers it until pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed-core
	$(BIN)/slas-trl train

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not network"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf $(VENV)

# pip is asked for, not only python: an environment whose making was interrupted has the one without the other.
# The tests compare two rewards with the packages of their authors. Without what those depend on, an old pytest and an old
# protobuf among it, which is also why no extra in pyproject.toml can name it.
PARITY := hpsv2==1.2.0 image-reward==1.5
STAMPS := $(VENV)/.installed-core $(VENV)/.installed-test $(VENV)/.installed-dev
$(STAMPS): $(VENV)/.installed-%: pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -e '.$(if $(filter-out core,$*),[$*])'
	$(if $(filter-out core,$*),$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(PARITY))
	@touch $@
