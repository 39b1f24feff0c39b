"""Critique, refinement, selection and group assembly, with a generator that is a table instead of a model."""

import dataclasses
import functools
import threading
import time

import numpy as np
import pytest

from cgrpo_jax.config.critics import CRITICS
from cgrpo_jax.config.options import ObjectiveConfig, RefineConfig, RewardConfig
from cgrpo_jax.data.arithmetic import solution, worked_critique
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Graded
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.records import Attempt, Completion, Critique, Kind, Name, Problem, Request, Verdict
from cgrpo_jax.rollout import critics
from cgrpo_jax.rollout import stories as stories_module
from cgrpo_jax.rollout.collect import (
    CUT,
    Method,
    Posed,
    by_rule,
    groups_of,
    refined_responses,
    refinement_prompt,
    select,
    stories_of,
)
from cgrpo_jax.rollout.critics import Brief, inverted, usable, verdict_of
from cgrpo_jax.rollout.stories import Sample, Stories, Work, run_stories
from cgrpo_jax.rollout.written import critic_and_scorer
from cgrpo_jax.sampling.pool import Stats
from cgrpo_jax.text import prompts

QUESTION = "What is 23+46?"
PROBLEM = Problem(QUESTION, "69", prompts.question_messages(QUESTION), "exact")
RIGHT, WRONG = "\\boxed{69}", "\\boxed{70}"


def completion(tokenizer, text, finished=True):
    ids = tokenizer.encode_text(text) + list(tokenizer.eos_ids) * finished
    ids = np.asarray(ids, np.int32)
    return Completion(ids, np.full(len(ids), -0.5, np.float32), np.ones(len(ids), np.float32), finished)


def score(items, step=0):
    return [Attempt(c, text, float(RIGHT in text), RIGHT in text, None, "ok") for _, c, text in items]


class Table:
    """An engine that ends one request a chunk, the last asked first (`place` 0: the first), by a table of answers.

    It writes down what it was asked.
    """

    def __init__(self, answer, asked, place=-1):
        self.answer, self.asked, self.place, self.queue, self.stats = answer, asked, place, [], Stats()

    def submit(self, requests):
        self.asked.extend(requests)
        self.queue.extend(requests)

    @property
    def busy(self):
        return bool(self.queue)

    def advance(self, more_may_come):
        request = self.queue.pop(self.place)
        return [(request, self.answer(request))]


def groups_from(engine, problems, method, spare=(), step=0):
    """The groups of a step that is sampled by this engine."""
    with stories_of(problems, method, step, spare=spare) as stories:
        run_stories(stories, [engine])
    return groups_of(stories)


def method_of(tokenizer, cfg, samples, critic=None, scorer=None):
    brief = Brief(cfg, CRITICS[cfg.critique].shown or "none")
    own_critic, own_scorer = critic_and_scorer(brief, tokenizer, functools.partial(by_rule, score, tokenizer))
    return Method(samples, scorer or own_scorer, critic or own_critic, tokenizer, cfg, seed=0)


def collect(tokenizer, answers, cfg=None, samples=3, **parts):
    """`answers(kind, sample) -> text`; also the requests in the order in which they were asked."""
    asked = []

    def answer(request):
        return completion(tokenizer, answers(request.name.kind, request.name.sample))

    method = method_of(tokenizer, cfg or RefineConfig(), samples, **parts)
    (group,) = groups_from(Table(answer, asked), [PROBLEM], method)
    return group, asked


def test_golden_critiques():
    """The exact texts of the paper's indicative critiques."""
    attempts = [Attempt(None, "", reward, reward == 1, None, "ok") for reward in (1.0, 0.0)]
    texts = [critics.indicative(PROBLEM, attempt) for attempt in attempts]
    assert texts == ["The generated solution is correct.", "The generated solution is incorrect."]
    assert [critics.indicative_gt(PROBLEM, attempt) for attempt in attempts] == [
        "The generated solution is correct, the ground truth is 69.",
        "The generated solution is incorrect, the ground truth is 69.",
    ]


