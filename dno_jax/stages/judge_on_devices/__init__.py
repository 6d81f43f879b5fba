"""Judges that need the devices: the policy itself, and a reward model."""
