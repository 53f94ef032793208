"""Tables, as text in columns and as Markdown."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Lines of columns, two blanks apart.

    Args:
        rows: cells, a header among them; each has as many as there are columns.
        sides: of each column, `<` for flush left or `>` for flush right, as numbers are.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """The same as a table of Markdown; the first row is its header."""
    rules = [{"<": "---", ">": "---:"}[side] for side in sides]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))