def test_golden_refinement_prompt():
    """Written out from the paper's description (spec 2.6): eight spaces before each field, three dashes, one close."""
    system, user = prompts.refinement_messages("Why {x}?", [("<think>hm</think> {so}", "It is {wrong}.")])
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
    assert [r.name.kind for r in asked] == [Kind.RESPONSE] * 3 + [Kind.REFINEMENT] * 3
    assert [a.correct for a in group.refinements] == [False, False, True] and group.selected == (2,)
    assert [(a.text, refined) for a, refined in group.rows()] == [(WRONG, False)] * 3 + [(RIGHT, True)]
    assert [a.source for a in group.refinements] == [0, 1, 2]
    assert all(a.critique and "incorrect" in a.critique.text for a in group.responses)


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


@pytest.mark.parametrize(("at", "refinements", "critique"), [(1.0, 3, "incorrect"), (0.5, 0, None)])
def test_what_counts_as_correct_decides_trigger_and_selection(tokenizer, at, refinements, critique):
    """Scores of 0.6 and 0.2: below the threshold all are refined; the fractions are the rewards either way."""
    values = {"1": 0.6, "2": 0.2}

    class Fractions:
        def grade(self, jobs):
            return [Graded(None, Verdict(values[job.text[-2]], False, "ok")) for job in jobs]

    cfg = RewardConfig(correct_at=at, partial=True)
    rule = functools.partial(by_rule, functools.partial(rewards.score, verifier=Fractions(), cfg=cfg), tokenizer)
    group, _ = collect(tokenizer, lambda kind, g: f"\\boxed{{{1 if g == 1 else 2}}}", scorer=rule)
    assert [a.reward for a in group.responses] == [0.2, 0.6, 0.2] and len(group.refinements) == refinements
    assert all(
        (a.critique and critique in a.critique.text) if critique else a.critique is None for a in group.responses
    )
    always, _ = collect(
        tokenizer, lambda kind, g: f"\\boxed{{{1 if g == 1 else 2}}}", RefineConfig(trigger="always"), scorer=rule
    )
    assert [a.correct for a in always.refinements] == [False, at == 0.5, False]
    assert at == 1.0 or always.selected == (1,)


def test_selection():
    def rng():
        return np.random.default_rng(0)

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


def test_what_is_picked_follows_from_seed_step_and_problem(tokenizer):
    """One of three wrong refinements, by chance: another one for other problems, steps and seeds, else the same."""
    method = method_of(tokenizer, RefineConfig(select="random"), 3)

    def picks(seed, step):
        engine = Table(lambda request: completion(tokenizer, WRONG), [])
        groups = groups_from(engine, [PROBLEM] * 12, dataclasses.replace(method, seed=seed), step=step)
        return [group.selected for group in groups]

    assert picks(0, 0) == picks(0, 0) and set(picks(0, 0)) == {(0,), (1,), (2,)}
    assert len({tuple(picks(seed, step)) for seed, step in ((0, 0), (0, 1), (1, 0))}) == 3


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

    def answer(request):
        return cut if request.name.kind == Kind.REFINEMENT else completion(tokenizer, WRONG)

    groups = groups_from(Table(answer, []), [PROBLEM], method_of(tokenizer, RefineConfig(), 3))
    groups = [dataclasses.replace(groups[0], refinements=tuple(
        dataclasses.replace(attempt, reward=1.0) for attempt in groups[0].refinements))]  # fmt: skip
    made = credit.segments(groups, ObjectiveConfig(), 64.0)
    assert [s.refined for s in made] == [False] * 3 + [True]
    plain = tokenizer.encode_chat(PROBLEM.messages)
    assert all(list(s.prompt_ids) == plain for s in made) and list(made[3].ids) == list(ids)
    size = bin_size(
        share=True, problems=1, group=4, at_once=1, row_devices=1, longest_prompt=len(plain), longest_ids=16
    )  # fmt: skip
    bins = pack(made, size, Terms())
    (refined,) = [row for row in range(4) if bins.refined_ABT[0, row].any()]
    assert list(bins.prompt_AQS[0, 0, : len(plain) - 1]) == plain[:-1]
    (where,) = np.nonzero(bins.refined_ABT[0, refined])
    assert list(bins.token_ABT[0, refined, where]) == [plain[-1], 5, 400, 401]
    assert list(bins.target_ABT[0, refined, where]) == list(ids) and bins.scored_ABT[0, refined, where].all()
    needle = tokenizer.encode_text(" ground")
    assert len(needle) == 1 and not any((x == needle[0]).any() for x in (bins.prompt_AQS, bins.token_ABT))
    critique = critics.indicative_gt(PROBLEM, groups[0].responses[0])
    assert tokenizer.encode_chat(prompts.refinement_messages(QUESTION, [(WRONG, critique)])).count(needle[0]) >= 1


