"""A faithful fake judge: a real HTTP server with planted preferences and planted faults, for tests and rehearsals."""

from dno_jax.fake_judge.behaviour import FAULTS, OUTCOMES, Behaviour, read_settings, settings_table
from dno_jax.fake_judge.counts import Counts, Entry, counts_table
from dno_jax.fake_judge.preference import Scorer
from dno_jax.fake_judge.server import FakeJudge

__all__ = [
    "FAULTS",
    "OUTCOMES",
    "Behaviour",
    "Counts",
    "Entry",
    "FakeJudge",
    "Scorer",
    "counts_table",
    "read_settings",
    "settings_table",
]
