"""Workdirs as runs leave them, made up, and what a page shows of them: for the tests of the report."""

import json

from cgrpo_jax.config import default_config
from cgrpo_jax.workdir.shades import LETTERS


def attempt(text, right, **changes):
    """The record of a response or refinement, each character a token, the fourth of each five unlikely."""
    logp = "".join(LETTERS[24 if i % 5 == 3 else 0] for i in range(len(text)))
    shaded = {"logp": logp, "widths": "B" * len(text)}
    verdict = {"reward": float(right), "correct": right, "answer": "7", "status": "ok"}
    return {"text": text, **verdict, "tokens": len(text), "finished": True, **shaded} | changes


def group(question, responses, refinements=(), **changes):
    """The record of a problem; each refinement is one of the response with the same number, which has a critique."""
    responses = [
        one | ({"critique": "The solution is incorrect."} if i < len(refinements) else {})
        for i, one in enumerate(responses)
    ]
    refinements = [one | {"source": i} for i, one in enumerate(refinements)]
    selected = [i for i, one in enumerate(refinements) if one["correct"]][:1]
    record = {"question": question, "answer": "7", "tag": "", "responses": responses, "refinements": refinements}
    return record | {"kept": list(range(len(responses))), "selected": selected} | changes


SOLVED = group("What is 3+4?", [attempt("3+4 is $7$", True), attempt("It is 8", False)], tag="easy")
FIXED = group(
    "How many primes are below 18?",
    [attempt("There are 8 of them", False), attempt("I count 9", False)],
    [attempt("There are 7 of them", True), attempt("I count 9 again", False)],
    tag="hard",
)
FAILED = group(
    "Find $x$ with $x^2 = 49$, $x > 0$.", [attempt("zebra 6", False)], [attempt("still 6", False)], tag="hard"
)


def config(**changes):
    """What config.json holds."""
    raw = default_config()
    raw.update_from_flattened_dict({"model.path": "some/model", "train.steps": 4, "train.samples": 2} | changes)
    return raw.to_dict()


def metrics(steps=4, reward=0.25):
    """Lines of metrics.jsonl: an evaluation before, `steps` steps, an evaluation behind."""
    evaluation = {"eval/pass@1": 0.25, "eval/pass@1/low": 0.125, "eval/pass@1/high": 0.5}
    rows = [{"step": 0} | evaluation]
    for step in range(1, steps + 1):
        values = {"reward/responses": reward + step / 16, "reward/refinements": 0.875, "refine/success": 0.5}
        values |= {"policy/entropy": 1 / step, "policy/grad_norm": None if step == 2 else 0.5, "loss/total": -0.125}
        values |= {"sampler/logp_diff_mean": 1e-6, "sampler/logp_diff_max": 2e-5 * step, "seconds/sample": 2.0}
        rows.append({"step": step} | values)
    return [*rows, {"step": steps} | evaluation | {"eval/pass@1": 0.375}]


def write(folder, rollouts=None, rows=None, settings=None):
    """A workdir; `rollouts`: {step: groups}."""
    rollouts = {1: [SOLVED, FIXED], 2: [FAILED]} if rollouts is None else rollouts
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings or config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or metrics()))
    for step, groups in rollouts.items():
        text = "".join(json.dumps(one) + "\n" for one in groups)
        (folder / f"rollouts/{step:06d}.jsonl").write_text(text)
    return folder


def counts(page):
    chips = page.locator(".chip").all()
    return {
        chip.get_attribute("data-status"): int(chip.locator(".count").inner_text().replace(",", "")) for chip in chips
    }


def wait_until(page, condition):
    """The policy forbids what playwright's own waiting does."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(condition)
