"""Critique-GRPO on JAX: reinforcement learning of language models from rewards and critiques.

    import cgrpo_jax

    config = cgrpo_jax.get_config("quickstart")
    config.train.steps = 12
    metrics = cgrpo_jax.train(config, "runs/twelve")
    tables = cgrpo_jax.load_run("runs/twelve")

The functions load when they are asked for, and jax with those that compute: importing the package is cheap.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgrpo_jax.api import (
        Curves,
        evaluate,
        export,
        generate,
        get_config,
        grade,
        load_run,
        make_plan,
        push,
        train,
        write_report,
    )

__all__ = [
    "Curves", "evaluate", "export", "generate", "get_config", "grade", "load_run", "make_plan", "push", "train",
    "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cgrpo_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
