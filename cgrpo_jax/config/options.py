"""Every option of a run: its default, what it means, and what it may be. Nothing here or above it imports jax.

An option's range stands beside it (`option`); `faults` finds the values that lie outside. What depends on the model or
on several options is checked where a run is built (`checks.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from cgrpo_jax.config.critics import CRITICS, FALLBACKS, REFERENCES

TRIGGERS = ("none_correct", "any_wrong", "always", "never")
SELECTIONS = ("correct_then_random", "correct_first", "random")
REFINERS = ("policy", "target", "local")
SHAPES = ("shaped", "probability", "ratio", "log_probability", "ratio_to_sampler")
REMATS = ("dots", "full", "attention", "wide")
CORRECTION_LIMITS = {"token": 2.0, "sequence": 1.05}  # where objective.correction_limit is 0
AGGREGATIONS = ("constant", "token_mean", "sequence_mean")


def option(
    default: Any,
    *,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    help: str = "",
) -> Any:
    """A field with its range, and what the reference says of it behind its comment.

    Every float must be finite, whatever else is asked.
    """
    bounds = {"choices": choices, "above": above, "at_least": at_least, "below": below, "at_most": at_most}
    return dataclasses.field(default=default, metadata=bounds | {"help": help})


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Which weights to start from."""

    path: str = ""  # Hugging Face folder, hub id, or package://quickstart (the embedded model)
    revision: str = "main"  # of a hub id
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16"))  # of the computation; auto: by device
    random_init: bool = False  # keep configuration and tokenizer, draw fresh weights
    thinking: str = option("auto", choices=("auto", "on", "off"))  # `enable_thinking` of the chat template (Qwen3)
    # Another rope base and window than config.json has; an export says them, too. 0: as there
    rope_theta: float = option(0.0, at_least=0)
    max_positions: int = option(0, at_least=0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where problems come from."""

    source: str = ""  # file (.jsonl .json .parquet .csv) | hub id[:config] | arithmetic | reasoning_gym:TASK
    split: str = "train"
    revision: str = "main"  # of a hub id
    question_column: str = ""  # "" looks for the usual names
    answer_column: str = ""  # in method=sft the text to learn; "" is `target` there
    on_bad_row: str = option("error", choices=("error", "drop"))
    # Of mathematics. auto: this project's; math_verify: the reward of the paper's release (configs/README.md)
    grader: str = option("auto", choices=("auto", "math_verify"))
    max_prompt_tokens: int = option(512, at_least=1)  # a longer question is a bad row


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a score is worth. Most graders say 0 or 1; reasoning_gym's scorers and functions give fractions."""

    # package.module:function with the signature of TRL; several, with commas between them, are added. "": the graders.
    # They score the problems of data.source and eval.source, and what they return is the reward, whatever it is.
    fn: str = ""
    seconds: float = option(60.0, above=0)  # of a call of fn; what takes longer has no reward
    correct_at: float = option(1.0, above=0)  # the score from which on an attempt counts as correct
    # Of several functions the one, by its path, whose score decides that; or sum: the score of all together
    correct_by: str = ""
    partial: bool = False  # the reward is the score itself; else it is 1 of what counts as correct, and 0


@dataclasses.dataclass(frozen=True)
class TextsConfig:
    """Who writes the prompts: package.module:function, which returns chat turns. The defaults are the paper's."""

    # (question); also in evaluations. What a row has of its own as `prompt` stays, unless that is the paper's prompt
    task: str = "cgrpo_jax.text.prompts:question_messages"
    # Of the critic: (question, solution, the ground truth or None, whether a verdict is wanted)
    critique: str = "cgrpo_jax.text.prompts:critique_messages"
    # (question, [(solution, critique), ...]): one, or several with context=together
    refinement: str = "cgrpo_jax.text.prompts:refinement_messages"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Order of the filters: temperature, top-k, top-p."""

    temperature: float = option(1.0, at_least=0)  # 0 is greedy
    top_k: int = option(0, at_least=0)  # 0 keeps all
    top_p: float = option(1.0, above=0, at_most=1)
    max_new_tokens: int = option(512, at_least=1)
    # Texts at which an answer is over though no end-of-sequence id was sampled, as a list in JSON: ["\nQuestion:"].
    # Of all that is sampled here, evaluations and critiques too; not of a server
    stop: str = ""


GYM = "reasoning_gym:"  # before the name of a task of reasoning-gym


def generated(source: str) -> bool:
    """Whether the problems of a `data.source` are generated, without end."""
    return source == "arithmetic" or source.startswith(GYM)


def drawn(temperature: float, top_p: float) -> str:
    """How answers were drawn, to stand beside what they score: "greedy", "sampled, T=1", "sampled, T=1, top-p 0.9"."""
    return "greedy" if temperature == 0 else f"sampled, T={temperature:g}" + (f", top-p {top_p:g}" if top_p < 1 else "")


@dataclasses.dataclass(frozen=True)
class SamplerMemory:
    """What the sampler may use of each device, and what lies where."""

    # For the keys and values of all rows and of the prompts that wait for one; decides how many rows there are.
    kv_cache_mb: float = option(2048.0, above=0)
    # Devices that share the heads of a row and the sampler's weights; the rest share the rows. 0: as mesh.tensor.
    tensor: int = option(0, at_least=0)
    # Fixed sizes, for few programs: "SLOTSxROWS,..." and "TOKENS,...", as in 8192x256,16384x32 and 1024,9216. A request
    # goes to the smallest ring that holds prompt and limit; a prompt is padded to the smallest size. Both "": as asked.
    rings: str = ""
    prefills: str = ""


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """Which responses are refined and what of it is trained on. The defaults are the newest paper."""

    # none_correct: all n where none is right | any_wrong: the wrong ones | always: all | never: plain GRPO
    trigger: str = option("none_correct", choices=TRIGGERS)
    # Who writes them. policy: sampled under critiques | target: the data's column of that name, one trace of a stronger
    # model for each problem (LUFFY); nobody is asked for critiques then | local: a second model, under critiques
    refiner: str = option("policy", choices=REFINERS)
    # Who says what is wrong with an attempt (critics.py).
    critique: str = option(
        "indicative_gt", choices=tuple(CRITICS), help=" | ".join(f"{c.name}: {c.help}" for c in CRITICS.values())
    )
    # Of critique=function: package.module:function, given what reward.fn is given, and `rewards` and `correct`; a list
    # of texts, or None where there is nothing to say (then the fallback)
    critique_fn: str = ""
    critique_seconds: float = option(60.0, above=0)  # of a call of critique_fn
    critique_tokens: int = option(0, at_least=0)  # of a critique that the policy writes; 0: sampling.max_new_tokens
    # Of self_gt, api and local. agreeing: a critique counts if its verdict is that of the rule | any: whatever is
    # written counts; only wrong attempts are shown to the critic, right ones are told by the fallback (the release)
    critique_accept: str = option("agreeing", choices=("agreeing", "any"))
    critique_tries: int = option(3, at_least=1)  # until a critique counts; then the fallback
    # What stands in where no critique counts; drop: the attempt is not refined. auto: indicative_gt where the critic is
    # shown the ground truth, indicative where it is not, drop for no_verdict
    critique_fallback: str = option("auto", choices=FALLBACKS)
    inverted: bool = False  # every critique is given the opposite verdict: a control (the paper's appendix C)
    k: int = 1  # refinements in the group; 0, with generate.rows=critiques only: none is sampled
    select: str = option("correct_then_random", choices=SELECTIONS)  # correct_first: lowest index (the release)
    # append: n + k rows | replace: the first k responses make room, right or wrong (the release, n = 8)
    group: str = option("append", choices=("append", "replace"))
    # each: a prompt for each response that is refined | together: one prompt with all of them, for n refinements (GOLF)
    context: str = option("each", choices=("each", "together"))
    own_group: bool = False  # all refinements are trained on under their own prompt, too: a second group (GOLF)
    max_prompt_tokens: int = option(1024, at_least=1)  # the previous solution is cut in the middle to fit


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What method=generate keeps for method=sft, of at most train.steps x train.prompts problems."""

    # responses: the correct ones | refinements: the correct ones | both | critiques: those whose verdict is the rule's.
    # What was cut by a limit is never kept.
    rows: str = option("responses", choices=("responses", "refinements", "both", "critiques"))


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """The server of critique=api: any that speaks OpenAI's protocol."""

    base_url: str = ""  # http://HOST:PORT/v1; of Azure with ?api-version=...
    model: str = ""
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; "": the server wants none
    # What the critic is shown: none | gt: the ground truth | solution: the data's column `solution`, `target` or
    # `answer`, the first that holds a worked solution; of a row without one as gt
    reference: str = option("none", choices=REFERENCES)
    concurrent: int = option(32, at_least=1)  # requests at once, at most
    seconds: float = option(60.0, above=0)  # for one request, from its first byte to the last of the reply
    retries: int = option(2, at_least=0)  # of a failed request, by the client
    tokens: int = option(1024, at_least=1)
    temperature: float = option(0.7, at_least=0)
    top_p: float = option(0.75, above=0, at_most=1)
    price_read: float = option(0.0, at_least=0)  # of a million tokens
    price_written: float = option(0.0, at_least=0)
    spend_cap: float = option(0.0, at_least=0)  # of the whole run, in the currency of the prices; 0: none


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """The second model: the critic of critique=local, the writer of refiner=local. Its weights are never trained.

    It is sampled beside the policy, on the same devices: with rows and rings of its own, of the size that sampler.*
    says, so that both lie in memory. The two take turns at decoding.
    """

    path: str = ""  # Hugging Face folder, hub id, or package://quickstart
    revision: str = "main"  # of a hub id
    thinking: str = option("auto", choices=("auto", "on", "off"))  # `enable_thinking` of its chat template
    reference: str = option("none", choices=REFERENCES)  # what it is shown as a critic, see api.reference
    temperature: float = option(0.7, at_least=0)
    top_p: float = option(0.75, above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The defaults are the newest paper. Each switch is needed by a table of the paper or by its release."""

    # p/(p+gamma) | probability: p | ratio: p/p_old | log_probability: log p, which no clip binds (RLTF-SD) |
    # ratio_to_sampler: p over the sampler's own under the refinement prompt (Guide)
    refined_shape: str = option("shaped", choices=SHAPES)
    gamma: float = option(0.1, above=0)
    clip_eps: float = option(0.2, at_least=0, below=1)
    clip_high: float = option(0.0, at_least=0)  # of the ratio from above, 1 + it (clip-higher); 0: as clip_eps
    clip_responses: bool = True
    clip_refinements: bool = True
    # Of a row in its group: 1/n and 1/k | uniform: 1/(rows of the group) | sum: 1 (the release)
    weights: str = option("per_kind", choices=("per_kind", "uniform", "sum"))
    # group: the mean reward of responses and refinements | responses: theirs alone (LUFFY's split, RLTF-SD)
    baseline: str = option("group", choices=("group", "responses"))
    # token sum / constant (Dr.GRPO) | token_mean: of all tokens | sequence_mean: 1/|y| (GRPO)
    aggregation: str = option("constant", choices=AGGREGATIONS)
    # Advantages over the unbiased standard deviation + 1e-6 (GRPO, the release); over 1 where that is 0 (LUFFY's split)
    divide_by_std: bool = False
    kl_coef: float = option(0.0, at_least=0)  # k3 estimator against the initial policy
    kl_limit: float = option(0.0, at_least=0)  # of a token's k3, without gradient above it; 10 in the release; 0: none
    entropy_coef: float = option(0.0, at_least=0)
    # Of the entropy over tokens: as the loss aggregates them | token_mean: of all tokens of the update (the release)
    entropy_mean: str = option("as_loss", choices=("as_loss", "token_mean"))
    # mask: rows that the limit cut have no loss, and are counted in no mean of it: n, k, tokens, questions (DAPO)
    overlong: str = option("train", choices=("train", "mask"))
    # Of responses, where sampler and trainer disagree: token: weight min(p/p_sampler, limit) | sequence: one whose
    # geometric mean of p/p_sampler is above the limit or below its inverse has no loss
    correction: str = option("none", choices=("none", "token", "sequence"))
    correction_limit: float = option(0.0, at_least=0)  # above 1; 0: that of its kind, token 2, sequence 1.05


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; weights of matrices decay, norms and biases do not."""

    learning_rate: float = option(1e-6, above=0)
    schedule: str = option("constant", choices=("constant", "cosine"))  # after the warm-up; cosine: to final_fraction
    warmup_updates: int = option(0, at_least=0)
    final_fraction: float = option(0.0, at_least=0, at_most=1)
    b2: float = option(0.999, at_least=0, below=1)  # b1 is 0.9
    weight_decay: float = option(0.01, at_least=0)
    clip_norm: float = option(1.0, above=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = option(400, at_least=1)  # rollouts
    prompts: int = option(128, at_least=1)  # P, problems a step
    samples: int = option(7, at_least=1)  # n, responses a problem
    # Dynamic sampling (DAPO): problems a step at most that stand in for ones without a gradient, whose rewards are all
    # alike; they are the next ones of the stream. 0: off
    replacements: int = option(0, at_least=0)
    updates_per_rollout: int = option(1, at_least=1)  # optimizer updates, each on its own share of the problems
    # Problems at once in the gradient, rounded up to the devices; changes memory, not the result. 0: one a device.
    micro_batch: int = option(0, at_least=0)
    # Kept for the backward pass: dots (the products) | full (nothing but each layer's input) | and for long rows
    # on a TPU: attention (its output) | wide (that and the products that take longest)
    remat: str = option("dots", choices=REMATS)
    # Who is told the metrics beside TensorBoard: wandb or trackio, each an extra of that name (configs/README.md)
    tracker: str = option("", choices=("", "wandb", "trackio"))
    # Keys, with commas between them, that may differ from those of the checkpoint that is resumed (workdir/changes.py).
    accept_changes: str = ""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: of a checkpoint (method=eval), or before, during and after training."""

    every: int = option(0, at_least=0)  # steps of training; 0: none at all
    # As data.source. "": data.source itself, of which a local file has a tenth of its questions (256 at most, by the
    # seed) kept out of training
    source: str = ""
    revision: str = "main"  # of a hub id in eval.source
    split: str = "test"
    tasks: str = ""  # names of tasks.TASKS, NAME=FILE and NAME=package.module:function; in training beside eval.source
    problems: int = option(256, at_least=0)  # of each, the first ones; 0: all
    samples: int = option(4, at_least=1)  # per problem
    temperature: float = option(1.0, at_least=0)  # 0: greedy
    top_p: float = option(1.0, above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save; the last step is always saved."""

    every: int = option(50, at_least=1)  # steps
    keep: int = option(2, at_least=1)  # newest ones
    # Beside them, the best by this metric of the evaluation, higher is better: eval/pass@1, eval/TASK/pass@1; "": none.
    best: str = ""


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    """Limits of the worker processes."""

    workers: int = option(2, at_least=1)
    cpu_seconds: float = option(2.0, above=0)  # per answer
    memory_mb: int = option(2048, at_least=1)  # address space per worker


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 (one axis at most) takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _fault(value: Any, bounds: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    if bounds.get("choices") and value not in bounds["choices"]:
        return nearest(str(value), bounds["choices"]).removeprefix("; ")
    if bounds.get("above") is not None and not value > bounds["above"]:
        return "must be positive" if bounds["above"] == 0 else f"must be above {bounds['above']}"
    if bounds.get("at_least") is not None and not value >= bounds["at_least"]:
        return {0: "must not be negative", 1: "must be positive"}[bounds["at_least"]]
    if bounds.get("below") is not None and not value < bounds["below"]:
        return f"must be below {bounds['below']}"
    if bounds.get("at_most") is not None and not value <= bounds["at_most"]:
        return f"must be at most {bounds['at_most']}"
    return None


def faults(options: Any, prefix: str = "") -> list[str]:
    """One line for each value of a tree of options that lies outside its range."""
    found = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            found += faults(value, f"{prefix}{field.name}.")
        elif fault := _fault(value, field.metadata):
            default = str(field.default).lower() if isinstance(field.default, bool) else field.default
            found.append(f"{prefix}{field.name} = {value!r}: {fault} (--config.{prefix}{field.name}={default})")
    return found
