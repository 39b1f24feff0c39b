"""Critique, refinement, selection and group assembly, with a generator that is a table instead of a model."""

import numpy as np
import pytest

from cgrpo_jax.data.arithmetic import solution, worked_critique
from cgrpo_jax.learning.packing import group_rows, make_batch
from cgrpo_jax.options import ObjectiveConfig, RefineConfig
from cgrpo_jax.records import Attempt, Completion, Kind, Problem
from cgrpo_jax.rollout import critics
from cgrpo_jax.rollout.collect import CUT, collect_groups, refined_responses, refinement_prompt, select
from cgrpo_jax.text import prompts

QUESTION = "What is 23+46?"
PROBLEM = Problem(QUESTION, "69", prompts.question_messages(QUESTION), "exact")
RIGHT, WRONG = "\\boxed{69}", "\\boxed{70}"


def completion(tokenizer, text, finished=True):
    ids = tokenizer.encode_text(text) + list(tokenizer.eos_ids) * finished
    ids = np.asarray(ids, np.int32)
    return Completion(ids, np.full(len(ids), -0.5, np.float32), np.ones(len(ids), np.float32), finished)


def score(items):
    return [Attempt(c, text, float(RIGHT in text), RIGHT in text, None, "ok") for _, c, text in items]


def collect(tokenizer, answers, cfg=None, samples=3, **kwargs):
    """`answers(kind, sample) -> text`; remembers the prompts it was asked."""
    asked = []

    def generate(requests, then):
        """Rows end in reverse order; what is asked for in between is answered at the end."""
        asked.extend(requests)
        answer = lambda r: completion(tokenizer, answers(r.kind, r.sample))
        for number in reversed(range(len(requests))):
            asked.extend(then(number, answer(requests[number])))
        for number in range(len(requests), len(asked)):
            assert then(number, answer(asked[number])) == []

    cfg = cfg or RefineConfig()
    (group,) = collect_groups(
        [PROBLEM], samples, generate, score, critics.CRITICS[cfg.critique], tokenizer, cfg, seed=0, step=0, **kwargs
    )
    return group, asked


def test_golden_critiques():
    """The exact texts of the paper's indicative critiques."""
    attempts = [Attempt(None, "", float(correct), correct, None, "ok") for correct in (True, False)]
    items = [(PROBLEM, attempt) for attempt in attempts]
    assert critics.indicative(items) == ["The generated solution is correct.", "The generated solution is incorrect."]
    assert critics.indicative_gt(items) == [
        "The generated solution is correct, the ground truth is 69.",
        "The generated solution is incorrect, the ground truth is 69.",
    ]


def test_golden_refinement_prompt():
    """Written out from the paper's description (spec 2.6): eight spaces before each field, three dashes, one close."""
    system, user = prompts.refinement_messages("Why {x}?", "<think>hm</think> {so}", "It is {wrong}.")
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    indent = " " * 8
    assert user["content"].split("\n") == [
        "Given the following inputs:",
        indent + "**Question**: Why {x}?",
        indent + "**Previous Solution**: <think>hm</think> {so}",
        indent + "**Critique**: It is {wrong}.",
        "",
        indent + "Please re-answer by:",
        indent + "- Correcting potential errors identified in the critique, if they exist.",
        indent + "- Providing clear, step-by-step reasoning.",
        indent + r"- Formatting the final answer as `\boxed{answer}`.",
        "",
        indent + "Ensure the revised solution addresses all issues raised in the critique.",
    ]


def test_worked_critique_names_the_step_and_never_the_answer():
    text = solution(QUESTION)
    assert "right" in worked_critique(QUESTION, text, True)
    wrong = text.replace("2+4+0=06", "2+4+0=07").replace("69", "79")
    assert worked_critique(QUESTION, wrong, False) == "Step 2 is wrong: 2+4+0=07. Conclusion: incorrect [END]"
    assert worked_critique(QUESTION, "3+6+0=09;\\boxed{9}", False).startswith("Step 2 is missing")
    assert worked_critique(QUESTION, text.replace("{69}", "{96}"), False).startswith("Each step is right, the final")
    for bad in (wrong, "", "\\boxed{1}", "x" * 10_000):
        critique = worked_critique(QUESTION, bad, False)
        assert "69" not in critique and critique.endswith("incorrect [END]") and len(critique) < 120


def test_paper_default_refines_only_where_nothing_was_right(tokenizer):
    group, asked = collect(tokenizer, lambda kind, g: RIGHT if g == 1 else WRONG)
    assert len(asked) == 3 and group.refinements == () and group.kept == (0, 1, 2) and group.selected == ()
    group, asked = collect(tokenizer, lambda kind, g: RIGHT if kind == Kind.REFINEMENT and g == 2 else WRONG)
    assert [r.kind for r in asked] == [Kind.RESPONSE] * 3 + [Kind.REFINEMENT] * 3
    assert [a.correct for a in group.refinements] == [False, False, True] and group.selected == (2,)
    assert [(a.text, refined) for a, refined in group.rows()] == [(WRONG, False)] * 3 + [(RIGHT, True)]
    assert [a.source for a in group.refinements] == [0, 1, 2]
    assert all(a.critique and "incorrect" in a.critique for a in group.responses)


@pytest.mark.parametrize(
    ("trigger", "correct", "expected"),
    [
        ("none_correct", [0, 0], [0, 1]), ("none_correct", [0, 1], []), ("any_wrong", [0, 1, 0], [0, 2]),
        ("any_wrong", [1, 1], []), ("always", [1, 0], [0, 1]), ("never", [0, 0], []),
    ],
)  # fmt: skip
def test_triggers(trigger, correct, expected):
    attempts = [Attempt(None, "", float(c), bool(c), None, "ok") for c in correct]
    assert refined_responses(attempts, trigger) == expected


