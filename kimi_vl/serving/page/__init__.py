"""The chat page at ``/``: its files as routes, read once, with the headers that confine it to this server."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent
# Scripts and styles come from this server's files alone, and no text is ever read as markup.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
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


def page_routes() -> list[Route]:
    """Routes for ``/`` and for each file below ``/page/``. They need no API key: no file says anything of the model."""
    files = [file for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES]
    return [_route("/" if file.name == "index.html" else f"/page/{file.name}", file) for file in files]


def _route(path: str, file: Path) -> Route:
    body = file.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}

    async def answer(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=TYPES[file.suffix], headers=headers)

    return Route(path, answer, methods=["GET"], name=file.name)
