"""Every command that a page or a configuration names is one that the program takes."""

import argparse
import importlib
import json
import pathlib
import re
import shlex
import sys

import pytest

from cgrpo_jax.config import from_config_dict
from cgrpo_jax.config.files import get_config
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.planner import chips
from cgrpo_jax.run.checks import check

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / name / "README.md" for name in ("configs", "notebooks", "launch_tpu", "tests"))]
PAGES += sorted((ROOT / "configs").glob("*.py"))
QUICKSTART = ROOT / "cgrpo_jax" / "quickstart"
BY_FLAGS = ("main", "plan")  # absl's; the others use argparse


def commands():
    """(place, module, arguments) of each `python -m cgrpo_jax.MODULE --...` on the pages, its lines joined."""
    found = []
    for page in PAGES:
        if page.is_file():
            text = page.read_text().replace("\\\n", " ")
            for module, rest in re.findall(r"python -m cgrpo_jax\.(\w+)((?: [^\n`]+)?)", text):
                arguments = shlex.split(rest.partition(" #")[0].replace("...", ""))
                found.append(pytest.param(module, arguments, id=f"{page.parent.name}/{page.name} {module}{rest}"[:110]))
    return found


def troubles():
    """What the page on configurations says that a program says."""
    section = (ROOT / "configs/README.md").read_text().split("## When something fails\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    return [text for row in rows[1:] for text in re.findall("`([^`]+)`", row)]


def test_each_trouble_is_one_that_the_code_names():
    """Every text, but for what jax says and what is computed."""
    source = "\n".join(path.read_text() for path in (ROOT / "cgrpo_jax").rglob("*.py"))
    known = [text for text in troubles() if text not in ("RESOURCE_EXHAUSTED", "cpu")]
    assert len(known) > 20 and not [text for text in known if text not in source]


def test_each_metric_of_the_page_is_one_that_is_written():
    section = (ROOT / "configs/README.md").read_text().split("## Reading a run\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    named = [name for row in rows[1:] for name in re.findall("`([^`]+)`", row) if re.match(r"\w+/[\w@]+$", name)]
    written = {name for row in json.loads((ROOT / "tests/golden_run.json").read_text())["metrics"] for name in row}
    source = "\n".join(path.read_text() for path in (ROOT / "cgrpo_jax").rglob("*.py"))
    assert len(named) > 15 and not [name for name in named if name not in written and f'"{name}"' not in source]


class Parsed(Exception):
    """Stands for what a program would do next."""


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_the_program_takes_it(monkeypatch, module, arguments):
    if module in BY_FLAGS:
        takes_configuration(arguments)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *args):
        raise Parsed(parse(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    program = importlib.import_module(f"cgrpo_jax.{module}")
    if arguments:
        with pytest.raises(Parsed):
            program.main()


def takes_configuration(arguments):
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    assert all("=" in argument or argument in ("--preflight", "--debug") for argument in arguments), arguments
    known = {"config", "workdir", "hosts", "topology", "json", "hlo", "only", "most", "debug", "preflight"}
    assert all(name in known or name.startswith("config.") for name in given)
    if "topology" in given and given["topology"].islower():
        chips.topology(given["topology"])
    if "config" not in given or given["config"].isupper() or "METHOD" in given["config"]:
        return
    name = given["config"]
    config = get_config(str(ROOT / name) if name.startswith("configs/") else name)
    for key, value in given.items():
        if key.startswith("config."):
            set_leaf(config, key.removeprefix("config."), value)
    cfg = from_config_dict(config)
    if cfg.model.path == "package://quickstart":
        check(cfg, config_from_hf(QUICKSTART))


def set_leaf(config, key, text):
    """As the flag does: by the type that the leaf has."""
    *parts, leaf = key.split(".")
    for part in parts:
        config = config[part]
    held = config[leaf]
    config[leaf] = text == "true" if isinstance(held, bool) else type(held)(text)


def test_there_are_commands_and_a_wrong_one_is_found():
    assert len(commands()) > 30
    for wrong in (["--config=quickstart:drgrpo"], ["--config=quickstart", "--config.train.stepz=3"], ["--confg=x"]):
        with pytest.raises((AssertionError, ValueError, KeyError)):
            takes_configuration(wrong)