def test_selection():
    rng = lambda: np.random.default_rng(0)
    assert select([False, True, True, False], 1, "correct_first", rng()) == (1,)
    assert select([False] * 4, 1, "correct_first", rng()) == (0,)
    picks = {select([False, True, False, True], 1, "correct_then_random", np.random.default_rng(i)) for i in range(40)}
    assert picks == {(1,), (3,)}
    picks = {select([False] * 3, 1, "correct_then_random", np.random.default_rng(i)) for i in range(40)}
    assert picks == {(0,), (1,), (2,)}
    picks = {select([True, False], 1, "random", np.random.default_rng(i)) for i in range(40)}
    assert picks == {(0,), (1,)}
    assert set(select([False, True, False, True], 3, "correct_then_random", rng())) > {1, 3}
    assert select([], 1, "correct_then_random", rng()) == ()


def test_replacing_makes_room_for_the_refinement(tokenizer):
    cfg = RefineConfig(group="replace", trigger="always")
    group, _ = collect(tokenizer, lambda kind, g: WRONG, cfg)
    assert group.kept == (1, 2) and len(group.selected) == 1
    untriggered, _ = collect(tokenizer, lambda kind, g: RIGHT, RefineConfig(group="replace"))
    assert untriggered.kept == (0, 1, 2)


def test_trained_rows_hold_the_plain_prompt_and_the_sampled_ids(tokenizer):
    """No critique in a training tensor, no re-tokenisation, no invented end."""
    ids, ones = np.array([5, 400, 401, 7], np.int32), np.ones(4, np.float32)  # ids no text encodes to
    cut = Completion(ids, -ones, ones, False)

    def generate(requests, then):
        later = [r for number in range(3) for r in then(number, completion(tokenizer, WRONG))]
        for number in range(len(later)):
            then(3 + number, cut)

    groups = collect_groups(
        [PROBLEM], 3, generate, score, critics.indicative_gt, tokenizer, RefineConfig(), seed=0, step=0
    )
    (item,) = group_rows(groups, ObjectiveConfig())
    assert [row.refined for row in item.rows] == [False] * 3 + [True]
    assert list(item.prompt_ids) == tokenizer.encode_chat(PROBLEM.messages)
    batch = make_batch([item], rows_per_prompt=4, micro_batch=1)
    refined = np.flatnonzero(batch.refined_AB.ravel())[0]
    response = batch.response_ABT[0, refined]
    assert list(batch.prompt_AQT[0, 0, batch.start_AQ[0, 0] :]) == list(item.prompt_ids)
    assert list(response[:4]) == [5, 400, 401, 7] and not response[4:].any()
    assert batch.length_AB.ravel()[refined] == 4
    needle = tokenizer.encode_text(" ground")
    assert len(needle) == 1 and not any((x == needle[0]).any() for x in (batch.prompt_AQT, batch.response_ABT))
    assert tokenizer.encode_chat(prompts.refinement_messages(QUESTION, WRONG, critics.indicative_gt(
        [(PROBLEM, groups[0].responses[0])])[0])).count(needle[0]) >= 1  # fmt: skip


def test_golden_group_of_seven_and_one(tokenizer):
    group, _ = collect(tokenizer, lambda kind, g: RIGHT if kind == Kind.REFINEMENT else WRONG, samples=7)
    (item,) = group_rows([group], ObjectiveConfig())
    rows = item.rows
    np.testing.assert_allclose([row.advantage for row in rows], [-0.125] * 7 + [0.875])
    np.testing.assert_allclose([row.weight for row in rows], [1 / 7] * 7 + [1.0], rtol=1e-6)


def test_refinement_prompt_cuts_the_solution_only(tokenizer):
    solution_text = "START " + "3+6+0=09;" * 60 + " END"
    critique = "The generated solution is incorrect, the ground truth is 69."
    whole = refinement_prompt(tokenizer, PROBLEM, solution_text, critique, 10_000)
    assert tokenizer.hf.decode(whole).count(solution_text) == 1
    for budget in (len(whole) - 1, 300, 200):
        ids = refinement_prompt(tokenizer, PROBLEM, solution_text, critique, budget)
        text = tokenizer.hf.decode(ids)
        assert budget - 12 <= len(ids) <= budget
        assert QUESTION in text and critique in text and "START" in text and " END" in text and CUT.strip() in text
    bare = len(refinement_prompt(tokenizer, PROBLEM, CUT, critique, 10_000))
    assert refinement_prompt(tokenizer, PROBLEM, solution_text, critique, bare) is not None
    assert refinement_prompt(tokenizer, PROBLEM, solution_text, critique, bare - 1) is None


def test_a_solution_without_room_is_left_out_and_counted(tokenizer):
    from cgrpo_jax.workdir.metrics import group_metrics

    group, asked = collect(tokenizer, lambda kind, g: WRONG, RefineConfig(max_prompt_tokens=20))
    assert len(asked) == 3 and group.refinements == () and group.kept == (0, 1, 2)
    assert group_metrics([group])["refine/no_room"] == 3


def test_batches_refuse_what_does_not_fit(tokenizer):
    group, _ = collect(tokenizer, lambda kind, g: RIGHT)
    prompted = group_rows([group], ObjectiveConfig())
    for rows_per_prompt, micro_batch in [(2, 1), (3, 2)]:
        with pytest.raises(ValueError, match="1 problems of at most"):
            make_batch(prompted, rows_per_prompt=rows_per_prompt, micro_batch=micro_batch)
