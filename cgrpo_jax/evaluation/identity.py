"""What figures are about: digests of a model's files and of a problem's content."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable

from cgrpo_jax.data.choice_rows import question_text
from cgrpo_jax.grading.choices import LETTERS
from cgrpo_jax.records import Problem

SHOWN = 12  # hexadecimal digits of a digest in messages and tables


def files_digest(folder: pathlib.Path, names: Iterable[str]) -> str:
    """SHA-256 over names and bytes of those files of `names` that the folder has, whatever their order.

    Bytes are read in pieces, at 0.7 GB a second on a busy core (measured): 20 s for 7 billion weights in bfloat16.
    """
    whole = hashlib.sha256()
    for name in sorted(set(names)):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {name}\n".encode())
    return whole.hexdigest()


def weights_digest(folder: pathlib.Path) -> str:
    """Digest of the safetensors files of a Hugging Face folder, and of the index that says which tensor is where.

    Of the bytes on disk: no device is needed to know whose answers are stored. The same weights in other shards have
    another digest.
    """
    shards = [path.name for path in folder.glob("*.safetensors")]
    return files_digest(folder, [*shards, "model.safetensors.index.json"])


def contents(folder: pathlib.Path, side_files: Iterable[str]) -> dict[str, str]:
    """Digests of what a Hugging Face folder holds: of its weights, and of configuration, tokenizer and templates."""
    templates = [path.name for path in folder.glob("*.jinja")]
    return {"weights": weights_digest(folder), "files": files_digest(folder, [*side_files, *templates])}


def problem_digest(problem: Problem) -> str:
    """Digest of question, gold answer and options: equal for copies of a problem, in whatever row, file or order.

    Options are shown in an order that depends on the row, so they count as a set, and the gold is its text.
    """
    question, gold, options = problem.question, problem.answer, []
    if problem.grader == "choice" and problem.entry is not None:
        shown = list(problem.entry["options"])
        question = question.removesuffix(question_text("", shown))
        gold, options = shown[LETTERS.index(gold)], sorted(shown)
    content = json.dumps([question.strip(), gold.strip(), options])
    return hashlib.sha256(content.encode()).hexdigest()
