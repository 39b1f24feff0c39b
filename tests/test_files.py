"""Files as users have them: encodings, shapes, spellings of columns; and what is a bad row in them, by its number."""

import json
import os
import subprocess
import sys

import pytest

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.data.tasks import load_task
from cgrpo_jax.errors import DataError
from cgrpo_jax.grading.verifier import Reading


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def all_readable(golds):
    return [Reading(True, "ok")] * len(golds)


def load(source, log=print, **changes):
    cfg = DataConfig(source=str(source), **({"max_prompt_tokens": 10**9} | changes))
    return load_problems(cfg, 0, all_readable, lambda problem: len(problem.question), log)


def fine(problem):
    return None


GOOD = b'{"question": "Why?", "answer": "5"}\n'
BAD_LINES = {
    "a surrogate in the gold": (b'{"question": "q", "answer": "\\ud800"}', "column 'answer': half a surrogate pair"),
    "a surrogate in the question": (b'{"question": "q \\udfff", "answer": "5"}', "column 'question': half a surrogate"),
    "nested lists": (b'{"question": "q", "answer": ' + b"[" * 3000 + b"]" * 3000 + b"}", "JSON that cannot be read"),
    "nested lists elsewhere": (
        b'{"question": "q", "answer": "5", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        "lists within lists",
    ),
    "a long integer": (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
    "a long integer as text": (b'{"question": "q", "answer": "' + b"9" * 5000 + b'"}', "longer than the 2000"),
    "no UTF-8": (b'{"question": "q\xff", "answer": "5"}', "byte 16 is no UTF-8 (0xff)"),
    "no JSON": (b"{nope", "not valid JSON"),
    "a gold that is none": (b'{"question": "q", "answer": "nan"}', "no answer could equal 'nan'"),
}


OF_LINES = [(name, ".jsonl") for name in BAD_LINES]
OF_LISTS = [(name, ".json") for name in BAD_LINES if name != "no JSON"]  # that is the whole file


@pytest.mark.parametrize(("name", "suffix"), OF_LINES + OF_LISTS)
def test_a_bad_row_has_a_number_and_can_be_left_out(tmp_path, name, suffix):
    line, words = BAD_LINES[name]
    path = tmp_path / f"a{suffix}"
    if suffix == ".json":
        path.write_bytes(b"[" + GOOD.strip() + b",\n" + line + b", " + GOOD.strip() + b"]")
        words = words.replace("byte 16 is no UTF-8 (0xff)", "byte 0xff is no UTF-8")
    else:
        path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as error:
        load(path)
    assert len(str(error.value).splitlines()) == 2, str(error.value)
    assert "row 2, " in str(error.value) and words in str(error.value), str(error.value)
    logged = []
    assert load(path, logged.append, on_bad_row="drop").size == 2 and "bad rows left out: 1 of 3" in logged[0]


def test_bytes_that_are_no_utf8_in_a_table_of_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"question,answer\nWhy?,5\nWh\xe9?,5\nHow?,6\n")
    with pytest.raises(DataError, match=r"bad rows: 1 of 3(.|\n)*row 2, column 'question': byte 0xe9 is no UTF-8"):
        load(tmp_path / "a.csv")
    assert load(tmp_path / "a.csv", on_bad_row="drop").size == 2


def test_a_cell_of_any_length(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nWhy?,5\n" + "a" * 200_000 + ",6\nHow?,7\n")
    assert [len(load(tmp_path / "a.csv").get(i).question) for i in range(3)] == [4, 200_000, 4]


def test_a_quotation_mark_that_is_never_closed_swallows_no_row_unsaid(tmp_path):
    """What it opens goes on to the end of the file: that is a bad row, also where it would make a problem."""
    path = tmp_path / "a.csv"
    for table in ('question,answer\nWhy?,5\n"How?,6\nWho?,7\n', 'answer,question\n5,Why?\n6,"How?\n7,Who?\n'):
        path.write_text(table)
        with pytest.raises(DataError, match=r"bad rows: 1 of 2(.|\n)*row 2, (.|\n)*a quotation mark is never closed"):
            load(path)
        assert load(path, on_bad_row="drop").size == 1
    path.write_text('question,answer\n"a ""word""\n, and more",5\na "word",6\n"a" word,7\nHow?,8\n')
    with pytest.raises(DataError, match=r"bad rows: 1 of 4(.|\n)*row 3, "):
        load(path)
    kept = load(path, on_bad_row="drop")
    assert [kept.get(i).question for i in range(3)] == ['a "word"\n, and more', 'a "word"', "How?"]


SHAPES = {
    "a.JSONL": GOOD,
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD,
    "a.json": b"[" + GOOD + b"]",
    "bom.json": b"\xef\xbb\xbf[" + GOOD + b"]",
    "object.json": b'{"version": 1, "data": [' + GOOD + b"]}",
    "lines.json": GOOD + GOOD,
    "a.CSV": b"\xef\xbb\xbfQuestion,ANSWER\nWhy?,5\n",
    "capitals.jsonl": b'{"Question": "Why?", "Answer": 5}',
    "shouted.jsonl": b'{"PROBLEM": "Why?", "Final_Answer": "5"}',
    "listed.jsonl": b'{"question": ["Why?"], "answer": ["5"]}',
    "numbers.jsonl": b'{"prompt": ["Why?"], "answer": [5]}',
    "model.jsonl": b'{"prompt": [{"role": "user", "content": "Why?"}], "reward_model": {"ground_truth": ["5"]}}',
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_spellings(tmp_path, name):
    (tmp_path / name).write_bytes(SHAPES[name])
    problem = load(tmp_path / name).get(0)
    assert (problem.question, problem.answer) == ("Why?", "5")
    assert not {column.lower() for column in problem.columns} & {"question", "answer", "final_answer", "prompt"}


def test_an_exact_name_goes_before_another_spelling(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"Question": "no", "problem": "Why?", "ANSWER": "6", "solution": "5"}')
    problem = load(tmp_path / "a.jsonl").get(0)
    assert (problem.question, problem.answer) == ("Why?", "5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": [], "b": []}', "an object with 2 lists"), ('{"a": 1}', "an object with 0 lists"), ("5", "not int"),
        ("[{]", "Expecting"),
    ],
)  # fmt: skip
def test_json_that_holds_no_rows(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"cannot be read.*{words}"):
        load(tmp_path / "a.json")


