"""The one door to the `encodec` package.

It imports torchaudio at the top for a command line tool that we never call. Where torchaudio
cannot be loaded, an empty module stands in for it during the import, and only then: transformers
stumbles over a torchaudio that is not one.
"""

import sys
from types import ModuleType

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        from encodec.model import EncodecModel
        from encodec.quantization.vq import ResidualVectorQuantizer
    finally:
        del sys.modules["torchaudio"]
else:
    from encodec.model import EncodecModel
    from encodec.quantization.vq import ResidualVectorQuantizer

__all__ = ["EncodecModel", "ResidualVectorQuantizer"]
