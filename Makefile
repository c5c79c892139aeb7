PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/gemma-3-270m
KEEP ?=

.PHONY: install test demo lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@echo "installing into $(VENV); the first time takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		$(BIN)/pip install -qq -e '.[cuda,demo,dev]'; \
	else \
		$(BIN)/pip install -qq 'torch==2.13.0+cpu' \
			|| $(BIN)/pip install -qq --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'; \
		$(BIN)/pip install -qq -e '.[cpu,demo,dev]' \
			&& $(BIN)/pip uninstall -qq -y torchvision torchaudio torchcodec; \
	fi
	@touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	@$(BIN)/crane model fetch gemma-3-270m --to $(MODEL)

test: install $(MODEL)/config.json
	$(BIN)/pytest

demo: install
	@$(BIN)/crane demo --model $(MODEL) --out results/demo $(if $(KEEP),--keep)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
