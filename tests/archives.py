"""Small archives for tests, and access to the values in a store."""

import asyncio
import json
import warnings

import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.core.array_spec import ArrayConfig
from zarr.storage import MemoryStore

from zarr_cae import CAECodec, open_bottleneck
from zarr_cae._zarr import ArraySpec
from zarr_cae.codec.cae import _coder, loaded

PROTOTYPE = default_buffer_prototype()
M = loaded(CAECodec(quality=2)).latent_channels


def ranges_of(whole):
    """Return byte requests of every kind, None among them, and what each must return of the bytes `whole`."""
    size = len(whole)
    return {
        None: whole, RangeByteRequest(5, 20): whole[5:20], RangeByteRequest(size - 3, size + 9): whole[-3:],
        OffsetByteRequest(7): whole[7:], SuffixByteRequest(9): whole[-9:], SuffixByteRequest(size + 9): whole,
    }  # fmt: skip


def run(coroutine):
    return asyncio.run(coroutine)


def create(data, chunks, store=None, **keywords):
    """Return an array of pixels of the codec `cae`, by default of quality 2 in memory."""
    options = {"compressors": None, "serializer": CAECodec(quality=2), **keywords}
    store = MemoryStore() if store is None else store
    array = zarr.create_array(store, shape=data.shape, chunks=chunks, dtype=data.dtype, **options)
    array[...] = data
    return array


def latents_of(data, chunks, **keywords):
    return open_bottleneck(create(data, chunks, **keywords).store)[...]


def document(array):
    """Return the array's `zarr.json`."""
    return json.loads(json.dumps(array.metadata.to_dict(), default=str))


def store_of(document):
    """Return a store that holds one `zarr.json`."""
    return MemoryStore({"zarr.json": PROTOTYPE.buffer.from_bytes(json.dumps(document).encode())})


def read(store, key):
    value = run(store.get(key, PROTOTYPE))
    return None if value is None else value.to_bytes()


def write(store, key, content):
    run(store.set(key, PROTOTYPE.buffer.from_bytes(content)))


def contents(store):
    """Return all keys of a store with their bytes."""

    async def listed():
        return [key async for key in store.list()]

    return {key: read(store, key) for key in run(listed())}


def chunks_of(store):
    return {key: value for key, value in contents(store).items() if not key.endswith("zarr.json")}


def consolidate(store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)


def fill(store, pixels, *, consolidated=False):
    """Make a group with a CAE array, a nested one and a plain one; return the latents of the first."""
    root = zarr.create_group(store, attributes={"site": "x"})
    for path in ("photo", "deep/photo"):
        array = root.create_array(
            path, shape=pixels.shape, chunks=(32, 32, 3), dtype="uint8", serializer=CAECodec(quality=2),
            compressors=None,
        )  # fmt: skip
        array[...] = pixels
    root.create_array("mask", data=pixels[..., 0])
    if consolidated:
        consolidate(store)
    return latents_of(pixels, (32, 32, 3))


def coder_of(array, codec=None):
    """Return the `ChunkCoder` of an array's chunks, for its own codec or another."""
    spec = ArraySpec(
        array.chunks, array.metadata.data_type, array.fill_value, ArrayConfig.from_dict({}),
        zarr.buffer.default_buffer_prototype(),
    )  # fmt: skip
    return _coder(array.metadata.codecs[-1] if codec is None else codec, spec)
