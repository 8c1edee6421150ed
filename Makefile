# Both targets make the virtual environment in .venv first, where it is not there yet.
PYTHON ?= python3
VENV := .venv
PROMPT ?= a large red heart in front of a blue square on a mint background

.PHONY: picture test

picture: $(VENV)/.installed
	$(VENV)/bin/export-flash --target ios
	$(VENV)/bin/export-flash generate bundles/flash-mini/ios "$(PROMPT)" --out picture.png

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

# torch first and by itself, so that the build of this machine's package index is taken as it is.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
