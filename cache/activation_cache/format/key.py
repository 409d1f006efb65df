"""The key of a cache: a flat JSON mapping of everything that determines its values.

Two caches with equal keys hold the same values, so the key must name every cause (weights, settings, data, upstream
cache) and nothing else (batch size, codec, dates). It is kept field by field, not only as a digest, so that a stale
cache can say which field differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias

from activation_cache.errors import FormatError, Stale

from .canonical import KEY_DEPTH, Json, canonical, depth
from .layout import FORMAT, Storage

MOST_SHOWN = 8  # fields in a message

Key: TypeAlias = "dict[str, Json]"


def make_key(fields: Mapping[str, Json], storage: Storage) -> Key:
    """The key for `fields` (nested mappings are flattened, `a.b`) stored as `storage.dtype`.

    Adds the fields `format` and `dtype`; the codec stays out, since it changes no value. For `uint8`, put whatever
    determines the calibration (how many samples, which, the seed) into `fields`.
    """
    flat: Key = {}
    _flatten("", fields, flat)
    for name, value in (("format", FORMAT), ("dtype", storage.dtype)):
        if flat.setdefault(name, value) != value:
            raise FormatError(f"make_key adds the field {name!r} itself ({value!r}), and was given {flat[name]!r}")
    if depth(flat, KEY_DEPTH) > KEY_DEPTH:
        raise FormatError(f"the key has lists in lists deeper than {KEY_DEPTH}")
    normal: Key = json.loads(canonical(flat))  # tuples become lists: what a reader of the file will see
    return normal


def _flatten(prefix: str, fields: Mapping[str, Json], flat: Key) -> None:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            _flatten(f"{prefix}{name}.", value, flat)
        elif f"{prefix}{name}" in flat:
            raise FormatError(f"the key has two fields named {prefix + name!r}")
        else:
            flat[f"{prefix}{name}"] = value


def differences(cached: Mapping[str, Json], wanted: Mapping[str, Json]) -> dict[str, tuple[Json, Json]]:
    """Field -> (cached value, wanted value) for each field in which two keys differ, in order of the field's name."""
    absent = object()
    names = sorted({*cached, *wanted})
    return {
        name: (cached.get(name), wanted.get(name))
        for name in names
        if cached.get(name, absent) is absent
        or wanted.get(name, absent) is absent
        or canonical(cached[name]) != canonical(wanted[name])
    }


def check_key(cached: Mapping[str, Json], wanted: Mapping[str, Json] | None, location: str) -> None:
    """Raises Stale if the two keys differ; None asks for no check."""
    different = differences(cached, wanted) if wanted is not None else {}
    if different:
        raise Stale(f"{location} was made from something else: {describe(different)}; write it again", different)


def describe(different: Mapping[str, tuple[Json, Json]]) -> str:
    """One line that says which fields differ: `weights (cached "ab", wanted "cd"), seed (cached 1, wanted 2)`."""

    def show(value: Json) -> str:
        text = canonical(value).decode()
        return text if len(text) <= 40 else text[:36] + '..."'

    def say(name: str) -> str:
        return name[:60] if name.isprintable() else show(name)

    fields = [f"{say(name)} (cached {show(old)}, wanted {show(new)})" for name, (old, new) in different.items()]
    return ", ".join(fields[:MOST_SHOWN]) + f" and {len(fields) - MOST_SHOWN} more" * (len(fields) > MOST_SHOWN)
