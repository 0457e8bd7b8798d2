# `make` lists the targets. Two of them are all that a newcomer needs: `make quickstart`, then `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The Python to build the environment with, and the torch to put into it: a version from 2.8 on, or plain `torch` for the
# newest. No other file names a version of torch. On Linux, PyPI's torch carries CUDA; pip takes a smaller one without
# CUDA if PIP_EXTRA_INDEX_URL names the CPU index that PyTorch's installation page gives.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# A torch that carries CUDA, for `make cudatorch`.
CUDA_TORCH ?= torch==2.14.1
# Where `make quickstart` writes.
OUT ?= runs/quickstart

# The quickstart and the tests are small: more threads gain nothing, and wait for each other where others work, too.
export OMP_NUM_THREADS ?= 1

# Tests that run at a time, each on one core.
JOBS ?= $(shell nproc)
# Threads that the benchmarks take: one, and all.
CORES ?= $(sort 1 $(shell nproc))

VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.environment
KERNELS := $(VENV)/.kernels
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)
TEST_CPP := $(wildcard tests/emulation/*.h tests/emulation/*.cpp tests/emulation/*/*.h tests/emulation/*/*.cpp)

# The stamps name what they were made with, so that another TORCH or DPT_HPC_CUDA installs or builds again.
ifneq ($(TORCH),$(shell cat $(ENVIRONMENT) 2>/dev/null))
$(ENVIRONMENT): again
endif
ifneq (cuda=$(DPT_HPC_CUDA),$(shell cat $(KERNELS) 2>/dev/null))
$(KERNELS): again
endif

.PHONY: help quickstart test setup pyg slurm mpich browser docs bench fuzz sanitize lint format cuda cudatorch clean again

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: setup ## set-up, then ingest, pre-train, fine-tune and report on the sample data (no network, no GPU)
	@echo "== Quickstart: the main job on the data that ships with dpt_hpc"
	@$(BIN)/dpt-hpc quickstart --out $(OUT)

test: setup ## set-up, then every test
	@echo "== Tests, all of them, $(JOBS) at a time (the quick ones alone: $(BIN)/pytest -m 'not slow')"
	@$(BIN)/pytest -n $(JOBS) --dist loadfile
	@echo "== All tests passed. Next: 'make quickstart' for a first result, 'make lint' before a change is proposed."

setup: $(KERNELS) ## the environment in .venv and the compiled kernels; at once if nothing changed
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "== Set-up is complete. Next: make quickstart",:)

$(ENVIRONMENT): pyproject.toml
	@echo "== Set-up 1/3: Python environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "dpt_hpc needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 4; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment: its module ensurepip is missing."; \
	  echo "On Debian and Ubuntu: apt install python3-venv"; exit 4; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq "pip>=26.2"
	@echo "== Set-up 2/3: $(TORCH), then the other dependencies (minutes the first time, most of it download)"
	@$(BIN)/pip install -qq "$(TORCH)"
	@$(BIN)/pip install -qq --group build --group dev
	@$(BIN)/pip install -qq --only-deps ".[mpi]"
	@echo "$(TORCH)" > $@

$(KERNELS): $(ENVIRONMENT) CMakeLists.txt $(CPP)
	@echo "== Set-up 3/3: C++ kernels"
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "No C++ compiler: '$${CXX:-c++}' was not found."; \
	  echo "On Debian and Ubuntu: apt install g++   (or name one: CXX=... make $(MAKECMDGOALS))"; exit 4; }
	@$(BIN)/python -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo "Python's C headers (Python.h) are missing."; \
	  echo "On Debian and Ubuntu: apt install python3-dev"; exit 4; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -qq --no-build-isolation --no-deps --editable .
	@echo "cuda=$(DPT_HPC_CUDA)" > $@

# Wheels that were compiled against one torch must not come out of pip's cache for another.
pyg: setup ## torch-scatter and torch-cluster for the backend pyg and its tests (compiles for a quarter of an hour)
	@echo "== The extra pyg: torch-scatter and torch-cluster against $(TORCH)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS=$${MAX_JOBS:-$$(nproc)} \
	  $(BIN)/pip install -qq --cache-dir "$$($(BIN)/pip cache dir)/$(TORCH)" --no-build-isolation --only-deps ".[pyg]"

slurm: ## Slurm and munge for the tests of launch/slurm.sbatch (Debian and Ubuntu; asks for root only if they are missing)
	@PATH="$$PATH:/usr/sbin"; missing=; \
	for program in slurmctld slurmd munged srun; do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	test -z "$$missing" || { \
	  echo "== Slurm for the tests, without$$missing: apt-get install slurm-wlm munge libpmix-dev"; \
	  if [ "$$(id -u)" -eq 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	  $$as_root apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends slurm-wlm munge libpmix-dev >/dev/null; }

mpich: setup ## MPICH for the tests of its mpiexec, in a folder of its own beside Open MPI
	@test -x $(VENV)/mpich/bin/mpiexec || $(BIN)/pip install -qq --no-deps --ignore-installed --prefix $(VENV)/mpich mpich

browser: setup ## Chromium for the tests of report and live view (Debian; asks for root only if it is missing)
	@$(BIN)/pip install -qq --group browser
	@command -v chromium >/dev/null || { \
	  echo "== Chromium for the tests: apt-get install chromium"; \
	  if [ "$$(id -u)" -eq 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	  $$as_root apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

docs: setup ## the documentation in build/docs: warnings are errors, and no page asks anything of the network
	@$(BIN)/pip install -qq --group docs
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "== The documentation: build/docs/index.html"

# The data of ../shared/data where it is there, else what ships with dpt_hpc. One core first, then all of them.
bench: setup ## the benchmarks, on this machine, beside other packages: tables and a plot in build/bench
	@$(BIN)/pip install -qq --group peers
	@mkdir -p build/bench
	@echo "== Neighbour lists: edges per second beside other packages"
	@$(BIN)/python benchmarks/radius_graph.py --threads $(CORES) --out build/bench/radius_graph.json
	@echo "== One training step: fused kernels beside plain PyTorch"
	@$(BIN)/python benchmarks/training_step.py --threads $(CORES) --out build/bench/training_step.json
	@echo "== Neighbour lists: equal to those of ASE and matscipy, edge by edge"
	@$(BIN)/python benchmarks/radius_graph_equality.py dpt_hpc/sample/elastic.json.gz --cutoffs 5
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  echo "== GPU"; \
	  PYTHON=$(CURDIR)/$(BIN)/python OUT=build/bench bash benchmarks/gpu.sh || echo "Not all of it ran: build/bench/gpu.json says why."; \
	fi
	@$(BIN)/python benchmarks/summary.py build/bench

fuzz: setup ## ten thousand spoilt files over all readers, from fresh seeds; the table in benchmarks/results/fuzz.md (half an hour)
	@$(BIN)/python tests/fuzz_long.py --out benchmarks/results/fuzz.md

sanitize: setup ## the kernels' tests, and nasty numbers, under the address and undefined-behaviour sanitizers (minutes to compile)
	@echo "== The extension with sanitizers, in build/sanitize"
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	cmake -S . -B build/sanitize -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=None -DDPT_HPC_CUDA=OFF -DDPT_HPC_SANITIZE=ON \
	  -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" >/dev/null; \
	cmake --build build/sanitize >build/sanitize/log 2>&1 || { cat build/sanitize/log; exit 1; }
	@$(BIN)/python tests/sanitized.py

lint: $(ENVIRONMENT) ## what must be clean before a change lands: ruff, mypy --strict, clang-format, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(TEST_CPP)
	$(BIN)/shellcheck .ci/run benchmarks/gpu.sh launch/*.sh launch/*.sbatch

format: $(ENVIRONMENT) ## let ruff and clang-format write the layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(TEST_CPP)

cuda: $(ENVIRONMENT) ## compile the CUDA kernels for the A100 and the H100: no warning, hardly a spilled register (needs nvcc, but no GPU)
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	cmake -S . -B build/cuda -G Ninja --log-level=WARNING -DDPT_HPC_CUDA=ON -DDPT_HPC_WERROR=ON \
	  -DCMAKE_CUDA_ARCHITECTURES='80;90' -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
	  -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"; \
	cmake --build build/cuda --target kernels_cuda --clean-first >build/cuda/log 2>&1 || { cat build/cuda/log; exit 1; }; \
	if grep -i -B 2 -E 'warning|[0-9]{3,} bytes spill' build/cuda/log; then exit 1; fi; \
	echo "== $$(grep -c 'Compiling entry function' build/cuda/log) kernels for two GPUs, no warning;" \
	  "$$(grep -c '[1-9][0-9]* bytes spill stores' build/cuda/log || true) of them spill registers, each less than 100 bytes"

cudatorch: setup ## load the extension with CUDA in it beside a CUDA build of torch (downloads 6 GB, keeps nothing; no GPU)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	echo "== $(CUDA_TORCH) in a throw-away environment"; \
	$(PYTHON) -m venv "$$folder/venv"; \
	PIP_EXTRA_INDEX_URL= "$$folder/venv/bin/pip" install -qq --no-cache-dir "$(CUDA_TORCH)" numpy; \
	mkdir "$$folder/site"; cp -r dpt_hpc "$$folder/site/"; \
	cp "$$($(BIN)/python -c 'from dpt_hpc import _C; print(_C.__file__)')" "$$folder/site/dpt_hpc/"; \
	PYTHONPATH="$$folder/site" "$$folder/venv/bin/python" tests/beside_cuda_torch.py

clean: ## remove the environment and all build output
	rm -rf $(VENV) build dist
