"""Format Markdown tables for printing."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Header, rule and rows, as they are."""
    lines = [header, ["-" * max(3, len(cell)) for cell in header], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The title above a markdown_table whose columns are padded to one width."""
    lines = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    first, *others = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join([title, "", markdown_table(first, others), ""])


def plus_minus(value: Sequence[float], digits: int | None = None) -> str:
    """A mean and its standard error, to so many decimal places; None: to 3 and 1 significant digits."""
    mean, error = value
    if digits is None:
        return f"{mean:.3g} ± {error:.1g}"
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"
