"""Kimi-VL on MindSpore, an optional backend: the extra ``mindspore``, in an environment of its own.

Every operator is of ``mindspore.ops`` and has kernels for a CPU and for Ascend. What the host computes (configuration,
rotary angles, weights of the bicubic resize, sampling) comes from the other rooms. Nothing imports the modules here
before :func:`require` has found that MindSpore works.
"""

from __future__ import annotations

from importlib import metadata

from ..errors import UserError

OLDEST, BELOW = (2, 7), (2, 11)  # of the extra in pyproject.toml
_INSTALL = "run pip install 'kimi-vl[mindspore]' in an environment of its own"


def require() -> None:
    """Raises :class:`UserError` (E_BACKEND) unless a MindSpore of the versions that work is installed, with NumPy 1."""
    try:
        version = metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        raise UserError("E_BACKEND", f"MindSpore is not installed; {_INSTALL}.") from None
    if not OLDEST <= _release(version) < BELOW:
        allowed = f"at least {'.'.join(map(str, OLDEST))} and below {'.'.join(map(str, BELOW))}"
        raise UserError("E_BACKEND", f"MindSpore must be {allowed}, and {version} is installed; {_INSTALL}.")
    numpy = metadata.version("numpy")
    if _release(numpy) >= (2,):
        raise UserError("E_BACKEND", f"MindSpore does not work with NumPy {numpy}; run pip install 'numpy<2'.")


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, two at most."""
    return tuple(int(number) for number in version.split(".")[:2] if number.isdigit())
