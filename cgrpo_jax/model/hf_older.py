"""What an export gains so that the oldest `transformers` admitted (4.56) opens it and generates as the newest does.

Side files are copied byte for byte wherever they stay within this project; an export changes only these two, and only
where something is lacking. Functions from JSON object to JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GENERIC = "PreTrainedTokenizerFast"  # known to 4 and 5; 5 itself writes TokenizersBackend, which 4 has not


def both_rope_forms(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the form of transformers 4 beside `rope_parameters`, which only 5 reads.

    What is there already stays. The older form alone is read by both.
    """
    rope, old = dict(raw.get("rope_parameters") or {}), raw.get("rope_scaling") or {}
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type") or rope.get("type") or "default"
    added: dict[str, Any] = {}
    if raw.get("rope_theta") is None and (theta := old.get("rope_theta", theta)) is not None:
        added["rope_theta"] = theta
    if kind != "default" and not old:
        added["rope_scaling"] = {"rope_type": kind} | rope
    return {**raw, **added}


def both_tokenizer_forms(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` under names that both know, with no inputs that a decoder does not take.

    In 4 the generic class makes `token_type_ids` unless it is told not to, and `generate` refuses them.
    """
    raw = dict(raw)
    if raw.get("tokenizer_class") == "TokenizersBackend":
        raw["tokenizer_class"] = GENERIC
    if raw.get("tokenizer_class") == GENERIC and not raw.get("model_input_names"):
        raw["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(raw.get("extra_special_tokens"), list):  # a dict of named ones in 4
        raw["additional_special_tokens"] = raw.pop("extra_special_tokens")
    return raw
