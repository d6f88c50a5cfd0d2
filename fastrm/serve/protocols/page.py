"""The page at `/`, files without a build step that ask nobody but their own server, and what it shows of the server.

GET /activity answers with the figures of `Activity.report`.
"""

import mimetypes
from pathlib import Path

from fastapi import APIRouter, Response

from fastrm.serve.app import Service

_FOLDER = Path(__file__).parents[1] / "page"
_PATHS = {"/": "index.html"} | {f"/page/{name}": name for name in ("page.css", "page.js", "examples.js")}
# Scripts, styles and requests of this server alone, pictures also from the page's own memory; no other site frames it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(service: Service) -> APIRouter:
    """Return the router of /, /page and /activity."""
    router = APIRouter()
    for path, name in _PATHS.items():
        _add_file(router, path, _FOLDER / name)

    @router.get("/activity")
    async def activity() -> dict:
        return service.activity.report(service.scheduler.queue_length)

    return router


def _add_file(router: APIRouter, path: str, file: Path) -> None:
    """Answer with a file, always the whole of it: a Range that is malformed would be answered in plain text."""
    content, kind = file.read_bytes(), mimetypes.guess_type(file.name)[0]

    @router.get(path)
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)
