"""Where a run's curves go besides metrics.jsonl: TensorBoard's files, and services that are off unless asked for."""

from dno_jax.tracker.sinks import Sink, Sinks, open_sinks

__all__ = ["Sink", "Sinks", "open_sinks"]
