"""What a model, a data set or a person wrote never does anything in the report, however it is written or how much."""

import json

import report_runs
from report_runs import attempt, counts, group, wait_until

from cgrpo_jax.evaluation import tables

FAR = "http://far.invalid/"
RUN = "window.ran=1;alert(1)"
HOSTILE = [
    f"<script>{RUN}</script>", f"</script><script>{RUN}</script>", f"<!--<script>{RUN}//--></script>", f"<img src=x onerror='{RUN}'>",
    f"<svg onload='{RUN}'>", f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>", f"<a href='javascript:{RUN}'>x</a>",
    f"<meta http-equiv=refresh content='0;url={FAR}'>", f"<base href='{FAR}'>", f"<link rel=stylesheet href='{FAR}a.css'>",
    f"<style>@import url({FAR}b.css); body {{ display: none }}</style>", f"<form action='{FAR}'><button autofocus onfocus='{RUN}'>",
    f"<math><mtext><img src='{FAR}c.png' onerror='{RUN}'></mtext></math>", f"<details open ontoggle='{RUN}'>", "]]>", "&lt;b&gt;&amp;",
    f"$\\href{{javascript:{RUN}}}{{x}}$", f"$\\href{{{FAR}}}{{x}}$", f"$\\url{{{FAR}}}$", f"$\\includegraphics{{{FAR}d.png}}$",
    f"$\\style{{background:url({FAR}e)}}{{x}}$", "$\\class{chip}{x}$", "$\\id{data}{x}$", f"$\\data{{onclick={RUN}}}{{x}}$",
    f"$\\text{{<img src=x onerror='{RUN}'>}}$", f"$$\\label{{a}}\\ref{{<img onerror={RUN}>}}$$", "$\\def\\x{\\x\\x}\\x$", "$\\gdef\\frac#1#2{9}$",
    "$\\rule{9999em}{9999em}$", "$\\kern9999em x$", "$" + "{" * 1500 + "$", "$" + "\\frac{1}{" * 300 + "$", "\\begin{matrix}" + "&" * 900 + "\\end{matrix}",
    "\\boxed{" * 500, "$" * 999, "\u202eevil\u202c \u2066x", "\u2028\u2029", "\x00\x01\x1b[31m", "\ud800", "z\u0335\u0336" * 200, "[SCRIPTS][DATA][POLICY]",
    "\\g<0>\\1 $& $1 {0} %s", "${" + RUN + "}", "{{constructor.constructor('" + RUN + "')()}}", "__proto__", "constructor", "toString",
]  # fmt: skip


def hostile_run(folder):
    """Hostile texts wherever a text of a model, of data or of a person can stand."""
    groups = []
    for text in HOSTILE:
        verdict = {"verdict": True, "agrees": False, "tries": 2, "fallback": True}
        wrong, again = (attempt(of, False, answer=text, status=text, critic=verdict) for of in (text, text + "!"))
        made = group(text, [wrong, wrong], [again], answer=text, tag=text)
        made["responses"][0]["critique"] = text
        groups.append(made)
    names = [text for text in HOSTILE if text.isprintable()]
    rows = [{"step": step} | dict.fromkeys(names, 1.0) | {f"seconds/{name}": 1.0 for name in names} for step in (1, 2)]
    rows += [{"step": 2} | {f"eval/{name}/pass@1": 0.5 for name in names}]
    settings = report_runs.config(**{"model.path": HOSTILE[0], "data.source": HOSTILE[1], "api.model": HOSTILE[3]})
    report_runs.write(folder, {1: groups}, rows, settings)
    of = {
        "problems": 1,
        "rows": 1,
        "samples": 1,
        "content": ["c"],
        "correct": [[1]],
        "pass@1": 1.0,
        "pass@1/low": 0.2,
        "pass@1/high": 1.0,
    }
    of |= {"pass@k": {"1": 1.0}, "maj@G": 1.0, "length": 5.0, "truncated": 0.0, "no_answer": 0.0, "no_verdict": 0.0}
    mean = {
        "pass@1": 1.0,
        "pass@1/low": 0.8,
        "pass@1/high": 1.0,
        "length": 5.0,
        "truncated": 0.0,
        "no_answer": 0.0,
        "no_verdict": 0.0,
    }
    results = {
        "version": 4,
        "model": HOSTILE[4],
        "settings": dict.fromkeys(tables.SAMPLED, 0) | {name: name for name in HOSTILE[:20]},
        "notes": HOSTILE[:40],
        "mean": mean,
    }
    sampling = {"seconds": 1.0, "tokens": 5, "tokens_per_s": 5.0}
    results |= {"tasks": dict.fromkeys(HOSTILE[:40], of), "sampling": sampling}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


