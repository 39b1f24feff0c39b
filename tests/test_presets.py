"""LUFFY and GOLF: what stands in their groups and what each row counts, worked by hand."""

import dataclasses

import numpy as np
import pytest
from test_data import Parsable, load, own_cache, write_jsonl  # noqa: F401
from test_objective import PROBLEM as ASKED
from test_rollout import PROBLEM, RIGHT, WRONG, completion, method_of, sampler_of

from cgrpo_jax.data.sources import DataError, load_problems
from cgrpo_jax.learning import credit
from cgrpo_jax.options import DataConfig, ObjectiveConfig, RefineConfig
from cgrpo_jax.records import Attempt, Completion, Group, Kind
from cgrpo_jax.rollout.collect import collect_groups
from cgrpo_jax.workdir.metrics import group_metrics

LUFFY = RefineConfig(trigger="always", refiner="target")


def collected(tokenizer, cfg, answers, samples=3, **columns):
    """The group of a problem with these columns, its requests, and its metrics."""
    asked = []

    def answer(request):
        return completion(tokenizer, answers(request.name.kind, request.name.sample))

    method = dataclasses.replace(method_of(tokenizer, cfg, samples), trace_tokens=12)
    problem = dataclasses.replace(PROBLEM, columns=columns)
    (group,), _ = collect_groups([problem], method, sampler_of(answer, asked))
    return group, asked, group_metrics([group])


def attempts(rewards):
    ids = np.zeros(3, np.int32)
    return tuple(Attempt(Completion(ids, ids - 1.0, ids + 1.0, True), "", r, r == 1, None, "ok") for r in rewards)


# ---- LUFFY: a trace of the data beside n - 1 responses ----


def test_a_trace_is_a_refinement_that_nobody_samples(tokenizer):
    """Under the task prompt, the tokenizer's own ids and its end; scored by the rule, as responses are."""
    for trace in (RIGHT, [{"role": "assistant", "content": RIGHT}], [{"content": RIGHT}]):
        group, asked, metrics = collected(tokenizer, LUFFY, lambda kind, g: WRONG, target=trace)
        assert [request.name.kind for request in asked] == [Kind.RESPONSE] * 3
        ((attempt, refined),) = group.rows()[3:]
        ids = [*tokenizer.encode_text(RIGHT), tokenizer.hf.eos_token_id]
        assert refined and attempt.completion.ids.tolist() == ids and attempt.completion.finished
        assert (attempt.reward, attempt.source, attempt.critique) == (1.0, None, None)
        assert metrics["refine/no_room"] == 0 and metrics["refine/success"] == 1
        made = credit.segments([group], ObjectiveConfig(), 64.0)
        assert [list(s.prompt_ids) for s in made] == [tokenizer.encode_chat(PROBLEM.messages)] * 4
    seldom, _, _ = collected(tokenizer, dataclasses.replace(LUFFY, trigger="none_correct"), lambda *_: RIGHT, target="")
    assert len(seldom.rows()) == 3  # the trigger decides as ever


def test_a_trace_that_is_too_long_is_cut_and_has_no_end(tokenizer):
    """It counts as what is left of it: here nothing is answered. `overlong=mask` keeps it out of the loss."""
    group, _, metrics = collected(tokenizer, LUFFY, lambda kind, g: WRONG, target="3+6+0=09;" * 9 + RIGHT)
    (trace,) = group.refinements
    assert len(trace.completion.ids) == 12 and not trace.completion.finished and trace.reward == 0
    assert metrics["truncated/refinements"] == 1
    masked = credit.segments([group], ObjectiveConfig(overlong="mask", entropy_coef=0.1), 64.0)
    assert masked[3].silent and not masked[0].silent


def test_data_without_traces_are_refused(tmp_path):
    def traced(rows, **changes):
        cfg = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", rows)), **changes)
        return load_problems(cfg, 0, Parsable(), lambda problem: 1, print, traced=True)

    plain, good = {"question": "Why?", "answer": "1"}, {"question": "Why?", "answer": "1", "target": "So 1."}
    with pytest.raises(DataError, match=r"has no column 'target', which refine\.refiner=target") as error:
        traced([plain] * 3)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(DataError, match=r"row 2, column 'target': no solution in it"):
        traced([good, plain])
    assert traced([good, plain], on_bad_row="drop").size == 1
    with pytest.raises(DataError, match=r"data\.answer_column"):
        traced([{"question": "Why?", "target": "So \\boxed{1}"}])
    with pytest.raises(DataError, match="gcd has no column 'target'"):
        load_problems(DataConfig(source="reasoning_gym:gcd"), 0, Parsable(), lambda problem: 1, traced=True)
    assert load("arithmetic").get(1).columns["target"].endswith(f"\\boxed{{{load('arithmetic').get(1).answer}}}")


def test_golden_luffy():
    """7 responses, 3 of them right, and a right trace: mean 1/2 over all 8 (its split baseline: 3/7 over the 7)."""
    group = Group(ASKED, [1], attempts([1.0] * 3 + [0.0] * 4), attempts([1.0]), tuple(range(7)), (0,))
    for baseline, right, wrong in (("group", 1 / 2, -1 / 2), ("responses", 4 / 7, -3 / 7)):
        made = credit.segments([group] * 2, ObjectiveConfig(weights="sum", baseline=baseline), 100.0)
        pg = [s.pg_T[0] * 2 * 100 for s in made[:8]]
        np.testing.assert_allclose(pg, [right] * 3 + [wrong] * 4 + [right])
        assert [s.refined for s in made[:8]] == [False] * 7 + [True]
