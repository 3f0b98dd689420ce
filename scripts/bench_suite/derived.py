"""What is made of a checkpoint once and kept beside it, for those who cannot read the checkpoint itself.

Only the standard library is imported: some of them live in environments of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def beside(checkpoint: Path, ending: str, write: Callable[[Path], None]) -> Path:
    """What ``write`` makes of the folder ``checkpoint`` at the path that it is given: a file or a folder, whose name is
    that of the checkpoint with an ``ending``. It is there when it is complete, and made anew for a newer checkpoint."""
    target = checkpoint.with_name(f"{checkpoint.name}{ending}")
    if target.exists() and target.stat().st_mtime >= (checkpoint / "config.json").stat().st_mtime:
        return target
    _remove(target)
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        write(part)
        part.rename(target)
    finally:
        _remove(part)
    return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