TALLEST = "Math.max(...[...document.querySelectorAll('.text')].map((node) => node.scrollHeight))"
FOREIGN = "document.querySelectorAll('main :is(script, iframe, img, svg, a, form, object, embed, link, meta, base, style, details), [srcdoc], [onerror], [onload]').length"


def test_hostile_texts_stay_texts(opened, tmp_path):
    """No script runs, nothing is asked for, no dialog opens, and all of it can be read as it was written."""
    page = opened(hostile_run(tmp_path / "<img src=x onerror=window.ran=1>"))
    before = page.evaluate(FOREIGN)
    assert before == 0
    page.click(".chip[data-status=all]")
    shown = page.evaluate("list.shown.map((item) => item.group.question)")
    assert sorted(map(ascii, shown)) == sorted(map(ascii, HOSTILE))
    for view in ("tokens", "difference", "source", "rendered"):
        found = page.evaluate(
            f"""(name) => list.shown.map((item, at) => {{
                 setView(name); choose(at); present.cards.forEach((card) => toggleCard(card, true));
                 return [item.group.question, present.cards[0].body.textContent, {FOREIGN}, {TALLEST}];
               }})""",
            view,
        )
        assert [of[2] for of in found] == [0] * len(HOSTILE)
        assert max(of[3] for of in found) < 2000  # pixels: none buries the page
        if view in ("tokens", "source"):
            assert [of for of in found if of[0] != of[1]] == []
    page.fill("#search", "<script>window")
    wait_until(page, "list.shown.length < 10")
    page.wait_for_timeout(200)
    assert page.evaluate("[window.ran, document.title, Object.prototype.polluted]") == [
        None,
        "<img src=x onerror=window.ran=1> – run report",
        None,
    ]
    assert page.evaluate("document.querySelectorAll('[id=data]').length") == 1


# ---- Many rollouts ----
def test_five_thousand_rollouts_open_within_two_seconds(opened, tmp_path):
    """A problem each, of seven responses. Of two tries the better one: the machine may be busy."""
    words = "so we add the two numbers and find that the sum is $\\frac{1}{2}$ of it, which is \\boxed{7}. "
    texts = [(words * 4)[: 200 + 20 * i] for i in range(7)]
    responses = [
        attempt(text, False, logp=("AADA" * len(text))[: len(text) // 4], widths="E" * (len(text) // 4))
        for text in texts
    ]
    rollouts = {step: [group(f"What is {step}+{i}?", responses) for i in range(50)] for step in range(1, 101)}
    workdir = report_runs.write(tmp_path / "w", rollouts)
    milliseconds = []
    for _ in range(2):
        page = opened(workdir)
        milliseconds.append(int(page.get_attribute("html", "data-ready")))
    print(milliseconds)
    assert min(milliseconds) < 2000, milliseconds
    size = (tmp_path / "report.html").stat().st_size
    assert counts(page)["all"] == 5000 and page.locator("#rollouts-said").inner_text() == "" and size > 10e6
    assert page.locator(".row").count() < 60  # only those in sight
    page.focus("#list")
    page.keyboard.press("End")
    assert page.locator(".row[aria-selected=true] .where").inner_text().startswith("step 1 ")
    began = page.evaluate("performance.now()")
    page.fill("#search", "what is 77+3?")
    wait_until(page, "list.shown.length === 1")
    assert page.evaluate("performance.now()") - began < 2000
