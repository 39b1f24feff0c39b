"""Stop texts: the response ends where one is written, whoever looks when, and nothing behind it is graded or trained on."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICKSTART, engine_of, tiny_config
from test_train import lines, small

from cgrpo_jax.config import stop_texts
from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.model.decoder import init_params
from cgrpo_jax.records import Kind, Name, Request
from cgrpo_jax.rollout.collect import as_sampled
from cgrpo_jax.rollout.stories import sample_all
from cgrpo_jax.run import beginning, build
from cgrpo_jax.run.answers import settings_of
from cgrpo_jax.sampling.pool import EngineSetup, Pool
from cgrpo_jax.sampling.room import Fixed, Ring, Room
from cgrpo_jax.text.stop import Stopping, before, going_on
from cgrpo_jax.text.tokenizer import Pieces, Tokenizer
from cgrpo_jax.training import train

CFG = tiny_config("qwen3")
LIMITS = [40, 9, 24, 40, 33, 40]


def letters(ids):
    return "".join(chr(ord("a") + i % 5) for i in ids)


def first_with(ids, stops, spelled=letters):
    """By the definition: the fewest ids whose text holds a stop text."""
    return next((n for n in range(len(ids) + 1) if any(stop in spelled(ids[:n]) for stop in stops)), None)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, init_params(CFG, jax.random.key(0)))


@pytest.fixture(scope="module")
def free(mesh, params):
    """What is sampled where nothing stops it."""
    return sampled(mesh, params)[0]


def sampled(mesh, params, rows=4, chunk=8, fixed=None, **frame):
    room = Room(rows, 4096, fixed)
    setup = EngineSetup(CFG, mesh, (), 0, room, jnp.float32, unrolled=True, chunk=chunk, **frame)
    requests = [Request(Name(Kind.RESPONSE, 0, g), [5, 9, 2, 33, 7], limit) for g, limit in enumerate(LIMITS)]
    engine = engine_of(setup, params, 0, SamplingConfig(0.8))
    return sample_all(engine, requests), engine.stats


FIXED = Fixed((Ring(64, 2),), (8,))


@pytest.mark.parametrize(("rows", "chunk", "fixed"), [(4, 8, None), (2, 5, None), (6, 32, None), (2, 8, FIXED)])
def test_a_row_ends_where_the_stop_text_is_written(mesh, params, free, monkeypatch, rows, chunk, fixed):
    """The same ids whoever looks when; rows that have ended are idle on the device, too; nothing else is counted."""
    stops = (letters(free[0].ids[6:9]), letters(free[3].ids[20:24]))
    counts = [first_with(done.ids, stops) for done in free]
    assert None in counts and counts[0] <= 9 and any(n is not None and n > 9 for n in counts)
    decode = Pool.decode

    def watched(pool, *args):
        assert int(np.asarray(pool.slots.active_R).sum()) == len(pool.live)
        return decode(pool, *args)

    monkeypatch.setattr(Pool, "decode", watched)
    got, stats = sampled(mesh, params, rows, chunk, fixed, stop=Stopping(letters, stops))
    for done, whole, n in zip(got, free, counts, strict=True):
        np.testing.assert_array_equal(done.ids, whole.ids[:n])
        np.testing.assert_allclose(done.logp, whole.logp[:n], atol=1e-4)
        assert done.finished == (n is not None) and len(done.kept) == len(done.ids)
    assert stats.tokens == sum(len(done.ids) for done in got)


TEXTS = [
    "2 + 2 = 4, \\boxed{4}\n\nQuestion: What is 3+3? \\boxed{6}", "no end", "Question: at once", "Quest Question Question:",
    "é😀中文。問：\\boxed{1}", "a Question:Question: b", "",
]  # fmt: skip


@pytest.mark.parametrize("model", ["embedded", "smollm2"])
@pytest.mark.parametrize("stops", [("Question:",), ("問：", " = "), ("\n\n", "Question:")])
def test_texts_of_a_real_tokenizer(request, model, stops):
    folder = QUICKSTART if model == "embedded" else request.getfixturevalue("smollm2")
    plain, tokenizer = Tokenizer(folder), Tokenizer(folder, stops=stops)
    for text in TEXTS:
        cut = text
        for stop in stops:  # as lm-eval does
            cut = cut.split(stop)[0]
        ids = [*plain.encode_text(text), plain.end_id]
        assert tokenizer.decode(ids) == before(text, stops) == cut
        wanted = first_with(ids, stops, plain.decode)
        for new in (1, 3, 100):
            looks = [tokenizer.stopping(ids[:end], new) for end in range(new, len(ids), new)]
            found = next((n for n in [*looks, tokenizer.stopping(ids, len(ids))] if n is not None), None)
            assert found == wanted
        kept = ids[:wanted]
        assert tokenizer.decode(kept) == cut
        widths = Pieces(tokenizer).widths(kept, cut)
        assert len(widths) == len(kept) and sum(widths) == len(cut)
        assert tokenizer.decode(as_sampled(tokenizer, text, None, False).ids) == cut
        assert as_sampled(tokenizer, text, None, False).finished == (cut != text)


def test_an_added_token_ends_as_an_end_of_sequence_id_does():
    tokenizer = Tokenizer(QUICKSTART, stops=("<|im_start|>", "so"))
    assert tokenizer.stops == ("so",)
    assert tokenizer.eos_ids == tuple(sorted(tokenizer.hf.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])))
    with pytest.raises(ConfigError, match="holds the special token '<|im_start|>'".replace("|", r"\|")):
        Tokenizer(QUICKSTART, stops=("\n<|im_start|>user",))


@pytest.mark.parametrize("value", ["Question:", '"Question:"', '["a", 1]', '[""]', "{}", '["a"', "[]"])
def test_what_is_no_list_of_texts_is_refused(value):
    with pytest.raises(ConfigError, match="a list of texts in JSON is needed"):
        build.open_run(small(**{"sampling.stop": value}))


def test_a_run_ends_its_responses_there(tmp_path):
    """Rollout, refinements and evaluation; the ids that spell it are kept and trained on, and no text holds it."""
    assert stop_texts(small(**{"sampling.stop": '["=", "\n\\n"]'})) == ("=", "\n\n")
    evaluated = {"eval.every": 1, "eval.problems": 4, "eval.samples": 1}
    cfg = small(**evaluated | {"sampling.stop": '["="]', "train.steps": 1, "objective.entropy_coef": 0.01})
    run = build.open_run(cfg)
    assert settings_of(run)["stop"] == ["="] and "'='" in "\n".join(beginning.lines(run))
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "w")
    groups = lines(tmp_path / "w/rollouts/000001.jsonl")
    attempts = [a for group in groups for a in group["responses"] + group["refinements"]]
    assert not any("=" in attempt["text"] for attempt in attempts)
    trained = lines(tmp_path / "w/metrics.jsonl")
    assert trained[0]["eval/truncated"] < 1 and 0 < trained[0]["eval/length"] < 64
    (step,) = [row for row in trained if "reward/responses" in row]
    sampled_ids = step["length/responses"] * 6  # two problems, three responses; with each one selected refinement
    assert step["truncated/responses"] == 0 and step["tokens/trained"] > sampled_ids


def test_the_second_model_stops_there_too():
    second = {"refine.critique": "local", "local.path": "package://quickstart", "sampling.stop": '["="]'}
    run = build.open_run(small(**second))
    assert run.second.sampler.stop.stops == run.policy.sampler.stop.stops == ("=",)
    assert build.open_run(small()).policy.sampler.stop is None


GOES_ON = "So \\boxed{4}.\n\n**Question 2:** What is 3+3?\nIt is \\boxed{6}."


def test_responses_that_go_on_are_named():
    assert going_on(["\\boxed{4}", "Question: hm?\nThe answer is 4.", "the\nuser: none"]) is None
    said = going_on([GOES_ON, "x", GOES_ON, "The answer is 4\nProblem: 5?"])
    assert said.startswith("3 of 4 responses go on") and 'sampling.stop=["\\nQuestion 2:"]' in said
    told = json.loads(said.split("sampling.stop=")[1].split(" ends")[0])
    assert before(GOES_ON.replace("*", ""), told) == "So \\boxed{4}.\n"


def test_a_base_model_is_named_at_the_start(tmp_path):
    folder = shutil.copytree(QUICKSTART, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    run = build.open_run(small(**{"model.path": str(folder)}))
    said = "\n".join(beginning.lines(run))
    assert "no chat template" in said and "go on with the next question" in said and "'<|im_end|>'" in said
    policy = dataclasses.replace(run.policy, reader=Tokenizer(folder, stops=("Question:",)))
    stopped = dataclasses.replace(run, policy=policy)
    assert "go on with the next question" not in "\n".join(beginning.lines(stopped))
