"""What a critique that a model wrote concludes, what of it is usable, and what stands in where nothing is."""

from __future__ import annotations

import re

from cgrpo_jax.options import RefineConfig
from cgrpo_jax.records import Attempt, Critique, Problem
from cgrpo_jax.rollout.critics import TEMPLATES

CONCLUSION = re.compile(r"conclusion\W{0,8}(correct|right|incorrect|wrong)\b", re.IGNORECASE)
END = "[END]"


def verdict_of(text: str) -> bool | None:
    """What the last conclusion of a critique says; None where there is none."""
    found = CONCLUSION.findall(text)
    return found[-1].lower() in ("correct", "right") if found else None


def usable(text: str) -> str:
    """A critique without a reasoning block and without what follows its end mark; "" where nothing is left."""
    _, closed, after = text.rpartition("</think>")
    text = after if closed else text.partition("<think>")[0]
    return text.partition(END)[0].strip() if END in text else text.strip()


def or_fallback(critique: Critique, problem: Problem, attempt: Attempt, cfg: RefineConfig) -> Critique:
    if critique.text is not None or cfg.critique_fallback == "drop":
        return critique
    return critique._replace(text=TEMPLATES[cfg.critique_fallback](problem, attempt), fallback=True)
