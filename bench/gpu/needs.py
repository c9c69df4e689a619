"""Which test modules hold tests of the GPU, and which packages these and bench.gpu import: read from the source.

python -m bench.gpu.needs    the test modules, on one line

Reading costs a second and works where torch is missing. A package counts as needed where its import must succeed: at
the top of a module, in a test of the GPU, or in a function of bench.gpu. What stands in
`try: ... except ImportError:` or under `if TYPE_CHECKING:` is optional.
"""

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import dpofast

ROOT = Path(__file__).resolve().parents[2]
OWN = ("bench", "dpofast", "examples", "tests")
# What pytest and the build of the extension need besides, and which no source names.
ALWAYS = ("pytest", "setuptools")
# Where the name that pip knows is another.
DISTRIBUTIONS = {"yaml": "pyyaml"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _marks_gpu(expression: ast.expr) -> bool:
    """Whether pytest.mark.gpu stands in a decorator or in the value of pytestmark."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "gpu" and ast.unparse(node.value) == "pytest.mark"
        for node in ast.walk(expression)
    )


@functools.cache
def gpu_tests(path: Path) -> tuple[ast.FunctionDef, ...]:
    """The test functions of a file that are marked gpu, or that get the fixture `device`, directly or by another."""
    functions = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef)]
    arguments = {function.name: {arg.arg for arg in function.args.args} for function in functions}

    def gets_device(name: str, seen: frozenset[str] = frozenset()) -> bool:
        asked = arguments.get(name, set()) - seen
        return "device" in asked or any(gets_device(other, seen | {name}) for other in asked if other in arguments)

    marked = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and _marks_gpu(node.value):
            marked |= arguments.keys()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and any(map(_marks_gpu, node.decorator_list)):
            marked |= {child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef)}
    tests = [function for function in functions if function.name.startswith("test")]
    return tuple(test for test in tests if test.name in marked or gets_device(test.name))


def gpu_test_modules(folder: Path = ROOT / "tests") -> list[Path]:
    """The test modules that `pytest -m gpu` collects."""
    return [path for path in sorted(folder.rglob("test_*.py")) if gpu_tests(path)]


def _optional(node: ast.AST) -> bool:
    """Whether what the node holds may fail to import, or is for a type checker only."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.Try) and any(
        handler.type is not None and "Import" in ast.unparse(handler.type) for handler in node.handlers
    )


def _imports(file: Path, node: ast.AST, functions: bool = False) -> Iterator[str]:
    """Dotted names that a node of a file imports; each name of a `from` import among them, as it may be a module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -child.level] if child.level else ()
            module = ".".join([*package, *([child.module] if child.module else [])])
            yield from (f"{module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "dpofast":
            yield f"dpofast.{child.attr}"
        elif not _optional(child) and (functions or not isinstance(child, FUNCTIONS)):
            yield from _imports(file, child, functions)


def _sources(name: str) -> list[Path]:
    """The files of ours that `import name` runs: the module and the packages above it."""
    names = name.split(".")
    if names[0] == "dpofast" and names[1:2] and names[1] in dpofast._MODULES:
        names = dpofast._MODULES[names[1]].split(".")  # a public name, imported when it is first used
    found = []
    for depth in range(1, len(names) + 1):
        path = ROOT.joinpath(*names[:depth])
        found += [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()]
    return found


def _with_conftests(path: Path) -> list[Path]:
    """A test module and the conftest.py of each folder above it."""
    folders = [folder for folder in path.parents if ROOT in (folder, *folder.parents)]
    return [path, *(folder / "conftest.py" for folder in folders if (folder / "conftest.py").exists())]


@functools.cache
def packages_of(path: Path) -> frozenset[str]:
    """The packages of others that a test module or a module of bench.gpu needs, by the names that are imported."""
    waiting, seen, packages = _with_conftests(path), set[Path](), set[str]()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        names = set(_imports(file, _tree(file), functions=file.parent == Path(__file__).resolve().parent))
        for test in gpu_tests(file) if file == path else ():
            names |= set(_imports(file, test, functions=True))
        for name in names:
            top = name.partition(".")[0]
            if top in OWN:
                waiting += _sources(name)
            elif top not in sys.stdlib_module_names:
                packages.add(top)
    return frozenset(packages)


def installed(name: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(name) is not None


def missing_of(path: Path) -> list[str]:
    """The packages that a test module or a module of bench.gpu needs and that are not installed, as pip names them."""
    absent = [name for name in packages_of(path) if not installed(name)]
    return sorted(DISTRIBUTIONS.get(name, name) for name in absent)


def missing(paths: Iterable[Path] | None = None) -> dict[str, list[str]]:
    """What is not installed, as pip names it, and the files that need it; of all tests of the GPU and all parts."""
    users: dict[str, list[str]] = {
        name: ["every test" if name == "pytest" else "the extension"] for name in ALWAYS if not installed(name)
    }
    for path in [*gpu_test_modules(), *sorted((ROOT / "bench" / "gpu").glob("*.py"))] if paths is None else paths:
        for name in missing_of(path):
            users.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return users


if __name__ == "__main__":
    print(*(path.relative_to(ROOT) for path in gpu_test_modules()))
