"""What every run of the command line imports: the server of processes.py holds it ready. No device is started by it."""

import transformers  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

from dno_jax import iteration  # noqa: F401
from dno_jax.cli import main  # noqa: F401
