"""What has no public path in the oldest supported release of zarr, each with the reason why it is needed.

Everything else comes from `zarr.abc`, `zarr.buffer`, `zarr.codecs`, `zarr.registry` and `zarr.storage`.
"""

import sys
from types import FrameType

import zarr
from packaging.version import Version
from zarr.abc.codec import ArrayArrayCodec, Codec
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec  # type of the `chunk_spec` that zarr passes to every codec
from zarr.core.chunk_key_encodings import (
    ChunkKeyEncoding,  # base class of `WithoutLatentAxis`
    parse_chunk_key_encoding,  # reads the encoding that `WithoutLatentAxis` wraps
)
from zarr.core.common import (
    JSON,  # type of the values that `Codec.from_dict` takes and `to_dict` returns
    parse_named_configuration,  # reads {"name": ..., "configuration": ...} as zarr does
)
from zarr.core.sync import sync  # a `Store` that other stores read synchronously must run on zarr's own event loop

__all__ = [
    "JSON",
    "ArraySpec",
    "ChunkKeyEncoding",
    "parse_chunk_key_encoding",
    "parse_named_configuration",
    "spec_after_filters",
    "sync",
]

_EVOLVES_IN_ORDER = Version(zarr.__version__) >= Version("3.2")
"""Whether zarr passes each codec the spec that the codecs before it leave; older releases pass the array's own."""


def spec_after_filters(codec: Codec, array_spec: ArraySpec) -> ArraySpec:
    """Return the spec as it reaches a codec. Call this in the codec's `evolve_from_array_spec`, nowhere else."""
    if _EVOLVES_IN_ORDER:
        return array_spec
    # zarr < 3.2 passes the array's own spec even to a codec behind a transpose. The chain of codecs is only in the
    # frame of the caller's caller: the constructor of the metadata, or a method of the sharding codec.
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001
    chain: tuple[object, ...] = ()
    for _ in range(3):
        if frame is None or chain:
            break
        caller = frame.f_locals.get("self")
        chain = caller.codecs if isinstance(caller, ShardingCodec) else frame.f_locals.get("codecs_parsed_partial", ())
        frame = frame.f_back
    spec = array_spec
    for other in chain:
        if other is codec:
            return spec
        if isinstance(other, ArrayArrayCodec):
            spec = other.resolve_metadata(spec)
    return array_spec
