"""Errors a user can cause. The CLI prints them without a traceback and exits with 2.

Every message says what was required, what was got, and what to do. Anything else that escapes is a bug and keeps its
traceback.
"""


class WorldlineError(ValueError):
    """Base of every error that a user's input can cause."""


class SpecMismatch(WorldlineError):
    """What one component provides is not what the next one requires."""


class DatasetError(WorldlineError):
    """A dataset on disk is missing something, is of another version, or holds values that cannot be used."""


class CheckpointError(WorldlineError):
    """A checkpoint folder is incomplete, of another kind, or does not fit what it is loaded into."""


class SimulatorError(WorldlineError):
    """A simulator cannot be made: unknown task, unknown camera, no headless GL library."""


class PolicyError(WorldlineError):
    """A policy cannot be reached or answered with something that is not an action chunk."""
