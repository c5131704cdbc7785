"""Read, check and write weights files.

A weights file is a safetensors file named by the SHA-256 of its bytes. It holds, for Q qualities, M latent channels,
S sources and R = M or M K rows:

    analysis.*, synthesis.*      the networks' parameters (float16 or float32), see `weights.architecture`
    gain, shift   (Q, M) float32 symbol = rint(latent * gain - shift)
    step, offset  (Q, M) float32 dequantised latent = symbol * step + offset, in exactly these two operations
    tables.minimum, tables.length (Q, R) int32 and tables.frequency (n,) uint16, integer frequency tables (`tables`)
    contexts.source (Q, M, S) int16, contexts.weight (Q, M, S) uint8, contexts.threshold (Q, M, K - 1) uint16,
    contexts.predicted (Q, M) uint8, contexts.zero (Q, M) uint16, if the tables have contexts (`contexts`)
    compressai.cumulative (M, L), compressai.length (M,), compressai.offset (M,) int32, the tables of CompressAI's own
    streams, if the file was made from a checkpoint that has them (`legacy.stream`)

A file without networks and without an architecture serves to read latents, but not pixels. Its metadata hold `format`,
`model`, `metric`, `qualities`, `architecture`, `provenance` and, if the weights have one, `name`. Loading a file
computes nothing from floats, so that symbols and latents are the same on every machine.

Files are untrusted. Kinds and shapes of all tensors are checked in the header, against the architecture and each other,
before any tensor is allocated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from zarr_cae.coder.contexts import Contexts
from zarr_cae.coder.tables import Tables
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.weights.architecture import LARGEST_WIDTH, Shape, parameter_shapes

Metric = Literal["mse", "ms-ssim"]
METRICS: tuple[Metric, ...] = ("mse", "ms-ssim")
QUALITIES = range(1, 9)
LAMBDAS: dict[Metric, tuple[float, ...]] = {
    "mse": (0.0011, 0.0035, 0.0067, 0.0130, 0.0250, 0.0260, 0.0620, 0.1480),
    "ms-ssim": (2.10, 4.58, 8.73, 16.64, 31.73, 42.00, 92.00, 200.00),
}
"""Weight of the distortion at qualities 1 to 8 in the training of the bundled family: of the mean squared error in
units of 1/255, or of 1 - MS-SSIM, relative to bits per pixel.

Qualities 2 to 5 have CompressAI's values. With its other values, the rate at quality 1 would exceed CompressAI's, and
the rate would nearly double from 5 to 6, which belong to different networks.
"""
DEFAULT_MODEL = "cae-v1"
"""The bundled family."""
ZOO_MODEL = "bmshj2018-factorized"
"""CompressAI's factorized-prior models."""
MODELS = (DEFAULT_MODEL, ZOO_MODEL)
FORMAT = "zarr-cae-weights-1"
NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
"""The name of a family."""

_LARGEST_HEADER = 1 << 20
_LARGEST_CLASSES = 256
"""The coder holds the class of a position in a byte."""
_KINDS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""NumPy's names of the number types in safetensors files. NumPy has no bfloat16."""
_FLOATS = ("float16", "float32")
_COMPRESSAI = ("compressai.cumulative", "compressai.length", "compressai.offset")
_TensorTypes = Mapping[str, tuple[str, Shape]]
"""The kind and the shape of each tensor of a file."""


@dataclass(frozen=True)
class WeightsInfo:
    """The metadata of a weights file, read from its header alone."""

    digest: str
    """`sha256:` and 64 hex digits, from the file's name; `read` compares it with the bytes."""
    path: Path
    model: str
    metric: Metric
    qualities: tuple[int, ...]
    architecture: Mapping[str, Any]
    provenance: Mapping[str, Any]
    name: str | None = None
    """The name of the family, such as "histology", if it has one."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A loaded and verified weights file."""

    info: WeightsInfo
    tensors: Mapping[str, npt.NDArray[Any]]
    tables: tuple[Tables, ...]
    """The frequency tables of each quality."""

    def row(self, quality: int) -> int:
        """Return the first index of gain, shift, step, offset and tables for a quality."""
        return self.info.qualities.index(quality)

    @property
    def latent_channels(self) -> int:
        """M, the number of latent channels."""
        return int(self.tensors["gain"].shape[1])


