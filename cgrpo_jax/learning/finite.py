"""Counts steps whose numbers are not finite, and ends a run that has too many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cgrpo_jax.errors import TrainingError

MOST = 3  # steps in a row, with which a run ends


def check_last(nonfinite: int, steps: int) -> None:
    """Raises TrainingError where a run ends with steps that were not finite, though too few to have stopped it."""
    if nonfinite:
        raise TrainingError(
            f"the last {nonfinite} of {steps} steps were not finite (metrics sampler/nonfinite, policy/nonfinite_*): "
            "nothing was learnt in them"
        )


def check_parameters(step: int, updates: Sequence[Mapping[str, float]]) -> None:
    """Raises TrainingError where the updates of a step, if it has any, left parameters that are no finite numbers."""
    if updates and (count := updates[-1]["nonfinite_parameters"]):
        raise TrainingError(
            f"step {step}: {count:.0f} parameters are no finite numbers after this update, and are not saved: "
            "optimizer.learning_rate (with optimizer.weight_decay) is too large; a smaller one goes on from the newest "
            "checkpoint with --config.train.accept_changes=optimizer.learning_rate"
        )


def nonfinite_counts(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How many log-probabilities and gradients of a step were not finite, from the metric sums of its updates."""
    return {
        "trained log-probabilities": sum(update["nonfinite_tokens"] for update in updates),
        "gradients": sum(update["notfinite_in_a_row"] > 0 for update in updates),
    }


def nonfinite_steps(before: int, step: int, found: Mapping[str, float]) -> int:
    """How many steps in a row had something that is no finite number, this one included.

    Args:
      before: such steps right before this one.
      found: what -> how many of it were not finite.

    Raises:
      TrainingError: MOST of them.
    """
    bad = {what: count for what, count in found.items() if count}
    if not bad:
        return 0
    if before + 1 < MOST:
        return before + 1
    named = ", ".join(f"{count:.0f} {what}" for what, count in bad.items())
    raise TrainingError(
        f"step {step}: {MOST} steps in a row were not finite, in this one {named}; "
        "such gradients changed nothing, and parameters are saved only where all of them are finite"
    )
