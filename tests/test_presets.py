"""LUFFY and GOLF: what stands in their groups and what each row counts, worked by hand."""

import dataclasses

import numpy as np
import pytest
from test_data import Parsable, load, own_cache, write_jsonl  # noqa: F401
from test_objective import PROBLEM as ASKED
from test_rollout import PROBLEM, RIGHT, WRONG, Table, completion, groups_from, method_of
from test_train import small

from cgrpo_jax.config import METHODS
from cgrpo_jax.config.options import DataConfig, ObjectiveConfig, RefineConfig
from cgrpo_jax.data.cells import trace_of
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.errors import DataError
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.packing import pack_smallest
from cgrpo_jax.records import Attempt, Completion, Group, Kind
from cgrpo_jax.rollout.collect import CUT, refinement_prompt
from cgrpo_jax.run import build
from cgrpo_jax.workdir.metrics import group_metrics

LUFFY = RefineConfig(trigger="always", refiner="target")


def collected(tokenizer, cfg, answers, samples=3, **columns):
    """The group of a problem with these columns, its requests, and its metrics."""
    asked = []

    def answer(request):
        return completion(tokenizer, answers(request.name.kind, request.name.sample))

    method = dataclasses.replace(method_of(tokenizer, cfg, samples), trace_tokens=12)
    problem = dataclasses.replace(PROBLEM, columns=columns)
    (group,) = groups_from(Table(answer, asked), [problem], method)
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
        traced([{"question": "Why?", "target": "1"}])
    worked = traced([{"question": "Why?", "target": "So \\boxed{1}"}]).get(0)  # a trace that holds the answer, too
    assert (worked.answer, trace_of(worked)) == ("1", "So \\boxed{1}")
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


# ---- GOLF: one prompt with all wrong attempts; its refinements are a group of their own, too ----

GOLF = RefineConfig(context="together", own_group=True, group="replace", max_prompt_tokens=2000)


def test_all_wrong_attempts_stand_in_one_prompt(tokenizer):
    """As many refinements as responses, all of that prompt; one of them takes the place of a response."""
    said = ["\\boxed{1}", "\\boxed{2}", "\\boxed{3}"]

    def answers(kind, g):
        return said[g] if kind == Kind.RESPONSE else RIGHT if g == 1 else WRONG

    group, asked, metrics = collected(tokenizer, GOLF, answers)
    refining = [request for request in asked if request.name.kind == Kind.REFINEMENT]
    assert [request.name.sample for request in refining] == [0, 1, 2]
    assert len({tuple(request.prompt_ids) for request in refining}) == 1
    prompt = tokenizer.hf.decode(refining[0].prompt_ids)
    for number, text in enumerate(said, 1):
        field = f"**Previous Solution {number}**: {text}\n        **Critique {number}**: The generated solution is inc"
        assert prompt.count(field) == 1
    assert (group.kept, group.selected, group.own_group) == ((1, 2), (1,), (0, 1, 2))
    assert [a.source for a in group.refinements] == [None] * 3 and metrics["refine/no_room"] == 0
    made = credit.segments([group], ObjectiveConfig(), 64.0)
    assert [s.refined for s in made] == [False, False, True, False, False, False]
    prompts_of = [list(s.prompt_ids) for s in made]
    assert prompts_of == [list(group.prompt_ids)] * 3 + [list(refining[0].prompt_ids)] * 3
    assert all(s.sampler_logp_T[0] == -0.5 for s in made)
    partly = dataclasses.replace(GOLF, trigger="any_wrong")
    some, _, _ = collected(tokenizer, partly, lambda kind, g: WRONG if g == 1 else RIGHT)
    assert len(some.refinements) == 3 and "Solution 2" not in tokenizer.hf.decode(some.refinements[0].prompt_ids)


def test_several_solutions_are_cut_to_like_length(tokenizer):
    """The longest give way first; questions, critiques and short solutions stay whole."""
    short, longer = "SHORT \\boxed{1}", "START " + "3+6+0=09;" * 60 + " END"
    shown = [(short, "It is 69."), (longer, "No."), (longer, "Wrong.")]
    whole = refinement_prompt(tokenizer, PROBLEM, shown, 10_000)
    assert tokenizer.hf.decode(whole).count(longer) == 2
    for budget in (len(whole) - 1, len(whole) - 300, 500):
        ids = refinement_prompt(tokenizer, PROBLEM, shown, budget)
        text = tokenizer.hf.decode(ids)
        assert budget - 20 <= len(ids) <= budget and short in text and "It is 69." in text and "Wrong." in text
        assert (text.count("START"), text.count(" END"), text.count(CUT.strip())) == (2, 2, 2)
    assert refinement_prompt(tokenizer, PROBLEM, shown, 150) is None
    group, asked, metrics = collected(tokenizer, dataclasses.replace(GOLF, max_prompt_tokens=20), lambda *_: WRONG)
    assert len(asked) == 3 and metrics["refine/no_room"] == 3 and group.kept == (0, 1, 2) and group.own_group == ()


def test_golden_golf():
    """8 wrong responses; of 8 refinements 2 are right (mean 1/4), one replaces a response: 7/8 and -1/8; 3/4 and -1/4."""
    refinements = tuple(dataclasses.replace(a, prompt_ids=[2, 3]) for a in attempts([1.0] + [0.0] * 6 + [1.0]))
    group = Group(ASKED, [1], attempts([0.0] * 8), refinements, tuple(range(1, 8)), (7,), tuple(range(8)))
    made = credit.segments([group] * 2, ObjectiveConfig(weights="uniform"), 100.0)
    pg = np.array([s.pg_T[0] * 2 * 100 * 8 for s in made])
    own = [3 / 4] + [-1 / 4] * 6 + [3 / 4]
    np.testing.assert_allclose(pg[:16], [-1 / 8] * 7 + [7 / 8] + own)
    assert [s.refined for s in made[:16]] == [False] * 7 + [True] + [False] * 8 and len(made) == 32
    assert [list(s.prompt_ids) for s in made[:16]] == [[1]] * 8 + [[2, 3]] * 8


@pytest.mark.parametrize("share", [True, False])
def test_the_bins_hold_the_second_group(share):
    """Every problem refined, every row as long as can be, distinct prompts of both kinds."""
    run = build.open_run(small(**METHODS["golf"], **{"train.prompts": 3}))
    run = dataclasses.replace(run, share_prompts=share)
    ids = np.arange(64, dtype=np.int32)

    def attempt(reward, prompt_ids=None):
        return Attempt(Completion(ids, -ids, ids, True), "", reward, False, None, "ok", prompt_ids=prompt_ids)

    def group(p):
        refinements = tuple(attempt(float(g % 2), [p] * 256) for g in range(8))
        return Group(ASKED, [p] * 64, (attempt(0.0),) * 8, refinements, tuple(range(1, 8)), (1,), tuple(range(8)))

    made = credit.segments([group(p) for p in range(1, 4)], run.cfg.objective, 64.0)
    bins = pack_smallest(made, build.bin_sizes(run, 64), build.terms(run.cfg))
    assert bins.scored_ABT.sum() == 3 * 16 * 64 and int(bins.count) <= len(bins.token_ABT)
