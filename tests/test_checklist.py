"""Every name in the checklist of configs/README.md is there: methods, keys and their values, metrics, functions, tests."""

import ast
import functools
import importlib
import pathlib
import re

import pytest
from test_paper import PAPER

from cgrpo_jax.config import METHODS, Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECTION = (ROOT / "configs/README.md").read_text(encoding="utf-8").partition("## What a whole implementation has")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \d.*$", SECTION, re.MULTILINE)
]
CODE = re.compile(r"`([^`]+)`")
SOURCE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cgrpo_jax").rglob("*.py"))


@functools.cache
def functions_of(path):
    return {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if hasattr(node, "name")}


def dotted(name):
    """What a dotted name says: the longest part of it that is a module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def option_of(key):
    """The field of a key of the configuration."""
    holder = Config
    *sections, last = key.split(".")
    for section in sections:
        holder = type(holder.__dataclass_fields__[section].default)
    return holder.__dataclass_fields__[last]


def fault(name):
    """Why a name of the table is none; None where it is one."""
    if name.startswith("tests/"):
        path, _, test = name.partition("::")
        return None if (ROOT / path).is_file() and test in functions_of(path) else "no such test"
    if name.startswith("cgrpo_jax."):
        try:
            dotted(name)
        except AttributeError:
            return "no such function"
        return None
    if "/" in name:
        known = (ROOT / name).is_file() or f'"{name}"' in SOURCE
        return None if known else "neither a file nor a metric"
    if name in METHODS or name in PAPER["ROWS"]:
        return None
    key, _, value = name.partition("=")
    try:
        choices = option_of(key).metadata.get("choices", ())
    except (KeyError, AttributeError):
        return "no method and no key"
    return None if not value or value in choices else "no such value"


def test_each_row_is_there_once_and_says_what_shows_it():
    assert [int(row[0]) for row in ROWS] == list(range(1, 71)) and all(len(row) == 4 for row in ROWS)
    for number, _, by, shown in ROWS:
        tests = [name for name in CODE.findall(shown) if name.startswith("tests/")]
        assert tests or by.startswith(("next", "left out: ")), number
        assert CODE.findall(by) or by == "next", number
    assert len([row for row in ROWS if row[2].startswith("next")]) == 6


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_name_exists(row):
    names = [name for cell in row[2:] for name in CODE.findall(cell)]
    assert {name: why for name in names if (why := fault(name))} == {}


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_rollout.py::test_nothing", "tests/test_none.py::test_triggers", "cgrpo_jax.rollout.critics.none",
        "cgrpo_jax.nothing.at_all", "configs/none.py", "critique/none", "refine.none", "none.critique", "gpro",
        "refine.critique=none", "refine.k=1",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found_out(name):
    assert fault(name)
