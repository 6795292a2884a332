"""An empty stand-in for torchaudio, which distillmos imports and never calls.

The torchaudio of PyPI cannot load its library beside the CPU build of torch.
"""

import importlib.machinery
import sys
import types


def ensure_torchaudio() -> None:
    """Put an empty module in torchaudio's place where the real one cannot be imported."""
    if "torchaudio" in sys.modules:
        return
    try:
        import torchaudio  # noqa: F401 - only whether it can be imported matters
    except (ImportError, OSError):
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module
