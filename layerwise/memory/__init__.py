"""Measure and predict the peak memory of training. Prints nothing."""

from layerwise.memory.fit import Fit, find, fit
from layerwise.memory.measure import Peak, check_first_step, explain_exhaustion, peak, process_bytes
from layerwise.memory.predict import Footprint, Samples, predict

__all__ = [
    "Fit",
    "Footprint",
    "Peak",
    "Samples",
    "check_first_step",
    "explain_exhaustion",
    "find",
    "fit",
    "peak",
    "predict",
    "process_bytes",
]
