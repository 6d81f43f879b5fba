"""How questions reach endpoints: turns, limits, failover, probes, and the Batch API."""
