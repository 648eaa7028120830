# Verbs of the project; `make help` lists them. Everything lives in .venv, made on first use.

# Python 3.12 where one is found (PATH, pyenv, uv), else python3 >= 3.11.
PYTHON ?= $(shell scripts/find_python.sh)
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/jaxserve
DEMO := $(CACHE)/models/SmolLM2-135M-Instruct
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo demo-model serve test test-all smoke smoke-other check kernels-check kernels-gpu bench docs lock clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## make .venv and install the server, for the GPU that is found, else the CPU

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found (Debian: apt install python3-venv); install one or pass PYTHON=PATH"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[$$(scripts/find_extra.sh)]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install demo-model  ## serve SmolLM2-135M-Instruct on port 8000 (PORT=...)
	@$(BIN)/python scripts/announce.py http://localhost:$(PORT) SmolLM2-135M-Instruct $$PPID &
	exec $(BIN)/python -m jaxserve.serve --config smollm2-135m.yaml --model "$(DEMO)" --port $(PORT) $(ARGS)

demo-model: install  ## make the demo model's folder in ~/.cache/jaxserve
	@test -f "$(DEMO)/config.json" || $(BIN)/python scripts/fetch_demo_model.py --output "$(DEMO)"

serve: install  ## serve with your flags: make serve ARGS="--config qwen3b.yaml"
	exec $(BIN)/python -m jaxserve.serve $(ARGS)

test: $(VENV)/.installed-dev  ## run the suite (at most 20 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.installed-dev  ## run everything, slow tiers too, and record the result in docs/test-all.md
	$(BIN)/python scripts/test_all.py $(ARGS)

SMOKE := tests/device/test_engine_references.py tests/device/test_llm_offline.py tests/kernels/test_kv_write.py \
	tests/e2e/test_life.py::test_sigterm_finishes_what_runs_and_leaves_no_process

smoke: $(VENV)/.installed-dev  ## two minutes of the suite: engine, offline use, one server
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(SMOKE) $(ARGS)

smoke-other:  ## smoke on Python 3.11 and its jax, in .venv-3.11, where there is a second Python
	@other="$$(scripts/find_python.sh 3.11)"; \
	if [ -n "$$other" ] && [ "$$other" != "$(PYTHON)" ]; then $(MAKE) smoke PYTHON="$$other" VENV=.venv-3.11; \
	else echo "no second Python: no smoke test on it"; fi

check: $(VENV)/.installed-dev  ## style, import law, types of the control plane, house rules
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_tidy.py

# The versions that docs/kernels.md was written with: ptxas decides about registers. 270 MB, no driver, no CUDA libraries.
KERNELS := .venv-kernels
$(KERNELS)/.installed: constraints.txt
	@test -n "$$(scripts/find_python.sh 3.12)" || { echo "no Python 3.12 found: jax >= 0.11, and with it Mosaic GPU, needs it"; exit 1; }
	"$$(scripts/find_python.sh 3.12)" -m venv $(KERNELS)
	$(KERNELS)/bin/pip install -q --disable-pip-version-check -c constraints.txt jax flax
	jax="$$($(KERNELS)/bin/python -c 'import jax; print(jax.__version__)')"; \
	$(KERNELS)/bin/pip install -q --disable-pip-version-check --no-deps "jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax" \
	  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-nvdisasm==13.2.78
	@touch $@

kernels-check: $(KERNELS)/.installed  ## compile the GPU kernels for an H200 without one: no spills, as docs/kernels.md says
	PYTHONPATH=. $(KERNELS)/bin/python scripts/check_kernels.py $(ARGS)
	PYTHONPATH=. $(KERNELS)/bin/python scripts/check_portable.py $(filter --write,$(ARGS))
	PYTHONPATH=. $(KERNELS)/bin/python scripts/check_steps.py $(filter --write,$(ARGS))
	PYTHONPATH=. $(KERNELS)/bin/python scripts/check_sharded_steps.py $(filter --write,$(ARGS))
	PYTHONPATH=. $(KERNELS)/bin/python scripts/check_launches.py $(filter --write,$(ARGS))

kernels-gpu:  ## on a GPU, with PYTHON's packages as they are: results, speed and whole steps; kernels-gpu.{json,md}
	PYTHONPATH=. $(PYTHON) scripts/kernels_gpu.py $(ARGS)

bench: install demo-model  ## host and device time of a step on the demo model, and of the kernels alone
	$(BIN)/python scripts/bench_step.py --model "$(DEMO)" $(ARGS)
	$(BIN)/python scripts/bench_kernels.py

docs: $(VENV)/.installed-dev  ## write docs/configuration.md from the flags, docs/models.md from what the tests show
	$(BIN)/python scripts/write_configuration.py
	$(BIN)/python scripts/write_models.py
	$(BIN)/python -m scripts.write_malformed_models
	$(BIN)/python -m scripts.write_plan
	$(BIN)/python scripts/write_quantization.py

lock: $(VENV)/.installed-dev  ## write constraints.txt from what is installed in .venv and .venv-3.11
	$(BIN)/python scripts/lock.py $(VENV) .venv-3.11

clean:  ## remove what the verbs made here (the caches in ~/.cache/jaxserve stay)
	rm -rf $(VENV) .venv-3.11 $(KERNELS) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
