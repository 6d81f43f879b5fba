"""What every run of the command line imports: the server of processes.py holds it ready. No device is started by it."""

from contextlib import suppress

import transformers  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

from dno_jax import iteration  # noqa: F401
from dno_jax.cli import main  # noqa: F401

with suppress(ImportError):  # where it is there, every report draws with it
    import altair  # noqa: F401
