PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/gemma-3-270m
TORCH_CPU := torch==2.13.0+cpu
KEEP ?=
LOCK = echo '$(TORCH_CPU)' | $(BIN)/uv pip compile -q pyproject.toml - --extra cpu --constraint build/installed.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_36 --generate-hashes --only-binary :all: --emit-build-options --no-annotate \
	$(addprefix --no-emit-package ,torchvision torchaudio torchcodec triton opencv-python-headless) --custom-compile-command 'make lock' \
	--output-file deploy/locks/cpu.txt >/dev/null

SHELL := /bin/bash

.PHONY: install browser test test-all test-async test-v2 test-second-python contract image lock demo docs tutorial lint release-check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@echo "installing into $(VENV); the first time takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		$(BIN)/pip install -qq -e '.[cuda,demo,docs,dev]'; \
	else \
		$(BIN)/pip install -qq '$(TORCH_CPU)' \
			|| $(BIN)/pip install -qq --index-url https://download.pytorch.org/whl/cpu '$(TORCH_CPU)'; \
		$(BIN)/pip install -qq -e '.[cpu,demo,docs,dev]' \
			&& $(BIN)/pip uninstall -qq -y torchvision torchaudio torchcodec; \
	fi
	@touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	@$(BIN)/crane model fetch gemma-3-270m --to $(MODEL)

browser: install
	@.ci/browser $(BIN)

# The tests without engines in two processes of one thread each, then the others, whose engines want both cores.
test: install browser $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not engine and not release and not image' -n 2 --dist loadfile --durations 15
	$(BIN)/pytest -m 'engine and not release' --durations 25
	$(MAKE) test-async

# What depends on the plan of steps, with asynchronous scheduling, vLLM's default on GPUs; without what starts further engines.
test-async: install
	$(BIN)/python -m tests.runners v1 tests/engine/test_offline.py tests/engine/test_schedules.py -k 'not bit_identical' --durations 5

# Tests of engines as vLLM runs on GPUs: V2 model runner, asynchronous scheduling. Through Triton's interpreter: slow.
test-v2: install
	$(BIN)/python -m tests.runners v2 --durations 10

# What documents, packaging, deployment, benchmarks and simulations promise, too; before a release, and when these change.
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'release and not engine' -n 2 --dist loadfile --durations 15
	$(BIN)/pytest -m 'release and engine' --durations 15
	@.ci/second-python '$(TORCH_CPU)'

test-second-python: install
	@.ci/second-python '$(TORCH_CPU)'

# Whether vLLM's source has what the engine needs of it: make contract VERSION=0.33.0, or of all supported versions.
contract: install
	@$(BIN)/python -m tests.contract $(VERSION)

# Builds the image's CPU target, starts it as it is deployed, asks it and stops it. Needs a Docker engine.
image: install
	@mkdir -p build
	$(BIN)/pytest -s -m image tests/image 2>&1 | tee build/image.log; exit $${PIPESTATUS[0]}

# What the image's CPU target installs, by hash: the versions that .venv has. torch's build for CPUs comes from where uv is
# told to look (UV_FIND_LINKS, UV_INDEX), else from PyTorch's index.
lock: install
	@mkdir -p build
	@$(BIN)/pip freeze --exclude-editable | grep -v @ > build/installed.txt
	$(LOCK) || $(LOCK) --torch-backend cpu

demo: install
	@$(BIN)/crane demo --model $(MODEL) --out results/demo $(if $(KEEP),--keep)

# The site, into site/, and the addresses elsewhere that it links to.
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@grep -rhoE '<a [^>]*href="https?://[^"]+"' site --include=*.html | grep -oE 'https?://[^"]+' | sort -u

tutorial: install
	@$(BIN)/python tests/follow_tutorial.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

release-check: install $(MODEL)/config.json
	$(BIN)/python tests/release/serve_wheel.py build/release-check --torch '$(TORCH_CPU)' --model $(MODEL)

clean:
	rm -rf results build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
