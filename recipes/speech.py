"""Any folder of FLAC or WAV recordings, one sub-folder for each speaker: `--data-dir DIR`."""

from __future__ import annotations

from layerwise.data.speech import Speech
from layerwise.nets.speech import GRUContext, SpeechEncoder
from layerwise.objectives.frame_infonce import FrameInfoNCE
from layerwise.recipe import CacheSettings, Optimiser, Recipe, SpeechProbes, Training

recipe = Recipe(
    name="speech",
    dataset=Speech(),
    network=SpeechEncoder(channels=256, context=GRUContext(hidden=256)),
    objective=FrameInfoNCE(),
    optimiser=Optimiser(learning_rate=2e-4),
    training=Training(batch_size=16, epochs=300, patience=20),
    probe=SpeechProbes(),
    cache=CacheSettings(probe_splits=False),
)
