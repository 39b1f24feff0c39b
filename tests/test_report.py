"""What the report gathers from a workdir, what it leaves out and says so, and the file around it."""

import hashlib
import itertools
import json
import re
import sys

import numpy as np
import pytest
import report_runs
from hypothesis import given
from hypothesis import strategies as st
from report_runs import attempt, group

from cgrpo_jax import api, report
from cgrpo_jax.learning.credit import group_advantages
from cgrpo_jax.report_page import gather, page, rollouts
from cgrpo_jax.sharing import card as model_card
from cgrpo_jax.text.tokenizer import Pieces, Tokenizer
from cgrpo_jax.workdir import reading, shades
from cgrpo_jax.workdir.changes import flat

LEVELS = {letter: level for level, letter in enumerate(shades.LETTERS)}


def found(workdir, room=10**7, characters=10**6):
    """The rollouts of a workdir as the page holds them, and what is said of those left out."""
    of = rollouts.rollouts_of(workdir, flat(reading.config(workdir, print)), room, characters, print)
    return {step["step"]: [json.loads(one) for one in step["groups"]] for step in of["steps"]}, of["said"]


def block(html, name):
    """The JSON of a script element, given by one of its attributes."""
    return json.loads(re.search(rf'<script type="application/json" {name}>(.*?)</script>', html, re.DOTALL)[1])


# ---- Damage ----

