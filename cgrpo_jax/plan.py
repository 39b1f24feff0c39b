"""Tells whether a run fits TPUs that are not here, and how long it may take: compiles its programs, runs none.

    python -m cgrpo_jax.plan --config=tpu_v4 --topology=v4-32
    ... --config.sampler.kv_cache_mb=9000        # any leaf of the configuration can be set, as for training
    ... --only=update,decode --most=false        # two programs, without looking for the most rows that fit
    ... --json=plan.json --hlo=DIR               # the figures, and the texts of the compiled programs

Needs libtpu (pip install 'cgrpo_jax[tpu]'), no TPU, no weights, no tokenizer and no network: model.path is a folder
with a config.json, or the name of a model whose shape the package carries (cgrpo_jax/shapes). Exit code: 0 all fits,
1 something does not, 2 no plan could be made.
"""

import sys

from absl import flags

from cgrpo_jax.planner import chips


def asked_topology(argv: list[str]) -> str:
    """The value of `--topology`, before any flag is known."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "topology":
            return value if equals else "".join(argv[index + 1 : index + 2])
    return ""


if __name__ == "__main__":
    chips.prepare(asked_topology(sys.argv))
    from cgrpo_jax.planner import command  # imports jax, which reads what was prepared

    flags.adopt_module_key_flags(command)
    command.start()
