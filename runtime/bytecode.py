"""Compiled Python of libraries that came without it, in a cache of the user's: compiling torch takes seconds.

Installed by `uv`, or in an image that sets PYTHONDONTWRITEBYTECODE, a library may have source code alone, and Python
compiles it anew in every process.
"""

import importlib.util
import os
import sys
from pathlib import Path


def keep_compiled(library: str) -> Path | None:
    """Where the library has no compiled modules and Python would not leave any beside it, what is imported from now on
    is compiled into the cache, and found there by the next process. To be called before the library is imported.

    Returns:
        The cache's folder; None where Python is left as it is, as also where PYTHONPYCACHEPREFIX names another.
    """
    spec = importlib.util.find_spec(library)
    if sys.pycache_prefix is not None or spec is None or spec.cached is None or Path(spec.cached).exists():
        return None
    beside = Path(spec.cached).parent
    if not sys.dont_write_bytecode and os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner" / "python"
    except RuntimeError:  # nobody's home
        return None
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
    return folder
