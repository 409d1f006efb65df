"""What all settings share: frozen, validated fields, and an identity on which the validity of stages and caches rests.

Fields marked with `free()` cannot change any computed value (where data lie, how many samples share a file, …). They
stay out of `identity`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from layerwise.errors import RecipeError
from layerwise.settings.sources import NoSource, code_of
from layerwise.settings.units import parse_bytes

JsonValue = Any
Shape = tuple[int, ...]
Bytes = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]
MOST_LAYERS = 1000
MOST_CHANNELS = 2**16
MOST_SIDE = 2**16
MOST_SAMPLES = 2**24
MOST_EPOCHS = 10**6
MOST_UPDATES = 2**40


def free(default: Any, **constraints: Any) -> Any:
    """A field that cannot change any computed value, and so does not make a stage or a cache stale."""
    return Field(default, json_schema_extra={"changes_values": False}, **constraints)


def labelled_only(default: Any, **constraints: Any) -> Any:
    """A field that only says which labelled samples probes see, or where their labels are, and so does not make a stage
    stale: a stage depends on the contents of the splits that it reads, which its identity holds besides.
    """
    return Field(default, json_schema_extra={"changes_stages": False}, **constraints)


def later(default: Any, **constraints: Any) -> Any:
    """A field that an earlier version lacked: at its default, results are those of that version, and it stays out of
    the identity, so that what was made then is still valid.
    """
    return Field(default, json_schema_extra={"absent_at_default": True}, **constraints)


class Settings(BaseModel):
    """Frozen and validated; an unknown field is an error.

    Settings of your own bring code along, on which results depend as much as on the fields. Their identity holds a
    digest of the source of the file that defines the class, and of the local files that this one imports, as it is
    when the class is defined: edit a loss, a forward pass or a transform there and what was made with it is stale.
    Comments, docstrings and formatting do not count. Not seen are what is installed as a package (but for the file that
    defines the class, and the package's version), what is imported by a computed name, and data files that the code
    reads. Where such a thing changes results, and for classes that were typed into a shell or a notebook, state a
    version and change it with every edit:

        class MyLoss(ObjectiveSettings):
            version = 2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: ClassVar[int | str | None] = None
    """Part of the identity, where it is set."""
    _code: ClassVar[str | NoSource | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        try:
            cls._code = code_of(cls)
        except NoSource as error:
            cls._code = error

    @classmethod
    def code(cls) -> dict[str, JsonValue]:
        """What identifies the code of a class that is not part of layerwise, by itself; empty for one that is.

        Raises:
            RecipeError: the source cannot be read, and the class states no version.
        """
        if isinstance(cls._code, NoSource) and cls.version is None:
            raise RecipeError(
                f"{cls._code}, so an edit of its code would go unnoticed. Define it in a file, or set version = 1 "
                f"in the class and change it with every edit"
            )
        found = {"code": cls._code if isinstance(cls._code, str) else None, "version": cls.version}
        return {name: value for name, value in found.items() if value is not None}

    def identity(self, *, of_stages: bool = False) -> dict[str, JsonValue]:
        """The fields that can change a computed value, as JSON; nested settings likewise, with the name of their
        kind, and a digest of the code of those that are not part of layerwise.

        Args:
            of_stages: without those that can only change what probes see.
        """
        found: dict[str, JsonValue] = {"kind": type(self).__name__, **self.code()}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("changes_values") is False:
                continue
            if of_stages and isinstance(extra, dict) and extra.get("changes_stages") is False:
                continue
            if isinstance(extra, dict) and extra.get("absent_at_default") and getattr(self, name) == info.default:
                continue
            found[name] = self._as_json(getattr(self, name), of_stages)
        return found

    @staticmethod
    def _as_json(value: object, of_stages: bool) -> JsonValue:
        if isinstance(value, tuple):
            return [Settings._as_json(item, of_stages) for item in value]
        return value.identity(of_stages=of_stages) if isinstance(value, Settings) else value


def codes(value: object, path: str = "") -> dict[str, JsonValue]:
    """`Settings.code` of each class within some settings that is not part of layerwise, by the path of its field."""
    if isinstance(value, tuple):
        inner = {str(index): item for index, item in enumerate(value)}
        found: dict[str, JsonValue] = {}
    elif isinstance(value, Settings):
        inner = {name: getattr(value, name) for name in type(value).model_fields}
        found = {path: own} if (own := value.code()) else {}
    else:
        return {}
    for name, item in inner.items():
        found |= codes(item, f"{path}.{name}".lstrip("."))
    return found
