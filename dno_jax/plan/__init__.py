"""What a run takes and costs and whether it fits, before it starts."""
