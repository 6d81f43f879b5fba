"""A process that kills itself by SIGKILL, or stops itself by another signal, at a named point of the command line.

A point is "<what>:<n>": at the n-th call of <what> (from 1) the process dies as by kill -9, before the call does
anything, or, for "after-...", right after it. "<what>:<n>@SIGTERM" sends that signal instead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial


def send_at(
    owner: object,
    name: str,
    count: int,
    *,
    after: bool = False,
    only: Callable[..., bool] = lambda *a, **k: True,
    number: int = signal.SIGKILL,
) -> None:
    original, seen = getattr(owner, name), 0

    def killer(*args, **kwargs):
        nonlocal seen
        counts = only(*args, **kwargs)
        seen += counts
        reached = counts and seen == count  # once: what is sent may be waited with, or ignored
        if reached and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if reached and after:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, killer)


def arm(point: str) -> None:
    """Patch the one function that the point names."""
    from dno_jax import run_dir
    from dno_jax.stages import checkpoints, pair, train
    from dno_jax.training import checkpoint

    point, _, name = point.partition("@")
    die_at = partial(send_at, number=signal.Signals[name or "SIGKILL"])
    what, number = point.rsplit(":", 1)
    after, what = what.startswith("after-"), what.removeprefix("after-")
    if what.startswith("shard-"):  # a shard of this stage
        stage = what.removeprefix("shard-")
        die_at(run_dir.StageDir, "write_shard", int(number), after=after, only=lambda self, *_: self.stage == stage)
    elif what == "pairs":  # a file of the pair stage
        die_at(pair, "write_pairs", int(number), after=after)
    elif what.startswith("finish-"):  # the manifest of this stage
        stage = what.removeprefix("finish-")
        die_at(run_dir.StageDir, "finish", int(number), after=after, only=lambda self, *_, **__: self.stage == stage)
    elif what == "step":
        die_at(train, "train_step", int(number), after=after)
    elif what == "state":
        die_at(checkpoint.StateCheckpoints, "save", int(number), after=after)
    elif what == "policy":  # the weights are written, FINGERPRINT is not
        die_at(checkpoint, "write_atomically", int(number), after=after)
    elif what == "export":
        die_at(checkpoints.hf, "save", int(number), after=after)
    else:
        raise SystemExit(f"unknown point {point!r}")
