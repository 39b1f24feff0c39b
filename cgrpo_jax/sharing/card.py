"""A model card of a run, for the Hugging Face hub: what was trained on what and how, and what was measured.

Everything comes from the workdir; strings of its configuration are escaped, and local paths are cut to their last part.
"""

from __future__ import annotations

import dataclasses
import html
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from cgrpo_jax.config import Config
from cgrpo_jax.data.told import for_others, hub_id, public_name
from cgrpo_jax.errors import ReportError
from cgrpo_jax.evaluation import tables
from cgrpo_jax.evaluation.store import contents
from cgrpo_jax.evaluation.tables import Table
from cgrpo_jax.model.hf import SIDE_FILES
from cgrpo_jax.report_page import gather
from cgrpo_jax.report_page.live import Curves
from cgrpo_jax.workdir import reading
from cgrpo_jax.workdir.changes import flat

PICTURE = "curves.png"
UNKNOWN = "unknown"  # a licence, as the hub spells it
PAPER = "2506.03106"


class Card(NamedTuple):
    """README.md of a repository, and the picture it shows: a PNG, None where no curve was measured."""

    text: str
    picture: bytes | None

    def write(self, folder: pathlib.Path) -> None:
        (folder / "README.md").write_text(self.text, encoding="utf-8")
        if self.picture is not None:
            (folder / PICTURE).write_bytes(self.picture)


def plain(value: Any) -> str:
    """Any value as Markdown that shows it in one line and does nothing else."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#!|~:@])", r"\\\1", html.escape(text, quote=False))


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what the run has set otherwise than the defaults."""
    default = flat(dataclasses.asdict(Config()))
    changed = {name: value for name, value in config.items() if default.get(name) != value}
    return [(name, str(value)) for name, value in for_others(changed).items()]


def accuracies(rows: Sequence[Mapping[str, Any]], step: int) -> Table | None:
    """The first evaluation and the last one up to `step`, with 95 % intervals; None where there was none."""
    measured = [row for row in rows if row["step"] <= step and any(name.endswith("/low") for name in row)]
    if not measured:
        return None
    ends = measured[:1] + measured[1:][-1:]
    names = [name.removesuffix("/low") for name in ends[-1] if name.endswith("/low")]
    columns = ["", *[f"step {row['step']}" + (" (the base)" if row["step"] == 0 else "") for row in ends]]
    return Table(
        columns, [[plain(name.removeprefix("eval/")), *[_interval(row, name) for row in ends]] for name in names], []
    )


def _interval(row: Mapping[str, Any], name: str) -> str:
    known = [100 * value for end in ("", "/low", "/high") if (value := row.get(f"{name}{end}")) is not None]
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*known) if len(known) == 3 else ""


def picture(rows: Sequence[Mapping[str, Any]], step: int, drawn: str) -> bytes | None:
    """The curves up to `step`, as a PNG; None where nothing that it shows was measured."""
    curves = Curves()
    curves.drawn = drawn
    for row in rows:
        if row["step"] <= step:
            curves.add(row)
    figure = curves.figure()
    if figure is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def front_matter(config: Mapping[str, Any], license_id: str) -> str:
    """What the hub reads of a card: YAML between two lines of dashes."""
    data: dict[str, Any] = {"license": license_id, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if base := hub_id(str(config.get("model.path", ""))):
        data["base_model"] = base
    if dataset := hub_id(str(config.get("data.source", ""))):
        data["datasets"] = [dataset]
    data["tags"] = ["cgrpo_jax", "reinforcement-learning", str(gather.method_of(config)), f"arxiv:{PAPER}"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _evaluation(rows: Sequence[Mapping[str, Any]], drawn: str, step: int, evaluated: pathlib.Path | None) -> list[str]:
    parts = []
    if (table := accuracies(rows, step)) is not None:
        how = f", {drawn}" if drawn else ""
        parts += [
            f"Held-out problems, during training{how}, with 95 % intervals:",
            table.markdown(),
        ]
    if evaluated is not None:
        results = gather.evaluation_of(evaluated)
        if results is None:
            raise ReportError(f"--evaluated={evaluated}: no results.json; give the workdir of method=eval")
        cells = [[plain(cell) for cell in row] for row in results["rows"]]
        parts += [
            f"Named tasks ({plain(results['asked'])}):",
            Table(results["columns"], cells, []).markdown(),
        ]
        parts += [plain(note) for note in results["notes"]]
    return parts or ["Not evaluated."]


def check_evaluated(evaluated: pathlib.Path, model: pathlib.Path) -> None:
    """Raises ReportError unless the evaluation is of the files of this model: its weights, tokenizer and template."""
    asked, here = tables.read(evaluated)["settings"], contents(model, SIDE_FILES)
    other = [
        f"{name} {tables.setting_text(name, asked.get(name))}, not {tables.setting_text(name, here[name])}"
        for name in here
        if asked.get(name) != here[name]
    ]
    if other:
        raise ReportError(
            f"--evaluated={evaluated}: an evaluation of another model than this one ({'; '.join(other)}), which is in "
            f"{model} now: evaluate that with model.path={model}, and push again with another --out"
        )


def of_run(
    workdir: pathlib.Path,
    step: int,
    repo: str,
    license_id: str = UNKNOWN,
    evaluated: pathlib.Path | None = None,
    say: reading.Say = print,
) -> Card:
    """The card of a checkpoint of a run.

    Args:
      evaluated: the workdir of an evaluation of this checkpoint (method=eval), whose table is shown, too.
      say: is told what of the run could not be read, and is not in the card.

    Raises: RunError where `workdir` holds no metrics; ReportError where `evaluated` holds no results.
    """
    rows, config = reading.metrics(workdir, say), flat(reading.config(workdir, say))
    image = picture(rows, step, gather.drawn_in(config))
    base, data = (plain(public_name(key, str(config.get(key, "?")))) for key in ("model.path", "data.source"))
    method = plain(gather.method_of(config))
    changed = [[plain(name), plain(value)] for name, value in settings(config)]
    licence = "is not known to who made this card" if license_id == UNKNOWN else f"is {plain(license_id)}"
    parts = [
        f"# {plain(repo.rpartition('/')[2])}",
        f"Trained from {base} by {method} on {data}: step {step} of {config.get('train.steps', '?')}, with cgrpo_jax, "
        f"an implementation of [Critique-GRPO](https://arxiv.org/abs/{PAPER}) on JAX. This card was written by the "
        "program from what the run left behind; no person has added to it.",
        "## Evaluation",
        *_evaluation(rows, gather.drawn_in(config), step, evaluated),
        "## Training",
        *([f"![curves of the run, by step]({PICTURE})"] if image is not None else []),
        "Settings that are not the defaults:",
        Table(["setting", "value"], changed, []).markdown(),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```',
        "## Licence",
        f"The licence of these weights {licence}; that of the base model binds them, too.",
    ]
    return Card(front_matter(config, license_id) + "\n" + "\n\n".join(parts) + "\n", image)
