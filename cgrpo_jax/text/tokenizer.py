"""Chat turns to token ids and back, such that text inside a turn can never forge a special token."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cgrpo_jax.model.hf_config import CheckpointError, read_json
from cgrpo_jax.records import Message

# Private-use characters stand in for the contents while the template's own text is found out.
PLACEHOLDER = "\ue000{}\ue001"
DATE = "26 Jul 2024"  # what Llama 3's templates themselves fall back to


class PromptError(ValueError):
    """Text that cannot be put into a chat turn without danger."""


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
    """The tokenizer of a Hugging Face folder with its chat template and its set of end-of-sequence ids."""

    def __init__(self, folder: str | os.PathLike, thinking: str = "auto"):
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").exists():
            raise CheckpointError(f"{folder}/tokenizer.json: no such file; a fast tokenizer is needed")
        try:
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, clean_up_tokenization_spaces=False)
        except Exception as error:  # of many kinds, of three libraries
            raise CheckpointError(f"{folder}: its tokenizer cannot be read ({_one_line(error)})") from error
        self.hf = cast(PreTrainedTokenizerBase, loaded)
        self._choose_template(folder)
        self.plain = self.hf.chat_template is None  # a base model: its prompt is the user's text alone
        self.switches = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
        if thinking != "auto" and "enable_thinking" not in str(self.hf.chat_template):
            raise CheckpointError(f"{folder}: model.thinking = {thinking!r}, but its chat template has no such switch")
        ids: set[int] = set() if self.hf.eos_token_id is None else {int(cast(int, self.hf.eos_token_id))}
        for name in ("generation_config.json", "config.json"):
            if (folder / name).exists():
                eos = read_json(folder / name).get("eos_token_id")
                ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
        if not ids:
            raise CheckpointError(f"{folder}: no eos_token_id in tokenizer, generation_config.json or config.json")
        self.eos_ids = tuple(sorted(ids))
        self.start = (
            cast(str, self.hf.decode(self.hf.encode(""))) if self.plain else ""
        )  # the template's own business elsewhere
        added = self.hf.added_tokens_decoder.values()
        self.added = tuple(str(token) for token in added)
        self.special = frozenset(str(token) for token in added if token.special)
        self.folds_system = False  # into the user's turn
        self._try_template(folder)

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

    def encode_text(self, text: str) -> list[int]:
        """Plain text: what looks like a special token is spelled out in ordinary tokens."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the turns plus the header of the answer, equal to `apply_chat_template` for benign text.

        What a content must not forge: every special token, and every other added token that the template itself puts
        around the turns (`<think>` stays what it is unless the template writes one).

        Raises:
          PromptError: the template rewrites the contents, so template and text cannot be told apart safely.
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
        """Text of sampled ids; special tokens are left out, `<think>` parts stay."""
        return cast(str, self.hf.decode(list(ids), skip_special_tokens=True))

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]] | None, str]:
        """The templated text, the (start, end) spans of the contents in it, and the template's own part of it.

        No spans where the template rewrites the contents.
        """

        def template(contents: Sequence[str]) -> str:
            if self.plain:
                asked = [c for m, c in zip(messages, contents, strict=True) if m["role"] != "system"]
                return self.start + "\n\n".join(asked) + "\n"
            turns = [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]
            # Llama 3's templates would write today's date: a prompt must not depend on the day.
            fixed: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
            fixed |= self.switches
            try:
                return cast(str, self.hf.apply_chat_template(turns, **fixed))
            except Exception as error:  # whatever a template raises, or Jinja finds wrong with it
                raise PromptError(f"the chat template fails ({type(error).__name__}: {_one_line(error)})") from error

        messages = _folded(messages) if self.folds_system else messages
        contents = [message["content"] for message in messages]
        rendered = template(contents)
        skeleton = template([PLACEHOLDER.format(i) for i in range(len(contents))])
        pieces = re.split("\ue000(\\d+)\ue001", skeleton)
        for used in (contents, [content.strip() for content in contents]):  # some templates strip
            text, spans = pieces[0], []
            for number, literal in zip(pieces[1::2], pieces[2::2], strict=True):
                spans.append((len(text), len(text) + len(used[int(number)])))
                text += used[int(number)] + literal
            if text == rendered:
                return text, spans, "\ue000".join(pieces[0::2])
        return rendered, None, "\ue000".join(pieces[0::2])