def test_refinement_prompt_cuts_the_solution_only(tokenizer):
    solution_text = "START " + "3+6+0=09;" * 60 + " END"
    critique = "The generated solution is incorrect, the ground truth is 69."
    whole = refinement_prompt(tokenizer, PROBLEM, [(solution_text, critique)], 10_000)
    assert tokenizer.hf.decode(whole).count(solution_text) == 1
    assert refinement_prompt(tokenizer, PROBLEM, [(solution_text, critique)], len(whole)) == whole
    for budget in (len(whole) - 1, 300, 200):
        ids = refinement_prompt(tokenizer, PROBLEM, [(solution_text, critique)], budget)
        text = tokenizer.hf.decode(ids)
        assert budget - 12 <= len(ids) <= budget
        assert QUESTION in text and critique in text and "START" in text and " END" in text and CUT.strip() in text
    bare = len(refinement_prompt(tokenizer, PROBLEM, [(CUT, critique)], 10_000))
    assert refinement_prompt(tokenizer, PROBLEM, [(solution_text, critique)], bare) is not None
    assert refinement_prompt(tokenizer, PROBLEM, [(solution_text, critique)], bare - 1) is None


def test_a_solution_without_room_is_left_out_and_counted(tokenizer):
    from cgrpo_jax.workdir.metrics import group_metrics

    group, asked = collect(tokenizer, lambda kind, g: WRONG, RefineConfig(max_prompt_tokens=20))
    assert len(asked) == 3 and group.refinements == () and group.kept == (0, 1, 2)
    assert group_metrics([group])["refine/no_room"] == 3


# ---- Stories: what waits for what, and when it is told ----


def told(stories, script):
    """Polls and ends as the script says; what each poll returned."""
    polls = []
    for done in script:
        polls.append([request.name.sample for request in stories.due(idle=done is None).requests])
        if done is not None:
            stories.ended([(Request(Name(Kind.RESPONSE, 0, g), [1]), g) for g in done])
    return polls


def asking(*samples):
    return Sample([Request(Name(Kind.RESPONSE, 0, g), [1]) for g in samples])


def test_work_is_told_at_the_poll_after_the_next_chunk():
    """However fast it is: the schedule is a function of chunks, not of clocks."""

    def story():
        yield asking(0)
        value = yield Work(lambda: 7, "score")
        yield asking(value)

    def other():
        yield asking(1, 2)

    with Stories([story(), other()]) as stories:
        #       chunk 1 ends 0   chunk 2 ends 1   chunk 3 ends nothing   chunk 4 ends 7 and 2
        assert told(stories, [[0], [1], [], [7, 2], None]) == [[0, 1, 2], [], [7], [], []]
        assert not stories.due(idle=True).more


def test_nothing_is_graded_on_the_thread_that_decodes(tokenizer):
    """Also of refinements: the sampler's own thread only waits, and while an answer is graded it decodes a chunk."""
    graded, decoded = [], []

    def beside(items, step):
        graded.append(threading.current_thread())
        return score(items)

    def answer(request):
        decoded.append(threading.current_thread())
        return completion(tokenizer, WRONG)

    method = method_of(
        tokenizer, RefineConfig(trigger="always"), 3, scorer=functools.partial(by_rule, beside, tokenizer)
    )
    groups_from(Table(answer, []), [PROBLEM, PROBLEM], method)
    assert len(graded) == 4 and set(decoded) == {threading.current_thread()}
    assert threading.current_thread() not in graded


