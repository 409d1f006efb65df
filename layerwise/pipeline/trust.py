"""The recipe files and addresses of caches that the user chose on this machine: the only ones that a command runs, or
contacts, because a run says so.

A run may come from a stranger, and a recipe file is code. So `--recipe FILE.py` notes the file, by its absolute path
and the hashes of its content and of the local files that it imports, in the user's state directory
(XDG_STATE_HOME, else ~/.local/state), a small sealed file for each; and a command that works
on a run notes the address of its caches. A note that is damaged counts as none.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from activation_cache.store.files import require_real_folders
from layerwise.errors import DamagedData, WillNotFit
from layerwise.files.storage import read_json, write_json
from layerwise.settings.sources import digest, local_files

Say = Callable[[str], None]


def trust(path: Path, say: Say, sources: Mapping[str, Path] | None = None) -> None:
    """Note that the user named this recipe file, as it and what it imports are now.

    Args:
        sources: the files that run with it, by their names, where they are more than it shows by itself.

    Where that cannot be written the command goes on, and `say` is told: the file has to be named again next time.
    """
    path = path.resolve()
    files = {name: digest(file) for name, file in (sources or local_files(path)).items()}
    try:
        _write(*_note(path), {"path": str(path), "files": files})
    except (OSError, WillNotFit, DamagedData) as error:
        say(f"could not remember that you named {path} ({error}): later commands need --recipe again")


def changes(path: Path, say: Say, sources: Mapping[str, Path] | None = None) -> list[str] | None:
    """The files that differ from when the user named this recipe file; None where it was never named, or is gone.

    Args:
        sources: as for `trust`.
    """
    try:
        path = path.resolve(strict=True)
        root, note = _note(path)
        require_real_folders(root, str(note))
        known = read_json(root / note)
    except (OSError, ValueError, RuntimeError):
        return None
    except DamagedData as error:
        say(f"{error} Until then the recipe file counts as not named")
        return None
    before = None if known is None or known.get("path") != str(path) else known.get("files")
    if not isinstance(before, dict):
        return None
    now = sources or local_files(path)
    altered = [str(file) for name, file in now.items() if before.get(name) != digest(file)]
    return altered + [name for name in before if name not in now]


def trust_address(url: str | None) -> None:
    """Note that the user works with caches at this address; where that cannot be written, `knows_address` is false."""
    if url is None:
        return
    with suppress(OSError, WillNotFit, DamagedData):
        _write(*_note(url, "addresses"), {"url": url})


def knows_address(url: str | None, *, writes: bool = False) -> bool:
    """Whether caches there may be looked at, or written and replaced, because a run says so: where the user works; and
    looked at on this machine.
    """
    if url is None or (url.startswith("file://") and not writes):
        return True
    with suppress(OSError, DamagedData):
        root, note = _note(url, "addresses")
        require_real_folders(root, str(note))
        return (read_json(root / note) or {}).get("url") == url
    return False


def not_contacted(folder: Path, url: str, *, writes: bool = False) -> str:
    """What to say of an address that is not known, with the command that makes it so."""
    left = "nothing is written or replaced there" if writes else "it was not contacted"
    command = shlex.join(["layerwise", "status", f"--set=cache.url={url}", f"--run-dir={folder}"])
    return (
        f"{folder} says that its caches are at {url}, an address that was not named on this machine, so {left}. If "
        f"you trust "
        f"the address, name it with: {command}"
    )


def name_again(source: str, overrides: Sequence[str], folder: Path) -> str:
    """The command that names the recipe file of a run, as it is now, and changes nothing."""
    words = (f"--set={override}" for override in overrides)
    return shlex.join(["layerwise", "status", f"--recipe={source}", *words, f"--run-dir={folder}"])


def _write(root: Path, note: Path, content: dict[str, object]) -> None:
    (root / note).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_real_folders(root, str(note))
    known = None
    with suppress(DamagedData):  # it is written anew
        known = read_json(root / note)
    if known != content:
        write_json(root / note, content)


def _note(named: Path | str, kind: str = "recipes") -> tuple[Path, Path]:
    """The user's state directory, and where in it the note of this file or address lies."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    root = given if given.is_absolute() else Path.home() / ".local" / "state"
    return root, Path("layerwise", kind, hashlib.sha256(os.fsencode(named)).hexdigest()[:32] + ".json")
