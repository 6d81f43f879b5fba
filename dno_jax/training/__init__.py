"""Training: state, batches, optimiser, the sharded step, checkpoints and metrics."""
