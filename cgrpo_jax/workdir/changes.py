"""Compares the configuration of a run with that of the checkpoint it resumes from: which changes are allowed."""

from __future__ import annotations

import fnmatch
import hashlib
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cgrpo_jax.config.options import nearest
from cgrpo_jax.errors import ConfigError

REFUSED, LOGGED, COSINE = "refused", "logged", "refused under a cosine schedule"

# (pattern, verdict, why): the first match decides.
RULES = (
    ("method", REFUSED, "another method has other updates"),
    ("seed", REFUSED, "another seed has other problems and other samples"),
    ("model.path", LOGGED, "a name only: model.weights and model.files are compared by content"),
    ("model.revision", LOGGED, "a name only: model.weights and model.files are compared by content"),
    ("model.weights", REFUSED, "the initial weights, by content: the run began from others"),
    ("model.files", REFUSED, "configuration, tokenizer and chat template, by content: the tokens mean something else"),
    ("model.*", REFUSED, "the model computes or is asked otherwise"),
    ("data.source", LOGGED, "a name only: data.content is compared"),
    ("data.revision", LOGGED, "a name only: data.content is compared"),
    ("data.held_out", REFUSED, "eval.every, eval.source or eval.tasks decide which rows of the file are trained on"),
    ("data.*", REFUSED, "the position in the stream of problems would point at others"),
    ("reward.seconds", LOGGED, "a limit"),
    ("reward.*", REFUSED, "other rewards"),
    ("texts.*", REFUSED, "other prompts"),
    ("sampling.*", REFUSED, "the samples come from another distribution"),
    ("sampler.*", LOGGED, "memory only: no sample depends on it"),
    ("refine.critique_seconds", LOGGED, "a limit"),
    ("refine.*", REFUSED, "other refinements are trained on"),
    ("local.path", LOGGED, "a name only: local.weights and local.files are compared by content"),
    ("local.revision", LOGGED, "a name only: local.weights and local.files are compared by content"),
    ("local.weights", REFUSED, "another second model, by content"),
    ("local.files", REFUSED, "configuration, tokenizer and chat template of the second model, by content"),
    ("local.*", REFUSED, "the second model is asked otherwise"),
    ("generate.*", REFUSED, "other rows are kept"),
    ("api.base_url", LOGGED, "where the critic is"),
    ("api.model", REFUSED, "another critic"),
    ("api.reference", REFUSED, "other critiques"),
    ("api.temperature", REFUSED, "other critiques"),
    ("api.top_p", REFUSED, "other critiques"),
    ("api.tokens", REFUSED, "other critiques"),
    ("api.*", LOGGED, "limits and prices"),
    ("objective.*", REFUSED, "another loss"),
    ("optimizer.*", REFUSED, "another schedule or optimizer than the one whose state is restored"),
    ("train.steps", COSINE, "the cosine ends at the last step: another length is another learning rate at each step"),
    ("train.prompts", REFUSED, "other batches"),
    ("train.samples", REFUSED, "other groups"),
    ("train.replacements", REFUSED, "other batches, and another position in the stream"),
    ("train.updates_per_rollout", REFUSED, "the optimizer counts updates: another schedule"),
    ("train.micro_batch", LOGGED, "memory only"),
    ("train.remat", LOGGED, "memory only"),
    ("train.tracker", LOGGED, "who is told, not what is learnt"),
    ("train.accept_changes", LOGGED, "says itself what it changes"),
    ("eval.*", LOGGED, "no update depends on an evaluation"),
    ("checkpoint.*", LOGGED, "what is kept, not what is learnt"),
    ("verifier.*", LOGGED, "limits of worker processes"),
    ("mesh.*", LOGGED, "where arrays lie, not what they hold"),
)


def rule(key: str) -> tuple[str, str]:
    """Verdict and reason for a dotted key."""
    for pattern, verdict, why in RULES:
        if fnmatch.fnmatchcase(key, pattern):
            return verdict, why
    return REFUSED, "this version does not know what it changes"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf of nested dicts."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _accepted(asked: str, changed: Iterable[str], known: Iterable[str], step: int) -> set[str]:
    """The keys in train.accept_changes. Raises ConfigError for one that is unknown or has not changed."""
    keys = {part.strip() for part in asked.split(",")} - {""}
    for key in sorted(keys - set(changed)):
        if key not in known:
            raise ConfigError(f"train.accept_changes: no key {key!r}{nearest(key, known)}")
        raise ConfigError(f"train.accept_changes: {key} has not changed since step {step}; take it out")
    return keys


def check_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], accept: str, step: int, log: Callable[[str], None]
) -> None:
    """Logs each allowed change since the checkpoint of `step`, and refuses the others.

    Args:
      old, new: dotted key -> value of the checkpoint and of this run: configuration, and digests of contents.
      accept: train.accept_changes: comma-separated keys whose changes are allowed.

    Raises:
      ConfigError: a change is refused and not in train.accept_changes, or a key there has not changed.
    """
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if "train.steps" in changed and new["train.steps"] <= step:
        changed.remove("train.steps")  # no further training, so no schedule to differ
    accepted = _accepted(accept, changed, new, step)
    refused = []
    for key in changed:
        verdict, why = rule(key)
        line = f"{key} = {new.get(key)!r} (was {old.get(key)!r})"
        if verdict == LOGGED or key in accepted or (verdict == COSINE and new["optimizer.schedule"] != "cosine"):
            log(f"changed since step {step}: {line}")
        else:
            refused.append((key, f"{line}: {why}"))
    if refused:
        keys = ",".join(key for key, _ in refused)
        lines = "; ".join(line for _, line in refused)
        mend = f"Take another workdir, or --config.train.accept_changes={keys}"
        raise ConfigError(f"changed since step {step}: {lines}. {mend}")


def files_digest(files: Iterable[pathlib.Path]) -> str:
    """32 hex digits over the names and bytes of files, whatever their folder."""
    total = hashlib.sha256()
    for path in sorted(files, key=operator.attrgetter("name")):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:32]
