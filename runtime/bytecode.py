"""Compiled Python of libraries that came without it, in a cache of the user's: compiling torch takes seconds.

Installed by `uv`, or in an image that sets PYTHONDONTWRITEBYTECODE, a library may have source code alone, and Python
compiles it anew in every process.
"""

import importlib.util
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FREE_BYTES = 2**28  # on the disk, of which torch takes a tenth: of a file that was cut short no import would recover


def keep_compiled(library: str) -> Path | None:
    """Where the library has no compiled modules and Python would not leave any beside it, what is imported from now on
    is compiled into the cache, and found there by the next process. To be called before the library is imported.

    Returns:
        The cache's folder; None where Python is left as it is: also where PYTHONPYCACHEPREFIX names another, and where
        a cache of this user's alone cannot be had.
    """
    spec = importlib.util.find_spec(library)
    if library in sys.modules or sys.pycache_prefix is not None or spec is None or spec.cached is None:
        return None
    beside = Path(spec.cached).parent
    writes_beside = not sys.dont_write_bytecode and os.access(
        beside if beside.exists() else beside.parent, os.W_OK
    )
    if Path(spec.cached).exists() or writes_beside:
        return None
    folder = _own_folder(library)
    if folder is not None:
        sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
    return folder


def _own_folder(library: str) -> Path | None:
    """One for each version: Python tells a module's source by its time and size, which images may give to all alike."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = named if named.is_absolute() else Path.home() / ".cache"
        folder = folder / "tuner" / "python" / f"{library}-{version(library)}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_ours = found.st_uid == os.geteuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)
        return folder if is_ours and shutil.disk_usage(folder).free > FREE_BYTES else None
    except (OSError, RuntimeError, PackageNotFoundError):  # nobody's home is a RuntimeError
        return None
