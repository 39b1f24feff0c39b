"""The definition of each metric of a step, on a few attempts and sums whose figures are worked by hand."""

import numpy as np
import pytest

from cgrpo_jax.records import Attempt, Completion, Critique, Group, Problem
from cgrpo_jax.workdir.metrics import LOSSES, group_metrics, update_metrics


def attempt(reward, length, *, finished=True, extracted="1", status="ok", **changes):
    done = Completion(
        np.zeros(length, np.int32), np.full(length, -1, np.float32), np.ones(length, np.float32), finished
    )
    return Attempt(done, "", reward, reward == 1, extracted, status, **changes)


def group(responses, refinements=(), kept=(0, 1), selected=()):
    problem = Problem("q", "1", ({"role": "user", "content": "q"},))
    return Group(problem, [1], tuple(responses), tuple(refinements), kept, selected)


def test_metrics_of_what_was_sampled():
    """Three problems, two responses each: one solved by half and refined in vain, one by a refinement, one at once."""
    agreeing = Critique("u", False, True, tries=1, tokens=5, first_agrees=True)
    erring = Critique("t", True, False, tries=2, tokens=7)
    unclear = Critique("v", tries=6, tokens=9, fallback=True)
    half = group(
        [
            attempt(1, 2, critique=Critique("w"), parts={"style": 1.0}),
            attempt(0, 4, finished=False, extracted=None, critique=erring),
        ],
        [attempt(0.25, 7, finished=False, extracted=None, status="timeout", prompt_ids=[1])],
    )
    refined = group(
        [attempt(0, 1, critique=agreeing, parts={"style": 0.5, "short": 0.25}), attempt(0, 3, critique=unclear)],
        [attempt(1, 2, prompt_ids=[1]), attempt(0.5, 3)],
        kept=(1,),
        selected=(0,),
    )
    whole = group([attempt(1, 5, critique=Critique(None)), attempt(1, 6, extracted=None, status="died")])
    expected = {
        "reward/short": 0.25, "reward/style": 0.75, "reward/responses": 3 / 6, "reward/refinements": 1.75 / 3,
        "reward/trained": 4 / 6, "problems/solve_all": 1 / 3, "problems/solve_none": 1 / 3, "refine/rate": 2 / 3,
        "refine/success": 1 / 2, "critique/valid": 2 / 3, "critique/agreement": 1 / 2, "critique/first_valid": 1 / 3,
        "critique/first_agreement": 1, "critique/fallback": 1 / 3, "critique/unusable": 1 / 5,
        "critique/tries": 3, "tokens/critiques": 21, "refine/no_room": 1, "policy/entropy": 1,
        "policy/entropy_refinements": 1, "length/responses": 21 / 6, "length/refinements": 4,
        "truncated/responses": 1 / 6, "truncated/refinements": 1 / 3, "verifier/no_answer": 3 / 9,
        "verifier/timeouts": 1, "verifier/failures": 1, "verifier/no_reward": 0, "tokens/responses": 21,
        "tokens/refinements": 12,
    }  # fmt: skip
    assert group_metrics([half, refined, whole]) == pytest.approx(expected)


def test_what_nothing_was_sampled_for_has_no_metric():
    """A mean over no refinement and over no critique is left out; counts are 0."""
    values = group_metrics([group([attempt(1, 2), attempt(0, 2, status="memory")])])
    assert values["refine/rate"] == values["tokens/refinements"] == values["tokens/critiques"] == 0
    assert values["verifier/failures"] == 1 and "verifier/no_reward" not in values
    gone = (
        "reward/refinements",
        "refine/success",
        "critique/valid",
        "length/refinements",
        "policy/entropy_refinements",
    )
    assert not any(name in values for name in gone)


def test_metrics_of_updates():
    """Losses and gradient norms are means of updates; what is per token is divided by the tokens of both at once."""
    first = {
        "loss": 1.0, "response_loss": 0.75, "refined_loss": 0.25, "grad_norm": 2.0, "notfinite_total": 1.0,
        "nonfinite_tokens": 3.0, "tokens": 10.0, "response_tokens": 6.0, "refined_tokens": 4.0, "entropy": 5.0,
        "logp": -20.0, "clipped": 3.0, "refined_clipped": 1.0, "correction": 9.0, "refined_prob": 2.0, "kl": 1.0,
        "kl_clamped": 2.0, "logp_gap": 0.6, "logp_gap_max": 0.5,
    }  # fmt: skip
    second = {
        "loss": 3.0, "response_loss": 1.25, "refined_loss": 1.75, "grad_norm": 4.0, "notfinite_total": 2.0,
        "nonfinite_tokens": 1.0, "tokens": 30.0, "response_tokens": 18.0, "refined_tokens": 12.0, "entropy": 25.0,
        "logp": -40.0, "clipped": 9.0, "refined_clipped": 3.0, "correction": 15.0, "refined_prob": 6.0, "kl": 7.0,
        "kl_clamped": 2.0, "logp_gap": 90.0, "logp_gap_max": 9.0,
    }  # fmt: skip
    expected = {
        "loss/total": 2.0, "loss/responses": 1.0, "loss/refinements": 1.0, "policy/grad_norm": 3.0,
        "policy/nonfinite_total": 2.0, "policy/nonfinite_tokens": 4.0, "tokens/trained": 40.0,
        "policy/entropy_trained": 30 / 40, "policy/logp": -60 / 40, "policy/clipped": 12 / 24,
        "policy/clipped_refinements": 4 / 16, "policy/correction": 24 / 24, "policy/refined_prob": 8 / 16,
        "policy/kl": 8 / 40, "policy/kl_clamped": 4 / 40, "sampler/logp_diff_mean": 0.1, "sampler/logp_diff_max": 0.5,
    }  # fmt: skip
    assert update_metrics([first, second]) == pytest.approx(expected)
    assert update_metrics([]) == dict.fromkeys([*LOSSES, "tokens/trained", "policy/nonfinite_tokens"], 0.0)
