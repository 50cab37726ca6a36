"""The rules that keep it a house (DESIGN.md 2 and 7): who imports whom, what a trainer loads, set-up."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "icseg_jax").glob("*.py"))
ENTRY_POINTS = {"train", "evaluate", "ablate", "dryrun", "bench"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "icseg_jax" if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_entry_points_import_the_method(path: Path) -> None:
    if path.stem not in ENTRY_POINTS:
        assert "icseg_jax.train" not in set(imports(path))


def test_no_module_of_ours_loads_torch_or_tensorflow() -> None:
    """The trainer process never holds torch; only functions of the sidecar's own process import it."""
    names = [path.stem for path in SOURCES if path.stem != "__init__"]
    program = ("import importlib, sys\n"
               f"for name in {names}:\n"
               "    importlib.import_module('icseg_jax.' + name)\n"
               "    for heavy in ('torch', 'torchvision', 'sam2', 'tensorflow'):\n"
               "        if heavy in sys.modules:\n"
               "            sys.exit(f'{name} loads {heavy}')\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# bench measures against Hugging Face's generate when asked to, in a process that trains nothing.
@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.stem not in ("sam2_sidecar", "bench")], ids=lambda path: path.stem
)
def test_only_the_sidecar_names_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "torchvision", "sam2"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    unsafe = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    if path.stem == "readers":  # RefCOCO's tables are pickles: through an unpickler that builds plain containers only
        unsafe.remove("pickle")
        assert set(re.findall(r"pickle\.\w+", path.read_text())) == {"pickle.Unpickler"}
    assert not {name.split(".")[0] for name in imports(path)} & unsafe
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "os.system", "yaml.load"}, f"{path.name}:{node.lineno}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("shell") in (None, "False"), f"{path.name}:{node.lineno}"
        assert given.get("allow_pickle") in (None, "False"), f"{path.name}:{node.lineno}"
        if called == "torch.load":
            assert given.get("weights_only") == "True", f"{path.name}:{node.lineno}"


def test_every_import_is_a_declared_dependency() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!;~]", name, maxsplit=1)[0]).lower()

    optional = PROJECT["optional-dependencies"]
    declared = {normal(name) for name in PROJECT["dependencies"] + optional["sam2"] + optional["bench"]}
    distributions = packages_distributions()
    for path in SOURCES:
        modules = {name.split(".")[0] for name in imports(path)}
        for module in modules - set(sys.stdlib_module_names) - {"icseg_jax"}:
            found = {normal(name) for name in distributions.get(module, [module])}
            assert found & declared, f"{path.name} imports {module}, which pyproject.toml does not name"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_room_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} has no docstring"


def test_assets_are_part_of_the_package_and_small() -> None:
    files = [p for p in (ROOT / "icseg_jax" / "assets").rglob("*") if p.is_file()]
    assert all(p.stat().st_size <= 10 * 2**20 for p in files)
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert package["package-data"] == {"icseg_jax": ["assets/**"]}


def test_make_demo_and_make_test_set_up_first() -> None:
    for goal in ("demo", "test", "test-slow"):
        plain = ["make", "--no-print-directory", "-n", goal, "VENV=/nowhere", "PYTHON=python3"]
        done = subprocess.run(plain, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        torch = next(i for i, line in enumerate(lines) if "install torch==" in line)
        sam2 = next(i for i, line in enumerate(lines) if "--no-build-isolation sam2" in line)
        assert torch < sam2
        assert ("icseg_jax.train experiments/embedded.yaml" if goal == "demo" else "pytest") in lines[-1]


@pytest.mark.parametrize(("python", "reason"), [("/nowhere/python", "no '/nowhere/python' here"),
                                                ("./old", "Python 3.11 or newer is needed")])
def test_make_names_an_interpreter_that_will_not_do(tmp_path: Path, python: str, reason: str) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.10 && exit 0\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(["make", "-f", ROOT / "Makefile", "setup", f"PYTHON={python}"], cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and reason in line]
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test" and "set -euo pipefail" in script.read_text()


def test_licence() -> None:
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_types_and_shapes_are_checked_while_tests_run():
    from icseg_jax import metrics

    with pytest.raises(jaxtyping.TypeCheckError, match="davis_statistics"):
        metrics.davis_statistics(np.zeros((2, 2)))
