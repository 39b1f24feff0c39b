"""Puts the HTML report together: data as inert JSON, scripts and styles that its security policy names by hash."""

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
from cgrpo_jax.workdir.places import write_whole

FOLDER = pathlib.Path(__file__).parent
SCRIPTS = ["vendor/uPlot.iife.min.js", "vendor/temml.min.js", "dom.js", "strip.js", "curves.js", "tables.js"]
SCRIPTS += ["text.js", "diff.js", "detail.js", "rollouts.js", "start.js"]
STYLES = ("vendor/uPlot.min.css", "vendor/Temml-Local.css", "page.css")
MEGABYTES = 24.0  # of rollouts: 5,000 problems with seven short responses are 15; 24 open within two seconds
CHARACTERS = 16_000  # of a text


def _part(name: str) -> str:
    """A file of this folder, without the fonts that its styles would load: those of the system are used instead."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r"@font-face\s*\{[^}]*\}", "", text) if name.endswith(".css") else text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def inert(text: str) -> str:
    """JSON that is safe in a script element: it holds no tag and no comment."""
    return text.replace("<", "\\u003c")


def _rollouts_json(found: Mapping[str, Any]) -> str:
    """JSON of the rollouts of a run, whose groups are JSON already."""
    steps = [f'{{"step":{json.dumps(step["step"])},"groups":[{",".join(step["groups"])}]}}' for step in found["steps"]]
    return f'{{"said":{json.dumps(found["said"])},"steps":[{",".join(steps)}]}}'


def page(data: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The HTML. `data`: runs and their comparison; `found`: the rollouts of each run."""
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
    """Writes the report of these runs to the file `out`; returns lines on what was left out, with the name of the run.

    Args:
      megabytes: of rollouts, for all runs together.
      characters: of one text; a longer one loses its middle.

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
    write_whole(out, page(data, found))
    said = [(run, [*run["damaged"], *filter(None, [of["said"]])]) for run, of in zip(gathered, found, strict=True)]
    return "\n".join(f"{run['name']}: {line}" for run, lines in said for line in lines)