def test_late_work_is_waited_for_and_idle_waits():
    release = threading.Event()

    def story():
        yield asking(0)
        yield Work(release.wait, "score")
        yield asking(1)

    with Stories([story()]) as stories:
        assert told(stories, [[0]]) == [[0]]
        threading.Timer(0.05, release.set).start()
        assert told(stories, [None]) == [[1]]  # nothing else to do


def test_decoding_waits_for_late_work_no_longer_than_a_chunk(monkeypatch):
    """A verdict that takes ten chunks: others go on meanwhile, it is told when it is there, and counted."""
    release, chunk = threading.Event(), 0.1
    monkeypatch.setattr(stories_module, "PATIENCE", 0.0)

    def slow():
        yield asking(0)
        yield Work(release.wait, "score")
        yield asking(9)

    def quick():
        for sample in range(1, 6):
            yield asking(sample)

    with Stories([slow(), quick()]) as stories:
        assert [r.name.sample for r in stories.due(idle=False).requests] == [0, 1]
        polls, waited = [], []
        for sample in range(5):
            time.sleep(chunk)
            ended = [0, 1] if sample == 0 else [sample + 1]
            stories.ended([(Request(Name(Kind.RESPONSE, 0, g), [1]), g) for g in ended])
            if sample == 3:
                release.set()
                while not stories.jobs[0].future.done():
                    time.sleep(0.001)
            began = time.monotonic()
            polls.append([r.name.sample for r in stories.due(idle=False).requests])
            waited.append(time.monotonic() - began)
        assert polls == [[2], [3], [4], [5, 9], []]
        assert max(waited[2:]) < chunk  # it was waited for once, after the second chunk
        assert chunk / 2 < waited[1] < 5 * chunk and stories.late == 1


def test_patience_is_of_a_poll_and_not_of_each_piece_of_work(monkeypatch):
    """Chunks take no time. A verdict within the patience is in time; two beyond it are waited for together."""
    release, patience = threading.Event(), 0.5
    monkeypatch.setattr(stories_module, "PATIENCE", patience)

    def story(sample, call):
        yield asking(sample)
        yield Work(call, "score")
        yield asking(sample + 10)

    slow = functools.partial(release.wait, 10 * patience)
    calls = (lambda: time.sleep(patience / 10), slow, slow)
    with Stories([*map(story, range(3), calls)], threads=3) as stories:
        assert told(stories, [[0, 1, 2], []]) == [[0, 1, 2], []]
        began = time.monotonic()
        assert [request.name.sample for request in stories.due(idle=False).requests] == [10]
        assert patience <= time.monotonic() - began < 1.8 * patience and stories.late == 2
        release.set()


def test_remote_work_is_told_by_arrival():
    first, second = threading.Event(), threading.Event()

    def story(event, sample):
        yield Work(event.wait, "critique", remote=True)
        yield asking(sample)

    with Stories([story(first, 0), story(second, 1)]) as stories:
        assert list(stories.due(idle=False).requests) == []
        second.set()
        while not stories.jobs[1].future.done():
            time.sleep(0.001)
        assert [r.name.sample for r in stories.due(idle=False).requests] == [1]
        first.set()
        assert [r.name.sample for r in stories.due(idle=True).requests] == [0]


def test_work_that_raises_ends_the_run(tokenizer):
    def broken(items, step):
        raise ValueError("no grader")

    with pytest.raises(ValueError, match="no grader"):
        collect(tokenizer, lambda kind, g: WRONG, scorer=functools.partial(by_rule, broken, tokenizer))


def test_a_verdict_may_come_from_the_policy_itself(tokenizer):
    """Scoring asks the sampler: a critique of each attempt, in a round of its own, gives reward and text."""

    def scorer(posed, kind, completions):
        number = sum(len(ids.ids) for ids in completions) > 0  # any name that is free will do
        round_ = scorer.rounds = getattr(scorer, "rounds", 0) + number
        requests = [Request(Name(Kind.CRITIQUE, 0, g, round_), [1, 2]) for g in range(len(completions))]
        verdicts = yield Sample(requests)
        texts = [tokenizer.decode(completion.ids) for completion in completions]
        said = [tokenizer.decode(verdict.ids) for verdict in verdicts]
        return [
            Attempt(completion, text, float("right" in word), "right" in word, None, "ok")
            for completion, text, word in zip(completions, texts, said, strict=True)
        ]

    def answers(kind, g):
        return {Kind.CRITIQUE: "right" if g == 2 else "wrong"}.get(kind, WRONG)

    group, asked = collect(tokenizer, answers, RefineConfig(trigger="any_wrong"), scorer=scorer)
    assert [a.reward for a in group.responses] == [0.0, 0.0, 1.0]
    assert [a.source for a in group.refinements] == [0, 1]
    rounds = [r.name.round for r in asked if r.name.kind == Kind.CRITIQUE]
    assert rounds == [1, 1, 1, 2, 2]


