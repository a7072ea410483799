"""The errors that users meet, in one place, and how others are quoted."""


class UnsuitableLayerError(ValueError):
    """A target layer from which MiCA cannot be initialised (non-finite weight, rank too large, ...)."""


class UsageError(ValueError):
    """Bad input to the command line: one clear line and exit status 2, no traceback."""


def first_line(error: Exception) -> str:
    """What a line that quotes the error says of it: its message may be long, or empty."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
