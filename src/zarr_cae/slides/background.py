"""The codec with which `convert` and `encode` write: it codes chunks of one colour once, and counts what is coded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from zarr.abc.buffer import Buffer
from zarr.buffer import default_buffer_prototype

from zarr_cae.codec import CAECodec
from zarr_cae.codec.chunk import is_all_fill

__all__ = ["WritingCodec", "begin"]

_counting: ContextVar[Callable[[int], None] | None] = ContextVar("counting", default=None)
"""Called with the number of samples of each chunk that was coded."""
_coding: ContextVar[dict[tuple[Any, ...], asyncio.Lock]] = ContextVar("coding")
"""A lock for each colour, so that of equal chunks only one goes through the network. It is for one event loop."""
_MOST = 1024
_colours: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
_lock = Lock()


def begin(samples: int, advance: Callable[[int], object]) -> Callable[[], None]:
    """Prepare an asyncio task to write with `WritingCodec`, and count what is coded.

    Parameters
    ----------
    samples
        How many samples the task will write.
    advance
        Called with the number of samples of each chunk that was coded; in all never more than `samples`.

    Returns
    -------
    Callable
        To be called after the task: counts the rest, such as chunks of fill value, which zarr does not code.
    """
    left = samples

    def count(coded: int) -> None:
        nonlocal left
        coded = min(coded, left)
        left -= coded
        advance(coded)

    _counting.set(count)
    _coding.set({})
    return lambda: count(left)


@dataclass(frozen=True)
class WritingCodec(CAECodec):
    """A `CAECodec` with the same metadata and the same bytes.

    Chunks of one colour, such as the glass around the tissue, go through the network once for each colour. zarr does
    not store chunks that are all fill value, so they are not coded at all.
    """

    __init__ = CAECodec.__init__

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Buffer:
        colour = self._colour(chunk_array)
        content = _known(colour)
        if content is None:
            async with _coding.get({}).setdefault(colour, asyncio.Lock()) if colour else nullcontext():
                content = _known(colour) or _keep(colour, await super()._encode_single(chunk_array, chunk_spec))
        _count(chunk_spec)
        return content

    def _encode_sync(self, chunk_array: Any, chunk_spec: Any) -> Buffer:
        colour = self._colour(chunk_array)
        content = _known(colour) or _keep(colour, super()._encode_sync(chunk_array, chunk_spec))
        _count(chunk_spec)
        return content

    async def _encode_partial_single(self, byte_setter: Any, chunk_array: Any, selection: Any, chunk_spec: Any) -> None:
        if not _whole(chunk_array, chunk_spec):
            await super()._encode_partial_single(byte_setter, chunk_array, selection, chunk_spec)
            _count(chunk_spec)
        elif is_all_fill(chunk_array.as_numpy_array(), chunk_spec):
            await byte_setter.delete()
        else:
            await byte_setter.set(await self._encode_single(chunk_array, chunk_spec))

    def _encode_partial_sync(self, byte_setter: Any, chunk_array: Any, selection: Any, chunk_spec: Any) -> None:
        if not _whole(chunk_array, chunk_spec):
            super()._encode_partial_sync(byte_setter, chunk_array, selection, chunk_spec)
            _count(chunk_spec)
        elif is_all_fill(chunk_array.as_numpy_array(), chunk_spec):
            byte_setter.delete_sync()
        else:
            byte_setter.set_sync(self._encode_sync(chunk_array, chunk_spec))

    def _colour(self, chunk_array: Any) -> tuple[Any, ...] | None:
        """Return a key for a chunk of one colour: equal for chunks of this colour, shape and codec. None for others."""
        pixels = np.asarray(chunk_array.as_numpy_array())
        corner = pixels[..., :1, :1]  # rows and columns are last in arrays that `convert` writes
        for part in (pixels[..., ::61, ::67], pixels):  # a look at some pixels is enough for most chunks
            if not (part == corner).all():
                return None
        return str(self.to_dict()), pixels.shape, pixels.dtype.str, corner.tobytes()


def _known(key: tuple[Any, ...] | None) -> Buffer | None:
    with _lock:
        content = None if key is None else _colours.get(key)
    return None if content is None else default_buffer_prototype().buffer.from_bytes(content)


def _keep(key: tuple[Any, ...] | None, content: Buffer) -> Buffer:
    if key is not None:
        with _lock:
            _colours[key] = content.to_bytes()
            while len(_colours) > _MOST:
                _colours.popitem(last=False)
    return content


def _whole(chunk_array: Any, spec: Any) -> bool:
    return tuple(chunk_array.shape) == tuple(spec.shape)


def _count(spec: Any) -> None:
    called = _counting.get()
    if called is not None:
        called(int(np.prod(spec.shape)))
