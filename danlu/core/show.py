"""Results printed for people, on stdout."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from danlu.core.config import flatten
from danlu.core.stage import as_json

_PLAIN_WIDTH = 120
"""Columns of a table that is written to a file or a pipe."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a model may say and a terminal would obey."""


class _Console(Console):
    """rich's, but that it leaves a reader who has seen enough to the command line."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(markup: bool = False) -> Console:
    """For stdout: as wide as the terminal or COLUMNS says; elsewhere wide enough for a table.

    Text is printed as it is, unless `markup`; NO_COLOR leaves out every escape code.
    """
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _Console(
        width=None if wide else _PLAIN_WIDTH,
        markup=markup,
        emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; columns whose values are all numbers are set to the right, the first is never cut."""
    made = Table(title=title or None, title_justify="left", header_style="bold", title_style="bold")
    for number, column in enumerate(columns):
        values = [row[number] for row in rows if row[number] is not None]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        justify: Literal["right", "left"] = "right" if values and numeric else "left"
        made.add_column(column, justify=justify, no_wrap=number == 0, overflow="fold")
    for row in rows:
        made.add_row(*(show_value(value) for value in row))
    return made


def show_value(value: Any) -> str:
    """1,234 · 0.1235 · 12,346 · yes · – for nothing; a text without what would steer the terminal."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 9999.5 <= abs(value) < 1e15 else f"{value:,.4g}"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))


def show_size(number: float) -> str:
    """Bytes as "1.5 GB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(number) >= 999.5 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:,.0f} {units[0]}" if abs(number) >= 999.5 else f"{number:.3g} {units[0]}"


def show_result(result: Any) -> None:
    """Any result as a table of its figures; those that it doesn't have are left out."""
    values = as_json(result)
    if isinstance(values, Mapping) and values:
        rows = [
            (key.replace("_", " "), value)
            for key, value in flatten(values).items()
            if value is not None and not isinstance(value, list)
        ]
        console().print(table("", ("figure", "value"), rows))