def test_missing_names_what_is_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"frage": "Why?", "antwort": "5", "leer": null}')
    with pytest.raises(DataError, match=r"column 'answer/ground_truth/.*': missing; there: frage, antwort$"):
        load(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"column 'q': missing; there: frage, antwort$"):
        load(tmp_path / "a.jsonl", question_column="q", answer_column="antwort")
    wide = {f"c{i}": i for i in range(40)}
    (tmp_path / "b.jsonl").write_text(json.dumps(wide))
    with pytest.raises(DataError, match=r"there: c0, .*c11 and 28 more$"):
        load(tmp_path / "b.jsonl")


def test_golds_that_are_none_are_bad_rows_everywhere(tmp_path):
    """In training and in every evaluation of a mathematical task, whatever the verifier would say."""
    rows = [{"question": "q", "answer": gold} for gold in ("5", "?", "https://x.org", "[asy]", "\\frac{1", "proof")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("gsm8k", "mine"):
        for ask in (lambda: load(tmp_path / "a.jsonl"), lambda n=name: named(n, tmp_path / "a.jsonl")):
            with pytest.raises(DataError) as error:
                ask()
            text = str(error.value)
            assert text.startswith("bad rows: 5 of 6") and all(
                f"row {number}, column 'answer'" in text for number in range(2, 7)
            )


def named(name, path, parsable=all_readable, **changes):
    return load_task(name, str(path), 0, DataConfig(**changes), fine, print, parsable=parsable)


def test_golds_of_an_evaluation_are_asked_once(tmp_path):
    """As those of training; letters and TheoremQA's types have a check of their own and ask nobody."""
    asked = []

    def parsable(golds):
        asked.append(list(golds))
        return [Reading(gold != "x+", "ok") for gold in golds]

    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "5"}\n{"question": "q", "answer": "x+"}\n')
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"bad rows: 1 of 2(.|\n)*row 2, column 'answer': math-verify cannot read 'x\+'"
        ):
            named("gsm8k", tmp_path / "a.jsonl", parsable)
    assert [problem.id for problem in named("gsm8k", tmp_path / "a.jsonl", parsable, on_bad_row="drop")] == ["1"]
    assert asked == [["5", "x+"]]
    (tmp_path / "b.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 1}\n')
    (tmp_path / "c.jsonl").write_text('{"question": "q", "answer": "True", "answer_type": "bool"}\n')
    named("mmlu_stem", tmp_path / "b.jsonl", parsable), named("theoremqa", tmp_path / "c.jsonl", parsable)
    assert len(asked) == 1


def test_a_large_file_is_said(tmp_path):
    """And a question of millions of characters, while it is measured."""
    rows = [{"question": "q", "answer": "1"}, {"question": "x" * 10_000_000, "answer": "1"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    logged = []
    assert load(tmp_path / "a.jsonl", logged.append, max_prompt_tokens=100, on_bad_row="drop").size == 1
    assert logged[0] == f"reading {tmp_path}/a.jsonl, 10 MB"
    assert logged[1] == "row 2: measuring a question of 10 million characters"


def test_a_long_check_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("cgrpo_jax.data.checking.EVERY", 0.0)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3)
    logged = []
    load(tmp_path / "a.jsonl", logged.append)
    assert logged[-1] == "checked 2 of 3 rows"


READS = """
import sys
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.grading.verifier import Reading
from cgrpo_jax.config.options import DataConfig
for source in sys.argv[1:]:
    readable = lambda golds: [Reading(True, "ok")] * len(golds)
    print(ascii(load_problems(DataConfig(source=source), 0, readable, lambda problem: 1).get(0).question))
"""


def test_files_are_utf8_in_any_locale(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Wié?", "answer": "5"}', encoding="utf-8")
    (tmp_path / "a.json").write_text('[{"question": "Wié?", "answer": "5"}]', encoding="utf-8")
    (tmp_path / "a.csv").write_text("question,answer\nWié?,5\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    files = [str(tmp_path / name) for name in ("a.jsonl", "a.json", "a.csv")]
    done = subprocess.run(
        [sys.executable, "-c", READS, *files], env=os.environ | ascii_only, capture_output=True, text=True
    )
    assert done.stdout.split() == ["'Wi\\xe9?'"] * 3, done.stderr


def test_home_in_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert load("~/a.jsonl").size == 1 and len(named("mine", "~/a.jsonl")) == 1
