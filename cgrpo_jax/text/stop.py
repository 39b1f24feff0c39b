"""Where a text is over though no end-of-sequence id was sampled: stop texts, and texts that should have had one."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence

SPARE = 4  # ids beyond those that can spell a stop text: the first of a window may be decoded otherwise than in it


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop text, as lm-eval cuts at `until`."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


@dataclasses.dataclass(frozen=True)
class Stopping:
    """Finds out how many ids of a response are kept where they have written a stop text.

    Up to the id that completes it: as with an end-of-sequence id, that depends on what was sampled until then and on
    nothing that came after it, so neither does it depend on when anybody looks.

    Args:
      decode: ids to the text in which stop texts are looked for.
    """

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...]

    def _written(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.stops)

    def __call__(self, ids: Sequence[int], new: int) -> int | None:
        """The number of ids that are kept, None where no stop text is there.

        Args:
          new: ids at the end that have not been looked at.
        """
        reach = max(len(stop.encode("utf-8", "surrogatepass")) for stop in self.stops) + SPARE
        if not self._written(ids[max(0, len(ids) - new - reach) :]) or not self._written(ids):
            return None
        return bisect.bisect_left(range(len(ids)), True, key=lambda count: self._written(ids[:count]))


ANSWER = re.compile(r"\\boxed\s*\{|\banswer is\b|\banswer\s*:|####", re.IGNORECASE)
NEXT = re.compile(r"\n[\s*#]*((?:question|problem|exercise|human|user|instruction|q)\b[^\n:]{0,12}:)", re.IGNORECASE)


def going_on(texts: Iterable[str]) -> str | None:
    """A sentence on responses that go on with a question of their own behind an answer; None where none does.

    So does a base model, which has learnt pages of exercises: what is graded then is the answer to the last of them.
    """
    texts, marks = list(texts), collections.Counter[str]()
    for text in texts:
        answer = ANSWER.search(text)
        if answer and (found := NEXT.search(text, answer.end())):
            marks[found[1]] += 1
    if not marks:
        return None
    mark = marks.most_common(1)[0][0]
    return (
        f"{marks.total()} of {len(texts)} responses go on with a question of their own after their answer, as "
        f"{mark!r}, and the last answer is graded; sampling.stop={json.dumps([chr(10) + mark])} ends them before it"
    )
