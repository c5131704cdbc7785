"""The HTTP server behind `zarr-cae serve`: an archive for Zarr readers, and a page to look at it.

    /                                           the page
    /zarr/KEY                                   the archive as `DecodedStore` shows it
    /latents/KEY                                its latents with standard codecs, if asked for
    /pictures.json                              the pictures of the archive
    /tiles/PICTURE/pixels|latents/SCALE/COLUMN/ROW.png?at=0,1

The server only reads, and only inside the archive's folder.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from zarr.buffer import default_buffer_prototype

from zarr_cae.errors import CAEError
from zarr_cae.latents.store import BottleneckStore
from zarr_cae.latents.view import is_metadata
from zarr_cae.serve.pictures import Pictures
from zarr_cae.serve.responses import respond, respond_file
from zarr_cae.serve.store import DecodedStore

_VIEWER = Path(__file__).parent / "viewer"
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "viewer.js": ("viewer.js", "text/javascript"),
    "viewer.css": ("viewer.css", "text/css"),
    "openseadragon.js": ("openseadragon.min.js", "text/javascript"),
}
_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"
_LONGEST_KEY = 1024
_MOST_REQUESTS = 1000
"""Requests and connections at one time; uvicorn answers further ones with 503."""

Endpoint = Callable[[Request], Awaitable[Response]]


def application(folder: Path, *, latents: bool = False, origins: str = "*", cache_bytes: int = 1 << 28) -> Starlette:
    """Return the ASGI application that serves a folder with a Zarr hierarchy.

    Parameters
    ----------
    folder
        The hierarchy.
    latents
        Whether to serve latents under `/latents/` as well.
    origins
        The origin whose web pages may read the archive (CORS); "*" allows all.
    cache_bytes
        Bytes of compressed chunks to keep at most, for pixels and for latents each.

    Raises
    ------
    CAEConfigurationError
        If the hierarchy has nothing to look at.
    """
    pictures = Pictures(folder)
    routes = [
        Route("/zarr/{key:path}", _values(folder, DecodedStore(folder, cache_bytes=cache_bytes))),
        Route("/pictures.json", _described(pictures)),
        Route("/tiles/{picture:int}/{kind}/{scale:int}/{column:int}/{row:int}.png", _tiles(pictures)),
        Route("/{name}", _page),
        Route("/", _page),
    ]
    if latents:
        view = DecodedStore(BottleneckStore(folder), cache_bytes=cache_bytes)
        routes.insert(1, Route("/latents/{key:path}", _values(folder, view)))
    cors = Middleware(
        CORSMiddleware,
        allow_origins=[origins],
        allow_methods=["GET", "HEAD"],
        allow_headers=["Range", "If-None-Match", "If-Range"],
        expose_headers=["Accept-Ranges", "Content-Length", "Content-Range", "ETag"],
        max_age=3600,
    )
    return Starlette(routes=routes, middleware=[cors], exception_handlers={CAEError: _failed})


def serve(app: Starlette, listening: socket.socket) -> uvicorn.Server:
    """Return a server for `app` on a socket from `listen`; its `run(sockets=[listening])` runs until it is stopped."""
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        app, host, port, log_level="warning", ws="none", lifespan="off", limit_concurrency=_MOST_REQUESTS
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raise OSError if the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_MOST_REQUESTS)


def _values(folder: Path, store: DecodedStore) -> Endpoint:
    root = folder.resolve()

    async def endpoint(request: Request) -> Response:
        key = request.path_params["key"]
        if not _is_key(key):
            return _missing()
        file = await run_in_threadpool((root / key).resolve)
        if not file.is_relative_to(root):  # a link out of the folder
            return _missing()
        if await store.makes(key):
            value = await store.get(key, default_buffer_prototype())
            kind = "application/json" if is_metadata(key) else "application/octet-stream"
            return _missing() if value is None else respond(request, value.to_bytes(), kind)
        if not await run_in_threadpool(file.is_file):
            return _missing()
        return await respond_file(request, file)

    return endpoint


def _is_key(key: str) -> bool:
    """Return whether a path is the key of a store; parts such as `..`, which a file system interprets, are not."""
    parts = key.split("/")
    return len(key) <= _LONGEST_KEY and not any(
        part in {"", ".", ".."} or "\\" in part or ":" in part or "\0" in part for part in parts
    )


def _described(pictures: Pictures) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        return JSONResponse(await run_in_threadpool(pictures.describe))

    return endpoint


def _tiles(pictures: Pictures) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        place = request.path_params
        at = request.query_params.get("at", "")
        if not all(number.isdecimal() and len(number) < 10 for number in at.split(",") if at):
            return _missing()
        positions = [int(number) for number in at.split(",")] if at else []
        content = await pictures.tile(
            place["picture"], place["kind"], place["scale"], place["column"], place["row"], positions
        )
        return _missing() if content is None else respond(request, content, "image/png", "max-age=60")

    return endpoint


async def _page(request: Request) -> Response:
    found = _FILES.get(request.path_params.get("name", ""))
    if found is None:
        return _missing()
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return FileResponse(_VIEWER / found[0], media_type=found[1], headers=headers)


async def _failed(_: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 500)


def _missing() -> Response:
    return PlainTextResponse("not found", 404)
