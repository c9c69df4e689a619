"""MkDocs hooks: put generated tables into pages, and generated figures among the site's files.

A page holds a line such as `{{ generated: flags }}`; the name is one of TEXTS in docs/generate.py. Figures are the
functions of docs/figures.py, at figures/<name>.svg.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import figures  # noqa: E402
import generate  # noqa: E402

_MARK = re.compile(r"^\{\{ generated: (\w+) \}\}$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add every figure as a file of the site."""
    for name, draw in figures.FIGURES.items():
        files.append(File.generated(config, f"figures/{name}.svg", content=draw()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each mark by the text that its name stands for."""

    def text(match: re.Match[str]) -> str:
        if match[1] not in generate.TEXTS:
            raise PluginError(f"{page.file.src_uri}: nothing generates {match[1]!r}")
        return generate.TEXTS[match[1]]()

    return _MARK.sub(text, markdown)
