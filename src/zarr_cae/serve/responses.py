"""HTTP responses for values in memory and files: ETags, conditions and byte ranges (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from hashlib import blake2b
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*")


def respond(request: Request, content: bytes, media_type: str, cache_control: str = "no-cache") -> Response:
    """Return `content`, or the part of it that the request asks for.

    Parameters
    ----------
    request
        A GET or HEAD request. `If-None-Match`, `Range` and `If-Range` are honoured; a request of several ranges gets
        the whole content, as section 14.2 allows.
    content
        The whole value.
    media_type
        The type of the whole value.
    cache_control
        By default, clients may keep the value but must ask whether it changed.

    Returns
    -------
    Response
        200 with all bytes, 206 with a range, 304 if the client has the value, or 416 for a range beyond the value.
    """
    etag = f'"{blake2b(content, digest_size=16).hexdigest()}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": cache_control}
    if is_known(request, etag):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    if wanted is not None and request.headers.get("if-range", etag) == etag:
        span = byte_range(wanted, len(content))
        if span is not None and span.start >= span.stop:
            return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
        if span is not None:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(content)}"
            return Response(content[span.start : span.stop], 206, headers, media_type)
    return Response(content, 200, headers, media_type)


async def respond_file(request: Request, file: Path) -> Response:
    """Return a file, or the part of it that the request asks for, without reading all of it into memory."""
    found = await run_in_threadpool(file.stat)
    etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
    if is_known(request, etag):
        return Response(status_code=304, headers=headers)
    return FileResponse(file, headers=headers, media_type="application/octet-stream", stat_result=found)


def is_known(request: Request, etag: str) -> bool:
    """Return whether the client says by `If-None-Match` that it has this version."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag in known or "*" in known


def byte_range(header: str, length: int) -> range | None:
    """Return the bytes that a `Range` header asks for; an empty range if there are none; None to ignore the header."""
    found = _RANGE.fullmatch(header)
    if found is None or found[1] == found[2] == "":
        return None
    if not found[1]:
        return range(max(0, length - int(found[2])), length)
    start = int(found[1])
    end = length if not found[2] else min(int(found[2]) + 1, length)
    if found[2] and int(found[2]) < start:
        return None
    return range(start, end)
