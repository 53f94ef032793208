"""Tables of text and of Markdown."""

import pytest

from spark_me.tables import markdown_table, text_table

ROWS = [("class", "images", "top-1"), ("cat", "1200", "9.5%"), ("a long name", "7", "100.0%")]


def test_columns_are_as_wide_as_their_widest_cell_and_flush_as_said() -> None:
    assert text_table(ROWS, "<>>").split("\n") == [
        "class        images   top-1",
        "cat            1200    9.5%",
        "a long name       7  100.0%",
    ]
    assert text_table([("a", "b"), ("", "")], "<<") == "a  b\n", "no blanks behind a line"


@pytest.mark.parametrize(("sides", "rule"), [("<>>", "| --- | ---: | ---: |"), ("><<", "| ---: | --- | --- |")])
def test_markdown_says_the_sides_below_its_header(sides: str, rule: str) -> None:
    assert markdown_table(ROWS, sides).split("\n") == [
        "| class | images | top-1 |",
        rule,
        "| cat | 1200 | 9.5% |",
        "| a long name | 7 | 100.0% |",
    ]
