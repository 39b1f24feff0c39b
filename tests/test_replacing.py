"""Dynamic sampling: problems without a gradient are replaced by the next ones of the stream."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from test_rollout import PROBLEM, RIGHT, WRONG, Table, completion, groups_from, method_of
from test_train import lines, small, without_times

from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.data import arithmetic
from cgrpo_jax.learning import credit
from cgrpo_jax.training import train

NEVER = RefineConfig(trigger="never")


first_asked = functools.partial(Table, place=0)


def replaced(tokenizer, mixed, spare, sampler=Table, cfg=NEVER, problems=2):
    """Groups of two problems and as many spare ones; those in `mixed` have a right and a wrong response."""
    taken = []

    def more():
        for number in range(problems, problems + spare):
            taken.append(number)
            yield dataclasses.replace(PROBLEM, tag=str(number))

    def answer(request):
        right = request.name.problem in mixed and request.name.sample == 0
        return completion(tokenizer, RIGHT if right else WRONG)

    own = [dataclasses.replace(PROBLEM, tag=str(number)) for number in range(problems)]
    groups = groups_from(sampler(answer, []), own, method_of(tokenizer, cfg, 2), spare=more())
    assert [group.problem.tag for group in groups] == [str(number) for number in range(problems + len(taken))]
    return groups


@pytest.mark.parametrize(
    ("mixed", "spare", "trained"),
    [
        ({0, 1}, 9, [0, 1]), ({1, 3}, 9, [1, 3]), ({2, 3}, 9, [2, 3]), ({0, 5}, 9, [0, 5]),
        ({1, 3}, 1, [1, 2]), ({7}, 3, None), ({1, 3}, 0, [0, 1]),
    ],
)  # fmt: skip
def test_who_is_replaced_by_whom(tokenizer, mixed, spare, trained):
    """As far as the bound allows, and no further than needed; always as many are trained on as were asked for."""
    groups = replaced(tokenizer, mixed, spare)
    left = [int(group.problem.tag) for group in groups if group.rows()]
    assert len(left) == 2 and (trained is None or left == trained)
    assert len(groups) == (2 + spare if trained is None else max(trained) + 1)
    assert all(len(group.responses) == 2 for group in groups)  # what was sampled is kept, also of the replaced
    assert all(group.rows() or group.alike for group in groups)


def test_the_outcome_depends_on_no_order(tokenizer):
    for mixed in ({0, 5}, {3, 4}, {2}, {7}):
        one, other = (replaced(tokenizer, mixed, 4, sampler) for sampler in (Table, first_asked))
        assert [group.problem.tag for group in one] == [group.problem.tag for group in other]
        trained = [[group.problem.tag for group in groups if group.rows()] for groups in (one, other)]
        assert trained[0] == trained[1]


def test_refinements_count_and_so_does_a_second_group(tokenizer):
    """A right refinement among wrong responses is a gradient; in a second group one that was not selected, too."""
    always = RefineConfig(trigger="always")

    def groups(cfg, right):
        def answer(request):
            return completion(tokenizer, RIGHT if request.name[:3] in right else WRONG)

        made = groups_from(Table(answer, []), [PROBLEM], method_of(tokenizer, cfg, 2), spare=[PROBLEM])
        return made

    refined = {(1, 0, 1)}  # a refinement of problem 0
    assert len(groups(always, set())) == 2 and len(groups(always, refined)) == 1
    own = RefineConfig(trigger="always", context="together", own_group=True, max_prompt_tokens=2000)
    assert len(groups(own, refined | {(0, 0, 0), (0, 0, 1)})) == 1  # all rows right; beside them a wrong refinement
    emptied, _ = groups(own, set())
    assert emptied.rows() == [] and emptied.own_group == () and len(emptied.refinements) == 2


def test_what_was_replaced_is_in_no_bin(tokenizer):
    """Nor in a normaliser: the bins are those of the trained problems alone."""
    cfg = small(**{"refine.trigger": "never", "train.updates_per_rollout": 2, "objective.entropy_coef": 0.1})
    groups = replaced(tokenizer, {1, 3}, 9, cfg=NEVER)
    asked = cfg.objective, 64.0, cfg.train.updates_per_rollout
    one, other = credit.of_updates(groups, *asked), credit.of_updates([groups[1], groups[3]], *asked)
    assert len(one) == 2 and groups[0].rows() == []
    for segments, wanted in zip(one, other, strict=True):
        for segment, same in zip(segments, wanted, strict=True):
            jax.tree.map(np.testing.assert_array_equal, segment._asdict(), same._asdict())


@pytest.mark.thorough
def test_a_resumed_run_goes_on_in_the_stream(tmp_path):
    """Two steps and two more are four, to the last bit, and no problem is asked twice."""
    changes = {"train.replacements": 3, "train.steps": 4, "checkpoint.every": 2}
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), tmp_path / "whole")
        train(small(**changes | {"train.steps": 2}), tmp_path / "parts")
        train(small(**changes), tmp_path / "parts")
    whole, parts = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert whole == parts and sum(row["problems/replaced"] for row in whole) > 0
    asked = []
    for step in range(1, 5):
        one, other = (tmp_path / name / "rollouts" / f"{step:06d}.jsonl" for name in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
        groups = [json.loads(line) for line in one.read_text().splitlines()]
        asked += [group["question"] for group in groups]
        assert len(groups) == 2 + whole[step - 1]["problems/replaced"] <= 5
        assert sum(bool(group["kept"]) for group in groups) == 2
    assert asked == [arithmetic.problem(0, "train", i).question for i in range(len(asked))]
