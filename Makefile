# `make demo` and `make test` are all a newcomer needs: both set the environment up first.
#
# Variables, e.g. `make setup PYTHON=python3.12 TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"`:
#   PYTHON       the interpreter that makes .venv (3.11 or newer)
#   TORCH        pip arguments for torch: another version, or an index that has the CPU or CUDA build you want
#   TORCHVISION  the torchvision that belongs to it
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo test test-slow clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up if needed, train the small policy on this machine, write runs/embedded/report.html"
	@echo "make test       set up if needed, lint, run the tests"
	@echo "make test-slow  the long tests, which make test leaves out"
	@echo "make setup      .venv with everything in it (see the variables at the top of the Makefile)"
	@echo "make clean      remove .venv and caches; runs/ stays"

setup: $(READY)

# The stamp is written last: an interrupted set-up goes on where it stopped, a finished one is reused.
$(READY): pyproject.toml
	@test -x $(BIN)/python || command -v $(PYTHON) >/dev/null || \
	  { echo "error: no '$(PYTHON)' here; install Python 3.11 or newer, or say 'make PYTHON=/path/to/python'" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } || \
	  { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PIP) install --upgrade pip setuptools wheel
	$(PIP) install $(TORCH) $(TORCHVISION)
	SAM2_BUILD_CUDA=0 $(PIP) install --no-build-isolation sam2
	$(PIP) install --no-build-isolation -e '.[sam2,test,bench]'
	@# Compilers for TPUs and GPUs lie beside site-packages, so that only dryrun finds them (DESIGN.md 8); the versions are jax's.
	@test -d $(VENV)/libtpu/libtpu || $(PIP) install --no-deps --target $(VENV)/libtpu "$$($(BIN)/python -c \
	  'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')" || \
	  { rm -rf $(VENV)/libtpu; echo "note: no libtpu for this platform; all but 'python -m icseg_jax.dryrun' for TPUs works" >&2; }
	@test -d $(VENV)/cuda/jax_plugins || $(PIP) install --no-deps --target $(VENV)/cuda $$($(BIN)/python -c \
	  'from importlib.metadata import version as v; print("jax-cuda12-pjrt==" + v("jax"), "jax-cuda12-plugin==" + v("jax"))') nvidia-cuda-nvcc-cu12 || \
	  { rm -rf $(VENV)/cuda; echo "note: no CUDA compiler of jax for this platform; dryrun for gpu:8 counts CPU devices" >&2; }
	@touch $@

# Big pages for malloc: without them a sixth of a step on CPU goes into page faults.
demo: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
# Two devices of the CPU: rollouts are played in two thirds of the time, for a decoding step alone keeps one core busy.
demo: export XLA_FLAGS := $(XLA_FLAGS) --xla_force_host_platform_device_count=2
demo: setup
	$(BIN)/python -m icseg_jax.train experiments/embedded.yaml

LONGEST := $(patsubst %,tests/test_%.py,train rollout sam2_sidecar mesh evaluate)
TESTS := $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/test_*.py)))
test: setup
	$(BIN)/ruff check .
	@# A file stays together, since its tests share what they made; the longest ones come first (pytest drops a file that
	@# a folder beside it holds, so no folder). Three workers for two cores: a test that waits for a process of its own
	@# leaves a core alone.
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(TESTS)

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

clean:
	rm -rf $(VENV) *.egg-info build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
