"""Names of zarr that have no public path in the oldest supported release, each with the reason why it is needed.

Everything else comes from `zarr.abc`, `zarr.buffer`, `zarr.codecs`, `zarr.registry` and `zarr.storage`.
"""

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

__all__ = ["JSON", "ArraySpec", "ChunkKeyEncoding", "parse_chunk_key_encoding", "parse_named_configuration", "sync"]
