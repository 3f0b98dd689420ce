"""Pictures that lines name by their path, which must lie in the folder of the lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import UserError
from ..text.messages import Part, Turn


class Files:
    """Looks paths up from ``folder``; with ``anywhere`` they may be absolute, or lead out of it."""

    def __init__(self, folder: Path, anywhere: bool = False):
        self._folder, self._anywhere = folder.resolve(), anywhere

    def put_in(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """``turns`` with the paths of files in the place of their names; URLs stay. Raises :class:`UserError`."""
        return tuple(Turn(turn.role, tuple(map(self._part, turn.parts))) for turn in turns)

    def _part(self, part: Part) -> Part:
        if isinstance(part, str) or not isinstance(part.source, str) or _is_url(part.source):
            return part
        return dataclasses.replace(part, source=self._path(part.source))

    def _path(self, name: str) -> Path:
        try:
            path = (self._folder / name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # a loop of links, a null byte
            raise UserError("E_IMAGE_UNREADABLE", "there is no file of the name that is given; correct it.") from None
        if not self._anywhere and not path.is_relative_to(self._folder):
            raise UserError(
                "E_IMAGE_SOURCE", "a file must lie in the folder of the lines; move it there, or give --allow-paths."
            )
        if not path.is_file():
            raise UserError("E_IMAGE_UNREADABLE", "the name that is given is not that of a file; correct it.")
        return path


def _is_url(source: str) -> bool:
    """Whether the pipeline is to judge ``source``: a scheme of more than a letter, which a path in a folder lacks."""
    return source.lstrip()[:8].lower().startswith(("data:", "http:", "https:", "file:"))
