"""What is printed for people."""

import math

import pytest
from rich.console import Console

from danlu.core.show import console, show_result, show_size, show_value, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (1234.56, "1,235"),
        (9999.6, "10,000"),
        (123456.7, "123,457"),
        (-1e-7, "-1e-07"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("[/b] :dog:", "[/b] :dog:"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred\x07\r\x9b1m", "�[31mred���1m"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert show_value(value) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1536, "1.54 kB"),
        (999_499, "999 kB"),
        (999_950, "1 MB"),
        (1.5e9, "1.5 GB"),
        (81.9e9, "81.9 GB"),
        (2.2e12, "2.2 TB"),
        (3.4e15, "3,400 TB"),
    ],
)
def test_sizes(number: float, text: str) -> None:
    assert show_size(number) == text


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [line.split("│")[1:-1] for line in lines]


def test_columns_of_numbers_are_set_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("first", 5, True, "x"), ("b", 1234, False, None), ("c", None, True, "yy")]
    console().print(table("", ("name", "number", "flag", "nothing"), rows))
    cells = printed(capsys)
    assert [row[0] for row in cells] == [" first ", " b     ", " c     "]
    assert [row[1] for row in cells] == ["      5 ", "  1,234 ", "      – "]
    assert [row[2] for row in cells] == [" yes  ", " no   ", " yes  "]
    assert [row[3] for row in cells] == [" x       ", " –       ", " yy      "]


def test_an_empty_column_is_set_to_the_left() -> None:
    assert table("", ("a", "b"), [("x", None)]).columns[1].justify == "left"


def test_markup_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(table("[i]title", ("[b]a",), [("[/b] [red]x :dog:",)]))
    shown = capsys.readouterr().out
    assert "[/b] [red]x :dog:" in shown
    assert "[i]title" in shown
    assert "[b]a" in shown


def test_results_are_flattened(capsys: pytest.CaptureFixture[str]) -> None:
    show_result({"held_out": {"documents": 3, "bytes": 1.5}, "rows": [1, 2], "ok": True, "accuracy": None})
    cells = [[cell.strip() for cell in row] for row in printed(capsys)]
    assert cells == [["held out.documents", "3"], ["held out.bytes", "1.5"], ["ok", "yes"]]
    show_result(None)
    assert capsys.readouterr().out == ""


def test_the_width_is_columns_or_enough_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    assert console().width == 77
    monkeypatch.delenv("COLUMNS")
    assert console().width == 120


def test_no_color_also_leaves_out_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert console().color_system is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert console().color_system is None
    monkeypatch.setenv("NO_COLOR", "")  # empty counts as not set: no-color.org
    assert console().color_system is not None
    assert isinstance(console(), Console)
