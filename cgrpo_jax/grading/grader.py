"""What happens to an answer: it is found in the response, spelled in one way, and compared with the gold.

    response -> extract (`answers`, `choices`, `release`) -> answer
    answer and gold -> one spelling (`normalise`) -> lists, sets, matrices (`structure`) -> compared part by part
    (`equivalence`) -> words, numbers and units (`leaves`); what is left is asked of math-verify (`expressions`)

Only a worker process calls this (`worker.py`), under the CPU and memory limits of one answer: the process that trains
gets the extracted answer and the reward, and parses nothing that a model wrote. A grader is a row of `GRADERS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from cgrpo_jax.grading import choices, equivalence, release, theoremqa
from cgrpo_jax.grading.answers import extract_answer
from cgrpo_jax.grading.golds import missing_sign
from cgrpo_jax.grading.leaves import Ask


class Job(NamedTuple):
    """One question to a worker process. With neither `text` nor `answer` it is whether the gold can be read at all."""

    grader: str  # a key of GRADERS
    gold: str
    text: str | None = None  # a whole response, in which the answer has to be found
    answer: str | None = None  # in place of `text`, where the answer is known already
    question: str = ""
    entry: Any = None  # what the grader needs beside the gold, as of Problem


class Grader(NamedTuple):
    """How the answer is found in a response, and what it is worth from 0 to 1."""

    extract: Callable[[str, Any], str | None]  # (response, entry of the job) -> answer
    reward: Callable[[Job, str, Ask], float]
    needs: str = ""  # a module to import before the time of the answer begins


def extract(job: Job) -> str | None:
    """The answer that a job is about; None where the response gives none, or where the job is about the gold alone."""
    return job.answer if job.text is None else GRADERS[job.grader].extract(job.text, job.entry)


def reward(job: Job, answer: str | None, ask: Ask) -> float:
    """What the extracted answer is worth; of a job about the gold alone, 1 where the gold can be read."""
    if answer is not None:
        return float(GRADERS[job.grader].reward(job, answer, ask))
    return float(job.text is None and equivalence.readable(job.gold, ask))


def _any_answer(text: str, entry: Any) -> str | None:
    return extract_answer(text)


def _exact(job: Job, answer: str, ask: Ask) -> float:
    """The answer is the gold string."""
    return answer == job.gold


def _math(job: Job, answer: str, ask: Ask) -> float:
    """Mathematical equivalence. The gold of a question for a percentage may lack the sign that the answer has."""
    missing = missing_sign(job.question, job.gold, answer)
    return equivalence.equal(f"{job.gold}\\%" if missing else job.gold, answer, ask)


def _math_verify(job: Job, answer: str, ask: Ask) -> float:
    """What math-verify says of the texts as they are, as in the release of the paper."""
    return ask(job.gold, answer, "plain")


def _choice(job: Job, answer: str, ask: Ask) -> float:
    """The answer names the option whose letter is the gold."""
    return choices.chosen(answer, job.entry["options"]) == job.gold


def _theoremqa(job: Job, answer: str, ask: Ask) -> float:
    """By the type of the gold; an answer that is no plain number must equal the gold as mathematics."""
    gold = job.entry["answer"]
    if missing_sign(job.question, str(gold), answer):
        gold /= 100
    correct = theoremqa.judge(job.entry["answer_type"], gold, answer)
    return equivalence.equal(theoremqa.spelled(gold), answer, ask) if correct is None else correct


def _reasoning_gym(job: Job, answer: str, ask: Ask) -> float:
    """The scorer of a task of `rewards.REASONING_GYM_TASKS`. Raises ValueError where it gives no number from 0 on.

    Much of what it gives between 0 and 1 is for an answer that contains the right one (0.5 to 12 where 2 is right).
    """
    import reasoning_gym

    entry = copy.deepcopy(dict(job.entry))
    found = min(float(reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry)), 1.0)
    if not found >= 0:
        raise ValueError(f"a score of {found}")
    return found


def _nothing(job: Job, answer: str, ask: Ask) -> float:
    """For jobs that only want to know the answer."""
    return 0.0


GRADERS = {
    "exact": Grader(_any_answer, _exact),
    "math": Grader(_any_answer, _math),
    "math_verify": Grader(lambda text, entry: release.extract(text), _math_verify),
    "choice": Grader(lambda text, entry: choices.extract_choice(text, entry["options"]), _choice),
    "theoremqa": Grader(_any_answer, _theoremqa),
    "reasoning_gym": Grader(_any_answer, _reasoning_gym, "reasoning_gym"),
    "function": Grader(_any_answer, _nothing),  # reward.fn decides
    "option": Grader(lambda text, entry: choices.chosen(text, entry["options"]), _nothing),  # a vote's letter
}
