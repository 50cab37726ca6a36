"""What every test shares: JAX on the CPU, types and shapes checked, hypothesis without a clock, a run directory."""

import ast
import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import _import_hook, install_import_hook

# Before anything imports jax; the commands that tests start inherit it. Tests compile more than they compute: LLVM
# optimises nothing, XLA's older emitters of loops compile in half the time of the new ones (other versions may not know
# that flag, and XLA ends a process over what it does not know), and what one test (or command) has compiled the next
# one of this worker reads.
quick = "--xla_backend_optimization_level=0"
if version("jaxlib") == "0.10.2":
    quick += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = programs = tempfile.mkdtemp(prefix="icseg_jax_programs_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"  # as every command says itself
atexit.register(shutil.rmtree, programs, ignore_errors=True)


class OutermostFunctions(_import_hook.JaxtypingTransformer):
    """Functions inside functions are left alone: they would be wrapped anew whenever the outer one runs, which took
    a good part of the suite's time."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        body, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = body
        return node


# Shapes and types of every annotated function are checked while the tests run; an int may stand for a float.
_import_hook.JaxtypingTransformer = OutermostFunctions
install_import_hook("icseg_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True), )")

# Slow machines must not make a test fail, and a failure must come back.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repo")


@pytest.fixture
def tmp_run(tmp_path: Path) -> Path:
    """A run directory that does not exist yet."""
    return tmp_path / "runs" / "run"
