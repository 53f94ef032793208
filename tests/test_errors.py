"""What is printed: one line that no terminal obeys, whatever it was made of."""

import pickle
import re
import unicodedata

import pytest

from spark_me import cli
from spark_me.errors import LONGEST_MESSAGE, LONGEST_NAME, EngineError, UserError, printable, shorten, shown
from spark_me.weights.expected import WeightsError

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\u200be\x7f\0"


def test_nothing_is_left_that_a_terminal_obeys() -> None:
    assert printable(HOSTILE) == "a\ufffd[2J\ufffd]0;title\ufffdb\ufffdc\ufffd31m\ufffdd\ufffde\ufffd\ufffd"
    assert printable("straße 猫 × … 😀") == "straße 猫 × … 😀"
    every = printable("".join(map(chr, range(0x110000))))
    assert {unicodedata.category(character) for character in every}.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"})


@pytest.mark.parametrize("kind", [UserError, EngineError])
def test_messages_are_one_line_of_bounded_length(kind: type[UserError]) -> None:
    error = kind(f"{HOSTILE}\n  two\r\n\nthree\u2028four: {'x' * 100_000}: do this next")
    assert re.match(r"a\ufffd\[2J.* two three four: xx", str(error)) and str(error).endswith("xx: do this next")
    assert str(error).isprintable() and len(str(error)) == LONGEST_MESSAGE
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    plain = "path/to/x.png: unreadable (truncated × 3): repair it"
    assert str(kind(plain)) == plain


def test_attributes_keep_the_true_names() -> None:
    error = pickle.loads(pickle.dumps(WeightsError(f"x: {HOSTILE}", [HOSTILE], [], {})))
    assert error.missing == [HOSTILE] and str(error).isprintable()


def test_interruptions_are_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt(f"the last checkpoint is {HOSTILE}")

    monkeypatch.setattr(cli, "parse", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == f"spark-me: interrupted: the last checkpoint is {printable(HOSTILE)}\n"


def test_names_are_cut_where_they_are_shown() -> None:
    assert shown("short") == "short" and len(shown("x" * 20_000)) == LONGEST_NAME
    assert shown(HOSTILE) == printable(HOSTILE) and shown(7) == "7"


def test_long_names_keep_both_ends() -> None:
    for length in (LONGEST_NAME - 1, LONGEST_NAME):
        assert shorten("x" * length, LONGEST_NAME) == "x" * length
    name = "".join(chr(ord("a") + number % 26) for number in range(200)) + ".png"
    for longest in (47, 48):
        short = shorten(name, longest)
        begin, end = short.split("…")
        assert len(short) == longest and abs(len(begin) - len(end)) <= 1
        assert name.startswith(begin) and name.endswith(end)
