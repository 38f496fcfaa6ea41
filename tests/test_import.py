"""What the package imports: nothing that measures or draws, and parts only from below."""

import ast
import subprocess
import sys
from pathlib import Path

import pyramid_cache


PACKAGE = Path(pyramid_cache.__file__).parent
# The parts that the modules of each part may import.
BELOW = {
    "ops": {"ops"},
    "engine": {"ops", "engine"},
    "caches": {"ops", "engine", "caches"},
    "plot": {"engine", "plot"},
}
OPTIONAL = {"matplotlib", "rich", "datasets", "accelerate"}
# What transformers itself imports is not counted.
PROGRAM = """
import sys
import transformers.modeling_utils, transformers.cache_utils, transformers.generation.utils
before = set(sys.modules)
import pyramid_cache
print(*set(sys.modules) - before)
"""


def imports_of(path: Path) -> set[str]:
    """The parts of the package, folders or modules, that a module imports anywhere in its code."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [name.split(".") for name in names if name.split(".")[0] == "pyramid_cache"]
    return {part[1] if len(part) > 1 else "caches" for part in parts}  # the package itself gives the caches


def test_imports_point_down() -> None:
    for part, below in BELOW.items():
        modules = list((PACKAGE / part).rglob("*.py"))
        assert modules
        for module in modules:
            # `plot` and `show` of a cache hand it to what draws it.
            up = {"plot"} if module == PACKAGE / "engine" / "cache.py" else set()
            assert imports_of(module) <= below | up, module


def test_import_loads_nothing_that_measures_or_draws() -> None:
    program = [sys.executable, "-c", PROGRAM]
    loaded = subprocess.run(program, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout.split()
    assert "pyramid_cache.engine.cache" in loaded
    assert not {name for name in loaded if name.split(".")[0] in OPTIONAL or name.startswith("pyramid_cache.lab")}
