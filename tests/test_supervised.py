"""The supervised loop: what its loss is, that it falls, resumes to the bit and stops where nothing is finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from plain_forward import forward
from test_train import small, without_times

from cgrpo_jax.data import arithmetic
from cgrpo_jax.errors import TrainingError
from cgrpo_jax.learning import credit
from cgrpo_jax.model.decoder import logits
from cgrpo_jax.run import build
from cgrpo_jax.training import train

ROWS = {
    "method": "sft", "model.random_init": True, "data.max_prompt_tokens": 256, "refine.max_prompt_tokens": 320,
    "train.prompts": 4, "train.samples": 1, "train.micro_batch": 4, "train.steps": 4, "checkpoint.every": 2,
    "optimizer.learning_rate": 3e-3,
}  # fmt: skip


def run(workdir, **changes):
    """The metrics, without times."""
    with jax.numpy_rank_promotion("allow"):
        train(small(**ROWS | changes), workdir)
    return metrics(workdir)


def metrics(workdir):
    return without_times(json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())


def arrays(workdir, step):
    """Weights and optimizer state of a checkpoint."""
    folder = (workdir / f"checkpoints/{step}").absolute()
    return {name: ocp.StandardCheckpointer().restore(folder / name) for name in ("params", "opt_state")}


def mean_nll(run, params, step, refinements):
    """Per answer token of a step's rows, each by itself and unpadded, in numpy from the decoder's logits."""
    total, count = 0.0, 0
    for index in range(4 * step, 4 * step + 4):
        messages, text = arithmetic.warm_start_row(0, index, refinements)
        prompt = run.policy.tokenizer.encode_chat(messages)
        answer = [*run.policy.tokenizer.encode_text(text), run.policy.tokenizer.hf.eos_token_id]
        ids_1T = jnp.asarray([[*prompt, *answer]], jnp.int32)
        logit_TV = np.asarray(logits(run.policy.shape, params, forward(run.policy.shape, params, ids_1T)))[0].astype(
            np.float64
        )
        logp_TV = logit_TV - np.log(np.exp(logit_TV).sum(-1))[:, None]
        for place, target in enumerate(answer, len(prompt)):
            total, count = total - logp_TV[place - 1, target], count + 1
    return total / count, count


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sft") / "w"
    run(workdir)
    return workdir


@pytest.mark.thorough
def test_the_loss_is_the_mean_likelihood_of_the_answers_and_falls(undisturbed):
    """Of the first batch exactly; of the plain rows (steps 1, 3) and of the refinements (2, 4) it falls."""
    rows, opened = metrics(undisturbed), build.open_run(small(**ROWS))
    with jax.numpy_rank_promotion("allow"):
        before, count = mean_nll(opened, opened.policy.weights(), 0, False)
        after, _ = mean_nll(opened, jax.tree.map(jnp.asarray, arrays(undisturbed, 4)["params"]), 0, False)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    np.testing.assert_allclose(rows[0]["loss/total"], before, rtol=1e-5)
    assert rows[0]["tokens/trained"] == count and rows[0]["loss/responses"] == rows[0]["loss/total"]
    assert after < before - 0.1 and rows[2]["loss/total"] < before and rows[3]["loss/total"] < rows[1]["loss/total"]


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_likelihood_has_temperature_one(undisturbed, tmp_path, temperature):
    """Whatever samples are drawn at: 0 gave NaN, 0.6 another loss."""
    rows = run(tmp_path / "w", **{"train.steps": 1, "sampling.temperature": temperature})
    assert rows == metrics(undisturbed)[:1]


@pytest.mark.thorough
def test_what_the_supervised_loop_writes(undisturbed):
    """Nothing of a sampler, nothing of groups; all of it finite."""
    assert (undisturbed / "report.html").exists()
    for row in metrics(undisturbed):
        assert {name.split("/")[0] for name in row} == {"step", "loss", "policy", "tokens"}
        assert all(np.isfinite(value) for value in row.values())
    assert not list((undisturbed / "rollouts").iterdir())
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.thorough
def test_a_stopped_supervised_run_resumes_to_the_same_end(undisturbed, tmp_path):
    run(tmp_path / "w", **{"train.steps": 2})
    assert run(tmp_path / "w") == metrics(undisturbed)
    one, other = (jax.tree.leaves(arrays(workdir, 4)) for workdir in (tmp_path / "w", undisturbed))
    assert len(one) == len(other) > 20
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, other, strict=True))


def test_supervised_weights_that_are_not_finite_stop_it(tmp_path, monkeypatch):
    plain = credit.supervised
    monkeypatch.setattr(credit, "supervised", lambda rows: [s._replace(ce_T=s.ce_T * np.nan) for s in plain(rows)])
    with pytest.raises(TrainingError, match=r"step 3: 3 steps in a row were not finite, .*1 gradients"):
        run(tmp_path / "w", **{"train.steps": 9, "checkpoint.every": 1})
    rows = metrics(tmp_path / "w")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["policy/nonfinite_total"] == 3
    assert sorted(path.name for path in (tmp_path / "w/checkpoints").iterdir()) == ["1", "2"]
