"""The page of the report in a browser: what is clicked, typed and seen."""

import json
import random

import numpy as np
import pytest
import report_runs
from report_runs import attempt, counts, group, wait_until

from cgrpo_jax.evaluation import intervals, tables
from cgrpo_jax.report_page import rollouts


@pytest.fixture
def one(opened, tmp_path):
    return opened(report_runs.write(tmp_path / "w"))


def questions(page):
    return page.locator(".row .what").all_inner_texts()


# ---- What is looked at first ----
def test_the_strip_says_which_run_and_how_good(one):
    facts = dict(
        zip(
            one.locator(".fact dt").all_inner_texts(),
            one.locator(".fact dd:first-of-type").all_inner_texts(),
            strict=True,
        )
    )
    assert one.locator("h1").inner_text() == "w" and one.title() == "w – run report"
    assert facts["Method"] == "critique_grpo" and facts["Model"] == "model" and facts["Steps"] == "4"
    assert facts["pass@1"].split() == ["0.375", "[0.125,", "0.500]"]
    assert "sampled, T=1; eval/pass@1, step 4" in one.locator(".strip").inner_text()
    assert one.locator("#evaluation-body tbody th").first.inner_text() == "pass@1, sampled, T=1"
    assert facts["Reward"] == "0.313 → 0.5" and facts["Fixed by refinement"] == "0.5 → 0.5"
    assert "0.250 at step 0" in one.locator(".strip").inner_text()


