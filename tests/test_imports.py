"""The package's rooms import each other in one direction, and modules never in a circle.

Rooms: every import counts, those for type checkers and those inside functions too, since a type is as
much of a dependency as a call. Circles: only what runs when a module is imported counts.
"""

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lucid_jax

PACKAGE = Path(lucid_jax.__file__).parent
ROOMS = {  # and what each may import, beside itself
    "cache": set(),
    "attention": {"cache"},
    "nn": {"cache", "attention"},
    "io": {"cache", "attention"},
    "decode": {"cache", "attention", "io"},  # io: a prompt cache is saved; models: only a protocol
    "models": {"cache", "attention", "nn", "io", "decode"},
    "lucid": {"cache"},
    "training": {"cache", "attention", "nn", "io", "decode", "models"},
    "tools": {"cache", "attention", "nn", "io", "decode", "models", "lucid", "training", ""},
    "": {"cache", "attention", "nn", "io", "decode", "lucid", "tools"},  # lucid_jax/__init__.py
}


def _module(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _room(module):
    return module.split(".")[1] if "." in module else ""


def _targets(node):
    """The modules of the package that one import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in MODULES else node.module for name in whole]
    else:
        return set()
    return {name for name in names if name in MODULES}


def _all_imports(path):
    return set().union(*map(_targets, ast.walk(ast.parse(path.read_text("utf-8")))))


def _when_imported(nodes):
    """What the statements of a module import while it is being imported itself."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inner = node.orelse if checking else ast.iter_child_nodes(node)
        found |= _targets(node) | _when_imported(inner)
    return found


def test_every_room_is_known():
    assert {_room(module) for module in MODULES} - {"training"} == set(ROOMS) - {"training"}


@pytest.mark.whole
@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_one_direction(room):
    wrong = [
        f"{module} imports {target}"
        for module, path in MODULES.items()
        if _room(module) == room
        for target in sorted(_all_imports(path))
        if _room(target) not in ROOMS[room] | {room}
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: _when_imported(ast.parse(path.read_text("utf-8")).body) - {module}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_what_reads_compiled_programs_waits_until_it_is_asked_for():
    """`import lucid_jax` is part of every command's start."""
    asked = "import sys, lucid_jax; print('lucid_jax.tools.inspection' in sys.modules)"
    run = [sys.executable, "-c", asked]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "False\n"


def test_the_checks_see_what_they_should():
    source = """
if TYPE_CHECKING:
    from lucid_jax.tools import bench
else:
    import lucid_jax.nn
def late():
    from lucid_jax.tools.cli import main
class Body:
    from lucid_jax.cache.update import update
"""
    tree = ast.parse(source)
    seen = {"lucid_jax.nn", "lucid_jax.cache.update"}
    assert _when_imported(tree.body) == seen
    every = set().union(*map(_targets, ast.walk(tree)))
    assert every == seen | {"lucid_jax.tools.bench", "lucid_jax.tools.cli"}


def test_verbs_of_the_cache_say_what_they_take_and_give():
    """No `Any` in a signature."""
    public = [getattr(lucid_jax, name) for name in lucid_jax.__all__]
    verbs = [one for one in public if getattr(one, "__module__", "").startswith("lucid_jax.cache.")]
    own = [x for x in vars(lucid_jax.scoring).values() if hasattr(x, "__module__")]
    scorers = [one for one in own if one.__module__ == lucid_jax.scoring.__name__]
    named = vars(lucid_jax.CacheState).items()
    methods = [one for name, one in named if not name.startswith("_") and name != "replace"]
    functions = [*filter(inspect.isfunction, (*verbs, *scorers, *methods))]
    known = {lucid_jax.update, lucid_jax.scoring.keep_best, lucid_jax.CacheState.layer}
    assert known <= set(functions)
    for function in functions:
        assert "Any" not in str(inspect.signature(function)), function.__qualname__
