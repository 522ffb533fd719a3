"""What CI relies on: which Python it finds, and that the package declares what it imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lucid_jax

PROJECT = Path(__file__).parents[1]
NEWEST_PYTHON = PROJECT / ".ci" / "newest_python"

needs_ci = pytest.mark.skipif(not NEWEST_PYTHON.exists(), reason="only a checkout has .ci")


def _put(path, code):
    """An executable that exits with `code`: 0 from a Python that can make environments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho noise >&2\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def _newest(tmp_path):
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYENV_ROOT": str(tmp_path / "pyenv"),
    }
    done = subprocess.run([NEWEST_PYTHON], env=environment, capture_output=True, text=True)
    assert not done.stderr
    assert (done.returncode == 0) == bool(done.stdout)
    return done.stdout.strip()


@needs_ci
def test_a_python_that_a_shim_hides_is_found_where_pyenv_keeps_it(tmp_path):
    _put(tmp_path / "bin" / "python3.14", 127)  # a shim of a version that nobody chose
    hidden = _put(tmp_path / "pyenv" / "versions" / "3.14.2" / "bin" / "python3.14", 0)
    _put(tmp_path / "pyenv" / "versions" / "3.13.0" / "bin" / "python3.13", 0)
    assert _newest(tmp_path) == hidden


@needs_ci
def test_the_newest_python_is_one_that_works(tmp_path):
    """Of one version the one on the PATH comes first, then the latest; broken ones are passed over."""
    versions = tmp_path / "pyenv" / "versions"
    _put(versions / "3.14.0" / "bin" / "python3.14", 1)
    old = _put(versions / "3.13.9" / "bin" / "python3.13", 0)
    new = _put(versions / "3.13.10" / "bin" / "python3.13", 0)
    assert _newest(tmp_path) == new
    Path(new).unlink()
    assert _newest(tmp_path) == old
    chosen = _put(tmp_path / "bin" / "python3.13", 0)
    assert _newest(tmp_path) == chosen


def _imported(path):
    """Top-level names of the modules a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def _declared(requirements):
    """Names of distributions, as the index compares them; `lucid-jax[text]` is itself."""
    names = (re.match(r"[\w.-]+", requirement).group() for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_what_the_package_imports_it_declares_and_the_reverse():
    """Among its dependencies, or in an extra for users; not merely brought along by another one."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = _declared(project["dependencies"])
    for_users = (*extras["text"], *extras["gguf"], *extras["plots"], *extras["training"])
    declared = needed | _declared(for_users)
    owners = importlib.metadata.packages_distributions()
    imported = set()
    for path in Path(lucid_jax.__file__).parent.rglob("*.py"):
        for name in {*_imported(path)} - {*sys.stdlib_module_names, "lucid_jax"}:
            distributions = _declared(owners.get(name, [name]))
            assert distributions & declared, f"{path.name} imports {name}"
            imported |= distributions
    assert needed <= imported
