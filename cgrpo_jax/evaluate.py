"""Sampled accuracy on held-out problems, through the same sampler and graders as training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from cgrpo_jax.rollout import Score
from cgrpo_jax.tokenizer import Tokenizer
from cgrpo_jax.types import Generate, Kind, Problem, Request


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation before, during and after training."""

    every: int = 0  # steps; 0: none at all
    source: str = ""  # as data.source; "" is data.source itself
    revision: str = "main"  # of a hub id in eval.source
    split: str = "test"
    problems: int = 256
    samples: int = 4  # per problem
    temperature: float = 1.0
    top_p: float = 1.0


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` problems (Wilson 1927).

    With several samples a problem the mean of each lies between 0 and 1, so this interval is on the safe side.
    """
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    problems: Sequence[Problem], samples: int, generate: Generate, score: Score, tokenizer: Tokenizer
) -> dict[str, float]:
    """pass@1 (the mean over samples) of all problems and of each tag, with its 95 % interval."""
    requests = [
        Request(prompt_ids, Kind.EVALUATION, p, g)
        for p, prompt_ids in enumerate(tokenizer.encode_chat(problem.messages) for problem in problems)
        for g in range(samples)
    ]
    completions = generate(requests)
    items = [(problems[r.problem], c, tokenizer.decode(c.ids)) for r, c in zip(requests, completions, strict=True)]
    attempts = score(items)
    values: dict[str, float] = {}
    for tag in ["", *sorted({problem.tag for problem in problems} - {""})]:
        chosen = [p for p, problem in enumerate(problems) if tag in ("", problem.tag)]
        correct = [sum(a.correct for a in attempts[p * samples : (p + 1) * samples]) / samples for p in chosen]
        name, mean = "eval/pass@1" + (f"/{tag}" if tag else ""), sum(correct) / len(correct)
        values[name] = mean
        values[f"{name}/low"], values[f"{name}/high"] = wilson(mean, len(chosen))
    values["eval/length"] = sum(len(c.ids) for c in completions) / len(completions)
    values["eval/truncated"] = sum(not c.finished for c in completions) / len(completions)
    return values
