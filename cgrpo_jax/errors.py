"""What can be wrong with what a user gave, asked for, or has: `main` ends with one line for each of these.

An error that is none of them is a fault of this program, and its traceback is kept. Imports nothing.
"""


class UserError(Exception):
    """Something that a user can mend. The message is a line that says what is wrong, where, and what mends it."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the keys."""


class DataError(UserError, ValueError):
    """Problems, rows or stored answers that cannot be read; the message names file, row and column."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or a model's folder that cannot be read, or that belongs to another run."""


class MeshError(UserError, ValueError):
    """A mesh that the devices at hand cannot form."""


class PromptError(UserError, ValueError):
    """Chat turns that cannot be encoded safely, or a chat template that fails."""


class CriticError(UserError, ValueError):
    """A critic's server that cannot be asked."""


class RunError(UserError, ValueError):
    """A workdir that holds no run that can be read."""


class ReportError(UserError, ValueError):
    """Evaluations that cannot be read, or cannot be reported side by side."""


class HubError(UserError, ValueError):
    """An upload to the Hugging Face hub that cannot be done."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on, because its numbers are not finite."""


class VerifierError(UserError, RuntimeError):
    """Worker processes that do not start or end at once, again and again."""


class HostsError(UserError, RuntimeError):
    """The hosts of a run that do not find each other, or of which one has ended or is lost."""
