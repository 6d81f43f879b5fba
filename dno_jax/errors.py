"""The one exception that means: the person who started this can fix it."""

from __future__ import annotations


class DnoError(ValueError):
    """A problem in the input or surroundings of a run.

    The message names the value, the place, what was expected and what to do. The command line prints it without a
    traceback; every other exception is a defect of this project and keeps its traceback.
    """
