"""One HTML file from its parts: data as JSON that never runs, scripts and styles that the policy names by hash."""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cgrpo_jax.evaluation import tables
from cgrpo_jax.report_page import gather, rollouts
from cgrpo_jax.workdir.places import writing

FOLDER = pathlib.Path(__file__).parent
SCRIPTS = ["vendor/uPlot.iife.min.js", "vendor/temml.min.js", "dom.js", "strip.js", "curves.js", "tables.js"]
SCRIPTS += ["text.js", "diff.js", "detail.js", "rollouts.js", "start.js"]
STYLES = ("vendor/uPlot.min.css", "vendor/Temml-Local.css", "page.css")
MEGABYTES = 24.0  # of rollouts: 5,000 problems of seven short responses are 15; a page of 24 opens within two seconds
CHARACTERS = 16_000  # of a text


def _part(name: str) -> str:
    """A file of this folder; fonts that it would fetch are left out, so those of the system stand in."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r"@font-face\s*\{[^}]*\}", "", text) if name.endswith(".css") else text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def inert(text: str) -> str:
    """JSON that can stand in a script element: no tag begins or ends in it, and no comment."""
    return text.replace("<", "\\u003c")


def _rollouts_json(found: Mapping[str, Any]) -> str:
    """The records are JSON already."""
    steps = [f'{{"step":{json.dumps(step["step"])},"groups":[{",".join(step["groups"])}]}}' for step in found["steps"]]
    return f'{{"said":{json.dumps(found["said"])},"steps":[{",".join(steps)}]}}'


def page(data: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The whole file. `data`: runs and their comparison; `found`: the rollouts of each run."""
    scripts, styles = [_part(name) for name in SCRIPTS], [_part(name) for name in STYLES]
    policy = {
        "default-src": ["'none'"],
        "script-src": [_hash(text) for text in scripts],
        "style-src": [_hash(text) for text in styles],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    blocks = [f'<script type="application/json" id="data">{inert(json.dumps(data, allow_nan=False))}</script>']
    for of in found:
        blocks.append(f'<script type="application/json" class="rollouts">{inert(_rollouts_json(of))}</script>')
    parts = {
        "[POLICY]": "; ".join(f"{name} {' '.join(values)}" for name, values in policy.items()),
        "[STYLES]": "\n".join(f"<style>{text}</style>" for text in styles),
        "[DATA]": "\n".join(blocks),
        "[SCRIPTS]": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    pattern = "|".join(map(re.escape, parts))
    return re.sub(pattern, lambda match: parts[match.group()], _part("page.html"))


def write(
    workdirs: Sequence[pathlib.Path], out: pathlib.Path, megabytes: float = MEGABYTES, characters: int = CHARACTERS
) -> str:
    """Writes the report of these runs to the file `out`; returns what was left out of it, a line a run.

    Args:
      megabytes: of rollouts, shared by the runs.
      characters: of a single text; the middle of a longer one is left out.

    Raises:
      RunError: a workdir without metrics and without an evaluation. ReportError: an evaluation of another version.
    """
    runs = dict(zip(tables.names_of(workdirs), workdirs, strict=True))
    gathered = [gather.run_of(name, path) for name, path in runs.items()]
    room = int(megabytes * 1e6 / len(runs))
    found = [
        rollouts.answers_of(path, run["results"]["tasks"], room, characters, run["damaged"].append)
        if run["results"] and not run["training"]["steps"]
        else rollouts.rollouts_of(path, run["config"], room, characters, run["damaged"].append)
        for run, path in zip(gathered, runs.values(), strict=True)
    ]
    data = {"runs": gathered, "compared": gather.compared(runs)}
    partial = out.with_name(out.name + ".partial")
    text = page(data, found)
    with writing(partial):
        partial.write_text(text, encoding="utf-8")
    partial.rename(out)
    said = [(run, [*run["damaged"], *filter(None, [of["said"]])]) for run, of in zip(gathered, found, strict=True)]
    return "\n".join(f"{run['name']}: {line}" for run, lines in said for line in lines)