def test_an_attempt_without_a_usable_critique_is_not_refined(tokenizer):
    def critic(posed, attempts):
        yield from ()
        return [Critique(None if g == 1 else "Look again.") for g in range(len(attempts))]

    group, asked = collect(tokenizer, lambda kind, g: WRONG, critic=critic)
    assert [r.name.sample for r in asked if r.name.kind == Kind.REFINEMENT] == [0, 2]
    assert [a.source for a in group.refinements] == [0, 2]
    assert [a.critique.text for a in group.responses] == ["Look again.", None, "Look again."]


# ---- Critics that a model is ----


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Step 2 is wrong.\nConclusion: incorrect [END]", False), ("**Conclusion:** right [END]", True),
        ("Conclusion: correct", True), ("It is correct.", None), ("", None), ("Conclusion: incorrectly put", None),
        ("Conclusion: perhaps correct", None), ("Add again. Conclusion: incorrect [END] and more", False),
        ("Conclusion: The solution is incorrect", False), ("**Conclusion: The student's solution is correct.** [END]", True),
        ("### Conclusion:\n\n'wrong' [END].", False), ("Conclusion: correct\nNo. Conclusion: wrong [END]", False),
        ("<think>Conclusion: correct [END]</think>The tens.\nConclusion: incorrect [END]", False),
        # what is no conclusion in the form that was asked for
        ("In conclusion, right angles were assumed in step 2.", None), ("Conclusion: right angles were assumed", None),
        ("Conclusion: correct/incorrect [END]", None), ("Conclusion: correct or incorrect [END]", None),
        ('conclude your judgment with: "Conclusion: correct/incorrect [END]."', None),
        ("End with `Conclusion: correct [END]` or `Conclusion: incorrect [END]`.", None),
        ("`Conclusion: correct [END]` or `Conclusion: incorrect [END]`", None),
        ("Conclusion: The solution is not correct [END]", None), ("Conclusion: partially correct [END]", None),
        ("Conclusion: correct\nBut look at step 2: 3+4 is 8.", None),
        ("Conclusion: correct [END]\nNo.\nConclusion: wrong [END]", None), ("The student's conclusion: correct", None),
        ("<think>Conclusion: correct [END]", None),
    ],
)  # fmt: skip
def test_a_verdict_is_the_conclusion_that_a_critique_ends_in(text, verdict):
    assert verdict_of(text, finished=True) is verdict


def test_a_critique_that_a_limit_cut_has_no_verdict():
    """Its last words may be anything; the end mark says that they are its last ones."""
    assert verdict_of("Step 1 is fine.\nConclusion: correct", finished=False) is None
    assert verdict_of("Step 1 is fine.\nConclusion: correct [END]\n\nNext", finished=False) is True


