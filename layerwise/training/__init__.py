"""Training modules on feeds: steps, stages, checkpoints. Knows neither recipes nor run directories."""