@pytest.mark.parametrize("width", [1400, 800, 400])
def test_it_opens_at_its_summary(opened, tmp_path, width):
    """The first pixel that is seen is the page's first, however many runs and however narrow."""
    page = opened(*(report_runs.write(tmp_path / name) for name in "abc"), viewport={"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollHeight") > 1000
    assert page.evaluate("scrollY") == 0 and page.locator(".strip").is_visible()


def test_a_run_without_rollouts_or_evaluations(opened, tmp_path):
    rows = [
        {"step": 1, "loss/total": 2.0, "seconds/update": 1.0},
        {"step": 2, "loss/total": 1.5, "seconds/update": 1.0},
    ]
    page = opened(report_runs.write(tmp_path / "w", {}, rows, report_runs.config(method="sft")))
    assert page.locator(".panel h3").all_inner_texts() == ["Loss", "Time per step", "Any metric"]
    assert "2 → 1.5" in page.locator(".strip").inner_text()
    assert page.locator(".empty").all_inner_texts() == [
        "These runs left no rollouts.",
        "These runs were not evaluated (eval.every, method=eval).",
    ]


def evaluated(folder, answers):
    """A workdir of an evaluation: {task: rows of (question, whether each answer is right)}."""
    entries = {}
    for task, rows in answers.items():
        (folder / "eval" / task).mkdir(parents=True)
        lines = [
            {"id": str(number), "sample": g, "gold": "18", "answer": "4", "correct": right, "status": "ok"}
            | {"question": question, "text": f"It is {g}.", "tokens": 5, "finished": g > 0}
            for number, (question, rights) in enumerate(rows)
            for g, right in enumerate(rights)
        ]
        (folder / "eval" / task / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        correct_PG = np.array([rights for _, rights in rows])
        ids = [str(number) for number in range(len(rows))]
        shape = correct_PG.shape
        entries[task] = intervals.summarise(
            ids, ids, correct_PG, np.zeros(shape, int), np.full(shape, 5), *[np.ones(shape)] * 3, 0
        )
    results = {
        "version": tables.VERSION,
        "model": "m",
        "settings": dict.fromkeys(tables.SAMPLED, "") | {"samples": 2, "temperature": 0.6, "top_p": 0.95},
        "notes": [],
        "tasks": entries,
    }
    results |= {
        "sampling": {"seconds": 1.0, "tokens": 5, "tokens_per_s": 5.0},
        "mean": intervals.mean_of_tasks(entries, 0),
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_answers_of_an_evaluation(opened, tmp_path):
    """They are browsed as rollouts are; an accuracy of 0 has an interval with a width; steps and rewards are not there."""
    rows = [("Ducks?", [False, False]), ("Robes?", [False, False])]
    page = opened(evaluated(tmp_path / "one", {"eggs": rows}))
    said = page.locator(".strip").inner_text().split("pass@1")[1].split()
    assert " ".join(said) == "0.000 [0.000, 0.658] sampled, T=0.6, top-p 0.95; eggs, 95 % interval"
    heads = page.locator("#evaluation-body thead th").all_inner_texts()
    assert "pass@1 [95 %], sampled, T=0.6, top-p 0.95" in heads
    assert questions(page) == ["Ducks?", "Robes?"] and page.locator("#filter-step").count() == 0
    assert page.locator("#evaluation-body tbody tr").count() == 1
    detail = page.locator("#detail").inner_text()
    assert (
        "wrong" in detail
        and "cut" in detail
        and "reward" not in detail
        and "step" not in detail
        and "5 tokens" in detail
    )
    rows[0] = ("Ducks?", [True, False])
    page = opened(evaluated(tmp_path / "two", {"eggs": rows, "more": rows[1:]}))
    assert counts(page) == {"all": 3, "failed": 2, "fixed": 0, "solved": 1}
    page.locator("#filter-tag").select_option("more")
    assert counts(page) == {"all": 1, "failed": 1, "fixed": 0, "solved": 0}
    assert page.locator("#evaluation-body tbody tr").count() == 3


def test_answers_without_room_are_left_out_and_said(tmp_path):
    """Those of tasks that are evaluated now, in their order; what an earlier command left is none of them."""
    rows = [(f"Question {number}?", [False]) for number in range(9)]
    workdir = evaluated(tmp_path / "w", {"more": rows[:1], "eggs": rows, "old": rows})
    (step,) = rollouts.answers_of(workdir, ["more", "eggs"], 10**6, 1000, print)["steps"]
    tags = [json.loads(record)["tag"] for record in step["groups"]]
    assert tags == ["more"] + 9 * ["eggs"]
    found = rollouts.answers_of(workdir, ["more", "eggs"], 3 * max(map(len, step["groups"])) + 1, 1000, print)
    assert found["steps"][0]["groups"] == step["groups"][:3] and found["said"].startswith("3 of 10 problems")


# ---- Curves ----
def legend(page, title):
    return (
        page.locator(".panel", has=page.locator(f"h3:text-is('{title}')"))
        .locator(".legend")
        .inner_text()
        .replace("\n", " ")
    )


def test_curves_tell_their_values_under_the_cursor(one):
    titles = one.locator(".panel h3").all_inner_texts()
    assert titles == [
        "Reward",
        "Held-out accuracy, sampled, T=1",
        "Refinement",
        "Entropy",
        "Gradient norm",
        "Sampler against trainer",
        "Time per step",
        "Any metric",
    ]
    assert legend(one, "Reward").split() == ["responses", "0.5", "refinements", "0.875", "last"]
    assert "0.375 [0.125, 0.500]" in legend(one, "Held-out accuracy, sampled, T=1")
    box = one.locator(".panel .u-over").first.bounding_box()
    one.mouse.move(box["x"] + box["width"] / 3, box["y"] + 40)
    assert legend(one, "Reward").split() == ["responses", "0.375", "refinements", "0.875", "step", "2"]
    assert legend(one, "Entropy").split() == ["policy", "0.5", "step", "2"]  # all panels share the cursor
    assert legend(one, "Gradient norm").split() == ["gradient", "–", "step", "2"]  # it was not finite


def test_dragging_zooms_all_curves_and_a_double_click_shows_all(one):
    ranges = "plots.map(({plot}) => [plot.scales.x.min, plot.scales.x.max])"
    whole = one.evaluate(ranges)
    box = one.locator(".panel .u-over").first.bounding_box()
    one.mouse.move(box["x"] + 2, box["y"] + 40)
    one.mouse.down()
    one.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50, steps=4)
    one.mouse.up()
    zoomed = one.evaluate(ranges)
    assert len({tuple(of) for of in zoomed}) == 1 and zoomed[0] == pytest.approx([1, 2.5], abs=0.05)
    assert one.locator("#unzoom").is_visible()
    one.mouse.dblclick(box["x"] + 20, box["y"] + 40)
    assert one.evaluate(ranges) == whole
    assert not one.locator("#unzoom").is_visible()


def test_a_curve_is_hidden_by_its_name_smoothed_and_any_metric_is_shown(one):
    name = one.locator(".legend .name").first
    name.click()
    assert name.get_attribute("aria-pressed") == "false" and not one.evaluate("plots[0].plot.series[1].show")
    one.select_option("#smoothing", "20")
    assert one.evaluate("plots[0].plot.data[1]") == pytest.approx([0.3125, 0.34375, 0.375, 0.40625])
    one.select_option("#smoothing", "1")
    one.select_option(".panel select", "policy/entropy")
    assert "policy/entropy 0.25" in legend(one, "Any metric")


# ---- Rollouts ----
def test_filters_and_their_counts(one):
    assert counts(one) == {"all": 3, "failed": 1, "fixed": 1, "solved": 1}
    assert len(questions(one)) == 1 and "Find" in questions(one)[0]  # failures first
    for name, words in (("fixed", "primes"), ("solved", "3+4")):
        one.click(f".chip[data-status={name}]")
        assert len(questions(one)) == 1 and words in questions(one)[0]
        assert words in one.locator(".question").inner_text()
    one.click(".chip[data-status=all]")
    assert ["Find" in questions(one)[0], len(questions(one))] == [True, 3]  # the newest step first
    one.select_option("#filter-order", "oldest")
    assert "3+4" in questions(one)[0]
    one.select_option("#filter-step", "1")
    assert counts(one) == {"all": 2, "failed": 0, "fixed": 1, "solved": 1}
    one.select_option("#filter-tag", "hard")
    assert counts(one) == {"all": 1, "failed": 0, "fixed": 1, "solved": 0}


def test_search_looks_into_all_texts_and_marks_what_it_finds(one):
    one.click(".chip[data-status=all]")
    one.keyboard.press("/")
    assert one.evaluate("document.activeElement.id") == "search"
    one.keyboard.type("ZEBRA")
    wait_until(one, "list.shown.length === 1")
    assert "Find" in questions(one)[0] and one.locator("mark").all_inner_texts() == ["zebra"]
    assert counts(one) == {"all": 1, "failed": 1, "fixed": 0, "solved": 0}
    one.fill("#search", "no such words")
    wait_until(one, "list.shown.length === 0")
    assert one.locator("#detail").inner_text() == "No problem is like this."
    one.keyboard.press("Escape")
    assert len(questions(one)) == 3 and one.evaluate("document.activeElement.id") == "list"


def test_keys_move_through_problems_and_attempts(one):
    one.click(".chip[data-status=all]")
    one.select_option("#filter-order", "oldest")
    one.focus("#list")
    for key, words in (
        ("ArrowDown", "primes"),
        ("ArrowDown", "Find"),
        ("ArrowDown", "Find"),
        ("ArrowUp", "primes"),
        ("Home", "3+4"),
        ("End", "Find"),
    ):
        one.keyboard.press(key)
        assert words in one.locator(".question").inner_text()
        assert words in one.locator(".row[aria-selected=true]").inner_text()
    one.keyboard.press("ArrowRight")
    one.keyboard.press("ArrowRight")
    assert one.evaluate("document.activeElement.innerText").startswith("Refinement 1")
    one.keyboard.press("v")
    assert one.locator(".segments [aria-pressed=true]").inner_text() == "As written"
    one.keyboard.press("ArrowUp")
    assert "primes" in one.locator(".question").inner_text()


def test_the_view_changes_from_a_filter_too(one):
    """What was clicked last has the focus. In the search it is a letter."""
    views = [one.evaluate("view")]
    for clicked in (".chip[data-status=all]", "#filter-order"):
        one.focus(clicked)
        one.keyboard.press("v")
        views.append(one.evaluate("view"))
    assert len(set(views)) == 3
    one.fill("#search", "v")
    one.press("#search", "v")
    assert one.input_value("#search") == "vv" and one.evaluate("view") == views[-1]


def test_a_problem_from_question_to_refinement(one):
    one.click(".chip[data-status=fixed]")
    detail = one.locator("#detail")
    text = detail.inner_text()
    places = [
        text.index(words)
        for words in (
            "How many primes",
            "Gold answer 7",
            "Response 1",
            "There are 8",
            "Critique",
            "is incorrect",
            "Refinement 1",
            "There are 7",
            "Response 2",
        )
    ]
    assert places == sorted(places)
    heads = [head.replace("\n", " ") for head in one.locator(".card-head").all_inner_texts()]
    assert "reward 0" in heads[0] and "A −0.33" in heads[0] and "reward 1" in heads[1] and "A +0.67" in heads[1]
    assert "not trained on" in heads[3] and "A " not in heads[3].split("reward")[1][:8]
    one.click("text=Difference")
    assert one.locator("del").all_inner_texts() == ["8"] and one.locator("ins").all_inner_texts() == ["7"]
    one.click("text=open all")
    assert one.locator(".card.open").count() == 4 and one.locator("ins").all_inner_texts() == ["7", " again"]
    one.click("text=close all")
    assert one.locator(".card.open").count() == 0
    one.click(".square.refined >> nth=1")
    assert one.locator(".card.open .card-head").inner_text().startswith("Refinement 2")


def test_refinements_of_all_responses_and_traces_of_the_data(opened, tmp_path):
    """They belong to no single response; those under their own prompt have an advantage among themselves, too."""
    wrong, right = attempt("It is 8", False, critique="Wrong."), attempt("So 7", True)
    trace = {key: value for key, value in right.items() if key not in ("logp", "widths")} | {"sampled": False}
    golf = group("golf?", [wrong, wrong]) | {"refinements": [right, wrong], "selected": [0], "own_group": [0, 1]}
    luffy = group("luffy?", [wrong]) | {"refinements": [trace], "selected": [0]}
    page = opened(report_runs.write(tmp_path / "w", {1: [golf], 2: [luffy]}))
    assert "Trace of the data" in page.locator("#detail").inner_text()
    page.click("text=Token probabilities")
    page.locator(".card-head").last.click()
    assert "are not in the file" in page.locator(".card-body").last.inner_text()
    page.select_option("#filter-order", "oldest")
    heads = page.locator(".card-head").all_inner_texts()
    assert "Refinement 1 of all wrong responses" in heads[2] and "A +0.67" in heads[2]
    assert ["A +0.50 among" in heads[2], "A −0.50 among" in heads[3]] == [True, True]
    assert "not trained" not in heads[3] and page.locator(".critique").count() == 2


def test_maths_is_rendered_and_money_is_not(opened, tmp_path):
    text = "It costs $5 and then $6 or $5-$6, so $\\frac{1}{2}$ of \\(x^2\\); $$a+b$$ \\[c\\] \\boxed{\\text{so } 7} $\\oops{$ \\boxed{"
    page = opened(report_runs.write(tmp_path / "w", {1: [group(text, [attempt("no", False)])]}))
    question = page.locator(".question")
    assert question.locator("math").count() == 5 and question.locator("mfrac").count() == 1
    assert "It costs $5 and then $6 or $5-$6, so " in question.inner_text() and "$\\oops{$" in question.inner_text()


def test_tokens_are_shaded_by_their_probability(one):
    one.click("text=Token probabilities")
    shaded = one.locator(".tokens span").all()
    assert "".join(span.inner_text() for span in shaded)[:9] == "zebra 6st" or len(shaded) >= 7
    assert [shaded[i].get_attribute("title") for i in (0, 3)] == ["p ≈ 1.00", "p ≈ 0.050"]
    assert [shaded[i].get_attribute("class") for i in (0, 3)] == ["shade0", "shade3"]
    assert one.locator(".shades").is_visible()


def test_runs_side_by_side(opened, tmp_path):
    first = report_runs.write(tmp_path / "first")
    rows = report_runs.metrics(reward=0.5)
    second = report_runs.write(
        tmp_path / "second", {7: [report_runs.FAILED]}, rows, report_runs.config(**{"refine.trigger": "never"})
    )
    page = opened(first, second)
    assert page.locator("h1").all_inner_texts() == ["first", "second"]
    assert "first: responses 0.5" in legend(page, "Reward") and "second: responses 0.75" in legend(page, "Reward")
    page.check("#config-differing")
    assert page.locator("#config-body tbody tr").all_inner_texts() == ["trigger\tnone_correct\tnever"]
    assert counts(page)["all"] == 4 and len(questions(page)) == 2
    page.click("#detail .elsewhere .link")  # the same question in the other run
    assert "first · step 2" in page.locator(".place").inner_text()
    page.select_option("#filter-run", "1")
    assert counts(page) == {"all": 1, "failed": 1, "fixed": 0, "solved": 0}


def test_narrow_screens_and_the_dark(opened, tmp_path):
    """Nothing is wider than the screen; the colours turn."""
    page = opened(report_runs.write(tmp_path / "w"), color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) != dark
    for width in (360, 700, 1000):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


# ---- Functions of texts ----
def texts(rng, count):
    """Texts full of what formulas and tokens begin and end with."""
    pieces = [
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "\\boxed{",
        "{",
        "}",
        "\\begin{align}",
        "\\end{align}",
        "x",
        "7",
        " ",
        "\n",
        "\\",
        "😀",
        "é",
        "word",
        "_",
        "\n\n",
    ]
    return ["".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(count)]


def test_parts_and_differences_hold_the_whole_text(one):
    rng = random.Random(0)
    befores, afters = texts(rng, 400), texts(rng, 400)
    parts = one.evaluate("(texts) => texts.map((text) => partsOf(text).map((part) => part.text).join(''))", befores)
    assert parts == befores
    script = "(pairs) => pairs.map(([a, b]) => difference(a, b))"
    for before, after, pieces in zip(
        befores, afters, one.evaluate(script, list(zip(befores, afters, strict=True))), strict=True
    ):
        assert "".join(text for kind, text in pieces if kind != "+") == before
        assert "".join(text for kind, text in pieces if kind != "-") == after
    same, other = " ".join(map(str, range(5000))), " ".join(map(str, range(9000, 4000, -1)))
    ((kind, text),) = one.evaluate("([a, b]) => difference(a, b)", [same, same])
    assert (kind, text) == (" ", same)
    kinds = {kind for kind, _ in one.evaluate("([a, b]) => difference(a, b)", [same, other])}
    assert {"+", "-"} <= kinds  # too many edits: told as a whole
