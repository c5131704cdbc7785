"""The loops of `rans` and `latents` compiled, at their first use, which keeps numba out of `import zarr_cae`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from zarr_cae import loops

__all__ = ["Kernels", "kernels"]

_log = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """The compiled functions, with the parameters of those in `loops`."""

    assign: Callable[..., float]
    encode: Callable[..., tuple[int, int]]
    decode: Callable[..., tuple[int, int]]
    restore: Callable[..., None]
    dequantise: Callable[..., None]


_compiled: Kernels | None = None
_compiling = threading.Lock()


def kernels() -> Kernels:
    """Compile the kernels, or load them from numba's cache, once in a process."""
    global _compiled  # noqa: PLW0603
    if _compiled is None:
        with _compiling:
            if _compiled is None:
                _compiled = _compile()
    return _compiled


def _compile() -> Kernels:
    import numba

    t = numba.types

    def read(kind: Any) -> Any:
        return t.Array(kind, 1, "C", readonly=True)

    def compiled(kernel: Callable[..., Any], signature: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(kernel)
        except Exception as error:  # noqa: BLE001 - no writable place, a full disk, a damaged cache: many types
            _log.debug("cae: numba's cache can't be used, compiling for this process only: %s", error)
            return numba.njit(signature, **options)(kernel)

    contexts = (read(t.int16), read(t.uint8), read(t.uint16))  # source, weight, threshold
    scratch = (t.uint16[::1], t.uint8[::1], t.uint8[::1], t.uint8[::1])  # score, activity, around, classes
    coded, rows = t.boolean[::1], (read(t.int32), read(t.int32))  # minimum, length
    tables = (*rows, read(t.uint32), read(t.uint32))  # offset, interval
    counts = t.UniTuple(t.int64, 2)  # type: ignore[no-untyped-call]
    inner = (t.int64, t.int64, *contexts, coded, t.uint8[::1], t.uint16[::1], t.uint8[::1])
    loops.run_classify = compiled(loops.classify, t.void(*inner))
    loops.run_spread = compiled(loops.spread, t.void(t.int64, t.int64, t.int64, t.uint8[::1], t.uint8[::1]))
    lanes = (t.uint32[::1], t.uint16[::1], t.int16[::1])  # state, words, escapes
    return Kernels(
        compiled(loops.assign, t.float64(read(t.int16), t.int64, *rows, coded, *contexts, *scratch, read(t.float32))),
        compiled(
            loops.encode, counts(read(t.int16), *tables, read(t.uint64), read(t.uint32), coded, t.uint8[::1], *lanes)
        ),
        compiled(
            loops.decode,
            counts(
                read(t.uint16), t.int64, t.int64, *tables, read(t.uint8), read(t.uint32), read(t.int16), t.boolean,
                read(t.uint32), coded, *contexts, *scratch, t.uint32[::1], t.int16[::1], t.int64[::1],
            ),
        ),
        compiled(loops.restore, t.void(t.int16[::1], t.int64, read(t.boolean))),
        compiled(
            loops.dequantise,
            t.void(read(t.int16), t.int64, read(t.float32), read(t.float32), t.float32[::1], *[t.int64] * 4),
        ),
    )  # fmt: skip
