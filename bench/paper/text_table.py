"""A table in Markdown, to print and to paste."""

from collections.abc import Sequence


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The title above the rows, columns padded to one width."""
    lines = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([title, "", shown[0], rule, *shown[1:], ""])


def plus_minus(value: Sequence[float]) -> str:
    """A mean and its standard error."""
    mean, error = value
    return f"{mean:.3g} ± {error:.1g}"
