"""Rewrite the text of README.md and docs/ that is made from the code and from bench/results, and the figures.

    python docs/generate.py              # after a change of what they show
    python docs/generate.py --check      # write nothing; exit code 1 where something is stale (tests/test_docs.py)

A page holds blocks `<!-- generated: name -->` ... `<!-- end of generated -->`; TEXTS maps the name to the function that
returns the Markdown between them. Figures are docs/figures/<name>.svg, drawn by docs/figures.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import figures  # noqa: E402

from bench import markdown, vision_table  # noqa: E402
from bench.scale import table as scale_table  # noqa: E402

_BLOCK = re.compile(r"^<!-- generated: (\w+) -->\n.*?^<!-- end of generated -->$", re.DOTALL | re.MULTILINE)


def _cell(text: str) -> str:
    """Text inside a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def own_flags() -> list[dataclasses.Field[Any]]:
    """The fields that DPOConfig adds to transformers' TrainingArguments, or gives another default."""
    from dpofast.training.config import DPOConfig

    return [field for field in dataclasses.fields(DPOConfig) if field.name in DPOConfig.__annotations__]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "not set" if field.default is None else _code(str(field.default))
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return _code(" ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "required"


def _flags(fields: Iterator[dataclasses.Field[Any]] | list[dataclasses.Field[Any]]) -> str:
    body = [(f"`--{field.name}`", _default(field), _cell(str(field.metadata.get("help", "")))) for field in fields]
    return markdown.rows(("flag", "default", "what it does"), body)


def flags() -> str:
    """What DPOConfig adds: name, default and help."""
    return _flags(own_flags())


def train_flags() -> str:
    """The flags of `dpofast train` that are not DPOConfig's."""
    from dpofast.cli.train import TrainArguments

    return _flags(list(dataclasses.fields(TrainArguments)))


def kinds() -> str:
    """The table of losses: whether each needs a reference, its options, and the plan of a trained head."""
    from dpofast.losses.kinds import KINDS

    body = []
    for name, kind in KINDS.items():
        options = ["beta"] if name != "sft" else []
        options += ["label_smoothing"] if kind.smoothing else []
        options += ["f_divergence_type"] if kind.divergence else []
        options += kind.options
        plan = "coupled: keep and recompute" if kind.coupled else "separable: 3 GEMMs"
        if "bco_delta" in kind.options:
            plan += "; coupled with `bco_delta='running_mean'`"
        shown = ", ".join(f"`{option}`" for option in options)
        rows = "pairs" if not kind.lists else "lists with scores" if kind.scores else "lists"
        body.append((f"`{name}`", rows, "needed" if kind.reference else "not used", shown, plan))
    return markdown.rows(("kind", "rows", "reference", "options", "plan of a trained head"), body)


def formulas() -> str:
    """Each kind with the equation and the paper that its function's docstring names."""
    from dpofast.losses.kinds import KINDS

    body = [(f"`{name}`", _cell((kind.function.__doc__ or "").partition("\n\n")[0])) for name, kind in KINDS.items()]
    return markdown.rows(("kind", "paper and equation, as its function says"), body)


def divergences() -> str:
    """The scores of f_divergence_type."""
    from dpofast.losses.divergences import DIVERGENCES

    body = [(f"`{name}`", _cell(score.__doc__ or "")) for name, score in DIVERGENCES.items()]
    return markdown.rows(("`f_divergence_type`", "s(u)"), body)


def findings() -> str:
    """The warnings that report.html can show, in the order in which it looks for them."""
    from dpofast.report.diagnosis import CHECKS

    body = [(f"`{check.__name__}`", _cell((check.__doc__ or "").partition("\n")[0])) for check in CHECKS]
    return markdown.rows(("warning", "what was found"), body)


class Message(NamedTuple):
    """An exception that the package raises: its type, its text with … for values, and the file it is raised in."""

    kind: str
    text: str
    file: str


def messages() -> list[Message]:
    """Every exception with a text that dpofast raises, by file; read from the source, nothing is imported."""
    found = []
    for path in sorted((ROOT / "dpofast").rglob("*.py")):
        if "kernels" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            if not (isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.args):
                continue
            name, text = made.func.id, " ".join(_template(argument) for argument in made.args)
            if _is_exception(name) and _says_something(text):
                found.append(Message(name, text, str(path.relative_to(ROOT))))
    return found


def _is_exception(name: str) -> bool:
    own = ("BadRow", "DamagedCheckpoint", "TrainingInterrupted")
    return name in own or (name.endswith("Error") and name != "AttributeError")


def _says_something(text: str) -> bool:
    """Whether a template has words of its own, beside values and "expected ..., got ..."."""
    return sum(map(str.isalpha, text.replace("expected", "").replace("got", ""))) >= 10


def _template(node: ast.expr) -> str:
    """A message's text: literal parts as they are, values as …"""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "…"


def errors() -> str:
    """The messages, one table for each package."""
    packages: dict[str, list[Message]] = {}
    for message in messages():
        packages.setdefault(message.file.split("/")[1].removesuffix(".py"), []).append(message)
    parts = []
    for package, found in sorted(packages.items()):
        table = markdown.rows(
            ("message", "raised as", "in"),
            [(_cell(m.text), f"`{m.kind}`", f"`{m.file.removeprefix('dpofast/')}`") for m in found],
        )
        parts.append(f"### {package}\n\n{table}")
    return "\n\n".join(parts)


def packages() -> str:
    """Every module of the package with the first line of its docstring."""
    parts = []
    for folder in [name for row in figures.layer_table()[1:] for name in row]:
        files = sorted((ROOT / "dpofast" / folder).rglob("*.py")) or [ROOT / "dpofast" / f"{folder}.py"]
        body = []
        for path in files:
            text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) if path.exists() else None
            if text and path.name != "__init__.py":
                body.append((f"`{path.relative_to(ROOT / 'dpofast')}`", _cell(text.partition("\n\n")[0])))
        if body:
            parts.append(f"### {folder}\n\n{markdown.rows(('module', 'what it does'), body)}")
    return "\n\n".join(parts)


