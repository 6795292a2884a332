"""An empty torchaudio for the packages that import it and never call it.

`encodec` and `distillmos` import torchaudio for command-line tools. PyPI's torchaudio cannot load
its library beside the CPU build of torch, so where it is missing an empty module stands in, for
the length of one import and no longer: transformers stumbles over a torchaudio that is not one.
"""

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torchaudio_for_import() -> Iterator[None]:
    """Make `import torchaudio` succeed inside the block."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module
        try:
            yield
        finally:
            del sys.modules["torchaudio"]
    else:
        yield
