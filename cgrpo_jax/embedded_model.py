"""Tokenizer and configuration of the embedded model; its weights come from `configs/quickstart_sft.py`.

python -m cgrpo_jax.embedded_model OUT      # writes OUT/{config,tokenizer,...}, no weights
"""

from __future__ import annotations

import pathlib
import sys

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from cgrpo_jax.data.arithmetic import warm_start_row
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.model.hf_config import FAMILIES, config_to_hf, write_json
from cgrpo_jax.workdir.places import expanded

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> BpeTokenizer:
    """Byte-level BPE that spells any text; the words of the prompts are single tokens, digits stay apart."""
    tokenizer = BpeTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # an upper bound: it stops when every word of the prompts is one token
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    turns = [warm_start_row(0, index, refinement=index % 2 == 1)[0] for index in range(64)]
    corpus = [f"{m['role']}\n{m['content']}" for messages in turns for m in messages] + ["assistant\n"] * 8
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_folder(out: pathlib.Path) -> None:
    """Everything of the Hugging Face folder but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    cfg = ModelConfig(
        family="qwen3", vocab=tokenizer.get_vocab_size(), width=128, mlp_width=256, layers=3, heads=4, kv_heads=2,
        head_dim=32, rope_theta=10_000.0, max_positions=512, tie_embeddings=True, **FAMILIES["qwen3"],
    )  # fmt: skip

    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(out / "config.json", config_to_hf(cfg, (ids[END],), ids[PAD]))
    write_json(out / "generation_config.json", {"eos_token_id": ids[END], "pad_token_id": ids[PAD]})
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
            "model_max_length": cfg.max_positions, "clean_up_tokenization_spaces": False,
            # transformers 4 adds token types to this class otherwise, which no decoder takes
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_folder(expanded(sys.argv[1]))
