"""Compile `kernels` with numba when they are first used. A process that only reads never compiles the encoder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from zarr_cae.coder import kernels
from zarr_cae.threads import hold_across_fork

__all__ = ["Decoders", "Encoders", "decoders", "dequantiser", "encoders"]

_log = logging.getLogger(__name__)


class Decoders(NamedTuple):
    """The compiled kernels that reading needs, with the parameters of `kernels`."""

    decode: Callable[..., tuple[int, int]]
    restore: Callable[..., None]


class Encoders(NamedTuple):
    """The compiled kernels that only writing needs, with the parameters of `kernels`."""

    assign: Callable[..., float]
    encode: Callable[..., tuple[int, int]]


_ready: dict[Callable[[], Any], Any] = {}
_compiling = threading.RLock()
_Made = TypeVar("_Made")

# A fork waits for a compilation to end: a child forked in the middle would inherit numba's lock and half-built state.
hold_across_fork(_compiling)


def decoders() -> Decoders:
    """Return the kernels for reading, compiled or loaded from numba's cache once per process."""
    return _once(_compile_decoders)


def dequantiser() -> Callable[..., None]:
    """Return the compiled `kernels.dequantise`, which only readers of latents need."""
    return _once(_compile_dequantiser)


def encoders() -> Encoders:
    """Return the kernels for writing, compiled or loaded from numba's cache once per process."""
    return _once(_compile_encoders)


def _once(make: Callable[[], _Made]) -> _Made:
    if make not in _ready:
        with _compiling:
            if make not in _ready:
                _ready[make] = make()
    return cast("_Made", _ready[make])


def _compiled(loop: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    import numba

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    signature = result(*arguments)
    try:
        return numba.njit(signature, cache=True, **options)(loop)
    except Exception as error:  # noqa: BLE001 - no writable folder, a full disk, a damaged cache raise many types
        _log.debug("cae: numba's cache can't be used, compiling for this process only: %s", error)
        return numba.njit(signature, **options)(loop)


class _Types:
    """The types of the kernels' parameters. Tuples hold the types of parameters that follow each other."""

    def __init__(self) -> None:
        from numba import types as t

        def read(kind: Any) -> Any:
            return t.Array(kind, 1, "C", readonly=True)

        self.int, self.bool, self.void, self.float = t.int64, t.boolean, t.void, t.float64
        self.counts = t.UniTuple(t.int64, 2)  # type: ignore[no-untyped-call]
        self.i16, self.u8, self.u16, self.u32, self.u64, self.f32, self.flags = map(
            read, (t.int16, t.uint8, t.uint16, t.uint32, t.uint64, t.float32, t.boolean)
        )
        self.symbols, self.words, self.states, self.places = t.int16[::1], t.uint16[::1], t.uint32[::1], t.int64[::1]
        self.values, self.bytes, self.coded = t.float32[::1], t.uint8[::1], t.boolean[::1]
        self.contexts = (self.i16, self.u8, self.u16)  # source, weight, threshold
        self.scratch = (self.words, self.bytes, self.bytes, self.bytes)  # score, activity, around, classes
        self.rows = (read(t.int32), read(t.int32))  # minimum, length
        self.tables = (*self.rows, self.u32, self.u32)  # offset, interval


def _compile_contexts() -> _Types:
    """Compile the functions that other kernels call, and bind them to the names that these call."""
    t = _Types()
    inner = (t.coded, t.bytes, t.words, t.bytes)  # coded, around, score, classes
    kernels.run_classify = _compiled(kernels.classify, t.void, t.int, t.int, *t.contexts, *inner)
    kernels.run_spread = _compiled(kernels.spread, t.void, t.int, t.int, t.int, t.bytes, t.bytes)
    return t


def _compile_decoders() -> Decoders:
    t = _once(_compile_contexts)
    shortcuts = (t.u8, t.u32, t.i16, t.bool, t.u32)  # lookup, likely, likely_symbol, sparse, zero_flag
    buffers = (*t.scratch, t.states, t.symbols, t.places)
    return Decoders(
        _compiled(kernels.decode, t.counts, t.u16, t.int, t.int, *t.tables, *shortcuts, t.coded, *t.contexts, *buffers),
        _compiled(kernels.restore, t.void, t.symbols, t.int, t.flags),
    )


def _compile_dequantiser() -> Callable[..., None]:
    t = _Types()
    where = (t.values, t.int, t.int, t.int, t.int)  # values, begin, rows, columns, channels
    compiled: Callable[..., None] = _compiled(kernels.dequantise, t.void, t.i16, t.int, t.f32, t.f32, *where)
    return compiled


def _compile_encoders() -> Encoders:
    t = _once(_compile_contexts)
    lanes = (t.states, t.words, t.symbols)  # state, words, escapes
    return Encoders(
        _compiled(kernels.assign, t.float, t.i16, t.int, *t.rows, t.coded, *t.contexts, *t.scratch, t.f32),
        _compiled(kernels.encode, t.counts, t.i16, *t.tables, t.u64, t.u32, t.coded, t.bytes, *lanes),
    )
