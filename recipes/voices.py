"""Synthetic voices, six modules, five minutes on a laptop: speech with nothing to download."""

from __future__ import annotations

from layerwise.data.voices import Voices
from layerwise.nets.speech import GRUContext, SpeechEncoder
from layerwise.objectives.frame_infonce import FrameInfoNCE
from layerwise.recipe import CacheSettings, Optimiser, Probe, Recipe, SpeechProbes, Training

recipe = Recipe(
    name="voices",
    dataset=Voices(),
    network=SpeechEncoder(channels=64, context=GRUContext(hidden=128)),
    objective=FrameInfoNCE(),
    optimiser=Optimiser(learning_rate=1e-3),
    training=Training(batch_size=8, epochs=14, patience=5),
    # Standardised, so that an untrained network's small numbers are not a handicap of their own.
    probe=SpeechProbes(
        phone=Probe(learning_rates=(1e-2,), epochs=5, batch_size=1024, standardise=True),
        speaker=Probe(learning_rates=(1e-2,), epochs=50, batch_size=64, standardise=True),
    ),
    cache=CacheSettings(probe_splits=False),
)
