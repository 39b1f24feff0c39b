"""How many characters of a text each of its tokens wrote."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import cast

from cgrpo_jax.text.stop import before
from cgrpo_jax.text.tokenizer import Tokenizer

BROKEN = "\ufffd"  # stands for bytes that are no whole character


class Pieces:
    """Tells the characters of tokens; what a token writes on its own is found once for each id."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.before = tokenizer.encode_text("a")  # decoded alone, some tokenizers drop a token's leading space
        self.own: dict[int, str] = {}

    def _write(self, ids: Iterable[int]) -> str:
        decode = self.tokenizer.hf.decode
        return cast(str, decode([*self.before, *ids], skip_special_tokens=True))[1:]

    def widths(self, ids: Sequence[int], text: str) -> list[int] | None:
        """Characters `[T]` of the tokens of a `text` that `Tokenizer.decode` made of `ids`; their sum is its length.

        Of tokens that share a character, the first has all the characters that they write together, the others none.
        What spells a stop text has none.
        None: the tokens one by one do not spell the text.
        """
        kept = list(ids)
        ended = len(kept) > 0 and kept[-1] in self.tokenizer.eos_ids
        if ended:
            kept.pop()
        for token in set(kept) - self.own.keys():
            self.own[token] = self._write([token])
        pieces = [self.own[token] for token in kept]
        first = 0
        while first < len(pieces):
            behind = first
            while behind < len(pieces) and BROKEN in pieces[behind]:
                behind += 1
            if behind > first:
                pieces[first:behind] = [self._write(kept[first:behind]), *[""] * (behind - first - 1)]
            first = behind + 1
        if pieces and pieces[0].startswith(" ") and not text.startswith(" "):
            pieces[0] = pieces[0][1:]
        whole = "".join(pieces)
        if before(whole, self.tokenizer.stops) != text:
            return None
        ends = [0, *itertools.accumulate(map(len, pieces))]
        within = [min(end, len(text)) for end in ends]
        return [*(after - first for first, after in itertools.pairwise(within)), *[0] * ended]
