"""Where sdengine keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import StorageError


def cache_dir() -> Path:
    """$SDENGINE_CACHE, else $XDG_CACHE_HOME/sdengine, else ~/.cache/sdengine; it may not exist yet.

    raises      StorageError when none of the three is known
    source      XDG Base Directory Specification 0.8: a relative XDG_CACHE_HOME counts as unset
    """
    if own := os.environ.get("SDENGINE_CACHE"):
        return Path(own).absolute()
    if (xdg := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(xdg):
        return Path(xdg) / "sdengine"
    try:
        return Path.home() / ".cache" / "sdengine"
    except RuntimeError as error:
        raise StorageError(
            f"no folder for the cache: {error}",
            hint="set SDENGINE_CACHE to a folder that you may write",
        ) from error
