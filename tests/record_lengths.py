"""Records how long a model's answers are, for `python -m cgrpo_jax.bench --mode=refill --lengths=FILE`.

python tests/record_lengths.py --model=CHECKPOINT --source=gsm8k/train.jsonl --out=tests/lengths.json
"""

import argparse
import json
import pathlib

from cgrpo_jax import config
from cgrpo_jax.records import Kind, Name, Request
from cgrpo_jax.rollout.stories import sample_all
from cgrpo_jax.run import build
from cgrpo_jax.workdir import compilation

# The training prompt ("step by step") makes SmolLM2-135M run on: mean 352 of a cap of 512. This one is answered in
# one line or many.
INSTRUCTION = "Give the calculation in one line, then the answer."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "source", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name, value in (("problems", 64), ("samples", 8), ("cap", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    compilation.keep_on_disk()
    raw = config.default_config("dr_grpo")
    raw.model.path, raw.sampling.max_new_tokens, raw.data.max_prompt_tokens = args.model, args.cap, 512
    run = build.open_run(config.from_config_dict(raw))
    lines = pathlib.Path(args.source).read_text().splitlines()[: args.problems]
    texts = [f"{json.loads(line)['question']}\n{INSTRUCTION}" for line in lines]
    prompts = [run.policy.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    asked = [Request(Name(Kind.RESPONSE, p, g), ids) for p, ids in enumerate(prompts) for g in range(args.samples)]
    weights = run.policy.synced()
    made = [len(done.ids) for done in sample_all(run.policy.engine(weights, 0), asked)]
    mean, capped = sum(made) / len(made), sum(count >= args.cap for count in made) / len(made)
    about = (
        f"{pathlib.Path(args.model).name} at temperature 1 on the first {args.problems} questions of GSM8K x {args.samples}, "
        f"asked with {INSTRUCTION!r}: mean {mean:.1f}, {capped:.1%} cut at {args.cap}"
    )
    response_tokens = [made[p * args.samples : (p + 1) * args.samples] for p in range(len(prompts))]
    record = {"about": about, "prompt_tokens": [len(ids) for ids in prompts], "response_tokens": response_tokens}
    pathlib.Path(args.out).write_text(json.dumps(record) + "\n")
    print(about)


if __name__ == "__main__":
    main()
