# Both targets make the virtual environment in .venv first, where it is not there yet.
PYTHON ?= python3
VENV := .venv
PROMPT ?= a big red heart above a small green circle, against a gradient from sky blue to cream

.PHONY: picture test optimum

picture: $(VENV)/.installed
	$(VENV)/bin/export-flash --target ios
	$(VENV)/bin/export-flash generate bundles/flash-mini/ios "$(PROMPT)" --out picture.png

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

# A bundle of the diffusers contract in optimum's pipeline, in an environment of its own (their pins exclude ours).
optimum: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/pip install --quiet --disable-pip-version-check -r tests/optimum/requirements.txt
	$(VENV)/bin/export-flash --target android --format onnx --contract diffusers --bits 16 --out bundles/optimum
	$(VENV)-optimum/bin/python tests/optimum/draw.py bundles/optimum/android

# torch first and by itself, so that the build of this machine's package index is taken as it is.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
