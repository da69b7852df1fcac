"""Errors that a user can cause and fix: the command reports them in one line and exits with 1."""


class PairDiffError(Exception):
    """The message names the file or setting that is wrong and says what to do."""


class DataError(PairDiffError, ValueError):
    """Data that is missing or invalid."""


class CheckpointError(PairDiffError, RuntimeError):
    """A checkpoint or run folder that cannot be written, read or used."""


class FetchError(PairDiffError, RuntimeError):
    """A download or its unpacking failed."""
