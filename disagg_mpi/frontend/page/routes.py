"""Where the page lies: its files, open to all, and its state, which needs the API key if there is one.

The files are read once; a request names none of them but by the routes that are here.
"""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.health import Health
from disagg_mpi.frontend.page.state import PageState

_FILES = {
    "/": "index.html",
    **{f"/page/{name}": name
       for name in ("page.css", "page.js", "dom.js", "graph.js", "prompt.js", "view.js", "icon.svg")},
}

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

OPEN_PAGE_PATHS = frozenset(_FILES)
"""Paths that need no API key: they are the same at every server."""

_HEADERS = {
    # Nothing from elsewhere, no script or style but the files; nobody else's page may frame this one.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A server of another version may answer at the same address tomorrow.
    "cache-control": "no-cache",
}


def page_routes(gate: Gate, health: Health) -> list[BaseRoute]:
    """For a starlette app. From now on the requests of ``gate`` are kept track of."""
    state = PageState(gate, health)

    async def tell_state(http: HttpRequest) -> Response:
        return Response(state.render(), headers=_HEADERS | {"cache-control": "no-store"},
                        media_type="application/json")

    return [*(_file_route(path, name) for path, name in _FILES.items()), Route("/page/state", tell_state)]


def _file_route(path: str, name: str) -> Route:
    body = resources.files(__package__).joinpath(name).read_bytes()
    media_type = _TYPES[name.rpartition(".")[2]]

    async def tell(http: HttpRequest) -> Response:
        return Response(body, headers=_HEADERS, media_type=media_type)

    return Route(path, tell, name=name)
