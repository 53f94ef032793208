"""`spark-me config` and docs/configuration.md: all keys, with what the schemas' source says about them."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from spark_me import cli
from spark_me.config.reference import docstrings, in_words, markdown_reference, text_reference
from spark_me.config.tasks import FinetuneConfig, PretrainConfig

ROOT = Path(__file__).parents[1]
SCHEMAS = {"pretraining": PretrainConfig, "fine-tuning": FinetuneConfig}


def defaults_of(schema: type) -> dict[str, Any]:
    """Every key of a schema and its default, walked here."""
    found = {}
    for each in fields(schema):
        value = getattr(schema(), each.name)
        inner = defaults_of(type(value)) if is_dataclass(value) else {}
        found |= {f"{each.name}.{key}": default for key, default in inner.items()} or {each.name: value}
    return found


DEFAULTS = {task: defaults_of(schema) for task, schema in SCHEMAS.items()}
KEYS = sorted({*DEFAULTS["pretraining"], *DEFAULTS["fine-tuning"]})


@cache
def explain(key: str, width: int = 10_000) -> dict[str, str]:
    """The rows of an explanation, and the text above them as `meaning`."""
    heading, *lines = text_reference([key], width).splitlines()
    assert heading == key
    blank = lines.index("")
    rows = dict(line.split(maxsplit=1) for line in lines[blank + 1 :])
    return rows | {"meaning": "\n".join(line.strip() for line in lines[:blank])}


def by_task(row: str, key: str) -> dict[str, str]:
    """Takes `1600 in pretraining, 300 in fine-tuning` apart; a single value holds for every task that has the key."""
    if " in " not in row:
        return {task: row for task in SCHEMAS if key in DEFAULTS[task]}
    found = re.fullmatch(r"(.+) in pretraining, (.+) in fine-tuning", row)
    assert found is not None, row
    return dict(zip(SCHEMAS, found.groups(), strict=True))


@dataclass
class Parent:
    """A section."""

    length: int = 1
    """Of the run,
    in steps."""
    width: int = 2
    """Of the parent. Example: 7."""
    plain: int = 3


@dataclass
class Child(Parent):
    """Another default for one, another meaning for the other."""

    length: int = 10
    width: int = 20
    """Of the child."""
    names: list[str] = field(default_factory=list)
    """Its own."""


def test_docstrings_are_inherited_where_a_field_has_none() -> None:
    assert docstrings(Parent) == {"length": "Of the run, in steps.", "width": "Of the parent. Example: 7."}
    assert docstrings(Child) == {"length": "Of the run, in steps.", "width": "Of the child.", "names": "Its own."}


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true or false"),
        (int, "whole number"),
        (float | None, "number or null"),
        (list[float], "list of numbers"),
        (list[int] | None, "list of whole numbers or null"),
        (list[str], "list of texts"),
    ],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert in_words(hint) == words


def test_a_type_without_words_is_noticed() -> None:
    with pytest.raises(TypeError, match="no words"):
        in_words(dict[str, int])


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_explained(key: str) -> None:
    rows = explain(key)
    tasks = [task for task in SCHEMAS if key in DEFAULTS[task]]
    assert rows["task"] == " and ".join(tasks)
    assert rows["section"] == (key.rpartition(".")[0] if "." in key else "none: it stands at the top of the file")
    stated = by_task(rows["default"], key)
    for task in tasks:
        # Read as the command line would be: yaml alone takes 1e-05 for a text.
        read = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={stated[task]}"]))["x"]
        assert read == DEFAULTS[task][key], task
        assert type(read) is type(DEFAULTS[task][key]) or {type(read), type(DEFAULTS[task][key])} == {int, float}
    assert rows["meaning"], f"{key}: write a docstring below the field"
    assert rows["meaning"][-1] == "."
    assert "Example:" not in rows["meaning"]


@pytest.mark.parametrize("key", KEYS)
def test_meanings_stand_in_the_source(key: str) -> None:
    """Below the field, in the class or in one it inherits from."""
    section, _, name = key.rpartition(".")
    said = explain(key)["meaning"].splitlines()
    tasks = [task for task in SCHEMAS if key in DEFAULTS[task]]
    for place, task in enumerate(tasks):
        owner = type(attrgetter(section)(SCHEMAS[task]())) if section else SCHEMAS[task]
        below = [
            re.search(rf'\n    {name}: [^\n]*\n    """(.*?)"""', inspect.getsource(each), re.DOTALL)
            for each in owner.__mro__[:-1]
        ]
        first = next(found for found in below if found is not None)
        source = " ".join(first[1].split()).split(" Example: ")[0]
        assert source == (said[0] if len(said) == 1 else said[place].removeprefix(f"{task.capitalize()}: "))


@pytest.mark.parametrize("key", KEYS)
def test_examples_are_values_of_the_keys_type(key: str) -> None:
    (argument,) = shlex.split(explain(key)["example"])
    name, _, value = argument.partition("=")
    assert name == key
    assert value not in ("null", '""'), f"{key}: end its docstring with `Example: VALUE.`"
    for task, schema in SCHEMAS.items():
        if key in DEFAULTS[task]:
            merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist([argument]))
            assert OmegaConf.select(merged, key) is not None


def test_the_list_has_all_keys_by_section_and_fits_80_columns() -> None:
    listed = text_reference([], 80)
    assert max(map(len, listed.splitlines())) <= 80
    found = re.findall(r"^(  )?([a-z_.]+)(?::|  )", listed, re.MULTILINE)
    by_section: dict[str, list[str]] = {}
    for indented, name in found:
        if indented and by_section:
            by_section[list(by_section)[-1]].append(name)
        elif not indented:
            by_section[name] = []
    assert [name for indented, name in found if indented][0] == "weights"
    assert list(by_section) == ["model", "data", "optim", "optim.lamb", "train", "run"]
    for section, own in by_section.items():
        assert sorted(own) == [key for key in KEYS if key.rpartition(".")[0] == section]


def test_the_list_says_the_first_sentence_alone() -> None:
    meaning = explain("train.accumulate")["meaning"]
    first = meaning[: meaning.index(".") + 1]
    listed = " ".join(text_reference([], 10_000).split())
    assert first != meaning
    assert f"train.accumulate whole number; default 1 {first} train.precision" in listed


def test_what_differs_between_the_tasks_is_said_of_each() -> None:
    assert explain("optim.name")["default"] == "lamb in pretraining, adamw in fine-tuning"
    assert explain("model.drop_path")["type"] == "number or null in pretraining, number in fine-tuning"
    pretraining, finetuning = explain("data.root")["meaning"].splitlines()
    assert pretraining.startswith("Pretraining: ")
    assert finetuning.startswith("Fine-tuning: ")


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["optim"], [key for key in KEYS if key.startswith("optim.")]),
        (["epochs"], ["train.epochs"]),
        (["weights"], ["weights"]),
        (["seed", "train.steps", "run.seed"], ["run.seed", "train.steps"]),
    ],
)
def test_sections_bare_names_and_several_keys(
    names: list[str], keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", *names]) == 0
    headings = re.findall(r"^(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(headings) == sorted(keys)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("train.epoch", "train.epochs"),
        ("optim.mask_ratio", "model.mask_ratio"),
        ("trian", "train"),
        ("train.epochs=3", "train.epochs"),
        ("", "weights"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    name: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", name]) == 2
    error = capsys.readouterr().err
    assert error == f"spark-me: error: unknown key {name}: did you mean {nearest}? `spark-me config` lists all\n"


def test_the_page_takes_no_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "train", "--markdown"]) == 2
    assert "leave out" in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "widest"), [("50", 50), ("80", 80), ("300", 100)])
def test_lines_are_as_wide_as_the_terminal(
    columns: str, widest: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["config", "data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    prose = [line for line in lines if not line.startswith("  example")]  # which are not broken
    assert widest - 12 < max(map(len, prose)) <= widest


def test_the_page_is_the_committed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--markdown"]) == 0
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == capsys.readouterr().out, "run `spark-me config --markdown > docs/configuration.md`"


def test_the_page_has_every_key_and_its_whole_meaning() -> None:
    page = markdown_reference()
    assert sorted(re.findall(r"^- \*\*`([a-z_.]+)`\*\*: ", page, re.MULTILINE)) == KEYS
    assert max(map(len, page.splitlines())) <= 120
    assert not [code for code in re.findall("`[^`]*`", page) if "\n" in code]  # which is to be copied
    # Without line breaks, and the backslashes that ask for them.
    text = " ".join(page.replace("\\\n", " ").split())
    for key in KEYS:
        assert " ".join(explain(key)["meaning"].split()) in text


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from spark_me import cli; code = cli.main(['config', 'train.epochs']); "
        "sys.exit(code or sorted({'torch', 'numpy', 'MinkowskiEngine'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("train.epochs\n")


def test_a_reader_that_stops_early_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "spark_me", "config"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
