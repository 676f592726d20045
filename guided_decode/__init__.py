"""Value-guided decoding: the PPO critic put to work at decoding time."""

from pathlib import Path

# In a checkout kernels/ and integrations/ stand beside this package, in a wheel inside it.
_PACKAGE = Path(__file__).resolve().parent
if not (_PACKAGE / "kernels").is_dir():
    __path__.append(str(_PACKAGE.parent))