OF_METRICS = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[1]",
    b'{"a": 1}',
    b'{"step": "3"}',
    b'{"step": 3, "a": "b"}',
    b'{"step": 3, "a": 1e999}',
]
OF_METRICS += [b"[" * 9999, b'{"step": ' + b"1" * 5000 + b"}"]


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path, recwarn):
    """By the report (which says so), by load_run, by a model card: file and line of each, and nothing else is lost."""
    run = report_runs.write(tmp_path / "run")
    whole = [line.encode() for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_bytes(b"\n".join([*OF_METRICS, *whole, b'{"step": 5, "to']))
    (run / "config.json").write_text((run / "config.json").read_text()[:99])
    (run / "rollouts/note.jsonl").write_text("mine")
    steps = run / "rollouts/000001.jsonl"
    good = steps.read_bytes()
    without = json.dumps({name: value for name, value in report_runs.SOLVED.items() if name != "kept"})
    steps.write_bytes(without.encode() + b"\n" + good + b"\xff\n")
    wanted = [f"{run}/metrics.jsonl, line {number}: " for number in range(1, 11)] + [f"{run}/config.json: "]
    wanted += [f"{steps}, line 1: 'kept' does not name responses; left out", f"{steps}, line 4: not valid JSON"]
    said = page.write([run], tmp_path / "page.html").splitlines()
    assert len(said) == len(wanted) and all(
        line.startswith(f"run: {of}") for line, of in zip(said, wanted, strict=True)
    )
    data = block((tmp_path / "page.html").read_text(), 'id="data"')["runs"][0]
    assert [f"run: {line}" for line in data["damaged"]] == said and data["method"] == "unknown"
    assert data["training"]["steps"] == [1, 2, 3, 4] and [len(groups) for groups in found(run)[0].values()] == [2, 1]
    metrics, attempts = api.load_run(run)
    told = sorted(str(one.message) for one in recwarn)
    assert told == sorted(line.removeprefix("run: ") for line in said if "config.json" not in line)
    assert list(metrics["step"]) == [0, 1, 2, 3, 4] and sorted(set(attempts["step"])) == [1, 2]
    cards = []
    assert "step 3" in model_card.of_run(run, 3, "me/mine", say=cards.append).text
    assert len(cards) == 11


def test_whatever_a_rollout_lacks_the_report_is_written(tmp_path):
    """Each key of a problem and of an attempt gone, or of another kind; what is no more needed may be missing."""
    spoilt = []
    for name in report_runs.FIXED:
        rest = {key: value for key, value in report_runs.FIXED.items() if key != name}
        spoilt += [rest, rest | {name: 7}, rest | {name: [None]}]
    first, *others = report_runs.FIXED["responses"]
    for name in first:
        rest = {key: value for key, value in first.items() if key != name}
        wrong = [rest, rest | {name: [7]}, rest | {name: "?"}]
        spoilt += [report_runs.FIXED | {"responses": [one, *others]} for one in wrong]
    run = report_runs.write(tmp_path / "run", rollouts={1: [*spoilt, report_runs.SOLVED]})
    said = page.write([run], tmp_path / "page.html", characters=10)
    assert len(said.splitlines()) > len(spoilt) / 2 and "line 1: 'question' is no text" in said
    assert found(run)[0][1][-1]["question"] == report_runs.SOLVED["question"]
    with pytest.warns(UserWarning, match="left out"):
        api.load_run(run)


# ---- Tokens of a text ----
@pytest.mark.parametrize("which", ["tokenizer", "smollm2"])
def test_widths_of_tokens_add_up_to_the_text(which, request, rng):
    """Any ids at all, also halves of characters and special ones; of whole texts, every token has its own characters."""
    tokenizer = request.getfixturevalue(which)
    tokenizer = tokenizer if which == "tokenizer" else Tokenizer(tokenizer)
    pieces, told = Pieces(tokenizer), 0
    for _ in range(200):
        ids = rng.integers(0, len(tokenizer.hf), rng.integers(0, 30)).tolist()
        text = tokenizer.decode(ids)
        widths = pieces.widths(ids, text)
        if widths is not None:
            told += 1
            assert len(widths) == len(ids) and sum(widths) == len(text) and min(widths, default=0) >= 0
    assert told > 190
    text = "  so x≠y, 日本語 😀\n\n done"
    ids = [*tokenizer.encode_text(text), tokenizer.eos_ids[0]]
    widths = pieces.widths(ids, tokenizer.decode(ids))
    ends = np.cumsum(widths)
    for own, end, width in zip(ids, ends, widths, strict=True):
        if (piece := tokenizer.hf.decode([own], skip_special_tokens=True)) and "\ufffd" not in piece:
            assert text[end - width : end] == piece
    assert widths[-1] == 0 and pieces.widths(ids, text + "!") is None


def test_widths_of_a_tokenizer_that_drops_a_leading_space():
    """As those of Llama 2 do, where a text begins."""

    class Words:
        eos_ids = stops = ()
        words = ("a", "▁so", "▁be", "it")

        @property
        def hf(self):
            return self

        def encode_text(self, text):
            return [self.words.index(text)]

        def decode(self, ids, skip_special_tokens=True):
            return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    tokenizer = Words()
    assert Pieces(tokenizer).widths([1, 2, 3], tokenizer.decode([1, 2, 3])) == [2, 3, 2]


@given(st.lists(st.integers(0, 300)))
def test_widths_are_read_as_they_were_written(widths):
    assert shades.read_widths(shades.write_widths(widths)) == widths


def test_probabilities_are_told_within_six_per_cent():
    logp_T = np.log(np.linspace(0.001, 1, 200)).astype(np.float32)
    told_T = np.exp([-LEVELS[letter] / 8 for letter in shades.write_logp(logp_T)])
    assert np.abs(told_T / np.exp(logp_T) - 1).max() < 0.065
    assert shades.write_logp(np.array([-np.inf, np.nan, -99.0, 0.0], np.float32)) == "___A"


# ---- Metrics, configuration ----
def test_long_curves_are_thinned_to_means_and_largest_values(monkeypatch):
    monkeypatch.setattr(gather, "POINTS", 3)
    rows = [{"step": s, "a": float(s), "gap_max": float(-s)} | ({"b": 1.0} if s == 4 else {}) for s in range(1, 8)]
    curves = gather._curves(rows)
    assert curves["each"] == 3 and curves["steps"] == [3, 6, 7]
    assert curves["values"] == {"a": [2, 5, 7], "gap_max": [-1, -4, -7], "b": [None, 1, None]}
    assert gather._curves([]) == {"steps": [], "values": {}, "each": 1}


@pytest.mark.parametrize("method", ["critique_grpo", "dr_grpo", "grpo", "rltf_sd", "critique_grpo_code"])
def test_the_method_is_named(method):
    raw = flat(report_runs.default_config(method).to_dict())
    assert gather.method_of(raw) == method
    assert gather.method_of(raw | {"method": "sft"}) == "sft"


def test_what_is_not_finite_is_none(tmp_path):
    workdir = report_runs.write(tmp_path / "w")
    (workdir / "metrics.jsonl").write_text(
        '{"step": 1, "reward/responses": 0.5, "loss/total": null}\n{"step": 2, "rewa'
    )
    report.leave(workdir, print)
    data = block((workdir / "report.html").read_text(), 'id="data"')
    assert data["runs"][0]["training"] == {
        "steps": [1], "values": {"reward/responses": [0.5], "loss/total": [None]}, "each": 1,
    }  # fmt: skip


# ---- Rollouts ----
def test_advantages_are_those_of_the_update(tmp_path):
    """Of all rows that are trained on, by the run's own baseline; none on the others."""
    for changes in ({}, {"objective.baseline": "responses"}, {"objective.divide_by_std": True}):
        folder = tmp_path / (next(iter(changes), "plain"))
        report_runs.write(folder, settings=report_runs.config(**changes))
        (_, fixed), (_,) = found(folder)[0].values()
        rewards, refined = np.array([0.0, 0.0, 1.0]), np.array([False, False, True])
        wanted = group_advantages(
            rewards,
            refined,
            baseline=changes.get("objective.baseline", "group"),
            divide_by_std="divide" in str(changes),
        )
        told = [one["advantage"] for one in [*fixed["responses"], fixed["refinements"][0]]]
        assert told == pytest.approx(wanted.tolist(), abs=1e-4)
        assert "advantage" not in fixed["refinements"][1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 33])
