"""The parameters of a model as two trees without a common leaf: those that are trained, and those that are frozen."""

from __future__ import annotations

from collections.abc import Callable

from cgrpo_jax.model.decoder import Params

Which = Callable[[str], bool]  # whether it is of a set of leaves, by a leaf's path (`layers/attn/q/kernel`)


def every_leaf(path: str) -> bool:
    return True


def no_leaf(path: str) -> bool:
    return False


def part_of(params: Params, chosen: Which, within: str = "") -> Params:
    """The chosen leaves of a tree of arrays or abstract ones. Nothing is copied; branches without a leaf are left out.

    Args:
      within: where the tree lies in a larger one, as the beginning of a path.
    """
    kept: Params = {}
    for name, part in params.items():
        if not isinstance(part, dict):
            kept |= {name: part} if chosen(within + name) else {}
        elif below := part_of(part, chosen, f"{within}{name}/"):
            kept[name] = below
    return kept


def split(params: Params, trained: Which) -> tuple[Params, Params]:
    """The trained leaves and the frozen ones; `joined` is the inverse."""
    return part_of(params, trained), part_of(params, lambda path: not trained(path))


def joined(trained: Params, frozen: Params) -> Params:
    """Two trees without a common leaf as one: all parameters of the model. Nothing is copied."""
    both = dict(trained)
    for name, part in frozen.items():
        both[name] = joined(both[name], part) if name in both else part
    return both
