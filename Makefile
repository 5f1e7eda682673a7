# Each target makes its own environment when there is none. VENV=path puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed

.PHONY: demo test

# The main job on a bundled reference: calibrate, slim, save, reload, same prompts and seeds.
demo: $(STAMP)
	$(VENV)/bin/slimdiff compress emoji-unet --params 0.5 --num-prompts 64 --steps 10 --batch-size 16
	$(VENV)/bin/slimdiff compare emoji-unet emoji-unet-slim --out emoji-unet-compare.png

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy src
	$(VENV)/bin/pytest -q -n 2 --dist worksteal

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(STAMP)
