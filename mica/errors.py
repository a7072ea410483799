"""The errors that users meet, in one place."""


class UnsuitableLayerError(ValueError):
    """A target layer from which MiCA cannot be initialised (non-finite weight, rank too large, ...)."""


class UsageError(ValueError):
    """Bad input to the command line: one clear line and exit status 2, no traceback."""