@pytest.mark.parametrize("part", [".", " ", "\n", "conclusion:", ". Conclusion: ", "Conclusion: correct\n\n\n"])
def test_a_verdict_is_found_in_linear_time(part):
    """A critique is at most this long, and its writer may be hostile."""
    began = time.monotonic()
    verdict_of(part * (65536 // len(part)), finished=True)
    assert time.monotonic() - began < 1.0


def test_a_critique_has_no_reasoning_block_and_ends_at_its_mark():
    assert usable("<think>it is 69</think> Step 1 is wrong. Conclusion: wrong [END] and more") == (
        "Step 1 is wrong. Conclusion: wrong"
    )
    assert usable("<think>never closed") == "" and usable("  ") == ""


def written_run(tokenizer, said, responses=(WRONG,) * 3, **cfg):
    """All refinements right; `said(sample, round)` is what the policy writes as a critique."""
    asked = []

    def answer(request):
        kind, _, sample, round_, _ = request.name
        texts = {Kind.RESPONSE: responses[sample % 3], Kind.REFINEMENT: RIGHT}
        return completion(tokenizer, texts[kind] if kind in texts else said(sample, round_))

    cfg = RefineConfig(**{"max_prompt_tokens": 4000} | cfg)
    (group,) = groups_from(Table(answer, asked), [PROBLEM], method_of(tokenizer, cfg, 3))
    return group, asked


def test_a_critique_that_contradicts_the_rule_is_written_anew_then_replaced(tokenizer):
    """Response 0 is criticised rightly at once, 1 at the second try, 2 never."""

    def said(sample, round_):
        right = sample == 0 or (sample == 1 and round_ == 1)
        return "Add again. Conclusion: incorrect [END]" if right else "Fine. Conclusion: correct [END]"

    group, asked = written_run(tokenizer, said, critique="self_gt", critique_tries=3)
    rounds = [(r.name.sample, r.name.round) for r in asked if r.name.kind == Kind.CRITIQUE]
    assert sorted(rounds) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    found = [a.critique for a in group.responses]
    assert [c.tries for c in found] == [1, 2, 3] and [c.fallback for c in found] == [False, False, True]
    assert found[0].text == found[1].text == "Add again. Conclusion: incorrect"
    assert found[2].text == "The generated solution is incorrect, the ground truth is 69." and found[2].agrees is False
    assert found[1].tokens > found[0].tokens > 0 and len(group.refinements) == 3
    from cgrpo_jax.workdir.metrics import group_metrics

    values = group_metrics([group])
    assert values["critique/valid"] == 1 and values["critique/agreement"] == pytest.approx(2 / 3)
    assert values["critique/first_valid"] == 1 and values["critique/first_agreement"] == pytest.approx(1 / 3)
    assert values["critique/fallback"] == pytest.approx(1 / 3) and values["critique/tries"] == 2
    dropped, _ = written_run(tokenizer, said, critique="self_gt", critique_fallback="drop")
    assert [a.source for a in dropped.refinements] == [0, 1] and dropped.responses[2].critique.text is None


def test_who_is_shown_the_ground_truth(tokenizer):
    """self_gt is; self_eval and no_verdict are not, and no critique but that of self_gt may name it."""
    for critique, shown in (("self_gt", True), ("self_eval", False), ("no_verdict", False)):
        _, asked = written_run(tokenizer, lambda *_: "Step 1 is doubtful. Conclusion: wrong [END]", critique=critique)
        prompt = tokenizer.hf.decode(next(r.prompt_ids for r in asked if r.name.kind == Kind.CRITIQUE))
        assert ("Ground truth: 69" in prompt) is shown and WRONG in prompt and QUESTION in prompt
        assert ("Do not say whether" in prompt) is (critique == "no_verdict")


@pytest.mark.parametrize(
    ("cfg", "stands_in"),
    [
        ({"critique": "self_gt"}, "The generated solution is incorrect, the ground truth is 69."),
        ({"critique": "self_gt", "critique_fallback": "indicative"}, "The generated solution is incorrect."),
        ({"critique": "no_verdict"}, None),
    ],
)
def test_what_stands_in_says_no_more_than_the_critic_might(tokenizer, cfg, stands_in):
    group, _ = written_run(tokenizer, lambda *_: "", **cfg)
    assert {a.critique.text for a in group.responses} == {stands_in}


def test_first_tries_are_told_from_last_ones(tokenizer):
    """All first critiques are wrong or unreadable, and all second ones right: only the last try looks perfect."""
    from cgrpo_jax.workdir.metrics import group_metrics

    first = ["Conclusion: correct [END]", "Who knows.", "Conclusion: correct [END]"]
    group, _ = written_run(
        tokenizer, lambda g, round_: "Conclusion: wrong [END]" if round_ else first[g], critique="self_gt"
    )
    values = group_metrics([group])
    assert values["critique/valid"] == values["critique/agreement"] == 1
    assert values["critique/first_valid"] == pytest.approx(2 / 3) and values["critique/first_agreement"] == 0


def test_any_critique_of_wrong_attempts_alone(tokenizer):
    """As the release does it: right ones are told by a sentence, and nobody looks for a verdict."""
    group, asked = written_run(
        tokenizer, lambda *_: "Add the tens again.", critique="self_gt", critique_accept="any", trigger="always",
        responses=[WRONG, RIGHT, WRONG],
    )  # fmt: skip
    assert {r.name.sample for r in asked if r.name.kind == Kind.CRITIQUE} == {0, 2}
    assert [a.critique.text for a in group.responses] == [
        "Add the tens again.", "The generated solution is correct, the ground truth is 69.", "Add the tens again.",
    ]  # fmt: skip
    assert [a.critique.tries for a in group.responses] == [1, 0, 1] and len(group.refinements) == 3


def test_self_evaluation_is_the_reward_and_agreement_is_measured(tokenizer):
    """The policy takes response 1 (wrong) for right, and says nothing of response 2: the rule is not asked."""

    def said(sample, round_):
        return ["Conclusion: wrong [END]", "Conclusion: correct [END]", "Who knows."][sample]

    group, asked = written_run(tokenizer, said, critique="self_eval", trigger="any_wrong")
    assert [a.reward for a in group.responses] == [0.0, 1.0, 0.0]
    assert [a.status for a in group.responses] == ["ok", "ok", "no_verdict"]
    assert [a.evaluation.agrees for a in group.responses] == [True, False, None]
    assert [a.source for a in group.refinements] == [0]  # 2 has no critique, and there is no fallback for it
    assert [a.reward for a in group.refinements] == [0.0]  # the rule would say 1
    names = [r.name for r in asked if r.name.kind == Kind.CRITIQUE]
    assert len(set(names)) == len(names) == 4  # of the refinement, too


def test_critics_without_a_model(tokenizer):
    attempts = [(0, Attempt(None, RIGHT, 1.0, True, None, "ok")), (1, Attempt(None, WRONG, 0.0, False, None, "ok"))]

    def texts(critique, problem):
        critic, _ = critic_and_scorer(Brief(RefineConfig(critique=critique)), tokenizer, None)
        story = critic(Posed(problem, 0, 0), attempts)
        with pytest.raises(StopIteration) as end:
            next(story)
        return [found.text for found in end.value.value]

    noted = dataclasses.replace(PROBLEM, columns={"critique": "Carry the one."})
    assert texts("offline", noted) == ["Carry the one."] * 2 and texts("offline", PROBLEM) == [None, None]
    halved = dataclasses.replace(PROBLEM, columns={"critique": "\ud800"})  # no tokenizer takes it
    assert texts("offline", halved) == [None, None]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("The generated solution is incorrect.", "The generated solution is correct."),
        ("The generated solution is correct, the ground truth is 4.", "The generated solution is incorrect, the ground truth is 4."),
        ("Step 2 is wrong.\nConclusion: incorrect", "Step 2 is wrong.\nConclusion: correct"),
        ("**Conclusion:** Right [END]", "**Conclusion:** Wrong [END]"), ("Look at step 2.", None),
        ("Conclusion: wrong [END] Carry the 1.", "Conclusion: right [END] Carry the 1."),
    ],
)  # fmt: skip
def test_an_inverted_critique_differs_in_its_verdict_alone(text, other):
    assert inverted(text) == other and (other is None or inverted(other) == text)


def test_the_control_inverts_what_a_model_wrote(tokenizer):
    """Appendix C inverts written critiques; what is measured of them is still what the critic said."""
    group, _ = written_run(
        tokenizer, lambda *_: "The tens are wrong. Conclusion: incorrect [END]", critique="self_gt", inverted=True
    )
    assert {a.critique.text for a in group.responses} == {"The tens are wrong. Conclusion: correct"}
    assert all(a.critique.agrees and not a.critique.fallback for a in group.responses)
    plain, _ = written_run(tokenizer, lambda *_: "", critique="indicative", inverted=True)
    assert {a.critique.text for a in plain.responses} == {"The generated solution is correct."}
