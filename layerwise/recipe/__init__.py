"""Recipes: dataset, modules, objective, optimiser and schedule, in one Python file that only chooses.

A recipe file imports all that it needs of settings from here.
"""

from layerwise.data.settings import DatasetSettings
from layerwise.nets.settings import NetworkSettings
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import Bytes, Settings, Shape, free, labelled_only
from layerwise.settings.choices import FeedName, MethodName, ScheduleName
from layerwise.settings.training import CacheSettings, Optimiser, Probe, SpeechProbes, Training

__all__ = [
    "Bytes",
    "CacheSettings",
    "DatasetSettings",
    "FeedName",
    "MethodName",
    "NetworkSettings",
    "ObjectiveSettings",
    "Optimiser",
    "Probe",
    "Recipe",
    "ScheduleName",
    "Settings",
    "Shape",
    "SpeechProbes",
    "Training",
    "free",
    "labelled_only",
]
