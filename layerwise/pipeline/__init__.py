"""What a run does: stages, caches, probes, plans, and what its directory holds."""
