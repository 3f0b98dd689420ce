"""``kimi-vl batch``: answers a file of requests or describes a folder of pictures, and goes on where it was stopped."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..batch.lines import FileLines, FolderLines
    from ..batch.results import Results

# What a line of a folder may say beside its prompt: the option, and the field of the body.
FIELDS = {"max_tokens": int, "temperature": float, "thinking_budget": int, "seed": int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="IN.jsonl OUT.jsonl, or OUT.jsonl alone with --folder")
    parser.add_argument("--model", help="as KIMI_VL_MODEL: a published name, demo, auto, a folder, … (auto)")
    parser.add_argument("--ordered", action="store_true", help="write answers in the order of the lines")
    parser.add_argument("--allow-paths", action="store_true", help="lines may name files outside of their folder")
    folder = parser.add_argument_group("a folder of pictures in the place of IN.jsonl")
    folder.add_argument("--folder", type=Path, metavar="PICTURES", help="ask about every picture in this folder")
    folder.add_argument("--prompt", metavar="TEXT", help="what to ask about each")
    folder.add_argument("--system", metavar="TEXT", help="replaces the default system message")
    for name, kind in FIELDS.items():
        folder.add_argument(f"--{name.replace('_', '-')}", type=kind, help="as in the body of a request")


def run(arguments: argparse.Namespace) -> int:
    source, target = _names(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    from ..batch.results import Results

    with contextlib.closing(Results(target)) as results, _lines(arguments, source, results) as (lines, folder):
        from .. import pipeline
        from ..batch.files import Files
        from ..batch.progress import Progress
        from ..batch.run import Batch
        from ..serving.options import ServerOptions
        from .serve import settled

        chosen = settled(ServerOptions(model=arguments.model or os.environ.get("KIMI_VL_MODEL") or "auto"))
        loaded = pipeline.load(chosen.model)
        progress = Progress(sys.stderr, lines.total, results.earlier)
        files = Files(folder, arguments.allow_paths)
        try:
            Batch(loaded, chosen, iter(lines), files, results, progress, arguments.ordered).run()
        finally:
            progress.end()
            loaded.engine.close(wait=False)
    return 1 if progress.failed else 0


def _names(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """Where the lines are (None: a folder of pictures), and where the answers go."""
    if arguments.folder is not None:
        if len(arguments.files) != 1 or not arguments.prompt:
            raise UserError("E_PARAMETER", 'write: kimi-vl batch --folder PICTURES --prompt "What is this?" OUT.jsonl')
        return None, arguments.files[0]
    if any(getattr(arguments, name) is not None for name in ("prompt", "system", *FIELDS)):
        raise UserError("E_PARAMETER", "prompts and sampling are in the lines; give these options with --folder.")
    if len(arguments.files) != 2:
        raise UserError("E_PARAMETER", "write: kimi-vl batch IN.jsonl OUT.jsonl (- is standard input or output)")
    return arguments.files[0], arguments.files[1]


@contextlib.contextmanager
def _lines(
    arguments: argparse.Namespace, source: str | None, results: Results
) -> Iterator[tuple[FileLines | FolderLines, Path]]:
    """The lines, and the folder in which they name files."""
    from ..batch.lines import FileLines, FolderLines, pictures

    if source is None:
        folder: Path = arguments.folder
        if next(pictures(folder), None) is None:
            raise UserError("E_PARAMETER", f"{folder}: no pictures are there; name another folder.")
        body = {name: getattr(arguments, name) for name in FIELDS if getattr(arguments, name) is not None}
        yield FolderLines(folder, arguments.prompt, arguments.system, body), folder
    elif source == "-":
        yield FileLines(sys.stdin.buffer, None), Path()
    else:
        try:
            file = open(source, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError("E_PARAMETER", f"{source}: cannot be read ({error.strerror}).") from None
        with file:
            status = os.fstat(file.fileno())
            if results.same_as(status):
                raise UserError("E_PARAMETER", "the answers would go to the file of the lines; name another one.")
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
            yield FileLines(file, size), Path(source).parent
