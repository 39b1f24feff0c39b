"""The parts of answers that only math-verify can compare: asked a round at a time, under one CPU limit an answer.

Whatever is asked twice is answered once. What an answer is charged does not depend on who asked first, so neither does
its verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cgrpo_jax.grading.verifier import Reply, Verifier
from cgrpo_jax.records import Verdict

Question = tuple[str, str, str]  # gold and answer of a part, and how they are to be compared


class Parts:
    """What is known of the parts of so many answers, and what each answer has used of its CPU time."""

    def __init__(self, verifier: Verifier, answers: int):
        self.verifier = verifier
        self.known: dict[Question, Reply] = {}
        self.needed: list[dict[Question, None]] = [{} for _ in range(answers)]
        self.spent = [False] * answers  # all of its time is used: what it does not know by now counts as no

    def says(self, answer: int, question: Question) -> bool:
        """Until it is answered a question counts as yes, so that an answer which fails elsewhere is refused at once."""
        return self.known[question].yes if question in self.known else not self.spent[answer]

    def unknown(self, answer: int, asked: Sequence[Question]) -> list[Question]:
        """Those that are still to be answered; none where the answer has no time left."""
        self.needed[answer].update(dict.fromkeys(asked))
        if self.spent[answer]:
            return []
        return [question for question in dict.fromkeys(asked) if question not in self.known]

    def ask(self, wanted: Mapping[int, Sequence[Question]]) -> None:
        """Asks the verifier what each answer wants to know; raises VerifierError."""
        limit = self.verifier.cpu_seconds
        jobs: dict[tuple[tuple[Question, ...], float], list[int]] = {}
        for answer, questions in wanted.items():
            known = [self.known[question] for question in self.needed[answer] if question in self.known]
            left = limit - sum(reply.seconds for reply in known)
            if left <= 0:
                self.spent[answer] = True
            else:
                jobs.setdefault((tuple(questions), left), []).append(answer)
        replies = self.verifier.compare_parts(list(jobs))
        for ((questions, left), answers), found in zip(jobs.items(), replies, strict=True):
            for number, (question, reply) in enumerate(zip(questions, found, strict=False)):
                # That the rest of an answer's time was too short for it says nothing to others.
                if reply.status != "timeout" or (number == 0 and left == limit):
                    self.known[question] = reply
            if len(found) < len(questions) or found[-1].status == "timeout":
                for answer in answers:
                    self.spent[answer] = True

    def verdict(self, answer: int, correct: bool, asked: Sequence[Question]) -> Verdict:
        """With the reason where it is refused only because something could not be compared."""
        statuses = [self.known[question].status for question in asked if question in self.known]
        failed = [status for status in statuses if status != "ok"] + ["timeout"] * self.spent[answer]
        return Verdict.of(correct, failed[0] if failed and not correct else "ok")