def supported() -> str:
    """What setup.py requires and the release that constraints.txt pins, for each package that dpofast needs."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    required = next(ast.literal_eval(word.value) for word in call.keywords if word.arg == "install_requires")
    pinned: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement, _, marker = line.partition(";")
            name = re.split("[=<>]", requirement)[0]
            release = requirement.removeprefix(name).removeprefix("==").strip()
            pinned.setdefault(name, []).append(release + (f" ({marker.strip()})" if marker else ""))
    body = []
    for requirement in required:
        name = re.split("[=<>;]", requirement)[0]
        bounds, _, marker = requirement.removeprefix(name).partition(";")
        body.append((name, _cell(bounds + marker), _cell("; ".join(pinned.get(name, ["not pinned"])))))
    return markdown.rows(("package", "required (setup.py)", "tested (constraints.txt)"), body)


def public_names() -> str:
    """An entry of the API reference for every name of dpofast.__all__, from the module that defines it."""
    import dpofast

    # Their other methods override transformers' own, and their fields are on the page of flags.
    constructor_only = ("DPOConfig", "DPOTrainer")
    entries = []
    for name in sorted(dpofast._MODULES, key=str.lower):
        options = "\n    options:\n      members: [__init__]" if name in constructor_only else ""
        entries.append(f"::: {dpofast._MODULES[name]}.{name}{options}")
    return "\n\n".join(entries)


def worked_example() -> str:
    """PackedBatch.layout() of the docs' example, and its description."""
    batch = figures.example_batch()
    return f"```text\n{batch.layout()}\n```\n\n`batch.describe()` says: {batch.describe()}."


def expected(name: str, module: str = "tables") -> Callable[[], str]:
    """The table of this name of a module of bench/roofline: predictions for GPUs."""

    def text() -> str:
        return getattr(importlib.import_module(f"bench.roofline.{module}"), name)()

    return text


TEXTS: dict[str, Callable[[], str]] = {
    "flags": flags,
    "train_flags": train_flags,
    "kinds": kinds,
    "formulas": formulas,
    "divergences": divergences,
    "findings": findings,
    "errors": errors,
    "packages": packages,
    "supported": supported,
    "public_names": public_names,
    "worked_example": worked_example,
    "summary": markdown.summary,
    "evidence": markdown.evidence_table,
    "steps": markdown.step_tables,
    "head": markdown.head_table,
    "packing": markdown.packing_table,
    "sharing": markdown.sharing_table,
    "lists": markdown.lists_table,
    "vision": vision_table.vision_table,
    "vision_summary": vision_table.vision_summary,
    "memory": markdown.memory_table,
    "scale": scale_table.scale_table,
    "real_run": markdown.real_run_table,
    "gpu": markdown.gpu_table,
    "families": markdown.families_table,
    "expect_one_gpu": expected("one_gpu_table"),
    "expect_example": expected("worked_example"),
    "expect_scale": expected("best_tables", "scale_tables"),
    "expect_modes": expected("modes_table", "scale_tables"),
    "expect_devices": expected("devices_table"),
    "expect_published": expected("published_table"),
    "expect_errors": expected("errors_table"),
}


def pages() -> list[Path]:
    """The Markdown files that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def refreshed(text: str, name: str) -> str:
    """A page's text with its blocks regenerated; name is the page's, for messages.

    Raises:
        ValueError: a block that does not end, an end without a block, or a name that is not in TEXTS.
    """
    blocks = len(_BLOCK.findall(text))
    if not blocks == text.count("<!-- generated: ") == text.count("<!-- end of generated -->"):
        raise ValueError(f"{name}: expected blocks of <!-- generated: name --> and <!-- end of generated -->, in turn")

    def block(match: re.Match[str]) -> str:
        if match[1] not in TEXTS:
            raise ValueError(f"{name}: expected a block's name to be one of {sorted(TEXTS)}, got {match[1]!r}")
        return f"<!-- generated: {match[1]} -->\n\n{TEXTS[match[1]]()}\n\n<!-- end of generated -->"

    return _BLOCK.sub(block, text)


def stale() -> dict[Path, str]:
    """The pages and figures that differ from what is generated now, with the text that they should have."""
    fresh = {page: refreshed(page.read_text("utf-8"), page.name) for page in pages()}
    fresh |= {ROOT / "docs" / "figures" / f"{name}.svg": draw() + "\n" for name, draw in figures.FIGURES.items()}
    return {path: text for path, text in fresh.items() if not path.exists() or path.read_text("utf-8") != text}


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0, or 1 for --check where something is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    found = stale()
    for path, text in found.items():
        if check:
            print(f"{path.relative_to(ROOT)} is stale: python docs/generate.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
