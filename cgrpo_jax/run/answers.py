"""The settings that decide an evaluation's answers, and the engine that samples those not stored under them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.evaluation import tables
from cgrpo_jax.evaluation.store import contents
from cgrpo_jax.model.hf import SIDE_FILES
from cgrpo_jax.run.build import Run
from cgrpo_jax.sampling.engine import Engine, weights_of
from cgrpo_jax.sampling.room import room_for
from cgrpo_jax.text.prompts import TaskPrompt, question_messages
from cgrpo_jax.text.tokenizer import Tokenizer


def _contents_of(run: Run) -> dict[str, str]:
    """Digests of the model's files. Random weights have none: the seed, which is a setting too, decides them."""
    drawn = {"weights": "drawn from the seed"} if run.cfg.model.random_init else {}
    return contents(run.policy.folder, SIDE_FILES) | drawn


def _prompt_digest(tokenizer: Tokenizer, task: TaskPrompt) -> str:
    """SHA-256 of the text around a question: system prompt, instruction and chat template, as the model reads them."""
    text = tokenizer.hf.decode(tokenizer.encode_chat(task("?")))
    return hashlib.sha256(str(text).encode()).hexdigest()


def settings_of(run: Run, task: TaskPrompt = question_messages) -> dict[str, Any]:
    """What decides the responses: stored ones may be used again only where this agrees.

    The model is known by its content, not by its path: what lies there can be replaced.
    """
    cfg = run.cfg
    return {
        **_contents_of(run),
        "prompt": _prompt_digest(run.policy.tokenizer, task),
        "eos_ids": list(run.policy.tokenizer.eos_ids),
        "stop": list(run.policy.tokenizer.stops),
        "dtype": str(run.learner.dtype),
        "thinking": cfg.model.thinking,
        "temperature": cfg.eval.temperature,
        "top_p": cfg.eval.top_p,
        "max_new_tokens": cfg.sampling.max_new_tokens,
        "seed": cfg.seed,
    }


def check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings to a new folder; raises ConfigError where `folder` holds responses of other ones."""
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); take another workdir") from None
    if missing := [name for name in settings if name not in old]:
        raise ConfigError(
            f"{path}: no {', '.join(missing)} in it (an older version wrote it), so the stored answers may be another "
            "model's; take another workdir"
        )
    changed = [name for name in settings if old[name] != settings[name]]
    if changed:
        text = tables.setting_text
        told = [f"{name} = {text(name, settings[name])} (was {text(name, old[name])})" for name in changed]
        raise ConfigError(f"{folder} holds responses of other settings: {', '.join(told)}; take another workdir")


def engine_for(run: Run, longest: int, weights: str) -> Engine:
    """Loads the weights, with as many rows as fit the prompts that are asked.

    Args:
      longest: tokens of the longest prompt that is asked.
      weights: of `_contents_of` the run, on the leader.

    Raises:
      ConfigError: the files are others now that they are loaded.
    """
    cfg, policy = run.cfg, run.policy
    slots = longest + cfg.sampling.max_new_tokens
    room = room_for(policy.shape, policy.sampler.mesh, cfg.sampler, slots, longest, policy.sampler.dtype)
    setup = dataclasses.replace(policy.sampler, room=room)
    engine = Engine(setup, weights_of(setup, policy.weights()), 0, run.evaluation)
    if _contents_of(run)["weights"] != weights:
        raise ConfigError(f"{policy.folder}: the weights were replaced while they were read; give the command again")
    return engine
