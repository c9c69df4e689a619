"""The direction of imports between packages, read from the source: lazy and TYPE_CHECKING imports count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpofast"
# A package imports only from packages on a line above its own, and from nobody on its own line.
LAYERS = (
    ("kernels", "_version"),
    ("common",),
    ("reference", "data", "losses", "checkpointing"),
    ("packing", "head"),
    ("model", "evaluation"),
    ("scoring", "integrations"),
    ("training", "report"),
    ("cli", "demo"),
    ("bench", "examples"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MOST_MODULES = 12
MOST_LINES = 450


def module_of(path: Path) -> str:
    """The dotted name of a file of dpofast, bench or examples."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for folder in (PACKAGE, ROOT / "bench", ROOT / "examples")
    for path in sorted(folder.rglob("*.py"))
}


def imports_of(path: Path) -> set[str]:
    """The modules of dpofast that a file imports, whenever and wherever in it; `dpofast._C` is left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import: name the package"
            module = node.module or ""
            below = {f"{module}.{alias.name}" for alias in node.names} & {*MODULES, "dpofast._C"}
            found |= below or {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("dpofast", "bench", "examples")} - {"dpofast._C"}


def package_of(module: str) -> str:
    """The package that LAYERS names: the first name below dpofast."""
    names = module.split(".")
    return names[0] if names[0] != "dpofast" else names[1] if len(names) > 1 else "dpofast"


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) not in ("dpofast", "__main__")])
def test_a_package_imports_only_from_packages_above_it(module):
    own = package_of(module)
    for imported in imports_of(MODULES[module]):
        other = package_of(imported)
        if other == own:
            continue
        if other == "dpofast":  # the public names, which bring any layer
            assert own in ("bench", "examples"), f"{module} imports a public name from dpofast: name its package"
            continue
        assert LEVEL[other] < LEVEL[own], f"{module} imports {imported}: {own} may not import from {other}"


def test_no_module_imports_itself_through_others():
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items() if name != "dpofast"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def folders():
    return sorted({path.parent for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_package_has_at_most_twelve_modules(folder):
    modules = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
    assert len(modules) <= MOST_MODULES, f"{folder.name} has {len(modules)} modules: {modules}"


@pytest.mark.parametrize("folder", ["bench", "csrc", "dpofast", "examples", "kernels", "tests"])
def test_no_file_is_long(folder):
    files = [path for suffix in ("py", "cpp", "hpp") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_package_has_a_layer():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"kernels"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert packages | modules == set(LEVEL) - {"bench", "examples"}


def test_no_package_has_the_name_of_a_public_function():
    names = {path.stem for path in PACKAGE.iterdir()}
    import dpofast

    assert not names & {name for name in dpofast.__all__ if callable(getattr(dpofast, name))}


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert not module.split(".")[-1].startswith("test_"), f"{path} imports {module}: use tests/support"
