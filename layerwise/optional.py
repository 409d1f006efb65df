"""Libraries that only some recipes need, imported when they are used."""

from __future__ import annotations

from types import ModuleType

from layerwise.errors import NotReady


def torchaudio(purpose: str) -> ModuleType:
    """
    Raises:
        NotReady: it cannot be imported, as beside a torch built for another CUDA.
    """
    try:
        import torchaudio
        import torchaudio.transforms
    except (ImportError, OSError, RuntimeError) as error:
        raise NotReady(
            f"{purpose} need torchaudio, which cannot be imported here: {error}. It must be built for the same CUDA as "
            "torch: torch 2.11 to 2.14 and torchaudio 2.11 from the same package index work together"
        ) from error
    return torchaudio
