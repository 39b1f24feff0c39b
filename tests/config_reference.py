"""The reference of all options, from their dataclasses, and the table of the names that other frameworks give them.

To renew both: `python tests/config_reference.py`.
"""

import ast
import dataclasses
import inspect
import io
import pathlib
import re
import tokenize
import typing

from cgrpo_jax import config
from cgrpo_jax.config import names as option_names

FILE = pathlib.Path(__file__).parent.parent / "configs" / "REFERENCE.md"
PAGE = FILE.parent / "README.md"
COMING = "## Coming from TRL or verl\n"
COMING_HEAD = """Typed as an option, each of these names (with its prefix or without, `--num_generations=8` as
`--config.actor_rollout_ref.rollout.n=8`) is answered with ours. Written by `python tests/config_reference.py` from
`cgrpo_jax/config/names.py`; names as read in TRL, verl and OpenRLHF in 2026, some of them of older versions.
"""
HEAD = """# Every option

`--config.KEY=VALUE` sets one, `config.KEY = VALUE` in a configuration file. Written by `python tests/config_reference.py`
from `cgrpo_jax/options.py` and `cgrpo_jax/config.py`; a test keeps it so.
"""


def comments(cls):
    """Field -> what the comments beside it, or on the lines above it, say."""
    source = inspect.getsource(cls)
    by_line = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above, line = [], node.lineno - 1
            while line in by_line and by_line[line][1]:
                above.insert(0, by_line[line][0])
                line -= 1
            beside = [by_line[n][0] for n in range(node.lineno, node.end_lineno + 1) if n in by_line]
            found[node.target.id] = " ".join(above + beside)
    return found


def allowed(field, kind):
    bounds = field.metadata
    if bounds.get("choices"):
        return ", ".join(f"`{choice}`" for choice in bounds["choices"])
    words = {"above": "above", "at_least": "at least", "below": "below", "at_most": "at most"}
    limits = [f"{word} {bounds[name]}" for name, word in words.items() if bounds.get(name) is not None]
    return f"{kind.__name__}, {', '.join(limits)}" if limits else kind.__name__


def table(cls, prefix):
    hints, said = typing.get_type_hints(cls), comments(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            default = f'`"{field.default}"`' if isinstance(field.default, str) else f"`{field.default}`"
            told = f"{said[field.name]} {field.metadata.get('help', '')}".strip()
            cells = f"`{prefix}{field.name}`", default, allowed(field, hints[field.name]), told
            rows.append("| " + " | ".join(re.sub(r"(?<!\\)\|", "\\|", cell) for cell in cells) + " |")
    return "\n".join(["| key | default | may be | |", "|---|---|---|---|", *rows])


def reference():
    parts = [HEAD.rstrip(), table(config.Config, "")]
    hints = typing.get_type_hints(config.Config)
    for field in dataclasses.fields(config.Config):
        cls = hints[field.name]
        if dataclasses.is_dataclass(cls):
            parts += [f"## {field.name}", inspect.getdoc(cls), table(cls, f"{field.name}.")]
    return "\n\n".join(parts) + "\n"


def coming():
    """The section of configs/README.md, from its heading to the next."""
    lines = ["| here | TRL | verl | OpenRLHF | |", "|---|---|---|---|---|"]
    for row in option_names.TABLE:
        names = [" ".join(f"`{name}`" for name in part.split()) for part in row[:4]]
        lines.append("| " + " | ".join([*names, row.differs]) + " |")
    return "\n".join([COMING, COMING_HEAD, *lines, "\n"])


def page_with(section):
    """configs/README.md with the section in its place."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(COMING)
    return before + section + rest[rest.index("## ") :]


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
    PAGE.write_text(page_with(coming()), encoding="utf-8")