def test_steps_are_taken_from_both_ends_and_then_from_the_widest_gap(count):
    order = list(rollouts.in_order(count))
    assert sorted(order) == list(range(count))
    assert order[:3] == [count - 1, 0, (count - 1) // 2][: len(order)]
    for taken in range(3, count):
        seen = sorted(order[:taken])
        gaps = [later - earlier for earlier, later in itertools.pairwise(seen)]
        assert max(gaps) <= 2 * min(gaps) + 2


def test_what_does_not_fit_is_left_out_and_said(tmp_path):
    groups = [group(f"{i}?", [attempt("word " * 50, False)]) for i in range(20)]
    workdir = report_runs.write(tmp_path / "w", dict.fromkeys(range(1, 41), groups))
    everything, said = found(workdir)
    assert [len(of) for of in everything.values()] == [20] * 40 and said == ""
    size = len(json.dumps(everything[1]))
    some, said = found(workdir, room=12 * size)
    assert {1, 40} <= some.keys() and 8 <= len(some) < 40 and list(some) == sorted(some)
    assert sum(len(json.dumps(one, separators=(",", ":"))) for of in some.values() for one in of) <= 12 * size
    assert said.startswith(f"{sum(map(len, some.values()))} problems of {len(some)} of 40 steps are in this file")
    few, said = found(workdir, room=4 * size)  # half of a step each, so that there are eight of them
    assert len(few) >= 7 and all(0 < len(of) < 20 for of in few.values()) and "in part" in said
    assert found(workdir, room=0)[0] == {} and "0 problems of 0 of 40 steps" in found(workdir, room=0)[1]


@given(st.text(max_size=80), st.data())
def test_of_a_long_text_the_middle_is_left_out_with_its_tokens(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    widths = np.diff([0, *cuts, len(text)]).tolist()
    logp = "".join(shades.LETTERS[i % 64] for i in range(len(widths)))
    whole = attempt(text, False, widths=shades.write_widths(widths), logp=logp)
    short = rollouts.shortened(whole, 20)
    if len(text) <= 20:
        assert short == whole
        return
    at, count = short["cut"]
    assert short["text"] == text[:at] + text[at + count :] and at <= 10 and len(short["text"]) <= 20
    kept = shades.read_widths(short["widths"])
    assert sum(kept) == len(short["text"]) and len(kept) == len(short["logp"])
    for whole in ({"text": text}, attempt(text, False)):  # the latter has a token a character
        assert rollouts.shortened(whole, 20)["text"] == text[:10] + text[-10:]


# ---- The file ----
def test_the_page_is_small_and_runs_nothing_but_its_own_scripts(tmp_path):
    """Below 1 MB without data; the policy names each script by its hash and allows nothing from anywhere."""
    workdir = report_runs.write(
        tmp_path / "w", {1: [group("</script><script>alert(1)</script><!--", [attempt("<b>", True)])]}
    )
    page.write([workdir], tmp_path / "out.html")
    html = (tmp_path / "out.html").read_text()
    assert len(html) < 1e6
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert [page._hash(text) for text in scripts] == re.findall(r"script-src ([^;]*)", policy)[0].split()
    assert len(scripts) == len(page.SCRIPTS) and policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    assert html.count("<script") == len(scripts) + 2 and "url('Temml" not in html
    (step,) = block(html, 'class="rollouts"')["steps"]
    assert step["groups"][0]["question"] == "</script><script>alert(1)</script><!--"


def test_what_others_wrote_is_what_they_published():
    versions = json.loads((page.FOLDER / "vendor/versions.json").read_text())
    hashes = {name: value for of in versions.values() for name, value in of["sha256"].items()}
    assert {of["licence"] for of in versions.values()} == {"MIT"} and set(versions) == {"uplot", "temml"}
    for name, value in hashes.items():
        assert hashlib.sha256((page.FOLDER / "vendor" / name).read_bytes()).hexdigest() == value
    assert {path.name for path in (page.FOLDER / "vendor").iterdir()} == hashes.keys() | {"versions.json", "README.md"}


def test_files_of_the_page_stay_small():
    for path in page.FOLDER.glob("*.*"):
        assert path.read_text().count("\n") <= 400, path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    first, second = report_runs.write(tmp_path / "a" / "w"), report_runs.write(tmp_path / "b" / "w")
    command(monkeypatch, first)
    assert (first / "report.html").exists() and "report.html  0." in capsys.readouterr().out
    command(monkeypatch, first, second, f"--out={tmp_path}/both.html", "--megabytes=0")
    assert capsys.readouterr().out.count("0 problems of 0 of 2 steps") == 2
    names = [run["name"] for run in block((tmp_path / "both.html").read_text(), 'id="data"')["runs"]]
    assert names == ["a/w", "b/w"]  # for both folders are called w
    with pytest.raises(SystemExit):
        command(monkeypatch, first, second)
    assert "--out is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"neither metrics.jsonl nor results.json"):
        command(monkeypatch, tmp_path)


def test_a_report_that_fails_never_fails_its_run(tmp_path):
    said = []
    report.leave(tmp_path, said.append)
    workdir = report_runs.write(tmp_path / "w")
    (workdir / "results.json").write_text("{}")
    report.leave(workdir, said.append)
    assert [line.split(":")[0] for line in said] == ["no report", "no report"] and "ReportError" in said[1]
    assert not list(tmp_path.rglob("report.html*"))
