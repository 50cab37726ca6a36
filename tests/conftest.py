"""What every test shares: JAX on the CPU, hypothesis without a clock, a run directory."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

# Before anything imports jax; the commands that tests start inherit it. Tests compile more than they compute: LLVM
# optimises less, and what one test (or command) has compiled the next one of this worker reads.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = programs = tempfile.mkdtemp(prefix="icseg_jax_programs_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"  # as every command says itself
atexit.register(shutil.rmtree, programs, ignore_errors=True)

# Slow machines must not make a test fail, and a failure must come back.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repo")


@pytest.fixture
def tmp_run(tmp_path: Path) -> Path:
    """A run directory that does not exist yet."""
    return tmp_path / "runs" / "run"
