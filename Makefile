# The commands of this repository; CI runs the same ones. `make` without a target lists them.
# Requirements: make and Python 3.11 or newer with venv. Everything else is installed into .venv/.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # only one pip may run at a time in .venv
.PHONY: help serve check test test-avx2 test-long test-containers format train-demo bench clean

VENV := .venv
PYTHON ?=
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= models/fashion32
EXTRA ?= base
DATA ?=
# One process more than processors, because many tests wait; more than four need too much memory.
PROCESSES := $(shell processors=$$(nproc 2>/dev/null || echo 2); [ $$processors -lt 4 ] && echo $$((processors + 1)) || echo 4)
# Each file runs in one process, which sets up its fixtures once; slow folders first.
# If a process dies, the run ends with the test's name: pytest-xdist would start another process and might then wait forever.
PARALLEL := --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder --max-worker-restart=0
# Without this variable, which many containers set: pip leaves compiling to the first import, and each of the many processes of the
# tests would compile every package again, which takes seconds.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/pytest

# Variables that limit libraries to AVX2: oneDNN (in OpenVINO and PyTorch), PyTorch, its MKL, numpy and its OpenBLAS.
# ONNX Runtime and a few kernels of OpenVINO cannot be limited (tests/parity/test_limited_instructions.py lists them).
AVX2_ONLY := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
    NPY_DISABLE_CPU_FEATURES='X86_V4 AVX512_ICL AVX512_SPR' OPENBLAS_CORETYPE=Haswell
# "yes" on a processor that has AVX2 and no later vector instructions; empty where that is unknown (only Linux has this file)
ONLY_AVX2 := $(shell awk '/^flags/ { print (/ avx2( |$$)/ && !/ (avx512|avx_|avx10|amx)/) ? "yes" : "no"; exit }' /proc/cpuinfo 2>/dev/null)
# Tests whose results depend on the processor's instructions
COMPUTING := $(filter-out tests/parity/test_manifests.py, $(wildcard tests/parity/test_*.py)) tests/integration/test_bundled_model.py \
    $(addprefix tests/unit/, service/backends/test_backends.py service/backends/test_onnx_backends.py model_export/test_parity.py) \
    $(addprefix tests/unit/diffusion/test_, classifier_guidance.py time_mlp.py update.py)

help:  ## print this list (default)
	@echo 'make TARGET [NAME=value ...]'
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-13s %s\n", $$1, $$2 }'

serve: $(VENV)/.installed-$(EXTRA)  ## serve MODEL (models/fashion32) on HOST (127.0.0.1) and PORT (8000); EXTRA=torch to serve checkpoints
	exec $(VENV)/bin/iddpm serve --model "$(MODEL)" --host "$(HOST)" --port "$(PORT)"

check: $(VENV)/.installed-dev  ## linters only: ruff, format, mypy, import directions, hadolint, yamllint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/yamllint --strict .yamllint.yml docker-compose*.yml deploy

# The linters use one processor; what they print follows when they end, as a whole. The tests stay in the foreground: a shell lets
# processes in the background ignore SIGINT, which tests send. Not $$(MAKE): `make -n` would run it.
test: $(VENV)/.installed-dev  ## all tests with reduced counts, and the linters beside them (minutes)
	@{ output=$$(make check 2>&1); status=$$?; printf '\n%s\n' "$$output"; exit $$status; } & linters=$$!; \
	$(PYTEST) $(PARALLEL); tests=$$?; \
	wait $$linters || { echo 'make check failed: what it printed is above, between the lines of the tests' >&2; exit 1; }; \
	exit $$tests

test-avx2: $(VENV)/.installed-dev  ## numerical tests with the kernels of a processor without AVX-512 and bfloat16
ifeq ($(ONLY_AVX2),yes)
	@echo 'Skipped: this processor has no instructions beyond AVX2, so that `make test` runs the same kernels.'
else
	$(AVX2_ONLY) $(PYTEST) $(PARALLEL) $(COMPUTING)
endif

test-long: check $(VENV)/.installed-ray  ## linters, then all tests with full counts, with Ray too (for a release)
	IDDPM_TEST_LONG=1 $(PYTEST) $(PARALLEL)

test-containers: $(VENV)/.installed-dev  ## the real Dockerfile and compose file with three replicas (docker; 10 minutes)
	IDDPM_TEST_CONTAINERS=1 $(PYTEST) -v tests/containers

format: $(VENV)/.installed-dev  ## reformat the code with ruff
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

train-demo: need-data $(VENV)/.installed-train  ## train the bundled model's preset from DATA (an npz file or a folder of class folders)
	exec $(VENV)/bin/iddpm train fashion32 --data "$(DATA)" --out runs/fashion32

bench: $(VENV)/.installed-bench  ## quick benchmark of a denoising step (minutes); prints how to run the long ones
	$(VENV)/bin/python -m benchmarks.denoise_step --quick
	@echo
	@echo 'The long ones, on an idle machine (hours; add --device cuda for a GPU):'
	@echo '  $(VENV)/bin/python -m benchmarks.denoise_step'
	@echo '  $(VENV)/bin/python -m benchmarks.sample'
	@echo '  $(VENV)/bin/python -m benchmarks.precision --judge build/judge.safetensors'
	@echo '  $(VENV)/bin/python -m benchmarks.serving  # to install Triton and LitServe: benchmarks/peers/requirements-*.txt'

.PHONY: need-data
need-data:
	@test -n "$(DATA)" || { echo 'DATA is not set: make train-demo DATA=path/to/fashion-mnist.npz' >&2; exit 2; }

clean:  ## remove .venv and caches; trained models in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra (torch, train, export, dev, bench, ray; base: none), all in the same .venv: renewed when pyproject.toml or constraints.txt change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo 'Installing iddpm ($*) into $(VENV)/ (the first time this takes a while)'
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.$(if $(filter base,$*),,[$*])'
	@touch $@

# The first Python that runs and is new enough (a version manager's shim may exist without a working Python).
$(VENV)/bin/pip:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "Creating $(VENV)/ with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV) && exit 0; \
	        echo "'$$python -m venv' failed. On Debian and Ubuntu it is a separate package: apt install python3-venv" >&2; \
	        exit 1; \
	    fi; \
	done; \
	echo "Python 3.11 or newer is needed and was not found (tried python3, python3.11 ... python3.14)." >&2; \
	echo "Found: $$({ python3 --version; } 2>/dev/null || echo 'no python3'). Select one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	exit 1