def trade_off(info: WeightsInfo, quality: int) -> float | None:
    """Return the bits that the mean squared error of one pixel in units of 1/255 is worth; None if nothing is known.

    It follows the lambda of the training that the provenance of the weights names, or else that of the bundled family.
    Weights for MS-SSIM were trained for another error.
    """
    if info.metric != "mse":
        return None
    recipe = info.provenance.get("recipe")
    named = recipe.get("lambdas") if isinstance(recipe, dict) else None
    place = info.qualities.index(quality)
    if isinstance(named, list) and len(named) == len(info.qualities):
        value = named[place]
        if isinstance(value, int | float) and 0 < value < 1e3:
            return float(value)
    return LAMBDAS["mse"][quality - 1]


def read_info(path: Path) -> WeightsInfo:
    """Read the metadata of a weights file from its header, and check the header.

    Raises
    ------
    CAEConfigurationError
        If the file is not a weights file that this version knows, or its tensors do not fit each other.
    OSError
        If the file cannot be read.
    """
    return _read_info(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_info(path: Path, _modified: int) -> WeightsInfo:
    with _opened(path) as file:
        return _checked_info(file, path)


def read(path: Path) -> Weights:
    """Read a weights file, whose name must be its digest, and check all of it.

    Raises
    ------
    CAEConfigurationError
        If the file is damaged, or is not a weights file that this version knows.
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != path.stem:
        raise CAEConfigurationError(
            f"cae: weights file {path} has SHA-256 {digest}, expected {path.stem}; it is damaged: remove it and "
            "import or install it again"
        )
    with _opened(path) as file:
        info = _checked_info(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safetensors is no mapping
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            _refuse(path, f"{name} must be finite")
        if name in ("gain", "step") and (tensor == 0).any():
            _refuse(path, f"{name} must not be 0")
    return Weights(info, tensors, tuple(_tables(tensors, path)))


def _opened(path: Path) -> Any:
    """Open a safetensors file with safetensors' own reader, which checks offsets and shapes against its size."""
    if not path.is_file():
        raise CAEConfigurationError(f"cae: weights file {path} is not a file")
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8 or int.from_bytes(start, "little") > min(_LARGEST_HEADER, path.stat().st_size - 8):
        _refuse(path, "it is not a safetensors file, or is truncated")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise CAEConfigurationError(f"cae: weights file {path} is not a safetensors file: {error}") from error


def _refuse(path: Path, fault: str) -> NoReturn:
    raise CAEConfigurationError(f"cae: weights file {path}: {fault}")


def _checked_info(file: Any, path: Path) -> WeightsInfo:
    info = _info(file.metadata() or {}, path)
    tensor_types: dict[str, tuple[str, Shape]] = {}
    for name in file.keys():  # noqa: SIM118 - safetensors is no mapping
        tensor = file.get_slice(name)
        kind = tensor.get_dtype()
        if kind not in _KINDS:
            _refuse(path, f"{name} has numbers of kind {kind}, expected one of {', '.join(_KINDS)}")
        tensor_types[name] = (_KINDS[kind], tuple(tensor.get_shape()))
    _check_tensors(info, tensor_types)
    return info


def _info(metadata: Mapping[str, str], path: Path) -> WeightsInfo:
    if metadata.get("format") != FORMAT:
        _refuse(
            path,
            f"format is {metadata.get('format')!r:.80}, expected {FORMAT!r}; a CompressAI checkpoint is converted by "
            "`zarr-cae weights import FILE`, another format needs a newer zarr-cae",
        )
    try:
        model, metric, qualities = metadata["model"], metadata["metric"], tuple(json.loads(metadata["qualities"]))
        architecture, provenance = json.loads(metadata["architecture"]), json.loads(metadata["provenance"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CAEConfigurationError(f"cae: weights file {path}: metadata are incomplete: {error!r}") from error
    known = all(type(quality) is int and quality in QUALITIES for quality in qualities)
    distinct = known and len(set(qualities)) == len(qualities) > 0
    if metric not in METRICS or model not in MODELS or not distinct:
        _refuse(
            path,
            f"it is for model {model!r:.80}, metric {metric!r:.80}, qualities {qualities!r:.80}, which this zarr-cae "
            "does not know; install a newer one",
        )
    if not isinstance(architecture, dict) or not isinstance(provenance, dict):
        _refuse(path, "architecture and provenance must be JSON objects")
    name = metadata.get("name")
    if name is not None and not NAME.fullmatch(name):
        _refuse(path, f"its name is {name!r:.80}, expected small letters, digits and hyphens")
    return WeightsInfo(f"sha256:{path.stem}", path, model, metric, qualities, architecture, provenance, name)


def _check_tensors(info: WeightsInfo, tensor_types: _TensorTypes) -> None:
    """Check kinds and shapes of all tensors against the architecture and each other."""

    def expect(name: str, shape: Iterable[int | None], *kinds: str) -> Shape:
        """Check one tensor; None stands for any length. Returns its shape."""
        wanted = tuple(shape)
        kind, found = tensor_types.get(name, ("nothing", ()))
        fits = len(found) == len(wanted) and all(b is None or a == b for a, b in zip(found, wanted, strict=True))
        if kind not in kinds or not fits:
            sides = ", ".join("any" if side is None else str(side) for side in wanted)
            _refuse(info.path, f"expected {name} as {' or '.join(kinds)} of shape ({sides}), got {kind} {found}")
        return found

    count = len(info.qualities)
    channels = expect("gain", (count, None), "float32")[1]
    if not 1 <= channels <= LARGEST_WIDTH:
        _refuse(info.path, f"expected 1 to {LARGEST_WIDTH} latent channels, got {channels}")
    for name in ("shift", "step", "offset"):
        expect(name, (count, channels), "float32")
    classes = 1
    if any(name.startswith("contexts.") for name in tensor_types):
        classes += expect("contexts.threshold", (count, channels, None), "uint16")[2]
        if classes > _LARGEST_CLASSES:
            _refuse(info.path, f"expected at most {_LARGEST_CLASSES} classes a channel, got {classes}")
        sources = expect("contexts.source", (count, channels, None), "int16")[2]
        expect("contexts.weight", (count, channels, sources), "uint8")
        expect("contexts.predicted", (count, channels), "uint8", "bool")
        expect("contexts.zero", (count, channels), "uint16")
    for name in ("tables.minimum", "tables.length"):
        expect(name, (count, channels * classes), "int32")
    expect("tables.frequency", (None,), "uint16")
    if any(name.startswith("compressai.") for name in tensor_types):
        for name, shape in zip(_COMPRESSAI, ((channels, None), (channels,), (channels,)), strict=True):
            expect(name, shape, "int32")
    _check_networks(info, tensor_types, channels, expect)


def _check_networks(info: WeightsInfo, tensor_types: _TensorTypes, channels: int, expect: Any) -> None:
    """Check that parameters are those of the architecture, all of them and no others."""
    networks = {name for name in tensor_types if name.startswith(("analysis.", "synthesis."))}
    if not info.architecture and not networks:
        return
    try:
        shapes = parameter_shapes(info.model, info.architecture)
    except ValueError as error:
        raise CAEConfigurationError(f"cae: weights file {info.path}: architecture: {error}") from error
    if info.architecture["latent"] != channels:
        _refuse(info.path, f"expected gain of {info.architecture['latent']} channels, got {channels}")
    for name, shape in shapes.items():
        expect(name, shape, *_FLOATS)
    for name in sorted(networks - set(shapes)):
        _refuse(info.path, f"a network of its architecture has no {name}")


def _tables(tensors: Mapping[str, npt.NDArray[Any]], path: Path) -> Iterable[Tables]:
    lengths, frequency = tensors["tables.length"], tensors["tables.frequency"]
    ends = np.cumsum(lengths.astype(np.int64).sum(1))
    if (lengths < 2).any() or ends[-1] != len(frequency):
        _refuse(path, f"tables.frequency has {len(frequency)} entries, expected {ends[-1]}")
    names = [field.name for field in fields(Contexts)]
    for row, (minimum, length, part) in enumerate(
        zip(tensors["tables.minimum"], lengths, np.split(frequency, ends[:-1]), strict=True)
    ):
        contexts = None
        if "contexts.source" in tensors:
            contexts = Contexts(*(tensors[f"contexts.{name}"][row] for name in names))
        yield Tables(minimum, length, part, contexts)


def pack(
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    model: str,
    metric: str,
    qualities: tuple[int, ...],
    architecture: Mapping[str, Any],
    provenance: Mapping[str, Any],
    name: str | None = None,
) -> bytes:
    """Return the bytes of a weights file. The same arguments give the same bytes."""
    metadata = {
        "format": FORMAT, "model": model, "metric": metric, "qualities": json.dumps(qualities),
        "architecture": json.dumps(architecture, sort_keys=True), "provenance": json.dumps(provenance, sort_keys=True),
        **({} if name is None else {"name": name}),
    }  # fmt: skip
    arrays = {key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}
    return _sorted_metadata(safetensors.numpy.save(arrays, metadata))


def _sorted_metadata(content: bytes) -> bytes:
    """Sort the keys of the header's metadata: safetensors writes them in the order of a hash map."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
