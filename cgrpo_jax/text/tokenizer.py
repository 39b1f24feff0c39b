"""Chat turns to token ids and back, such that text inside a turn can never forge a special token."""

from __future__ import annotations

import itertools
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cgrpo_jax.errors import CheckpointError, ConfigError, PromptError
from cgrpo_jax.model.hf_config import read_json
from cgrpo_jax.records import Message
from cgrpo_jax.text.prompts import SYSTEM
from cgrpo_jax.text.stop import Stopping, before

# Private-use characters stand in for the contents while the template's own text is found out.
PLACEHOLDER = "\ue000{}\ue001"
BROKEN = "\ufffd"  # stands for bytes that are no whole character
DATE = "26 Jul 2024"  # what Llama 3's templates themselves fall back to
# Others stand in for what a template may take for a mark and cut a text at (`</think>`, `[/INST]`).
HIDDEN = str.maketrans({"<": "\ue002", "[": "\ue003"})


def _squeezed(text: str) -> str:
    """Without what a template may change and yet lose nothing: white space and case."""
    return "".join(text.split()).casefold()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _folded(messages: Sequence[Message]) -> Sequence[Message]:
    """What the system says stands at the head of the first turn that follows it."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if not said or not others:
        return messages
    head: Message = {"role": others[0]["role"], "content": "\n\n".join([*said, others[0]["content"]])}
    return [head, *others[1:]]


class Tokenizer:
    """The tokenizer of a Hugging Face folder with its chat template and what ends a response.

    Args:
      stops: texts that end one (`config.stop_texts`); one that is an added token does so as an end-of-sequence id.
    """

    def __init__(self, folder: str | os.PathLike, thinking: str = "auto", stops: Sequence[str] = ()):
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").exists():
            raise CheckpointError(f"{folder}/tokenizer.json: no such file; a fast tokenizer is needed")
        try:
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, clean_up_tokenization_spaces=False)
        except Exception as error:  # of many kinds, of three libraries
            what = "config.json" if "Validation error for field" in str(error) else "tokenizer"
            raise CheckpointError(f"{folder}: its {what} cannot be read ({_one_line(error)})") from error
        self.hf = cast(PreTrainedTokenizerBase, loaded)
        self._choose_template(folder)
        self.plain = self.hf.chat_template is None  # a base model: its prompt is the user's text alone
        self.switches = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
        if thinking != "auto" and "enable_thinking" not in str(self.hf.chat_template):
            raise CheckpointError(f"{folder}: model.thinking = {thinking!r}, but its chat template has no such switch")
        added = self.hf.added_tokens_decoder.values()
        self.added = tuple(str(token) for token in added)
        self.special = frozenset(str(token) for token in added if token.special)
        self.start = self._written_before() if self.plain else ""  # the template's own business elsewhere
        self.folds_system = False  # into the user's turn
        self._try_template(folder)
        self._look_for_header(folder)
        self.stops = tuple(stop for stop in stops if stop not in self.added)
        self.eos_ids = self._end_ids(folder, set(stops) - set(self.stops))
        self.end_id = self._end_id()
        self._check_stops()

    def _written_before(self) -> str:
        """What the tokenizer puts before a text; what it puts behind one would end the turn before it begins."""
        marked = self.hf("x", return_special_tokens_mask=True)
        pairs = zip(marked["input_ids"], marked["special_tokens_mask"], strict=True)
        return cast(str, self.hf.decode([i for i, _ in itertools.takewhile(operator.itemgetter(1), pairs)]))

    @property
    def stopping(self) -> Stopping | None:
        """Finds stop texts in sampled ids; None where there are none."""
        return Stopping(self._spelled, self.stops) if self.stops else None

    def _check_stops(self) -> None:
        """Raises ConfigError for a stop text that no decoded text can hold."""
        for stop in self.stops:
            if held := [token for token in self.special if token in stop]:
                raise ConfigError(
                    f"sampling.stop: {stop!r} holds the special token {held[0]!r}, which is left out of texts; name "
                    "the token alone or the text alone"
                )

    def _check_ends(self, path: pathlib.Path, ids: Iterable[int]) -> None:
        """Raises CheckpointError for an end-of-sequence id that is a piece of text here, or nothing."""
        for i in ids:
            token = self.hf.convert_ids_to_tokens(i)
            if token is None:
                raise CheckpointError(f"{path}: eos_token_id {i}: the tokenizer beside it has no such id")
            if i not in self.hf.added_tokens_decoder:
                raise CheckpointError(
                    f"{path}: eos_token_id {i} is the text {self.hf.decode([i])!r} to the tokenizer beside it, so each "
                    "answer would end where it is first written; correct the id (sampling.stop ends answers at a text)"
                )

    def _end_ids(self, folder: pathlib.Path, stops: Iterable[str]) -> tuple[int, ...]:
        """Ids that end a response: of the tokenizer, of both configurations, and what the template ends a turn with.

        Args:
          stops: added tokens that do so, too.
        """
        ids: set[int] = set() if self.hf.eos_token_id is None else {int(cast(int, self.hf.eos_token_id))}
        for name in ("generation_config.json", "config.json"):
            if (folder / name).exists():
                eos = read_json(folder / name).get("eos_token_id")
                listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
                if not all(type(i) is int and i >= 0 for i in listed):
                    raise CheckpointError(
                        f"{folder / name}: eos_token_id = {eos!r}: an id, or a list of ids, is needed"
                    )
                self._check_ends(folder / name, listed)
                ids |= set(listed)
        ids |= {cast(int, self.hf.convert_tokens_to_ids(token)) for token in stops}
        ids |= {cast(int, self.hf.convert_tokens_to_ids(token)) for token in self._turn_ends()}
        if not ids:
            raise CheckpointError(f"{folder}: no eos_token_id in tokenizer, generation_config.json or config.json")
        return tuple(sorted(ids))

    def _end_id(self) -> int:
        """The id behind a text that is learnt: what the template ends a turn with, the tokenizer's own end first."""
        ends = {cast(int, self.hf.convert_tokens_to_ids(token)) for token in self._turn_ends()} or set(self.eos_ids)
        own = cast(int | None, self.hf.eos_token_id)
        return own if own in ends else min(ends)

    def _choose_template(self, folder: pathlib.Path) -> None:
        """Of several named templates the default one, else the only one. Raises CheckpointError for others."""
        named: Any = self.hf.chat_template
        if isinstance(named, dict) and "default" not in named:
            if len(named) != 1:
                raise CheckpointError(f"{folder}: its chat templates are {', '.join(sorted(named))}, and no 'default'")
            (self.hf.chat_template,) = named.values()

    def _try_template(self, folder: pathlib.Path) -> None:
        """Whether the template takes a system turn. Raises CheckpointError where it fails without one, too."""
        for fold in (False, True):
            self.folds_system = fold
            try:
                self._render(({"role": "system", "content": "a"}, {"role": "user", "content": "b"}))
                return
            except PromptError as error:
                failed = error
        raise CheckpointError(f"{folder}: {failed}")

    def _look_for_header(self, folder: pathlib.Path) -> None:
        """Raises CheckpointError where the template never begins the turn of the answer, so the user's would go on.

        It does not heed `add_generation_prompt`, and an answer within a chat has something before it that the prompt
        has not.
        """
        said = PLACEHOLDER.format(1)
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        try:
            asked, same = (self._templated(turns[:1], add_generation_prompt=flag) for flag in (True, False))
            head, shown, _ = self._templated(turns, add_generation_prompt=False).partition(said)
        except Exception:  # a template is somebody's program, and this one takes no such turns
            return
        header = head.rstrip().removeprefix(asked.rstrip()).strip()
        if not self.plain and asked == same and shown and head.startswith(asked.rstrip()) and header:
            raise CheckpointError(
                f"{folder}: its chat template ignores add_generation_prompt: a prompt ends in {asked[-20:]!r}, and the "
                f"model would go on in the user's turn; where that is set, write {header!r} behind the last turn"
            )

    def _turn_ends(self) -> set[str]:
        """The added tokens that the template writes right after an assistant's text, inside a chat and at its end.

        Where they are in no list of end-of-sequence ids (a base model with the template of its chat model) every
        response would run to the length limit.
        """
        said = PLACEHOLDER.format(1)
        found: set[str] = set()
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        for chat in ([*turns, turns[0]], turns) if not self.plain else ():
            try:
                text = self._templated(chat, add_generation_prompt=False)
            except Exception:  # a template is somebody's program, and this one takes no such turns
                continue
            behind = text.partition(said)[2].lstrip()
            if ends := [token for token in self.added if behind.startswith(token)]:
                found.add(max(ends, key=len))
        return found

    def encode_text(self, text: str) -> list[int]:
        """Plain text: what looks like a special token is spelled out in ordinary tokens."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_answer(self, text: str) -> np.ndarray:
        """int32 ids of a text to learn, with the id that ends its turn."""
        return np.asarray([*self.encode_text(text), self.end_id], np.int32)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the turns plus the header of the answer, equal to `apply_chat_template` for benign text.

        What a content must not forge: every special token, and every other added token that the template itself puts
        around the turns (`<think>` stays what it is unless the template writes one).

        Raises:
          PromptError: the template leaves out a part of the contents, or rewrites them and they hold special tokens,
            so template and text cannot be told apart safely.
        """
        text, spans, own = self._render(messages)
        guarded = self.special | {token for token in self.added if token in own}
        pattern = re.compile("|".join(map(re.escape, sorted(guarded, key=len, reverse=True))) or r"(?!)")
        marks = [match.group() for match in pattern.finditer(own)]
        guarded_ids = {self.hf.convert_tokens_to_ids(token) for token in guarded}
        expected = self.hf.convert_tokens_to_ids(marks)

        def forged(ids: list[int]) -> bool:
            return [i for i in ids if i in guarded_ids] != expected

        ids = self.hf.encode(text, add_special_tokens=False)
        if not forged(ids):
            return ids
        if spans is None:
            raise PromptError("the chat template rewrites this text, which holds special tokens")
        ids, position = [], 0
        for match in pattern.finditer(text):
            inside = any(match.start() < end and start < match.end() for start, end in spans)
            cut = match.start() + 1 if inside else match.start()  # broken in two, a forged token is but text
            ids += self.encode_text(text[position:cut])
            if not inside:
                ids.append(cast(int, self.hf.convert_tokens_to_ids(match.group())))
            position = cut if inside else match.end()
        ids += self.encode_text(text[position:])
        if forged(ids):
            raise PromptError("the text would forge a special token")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of sampled ids up to a stop text; special tokens and the turn's end are left out, `<think>` stays."""
        return before(self._spelled(ids), self.stops)

    def _spelled(self, ids: Iterable[int]) -> str:
        """As `decode`, with a stop text and what is behind it."""
        kept = list(ids)
        if kept and kept[-1] in self.eos_ids:  # which need not be called special
            kept.pop()
        return cast(str, self.hf.decode(kept, skip_special_tokens=True))

    def _templated(self, turns: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        # Llama 3's templates would write today's date: a prompt must not depend on the day.
        fixed: dict[str, Any] = {"tokenize": False, "date_string": DATE} | self.switches
        text = self.hf.apply_chat_template(list(turns), add_generation_prompt=add_generation_prompt, **fixed)
        return cast(str, text)

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]] | None, str]:
        """The templated text, the (start, end) spans of the contents in it, and the template's own part of it.

        No spans where the template rewrites the contents.

        Raises:
          PromptError: a part of a text is not in what the template makes of it. A system turn that is left out whole
            stands at the head of the user's turn, unless it is the task prompt's, which says nothing.
        """

        def template(contents: Sequence[str]) -> str:
            if self.plain:
                asked = [c for m, c in zip(messages, contents, strict=True) if m["role"] != "system"]
                return self.start + "\n\n".join(asked) + "\n"
            turns = [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]
            try:
                return self._templated(turns, add_generation_prompt=True)
            except Exception as error:  # whatever a template raises, or Jinja finds wrong with it
                raise PromptError(f"the chat template fails ({type(error).__name__}: {_one_line(error)})") from error

        messages = _folded(messages) if self.folds_system else messages
        contents = [message["content"] for message in messages]
        pieces = re.split("\ue000(\\d+)\ue001", template([PLACEHOLDER.format(i) for i in range(len(contents))]))
        own, shown = "\ue000".join(pieces[0::2]), {int(number) for number in pieces[1::2]}
        left_out = [message for i, message in enumerate(messages) if i not in shown]
        if any(message["role"] != "system" for message in left_out) or len(left_out) == len(messages):
            raise PromptError("the chat template leaves out a turn")
        if any(message["content"] != SYSTEM for message in left_out):  # what a critic is told to do, say
            return self._render(_folded(messages))

        def filled(used: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
            text, spans = pieces[0], []
            for number, literal in zip(pieces[1::2], pieces[2::2], strict=True):
                spans.append((len(text), len(text) + len(used[int(number)])))
                text += used[int(number)] + literal
            return text, spans

        for seen in (contents, [content.translate(HIDDEN) for content in contents]):
            rendered = template(seen)
            for how in (str, str.strip):  # some templates strip
                if filled([how(content) for content in seen])[0] == rendered:
                    return *filled([how(content) for content in contents]), own
        rendered = template(contents)
        for number in sorted(shown):
            if _squeezed(contents[number]) not in _squeezed(rendered):
                raise PromptError(f"the chat template leaves out a part of the {messages[number]['role']}'s text")
        return rendered, None, own


class Pieces:
    """How many characters of a text each of its tokens wrote. What an id writes alone is decoded once and kept."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.before = tokenizer.encode_text("a")  # decoded alone, some tokenizers drop a token's leading space
        self.own: dict[int, str] = {}

    def _write(self, ids: Iterable[int]) -> str:
        decode = self.tokenizer.hf.decode
        return cast(str, decode([*self.before, *ids], skip_special_tokens=True))[1:]

    def widths(self, ids: Sequence[int], text: str) -> list[int] | None:
        """Number of characters `[T]` of each token of a `text` that `Tokenizer.decode` made of `ids`.

        They add up to the length of the text. Where tokens share a character, all characters that they write together
        count for the first of them. Tokens of a stop text count 0. None: the tokens one by one do not spell the text.
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
