"""Handwritten digits, three modules, two minutes on a laptop: the embedded default."""

from __future__ import annotations

from layerwise.data.digits import Digits
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.infonce import PatchInfoNCE
from layerwise.recipe import CacheSettings, Optimiser, Probe, Recipe, Training

recipe = Recipe(
    name="digits",
    dataset=Digits(),
    network=PatchResNet(
        patch=8,
        patch_stride=4,
        stem_channels=16,
        groups=(
            Group(channels=32, blocks=1),
            Group(channels=64, blocks=1, stride=2),
            Group(channels=128, blocks=1, stride=2),
        ),
    ),
    objective=PatchInfoNCE(),
    optimiser=Optimiser(learning_rate=2e-3),
    training=Training(batch_size=32, epochs=20, patience=5, micro_batch=4),
    probe=Probe(learning_rates=(1e-3,), epochs=200, standardise=True),
    cache=CacheSettings(dtype="uint8"),
)
