"""What every test shares: JAX on the CPU, hypothesis without a clock, a run directory."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax

import hypothesis
import pytest

# Slow machines must not make a test fail, and a failure must come back.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repo")


@pytest.fixture
def tmp_run(tmp_path: Path) -> Path:
    """A run directory that does not exist yet."""
    return tmp_path / "runs" / "run"
