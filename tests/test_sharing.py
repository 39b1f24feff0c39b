"""`convert --push`: the model card of a run, and what goes to a stand-in for the hub."""

import dataclasses
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
import unittest.mock

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from markdown_it import MarkdownIt

from cgrpo_jax import convert
from cgrpo_jax.config import Config, default_config
from cgrpo_jax.data import told
from cgrpo_jax.evaluation import tables
from cgrpo_jax.evaluation.store import contents
from cgrpo_jax.model import hf
from cgrpo_jax.report_page import gather
from cgrpo_jax.sharing import card as model_card
from cgrpo_jax.sharing import hub

TOKEN = "hf_never_to_be_shown"
EVALUATIONS = {
    0: {"eval/pass@1": 0.25, "eval/pass@1/low": 0.2, "eval/pass@1/high": 0.3, "eval/length": 40.0},
    2: {"eval/pass@1": 0.5, "eval/pass@1/low": 0.4, "eval/pass@1/high": 0.6, "eval/length": 41.0},
    4: {"eval/pass@1": 0.75, "eval/pass@1/low": 0.7, "eval/pass@1/high": 0.8, "eval/length": 42.0},
}


def write_run(folder, **changes):
    """What a card is written from: configuration and metrics, as a run leaves them."""
    config = default_config("dr_grpo")
    config.update_from_flattened_dict({"model.path": "owner/base-model", "data.source": "openai/gsm8k:main"} | changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = [{"step": step, "reward/responses": step / 10} for step in range(1, 5)]
    lines += [{"step": step} | values for step, values in EVALUATIONS.items()]
    lines.sort(key=lambda line: line["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def parts_of(card):
    """The front matter as data, and the rest as the HTML that a page would show."""
    empty, front, body = card.text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def test_a_card_says_what_the_run_was(tmp_path):
    card = model_card.of_run(write_run(tmp_path / "run"), 4, "me/mine", "apache-2.0")
    front, page = parts_of(card)
    assert front == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
        "base_model": "owner/base-model", "datasets": ["openai/gsm8k"],
        "tags": ["cgrpo_jax", "reinforcement-learning", "dr_grpo", "arxiv:2506.03106"],
    }  # fmt: skip
    assert "Trained from owner/base-model by dr_grpo on openai/gsm8k:main: step 4 of 400" in page
    rows = [line for line in page.splitlines() if line.startswith(("<th>", "<td>"))]
    assert rows[:6] == [
        "<th></th>", "<th>step 0 (the base)</th>", "<th>step 4</th>",
        "<td>pass@1</td>", "<td>25.0 % [20.0, 30.0]</td>", "<td>75.0 % [70.0, 80.0]</td>",
    ]  # fmt: skip
    assert "<td>refine.trigger</td>\n<td>never</td>" in page and "optimizer.b2" not in page
    assert "from_pretrained(&quot;me/mine&quot;, dtype=&quot;auto&quot;)" in page
    assert '<img src="curves.png"' in page and card.picture.startswith(b"\x89PNG") and len(card.picture) < 100_000


def test_a_card_of_an_earlier_step_knows_nothing_later(tmp_path):
    run = write_run(tmp_path / "run")
    front, page = parts_of(model_card.of_run(run, 3, "me/mine"))
    assert "step 2</th>" in page and "75.0" not in page and "step 3 of 400" in page
    assert front["license"] == "unknown" and "is not known" in page
    assert model_card.picture(json.loads(f"[{','.join((run / 'metrics.jsonl').read_text().splitlines())}]"), 1, "") != (
        model_card.of_run(run, 4, "me/mine").picture
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/total": 0.1}\n')
    card = model_card.of_run(run, 1, "me/mine")
    assert "Not evaluated." in card.text and card.picture is None and "curves.png" not in card.text


HOSTILE = (
    "a/b\n---\nlicense: mit\n", "x | y |\n| z | w |", "<script>alert(1)</script>", "[a](javascript:alert(1))", "![a](http://e/x.png)",
    "`code` **bold** _it_ # h", "\\", "&lt;b&gt;", "1. a", "{{7*7}}", "a\u2028b\x00c", "* * *", "```\n# out", "~~~\nx", "a: !!python/object:os.system", "- a", "+ a", "www.example.org <b@c.d>",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_settings_stay_text(tmp_path, text):
    """In the front matter, in a sentence, and in a table."""
    wild = {"model.path": text, "data.source": text, "data.question_column": text, "train.accept_changes": text}
    front, page = parts_of(model_card.of_run(write_run(tmp_path / "run", **wild), 4, "me/mine"))
    calm, plain_page = parts_of(
        model_card.of_run(write_run(tmp_path / "run", **dict.fromkeys(wild, "calm")), 4, "me/mine")
    )
    assert front == {name: value for name, value in calm.items() if name not in ("base_model", "datasets")}

    def tags(html):
        return [part.partition(">")[0] for part in html.split("<")[1:]]

    assert tags(page) == tags(plain_page)
    shown = " ".join(text.split()).replace("\x00", "\ufffd")
    cell = page.partition("<td>data.question_column</td>\n<td>")[2].partition("</td>")[0]
    assert cell == shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_places_of_ones_own_are_not_told(tmp_path):
    own = tmp_path / "secret_place"
    own.mkdir()
    changes = {
        "model.path": f"{own}/model", "data.source": f"{own}/train.jsonl", "eval.source": "~/other/test.jsonl",
        "eval.tasks": f"math500,mine={own}/a=b.jsonl", "api.base_url": "http://user:word@inner.host/v1",
        "api.key_variable": "OTHER_KEY", "local.path": f"{own}/b=c,d/critic", "api.model": "/srv/other/served",
    }  # fmt: skip
    run = write_run(tmp_path / "run", **changes)
    card, config = model_card.of_run(run, 4, "me/mine"), json.loads((run / "config.json").read_text())
    tracked = told.for_others(config)
    reported = gather.run_of("run", run)
    hidden = ("secret_place", "other/", "inner.host", "user:word", "OTHER_KEY", "b=c", str(tmp_path))
    for text in (card.text, json.dumps(tracked), json.dumps(reported)):
        assert not [word for word in hidden if word in text]
    page = parts_of(card)[1]
    assert "math500,mine=a=b.jsonl" in page and "Trained from model by dr_grpo on train.jsonl" in page
    assert tracked["local"]["path"] == "critic" and tracked["eval"]["tasks"] == "math500,mine=a=b.jsonl"
    assert reported["config"]["local.path"].startswith("critic #") and reported["model"].startswith("model #")
    assert told.for_others({"local.path": "/a/critic"}, True) != told.for_others({"local.path": "/b/critic"}, True)


def test_a_file_is_no_data_set_of_the_hub(tmp_path):
    """Though it lay elsewhere, as a relative path of two parts."""
    front, page = parts_of(
        model_card.of_run(write_run(tmp_path / "run", **{"data.source": "customer/train.jsonl"}), 4, "me/mine")
    )
    assert "datasets" not in front and "customer" not in page and "on train.jsonl" in page


SAID = {  # names, columns, commits, numbers: nothing of them is a place
    "model.revision", "data.split", "data.revision", "data.question_column", "data.answer_column", "reward.fn", "reward.correct_by",
    "texts.task", "texts.critique", "texts.refinement", "sampling.stop", "sampler.rings", "sampler.prefills",
    "refine.critique_fn", "local.revision", "train.accept_changes", "eval.revision", "eval.split", "checkpoint.best",
}  # fmt: skip


def test_of_each_free_text_it_is_decided_whether_others_are_told():
    def texts(options, prefix=""):
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if dataclasses.is_dataclass(value):
                yield from texts(value, f"{prefix}{field.name}.")
            elif isinstance(value, str) and not field.metadata.get("choices"):
                yield prefix + field.name

    found = list(texts(Config()))
    assert set(found) == SAID | set(told.PLACES) | set(told.PRIVATE)
    assert len(found) == len(SAID) + len(told.PLACES) + len(told.PRIVATE)


def test_a_table_of_another_model_is_not_pushed(trained, tmp_path, monkeypatch, capsys):
    """The digests of the evaluated files decide; the embedded model's own export is this one."""
    api = reach(monkeypatch, StandIn(None))
    convert.convert(str(trained), "hf", f"{tmp_path}/evaluated")
    asked = contents(tmp_path / "evaluated", hf.SIDE_FILES)
    shown = {"columns": ["task"], "rows": [["gsm8k"]], "notes": [], "asked": "greedy"}
    drawn = dict.fromkeys(tables.SAMPLED, 0)
    monkeypatch.setattr(model_card.gather, "evaluation_of", lambda path: shown)
    (tmp_path / "eval").mkdir()
    for number, (name, value) in enumerate([("weights", "0" * 64), ("files", "0" * 64), ("weights", asked["weights"])]):
        results = {
            "version": tables.VERSION,
            "settings": asked | drawn | {name: value},
            "sampling": {"seconds": 1.0, "tokens": 1, "tokens_per_s": None},
            "tasks": {},
            "mean": {},
            "notes": [],
        }
        (tmp_path / "eval/results.json").write_text(json.dumps(results))
        out = tmp_path / f"out{number}"
        given = [f"--from={trained}", "--to=hf", f"--out={out}", "--push=me/mine", f"--evaluated={tmp_path}/eval"]
        ended, _ = call(monkeypatch, capsys, *given)
        if value != "0" * 64:
            assert ended is None and b"gsm8k" in api.sent["README.md"]
        else:
            assert (
                f"an evaluation of another model than this one ({name} 000000000000, not {asked[name][:12]})" in ended
            )
            assert api.sent == {} and not (out / "README.md").exists() and "\n" not in ended


def test_what_is_pushed_does_not_say_where_its_base_lay(trained, tmp_path):
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        path = shutil.copytree(trained, tmp_path / "w", dirs_exist_ok=True) / "hf" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: "/home/somebody/base"}))
    convert.convert(str(tmp_path / "w"), "hf", f"{tmp_path}/out")
    assert not [path for path in (tmp_path / "out").glob("*.json") if "somebody" in path.read_text()]


def test_an_evaluation_of_named_tasks_is_shown(tmp_path):
    results = {
        "columns": ["task", "n"],
        "rows": [["a|b", "3 x 1"]],
        "notes": ["n: problems."],
        "asked": "temperature 0.0",
    }
    with unittest.mock.patch.object(model_card.gather, "evaluation_of", return_value=results) as asked:
        card = model_card.of_run(write_run(tmp_path / "run"), 4, "me/mine", evaluated=tmp_path / "eval")
    asked.assert_called_once_with(tmp_path / "eval")
    page = parts_of(card)[1]
    assert (
        "Named tasks (temperature 0.0):" in page and "<td>a|b</td>\n<td>3 x 1</td>" in page and "n: problems." in page
    )


REAL = huggingface_hub.HfApi


class StandIn:
    """The hub. Every call is checked against the signature of the real one."""

    def __init__(self, private=None, fault=None):
        self.private, self.fault, self.calls, self.sent = private, fault, [], {}

    def __call__(self):
        return self

    def __getattr__(self, name):
        real = inspect.signature(getattr(REAL, name))

        def call(*args, **kwargs):
            asked = real.bind(self, *args, **kwargs).arguments
            self.calls.append((name, {key: value for key, value in asked.items() if key != "self"}))
            if name == self.fault:
                raise HfHubHTTPError(
                    "403 Forbidden: no write (Request ID: 1)\nmore", response=unittest.mock.MagicMock()
                )
            return getattr(self, f"_{name}")(**{key: value for key, value in asked.items() if key != "self"})

        return call

    def _whoami(self):
        return {"name": "me"}

    def _repo_info(self, repo_id):
        if self.private is None:
            raise RepositoryNotFoundError("404", response=unittest.mock.MagicMock())
        return unittest.mock.Mock(private=self.private)

    def _create_repo(self, repo_id, private, exist_ok):
        return f"https://huggingface.co/{repo_id}"

    def _upload_folder(self, folder_path, **others):
        self.sent = {path.name: path.read_bytes() for path in pathlib.Path(folder_path).iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with two checkpoints, both of them the embedded model."""
    folder = write_run(tmp_path_factory.mktemp("run") / "w", **{"model.path": "package://quickstart"})
    convert.convert("package://quickstart", "orbax", f"{folder}/checkpoints/4")
    shutil.copytree(folder / "checkpoints/4", folder / "checkpoints/2")
    shutil.copytree(folder / "checkpoints/4/hf", folder / "hf")
    return folder


def call(monkeypatch, capsys, *arguments):
    """The command; what it ended with (None: well), and what it printed."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    ended = None
    try:
        convert.main()
    except SystemExit as end:
        ended = end.code
    out = capsys.readouterr()
    assert TOKEN not in f"{ended}{out.out}{out.err}"
    return ended, out.out


def reach(monkeypatch, api, token=TOKEN):
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    return api


def test_a_dry_run_writes_all_and_sends_nothing(trained, tmp_path, monkeypatch, capsys):
    reach(monkeypatch, unittest.mock.Mock(side_effect=AssertionError("the hub was asked")), token=None)
    out = tmp_path / "out"
    ended, said = call(
        monkeypatch, capsys, f"--from={trained}", "--to=hf", f"--out={out}", "--push=me/mine", "--dry-run"
    )
    assert ended is None and "nothing was sent; without a dry run this is me/mine, private" in said
    names = {path.name for path in out.iterdir()}
    assert names >= {"README.md", "curves.png", "config.json", "model.safetensors", "tokenizer.json"}
    assert all(f"{(out / name).stat().st_size:,}  {name}" in said for name in names)
    assert "step 4 of 400" in (out / "README.md").read_text() and "--license=apache-2.0 would name one" in said


@pytest.mark.parametrize(("public", "private"), [(False, None), (True, None), (False, True), (True, False)])
def test_a_push_sends_the_folder(trained, tmp_path, monkeypatch, capsys, public, private):
    api = reach(monkeypatch, StandIn(private))
    flags = [f"--from={trained}", "--to=hf", f"--out={tmp_path}/out", "--push=me/mine", "--license=mit", "--step=2"]
    ended, said = call(monkeypatch, capsys, *flags, *(["--public"] if public else []))
    assert ended is None and "pushed to https://huggingface.co/me/mine" in said
    assert [name for name, _ in api.calls] == ["whoami", "repo_info", "create_repo", "upload_folder"]
    assert api.calls[2][1] == {"repo_id": "me/mine", "private": not public, "exist_ok": True}
    assert api.calls[3][1]["repo_id"] == "me/mine" and api.calls[3][1]["delete_patterns"] == "*.safetensors*"
    assert api.sent == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b"license: mit" in api.sent["README.md"] and b"step 2 of 400" in api.sent["README.md"]


BEFORE = [  # how the hub is, token, flags, what is said
    ({}, None, [], "--push: no token of the hub; set HF_TOKEN, or run `hf auth login`"),
    ({}, TOKEN, ["--push=mine"], "--push=mine: OWNER/REPO is needed"),
    ({}, TOKEN, ["--push=me/mine/too"], "--push=me/mine/too: "),
    ({}, TOKEN, ["--push="], "--push=: "),
    ({}, TOKEN, ["--push=me/-- -"], "--push=me/-- -: "),
    ({"private": False}, TOKEN, [], "--push=me/mine: this repository is public; --public says that"),
    ({"fault": "whoami"}, TOKEN, [], "--push=me/mine: 403 Forbidden: no write"),
    ({"fault": "repo_info"}, TOKEN, [], "--push=me/mine: 403 Forbidden: no write"),
    ({}, TOKEN, ["--from=package://quickstart"], "--push: --from=WORKDIR is needed, the run"),
    ({}, TOKEN, ["--step=3"], "no checkpoint of step 3; there: [2, 4]"),
    ({}, TOKEN, ["--evaluated=nowhere"], "--evaluated=nowhere: no results.json"),
    ({}, TOKEN, ["--out=."], "exists already"),
    ({}, TOKEN, ["--license=mit\nbase_model: other"], "--license=mit base_model: other: an identifier of the hub"),
]


@pytest.mark.parametrize(("how", "token", "flags", "words"), BEFORE)
def test_what_is_missing_is_said_before_weights_are_read(
    trained, tmp_path, monkeypatch, capsys, how, token, flags, words
):
    """In one line, and nothing is made."""
    api = reach(monkeypatch, StandIn(**how), token)
    monkeypatch.setattr(convert, "convert", unittest.mock.Mock(side_effect=AssertionError("weights were read")))
    monkeypatch.chdir(trained)
    given = [f"--from={trained}", "--to=hf", f"--out={tmp_path}/out", "--push=me/mine", *flags]
    ended, _ = call(monkeypatch, capsys, *given)
    assert ended.startswith("error: ") and words in ended and "\n" not in ended and "Request ID" not in ended
    assert not (tmp_path / "out").exists() and not {"create_repo", "upload_folder"} & {name for name, _ in api.calls}


@pytest.mark.parametrize("fault", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_leaves_the_folder(trained, tmp_path, monkeypatch, capsys, fault):
    api = reach(monkeypatch, StandIn(fault=fault))
    given = [f"--from={trained}", "--to=hf", f"--out={tmp_path}/out", "--push=me/mine"]
    ended, _ = call(monkeypatch, capsys, *given)
    assert ended.count("\n") == 0 and f"`hf upload me/mine {tmp_path}/out` tries again" in ended
    assert (tmp_path / "out/README.md").exists() and api.sent == {}


def test_flags_of_a_push_are_not_read_without_one(tmp_path, monkeypatch, capsys):
    for flag in ("--public", "--dry-run", "--license=mit", "--evaluated=x"):
        assert call(monkeypatch, capsys, "--from=a", "--to=hf", f"--out={tmp_path}/out", flag)[0] == 2
    assert call(monkeypatch, capsys, "--from=a", "--to=orbax", f"--out={tmp_path}/out", "--push=me/mine")[0] == 2
    assert hub.check_name("me/mine") is None


def test_a_hub_out_of_reach_is_one_line():
    """By the real client, whose errors differ between its versions."""
    code = "from cgrpo_jax.errors import HubError\nfrom cgrpo_jax.sharing import hub\ntry: hub.check_access('me/mine', False)\nexcept HubError as error: print(error)"
    given = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    given |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=120)
    assert done.stdout.startswith("--push=me/mine: the hub cannot be reached (") and done.stdout.count("\n") == 1, done
    assert TOKEN not in done.stdout + done.stderr
