"""Greedy InfoMax on STL-10, the vision experiment of the paper (Löwe et al. 2019, section 4.1 and appendix A.1).

As in the paper: 64x64 random crops of the unlabelled pictures, mirrored half of the time, in grayscale, as 7x7 patches
of 16x16; a pre-activation ResNet-50 without batch normalisation and without its last group, in three modules; 16
negatives, 5 rows predicted; Adam at 1.5e-4; a linear classifier on the mean of the patches, of centre crops.

Where the paper and the code published with it differ, this follows the paper, and `--set` gives the other:

    what           paper                              published code's defaults
    learning rate  1.5e-4                             optimiser.learning_rate=2e-4
    batch          16 images on each of 8 GPUs: 128   training.batch_size=32 for one of its GPUs
    negatives      from the 16 images of one GPU      training.loss_group=null: from the whole batch
    softmax        log softmax                        log(softmax + 1e-11): the same value where it is not tiny
    pixels         not told                           mean 0.4120, deviation 0.2570: taken here

Where this differs from both:

* A twentieth of the unlabelled pictures is held out, to tell when a module has converged. The paper trains "until
  convergence" one module after another, and 300 epochs together; training.patience=300 always trains 300.
* A cache holds one view of each picture where the paper's later modules see fresh crops; cache.views=8 stores eight.
"""

from __future__ import annotations

from layerwise.data.stl10 import STL10
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.infonce import PatchInfoNCE
from layerwise.recipe import CacheSettings, Optimiser, Probe, Recipe, Training

recipe = Recipe(
    name="stl10",
    dataset=STL10(crop=64, flip=True, grayscale=True, mean=(0.4120,), std=(0.2570,)),
    network=PatchResNet(
        patch=16,
        patch_stride=8,
        stem_channels=64,
        groups=(
            Group(channels=256, blocks=3),
            Group(channels=512, blocks=4, stride=2),
            Group(channels=1024, blocks=6, stride=2),
        ),
    ),
    objective=PatchInfoNCE(steps=5, skip=1, negatives=16),
    optimiser=Optimiser(learning_rate=1.5e-4),
    training=Training(batch_size=128, loss_group=16, epochs=300, patience=20, tolerance=1e-3),
    probe=Probe(learning_rates=(1e-3,), epochs=300),
    cache=CacheSettings(dtype="float16"),
)
