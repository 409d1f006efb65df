"""LibriSpeech as in the paper (section 4.2): five convolutions and a recurrent context; phones and speakers.

Needs `--data-dir` with LibriSpeech train-clean-100 (or `--download`); phone labels where CPC's authors' files lie
beside it. Follows the paper: Adam at 2e-4, up to 1,000 epochs of one window a recording. The labelled splits, whole
utterances of conv 1 to 5, would take terabytes, so the caches leave them out.

Where this differs from the paper and its published code:

* The batch is 32 windows, where they have 8 on each of 4 GPUs; so negatives come from all 32.
  training.batch_size=8 gives those of one GPU.
* A twentieth of the recordings is held out, to tell when a module has converged; training.patience=1000 always trains
  1,000 epochs.
* A cache holds one window of each recording, where their later modules see fresh ones; cache.views=8 stores eight.
"""

from __future__ import annotations

from layerwise.data.librispeech import LibriSpeech
from layerwise.nets.speech import SpeechEncoder
from layerwise.objectives.frame_infonce import FrameInfoNCE
from layerwise.recipe import CacheSettings, Optimiser, Recipe, SpeechProbes, Training

recipe = Recipe(
    name="librispeech",
    dataset=LibriSpeech(),
    network=SpeechEncoder(),
    objective=FrameInfoNCE(),
    optimiser=Optimiser(learning_rate=2e-4),
    training=Training(batch_size=32, epochs=1000, patience=50),
    probe=SpeechProbes(),
    cache=CacheSettings(probe_splits=False),
)
