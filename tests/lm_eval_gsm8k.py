"""Our greedy answers to GSM8K against those of lm-eval's `hf` backend, on the same prompts and weights in float32.

pip install "lm-eval[hf]"        # beside the test extra
python -m cgrpo_jax.main --config=configs/eval.py --config.model.path=CHECKPOINT --workdir=runs/gsm8k \
    --config.eval.tasks=gsm8k=gsm8k/test.jsonl --config.eval.problems=50 --config.sampling.max_new_tokens=256
python tests/lm_eval_gsm8k.py --model=CHECKPOINT --source=gsm8k/test.jsonl --workdir=runs/gsm8k

Where a text differs, the first token that does must be a near tie: the two largest logits there less than 1e-3 apart.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.tasks import load_task
from cgrpo_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

TASK = """
task: theirs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match}}]
"""


def theirs(model: HFLM, prompts: list[tuple[str, str]], tokens: int) -> list[str]:
    """The answers of lm-eval to (prompt, gold)."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        rows = pathlib.Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps({"prompt": p, "gold": g}) + "\n" for p, g in prompts))
        pathlib.Path(folder, "theirs.yaml").write_text(TASK.format(file=rows, tokens=tokens))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(model, tasks=["theirs"], task_manager=tasks, log_samples=True)
    samples = sorted(results["samples"]["theirs"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def gap_where_they_part(model: HFLM, tokenizer: Tokenizer, prompt: list[int], ids: list[int], text: str):
    """(place of the first token of ours that does not lead to `text`, difference of the two largest logits there)."""
    import torch

    place = next(n for n in range(len(ids) + 1) if n == len(ids) or not text.startswith(tokenizer.decode(ids[: n + 1])))
    with torch.no_grad():
        logits = model.model(torch.tensor([prompt + ids[:place]])).logits[0, -1]
    first, second = torch.topk(logits, 2).values.tolist()
    return place, first - second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "source", "workdir"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    eval_dir = pathlib.Path(args.workdir, "eval")
    settings = json.loads((eval_dir / "settings.json").read_text())
    lines = (eval_dir / "gsm8k" / "responses.jsonl").read_text().splitlines()
    ours = sorted(map(json.loads, lines), key=lambda record: record["problem"])
    task = load_task("gsm8k", args.source, len(ours), DataConfig(), lambda problem: None, print)
    tokenizer = Tokenizer(args.model)
    ids = [tokenizer.encode_chat(named.problem.messages) for named in task]
    texts = [tokenizer.hf.decode(row) for row in ids]
    model = HFLM(args.model, dtype="float32", device="cpu", batch_size=1)
    assert [model.tok_encode(text) for text in texts] == ids, "the prompts differ"
    golds = [named.problem.answer for named in task]
    answers = theirs(model, list(zip(texts, golds, strict=True)), settings["max_new_tokens"])
    same, wrong = 0, 0
    for number, (record, text) in enumerate(zip(ours, answers, strict=True)):
        if record["text"] == text:
            same += 1
            continue
        place, gap = gap_where_they_part(model, tokenizer, ids[number], record["ids"], text)
        wrong += gap >= 1e-3
        print(f"problem {number}: first differs at token {place}, where the two largest logits are {gap:.2e} apart")
    print(f"{same} of {len(ours)} identical; {wrong} differ at no near tie")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
