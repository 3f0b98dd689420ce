"""The chat page at ``/``: its files as routes, read once, with the headers that confine it to this server."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...text import prompts

FOLDER = Path(__file__).parent
# Scripts and styles come from this server's files alone, and no text is ever read as markup.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Files that belong together have no version in their names: each is asked for again, and mostly answered by 304.
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


PLACE = "\ufffc"
"""Stands in the ready messages where what the user writes goes."""


def page_routes() -> list[Route]:
    """Routes for ``/`` and for each file below ``/page/``. They need no API key: no file says anything of the model."""
    files = [file for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES]
    routes = [
        _route("/" if file.name == "index.html" else f"/page/{file.name}", file.read_bytes(), TYPES[file.suffix])
        for file in files
    ]
    return [*routes, _route("/page/prompts.json", json.dumps(_prompts()).encode(), "application/json")]


def _prompts() -> dict[str, dict[str, str]]:
    """The ready messages by the name of their function: the texts of each role, with :data:`PLACE` in the user's."""
    found = {}
    for make in (prompts.detect, prompts.click):
        texts = {}
        for message in make(PLACE):
            content = message["content"]
            texts[message["role"]] = content if isinstance(content, str) else content[-1]["text"]
        found[make.__name__] = texts
    return found


def _route(path: str, body: bytes, media_type: str) -> Route:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}

    async def answer(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return Route(path, answer, methods=["GET"], name=path)
