"""Chat turns to token ids and back, such that text inside a turn can never forge a special token."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cgrpo_jax.hf_config import CheckpointError, read_json
from cgrpo_jax.types import Message

# Private-use characters stand in for the contents while the template's own text is found out.
PLACEHOLDER = "\ue000{}\ue001"


class Tokenizer:
    """The tokenizer of a Hugging Face folder with its chat template and its set of end-of-sequence ids."""

    def __init__(self, folder: str | os.PathLike):
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").exists():
            raise CheckpointError(f"{folder}/tokenizer.json: no such file; a fast tokenizer is needed")
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, clean_up_tokenization_spaces=False)
        self.hf = cast(PreTrainedTokenizerBase, loaded)
        if self.hf.chat_template is None:
            raise CheckpointError(f"{folder}: no chat template (chat_template.jinja or tokenizer_config.json)")
        ids: set[int] = set() if self.hf.eos_token_id is None else {int(cast(int, self.hf.eos_token_id))}
        for name in ("generation_config.json", "config.json"):
            if (folder / name).exists():
                eos = read_json(folder / name).get("eos_token_id")
                ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
        if not ids:
            raise CheckpointError(f"{folder}: no eos_token_id in tokenizer, generation_config.json or config.json")
        self.eos_ids = tuple(sorted(ids))
        special = [str(token) for token in self.hf.added_tokens_decoder.values() if token.special]
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode_text(self, text: str) -> list[int]:
        """Plain text: what looks like a special token is spelled out in ordinary tokens."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the turns plus the header of the answer, equal to `apply_chat_template` for benign text.

        Raises:
          ValueError: the template rewrites the contents, so template and text cannot be told apart safely.
        """
        text, spans = self._render(messages)
        if not any(self.special.search(message["content"]) for message in messages):
            return self.hf.encode(text, add_special_tokens=False)
        ids: list[int] = []
        position = 0
        for match in self.special.finditer(text):
            inside = any(match.start() < end and start < match.end() for start, end in spans)
            if not inside:
                ids += self.encode_text(text[position : match.start()])
                ids.append(cast(int, self.hf.convert_tokens_to_ids(match.group())))
                position = match.end()
        return ids + self.encode_text(text[position:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of sampled ids; special tokens are left out, `<think>` parts stay."""
        return cast(str, self.hf.decode(list(ids), skip_special_tokens=True))

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The templated text and the (start, end) spans of the contents in it."""

        def template(contents: Sequence[str]) -> str:
            turns = [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]
            return cast(str, self.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

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
                return text, spans
        if any(self.special.search(content) for content in contents):
            raise ValueError("the chat template rewrites this text, which holds special tokens")
        return rendered, []
