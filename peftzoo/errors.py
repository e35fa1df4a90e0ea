"""What peftzoo raises for a user's mistake, and the exit code the command line ends with.

| code | meaning |
|---|---|
| 0 | done |
| 1 | an error in peftzoo itself |
| 2 | a bad recipe or bad arguments |
| 3 | a problem in the data |
| 4 | a problem in the model or the adapter |
| 5 | out of memory |
| 6 | training became non-finite |
| 7 | a run folder or checkpoint that cannot be used |
| 8 | what a benchmark was to time computes something wrong |
| 130 | interrupted, after the adapter was saved |
"""

from __future__ import annotations


class ZooError(Exception):
    """A problem with one clear message for the user; shown without a traceback."""

    exit_code = 1


class RecipeError(ZooError):
    """The recipe or the command line asks for something that does not exist or cannot be."""

    exit_code = 2


class DataError(ZooError):
    """The data cannot be read or holds nothing to train on."""

    exit_code = 3


class ModelError(ZooError, ValueError):
    """The base model, the adapter, or the two together do not fit."""

    exit_code = 4


class MemoryLimitError(ZooError):
    """The device ran out of memory."""

    exit_code = 5


class NonFiniteError(ZooError):
    """The loss or a gradient became infinite or not a number."""

    exit_code = 6


class CheckpointError(ZooError):
    """A run folder or checkpoint cannot be written or used."""

    exit_code = 7


class BenchmarkError(ZooError):
    """What a benchmark was to time gives outputs or gradients that are missing, zero, not finite or wrong."""

    exit_code = 8
