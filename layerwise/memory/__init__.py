"""Measure and predict the peak memory of training. Prints nothing."""

from layerwise.memory.measure import Peak, peak

__all__ = ["Peak", "peak"]
