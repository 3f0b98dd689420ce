"""Names of files that operating systems, file managers and tools leave beside others: never part of a checkpoint."""

from __future__ import annotations

from pathlib import PurePath

_NAMES = frozenset(
    """
    .ds_store .localized .apdisk .fseventsd .spotlight-v100 .temporaryitems .trashes .documentrevisions-v100
    thumbs.db ehthumbs.db desktop.ini $recycle.bin
    .directory lost+found .snapshot .snapshots @eadir #recycle
    .cache .git .gitattributes .gitignore .ipynb_checkpoints __pycache__
    """.split()
) | {"icon\r", "system volume information"}
_BEGINNINGS = ("._", ".nfs", ".fuse_hidden", ".smbdelete", ".trash-", ".~lock.")
_ENDINGS = (".pyc", ".swp")


def is_foreign(name: str) -> bool:
    """Whether the file ``name``, a path below a checkpoint's folder, is one of those or lies in such a folder."""
    parts = [part.lower() for part in PurePath(name).parts]
    return any(part in _NAMES or part.startswith(_BEGINNINGS) or part.endswith(_ENDINGS) for part in parts)
