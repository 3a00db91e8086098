# What the README's commands run. Each target sets up all it needs in $(VENV) and is quick when repeated.
#
#   make demo         answer several prompts plainly and speculatively with the demo model
#   make test         run the tests but the slow ones (those against PyTorch are skipped unless it is installed)
#   make test-all     install PyTorch as well and run every test, some of which take minutes
#   make check        lint, formatting, types
#
# VENV=folder puts the environment elsewhere; PYTHON=python3.12 picks the Python to build it with.

VENV ?= .venv
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3.10 python3; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo $$name; break; fi; done)
RUN := $(VENV)/bin/python

.PHONY: demo test test-all check
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(RUN) -m mlx_specstream.cli demo

test: $(VENV)/.installed-test
	@$(RUN) -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-torch
	@$(RUN) -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-test
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# Stamps: an installation is repeated only when pyproject.toml changes or the environment is new.
$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.10 or newer is needed and was not found; install it (macOS: brew install python," \
			"Debian: apt install python3-venv) or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) (once)"
	@$(PYTHON) -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
		echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@$(RUN) -m pip install -qq --disable-pip-version-check --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing mlx-specstream and what it needs into $(VENV) (some minutes the first time)"
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	@echo "Installing mlx-specstream and what its tests need into $(VENV) (some minutes the first time)"
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable ".[test]"
	@touch $@ $(VENV)/.installed

# On Linux pip takes PyTorch's CUDA build, some gigabytes. For the small CPU build install torch into $(VENV) first, the
# way its own site says; what is there already is kept.
$(VENV)/.installed-torch: $(VENV)/.created pyproject.toml
	@echo "Installing mlx-specstream, its tests and PyTorch into $(VENV) (some minutes the first time)"
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable ".[test,torch]"
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
