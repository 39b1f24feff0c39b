"""Conformance: what the authors' release gives for inputs of ours, on file in release.jsonl, and what this project gives.

Each row names its source, file and line of the release (or the paper whose rule it is); its expected values are those of
the release's own functions, run once. Where this project differs on purpose the row says `here`, and why.
"""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.config import METHODS
from cgrpo_jax.config.options import ObjectiveConfig, VerifierConfig
from cgrpo_jax.grading import release, rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.learning import credit, objective
from cgrpo_jax.records import Attempt, Completion, Group, Problem
from cgrpo_jax.rollout import collect, critics
from cgrpo_jax.text import prompts

ROWS = [json.loads(line) for line in (pathlib.Path(__file__).parent / "release.jsonl").read_text().splitlines()]
CODE = METHODS["critique_grpo_code"]


def part(name):
    return [row for row in ROWS if row["part"] == name]


def completion(ids):
    return Completion(np.arange(ids, dtype=np.int32), np.zeros(ids, np.float32), np.ones(ids, np.float32), True)


def attempt(reward, ids=1):
    return Attempt(completion(ids), "", reward, reward == 1, None, "ok")


def problem(gold="", grader="math_verify", question="?"):
    return Problem(question, gold, prompts.question_messages(question), grader)


def test_each_part_is_on_file_with_its_source():
    counts = collections.Counter(row["part"] for row in ROWS)
    assert counts["extraction"] > 50 and counts["loss"] > 5 and counts["k3"] > 5 and counts["advantage"] > 10
    assert {"selection", "group", "critique", "critic_prompt", "refinement_prompt", "task_prompt"} < counts.keys()
    assert all(row["source"] for row in ROWS) and all("why" in row for row in ROWS if "here" in row)


def test_rewards_of_responses():
    """Answers as the release extracts them (where `answer` is given: \\frac{1}{2} for 1/2 is a form), and its rewards."""
    rows = part("extraction")
    with Verifier(VerifierConfig()) as verifier:
        scored = rewards.score([(problem(row["gold"]), completion(1), row["text"]) for row in rows], verifier)
    for row, found in zip(rows, scored, strict=True):
        wanted = row.get("here", row)
        assert found.reward == wanted["reward"], row
        assert (found.extracted or "") == wanted.get("answer", found.extracted or ""), row
    assert release.extract("x" * 3_000) is None and release.extract("\\boxed{" + "9" * 3_000) is None


@pytest.mark.parametrize("row", part("k3"))
def test_k3_and_its_gradient(row):
    with jax.enable_x64(True):
        limit = CODE["objective.kl_limit"]
        value, slope = jax.value_and_grad(lambda logp: objective.k3(logp, jnp.float64(row["d"]), limit)[0])(0.0)
        np.testing.assert_allclose([value, slope], [row["value"], row["slope"]], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("row", part("advantage"))
def test_advantages(row):
    """Of seven responses and a refinement; float32 deviations in the release."""
    rewards_G, refined_G = np.array(row["rewards"], np.float64), np.arange(len(row["rewards"])) == 7
    found = credit.group_advantages(
        rewards_G, refined_G, baseline=row.get("baseline", "group"), divide_by_std=row["divide_by_std"]
    )
    np.testing.assert_allclose(found, row["advantages"], rtol=1e-5, atol=1e-7)


def rows_of(groups, key, width):
    return jnp.asarray([row[key] + [0.0] * (width - len(row[key])) for group in groups for row in group])


@pytest.mark.parametrize("row", part("loss"), ids=lambda row: row["case"])
def test_losses_and_gradients(row):
    """Ours is the mean over the questions of the update, the release's policy term the sum (its one length divides both).

    Its token mean is over all tokens at once, as its entropy term is.
    """
    cfg, width = ObjectiveConfig(**row["objective"]), row["response_length"]
    groups = []
    for rows in row["groups"]:
        made = [attempt(one["reward"], len(one["logp"])) for one in rows]
        groups.append(Group(problem(), [1], tuple(made[:-1]), tuple(made[-1:]), tuple(range(len(made) - 1)), (0,)))
    questions = 1 if cfg.aggregation == "token_mean" else len(groups)
    with jax.enable_x64(True):

        def padded(name):
            segments = credit.segments(groups, cfg, float(width))
            return jnp.asarray([[*getattr(s, name), *np.zeros(width - len(s.ids))] for s in segments])

        flat = [one for rows in row["groups"] for one in rows]
        tokens = objective.Tokens(
            scored_BT=jnp.asarray([[t < len(one["logp"]) for t in range(width)] for one in flat]),
            refined_BT=jnp.asarray([[one["refined"]] * width for one in flat]),
            pg_BT=padded("pg_T"),
            ce_BT=padded("ce_T"),
            ent_BT=padded("ent_T"),
            old_logp_BT=rows_of(row["groups"], "old", width),
        )
        entropy_BT = rows_of(row["groups"], "entropy", width)
        value, slope_BT = jax.value_and_grad(lambda logp: objective.token_loss(logp, entropy_BT, tokens, cfg)[0])(
            rows_of(row["groups"], "logp", width)
        )
    wanted = row["loss"] / questions - cfg.entropy_coef * row.get("entropy", 0.0)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for found_T, slope_T in zip(np.asarray(slope_BT), row["slope"], strict=True):
        np.testing.assert_allclose(found_T[: len(slope_T)] * questions, slope_T, rtol=1e-6, atol=1e-9)
        assert not found_T[len(slope_T) :].any()


def test_the_method_that_bears_its_name_has_its_loss():
    (shipped,) = [row for row in part("loss") if row["case"].startswith("as shipped")]
    named = {f"objective.{key}": value for key, value in shipped["objective"].items()}
    assert named.items() <= CODE.items()


def test_selection_and_group():
    rng = np.random.default_rng(0)
    for row in part("selection"):
        found = collect.select([score == 1 for score in row["scores"]], 1, CODE["refine.select"], rng)
        assert found == (row["selected"],)
    (row,) = part("group")
    assert CODE["refine.group"] == "replace" and CODE["train.samples"] == row["samples"]
    assert list(range(row["refinements"], row["samples"])) == row["kept"]


def test_texts():
    for row in part("critique"):
        judged = attempt(float(row["correct"]))
        assert critics.TEMPLATES[row["critic"]](problem(row["answer"]), judged) == row["text"]
    (row,) = part("refinement_prompt")
    asked = prompts.refinement_messages(row["question"], [(row["solution"], row["critique"])])
    assert [message["content"] for message in asked] == [row["system"], row["user"]]
    (row,) = part("critic_prompt")
    asked = prompts.release_critique_messages(row["question"], row["solution"], row["reference"], True)
    assert [message["content"] for message in asked] == [row["system"], row["user"]]
    (row,) = part("task_prompt")
    assert [m["content"] for m in prompts.question_messages(row["question"])] == [row["system"], row["user"]]
