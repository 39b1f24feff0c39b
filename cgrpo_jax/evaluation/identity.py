"""Digests of a model's files and of a problem's content, by which answers and figures are compared."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable

from cgrpo_jax.data.choice_rows import question_text
from cgrpo_jax.grading.choices import LETTERS
from cgrpo_jax.records import Problem


def files_digest(folder: pathlib.Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and bytes of those files of `names` that the folder has, in the order of their names.

    It takes 20 s for 7 billion weights in bfloat16 (0.7 GB a second, measured on a busy core).
    """
    whole = hashlib.sha256()
    for name in sorted(set(names)):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {name}\n".encode())
    return whole.hexdigest()


def weights_digest(folder: pathlib.Path) -> str:
    """Digest of the safetensors files of a Hugging Face folder and of their index.

    It is of the bytes on disk, so that stored answers can be matched to a model without loading it. The same weights in
    other shards have another digest.
    """
    shards = [path.name for path in folder.glob("*.safetensors")]
    return files_digest(folder, [*shards, "model.safetensors.index.json"])


def contents(folder: pathlib.Path, side_files: Iterable[str]) -> dict[str, str]:
    """Digests of a Hugging Face folder: one of its weights, one of configuration, tokenizer and chat templates."""
    templates = [path.name for path in folder.glob("*.jinja")]
    return {"weights": weights_digest(folder), "files": files_digest(folder, [*side_files, *templates])}


def problem_digest(problem: Problem) -> str:
    """Digest of question, gold answer and options. Copies of a problem in other rows or files have the same one.

    The order of the options depends on the row, so they are sorted, and the gold answer is the text of its option.
    """
    question, gold, options = problem.question, problem.answer, []
    if problem.grader == "choice" and problem.entry is not None:
        shown = list(problem.entry["options"])
        question = question.removesuffix(question_text("", shown))
        gold, options = shown[LETTERS.index(gold)], sorted(shown)
    content = json.dumps([question.strip(), gold.strip(), options])
    return hashlib.sha256(content.encode()).hexdigest()
