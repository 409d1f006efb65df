"""Measure and predict the peak memory of training. Prints nothing."""

from layerwise.memory.fit import Fit, fit
from layerwise.memory.measure import Peak, peak
from layerwise.memory.predict import Footprint, Samples, predict

__all__ = ["Fit", "Footprint", "Peak", "Samples", "fit", "peak", "predict"]
