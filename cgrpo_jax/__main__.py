"""`python -m cgrpo_jax`: which command to give. Loads no jax."""

import sys

from cgrpo_jax.config.flags import COMMANDS

if __name__ == "__main__":
    asks = set(sys.argv[1:]) <= {"-h", "--help"}
    print(COMMANDS) if asks else sys.exit(f"error: {sys.argv[1]!r}: options are those of a command\n{COMMANDS}")
