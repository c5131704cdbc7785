"""Weights files by content: a digest, or a configuration, to a verified file, its tensors and its tables.

A weights file is a safetensors file named by the SHA-256 of its bytes. It is looked for among the bundled files, then
in a cache folder; never under a path or URL that metadata gives. It holds

    analysis.*, synthesis.*      the networks' parameters (float16 or float32), as `transforms` names them
    gain, shift   (Q, M) float32 symbol = rint(latent * gain - shift)
    step, offset  (Q, M) float32 dequantised latent = symbol * step + offset, in exactly these two operations
    tables.minimum, tables.length (Q, R) int32 and tables.frequency (n,) uint16, integer frequency tables (`tables`)
    contexts.source (Q, M, S) int16, contexts.weight (Q, M, S) uint8, contexts.threshold (Q, M, K - 1) uint16,
    contexts.predicted (Q, M) uint8, contexts.zero (Q, M) uint16, if the tables have contexts (`contexts`)
    compressai.cumulative (M, L), compressai.length (M,), compressai.offset (M,) int32, the tables of CompressAI's own
    streams, if the file was made from a checkpoint that has them (`legacy.stream`)

for Q qualities, M latent channels and R = M or M K rows, and in its metadata `format`, `model`, `metric`, `qualities`,
`architecture` and `provenance`. Nothing is computed from floats at load, so symbols and latents are the same on every
machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from platformdirs import user_cache_path
from safetensors import SafetensorError

from zarr_cae.coder.contexts import Contexts
from zarr_cae.coder.tables import Tables
from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError

Metric = Literal["mse", "ms-ssim"]
METRICS: tuple[Metric, ...] = ("mse", "ms-ssim")
QUALITIES = range(1, 9)
DEFAULT_MODEL = "cae-v1"
"""The bundled family."""
ZOO_MODEL = "bmshj2018-factorized"
"""CompressAI's factorized-prior models."""
MODELS = (DEFAULT_MODEL, ZOO_MODEL)
FORMAT = "zarr-cae-weights-1"
CACHE_VARIABLE = "ZARR_CAE_WEIGHTS"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST_HEADER = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says of itself, read from its header alone."""

    digest: str
    """`sha256:` and 64 hex digits, from the file's name; checked against the bytes when they are loaded."""
    path: Path
    model: str
    metric: Metric
    qualities: tuple[int, ...]
    architecture: Mapping[str, Any]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Weights:
    """A loaded and verified weights file."""

    info: WeightsInfo
    tensors: Mapping[str, npt.NDArray[Any]]
    tables: tuple[Tables, ...]
    """One a quality."""

    def row(self, quality: int) -> int:
        """The first index of gain, shift, step, offset and tables for this quality."""
        return self.info.qualities.index(quality)

    @property
    def latent_channels(self) -> int:
        """M."""
        return int(self.tensors["gain"].shape[1])


def check_digest(digest: object) -> str:
    """Return `digest` if it has the form `sha256:<64 hex digits>`; raise CAEConfigurationError otherwise."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CAEConfigurationError(
            f"cae: weights must be 'sha256:' and 64 lower-case hex digits, got {digest!r}; a file is made known "
            "with `zarr-cae weights import FILE`, which prints its digest"
        )
    return digest


def cache_folder() -> Path:
    """Where imported weights live: `$ZARR_CAE_WEIGHTS`, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("zarr-cae") / "weights"


def bundled_folder() -> Path:
    """Where the package's own weights lie."""
    return Path(str(resources.files("zarr_cae.weights") / "bundled"))


def available() -> Iterator[WeightsInfo]:
    """Every weights file on this machine, the bundled ones first."""
    for folder in (bundled_folder(), cache_folder()):
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            if _DIGEST.fullmatch(f"sha256:{path.stem}"):
                try:
                    yield _info(path, path.stat().st_mtime_ns)
                except CAEConfigurationError as error:  # one damaged file must not hide the others
                    _log.warning("%s", error)


def default_digest(model: str, quality: int, metric: str) -> str:
    """The digest of the weights that a new array with this configuration uses.

    Raises WeightsNotFoundError if there are none on this machine.
    """
    for info in available():
        of_caecodec = info.architecture.get("margin")  # made for migrated arrays only
        if info.model == model and info.metric == metric and quality in info.qualities and not of_caecodec:
            return info.digest
    how = (
        f"run `zarr-cae weights fetch --quality {quality} --metric {metric}` once on a machine with a network, or "
        "`zarr-cae weights import FILE`"
        if model == ZOO_MODEL
        else "reinstall zarr-cae, whose bundled weights are incomplete"
    )
    raise WeightsNotFoundError(
        f"cae: no weights for model {model!r}, quality {quality}, metric {metric!r} on this machine; {how}"
    )


def find(digest: str, *, model: str, quality: int, metric: str) -> WeightsInfo:
    """The file with this digest, which must serve this configuration.

    Raises WeightsNotFoundError, which names all four, if no file has it; CAEConfigurationError if the file is of
    another model, quality or metric.
    """
    check_digest(digest)
    for folder in (bundled_folder(), cache_folder()):
        path = folder / f"{digest.removeprefix('sha256:')}.safetensors"
        if path.is_file():
            info = _info(path, path.stat().st_mtime_ns)
            break
    else:
        raise WeightsNotFoundError(
            f"cae: weights {digest} (model {model!r}, quality {quality}, metric {metric!r}) are not on this machine; "
            "get the file from whoever wrote the array and run `zarr-cae weights import FILE`, or install the "
            f"zarr-cae release that wrote it (looked in {bundled_folder()} and {cache_folder()})"
        )
    if (info.model, info.metric) != (model, metric) or quality not in info.qualities:
        raise CAEConfigurationError(
            f"cae: weights {digest} are for model {info.model!r}, metric {info.metric!r}, qualities "
            f"{list(info.qualities)}, not for model {model!r}, quality {quality}, metric {metric!r}"
        )
    return info


@lru_cache(maxsize=16)
def load(path: Path) -> Weights:
    """Read and verify the file that `find` returned. Raises CAEConfigurationError if it is damaged or incomplete."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != path.stem:
        raise CAEConfigurationError(
            f"cae: weights file {path} has SHA-256 {digest}, expected {path.stem}; it is damaged: remove it and "
            "import or install it again"
        )
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> Weights:
    try:
        info, tensors = _info_of_header(_header(content, path), path), safetensors.numpy.load(content)
    except SafetensorError as error:
        raise CAEConfigurationError(f"cae: weights file {path} is not a safetensors file: {error}") from error
    count = len(info.qualities)
    shape = tensors["gain"].shape if "gain" in tensors else ()
    rows = tensors["tables.minimum"].shape if "tables.minimum" in tensors else ()
    for name, dtype in {
        "gain": np.float32, "shift": np.float32, "step": np.float32, "offset": np.float32,
        "tables.minimum": np.int32, "tables.length": np.int32,
    }.items():  # fmt: skip
        tensor, wanted = tensors.get(name), rows if name.startswith("tables.") else shape
        if tensor is None or tensor.dtype != dtype or tensor.shape != wanted or len(wanted) != 2 or wanted[0] != count:
            got = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            of = "rows" if name.startswith("tables.") else "channels"
            raise CAEConfigurationError(
                f"cae: weights file {path}: expected {name} as {np.dtype(dtype)} ({count}, {of}), got {got}"
            )
    for name in ("gain", "shift", "step", "offset"):
        if not np.isfinite(tensors[name]).all() or (name in ("gain", "step") and (tensors[name] == 0).any()):
            raise CAEConfigurationError(f"cae: weights file {path}: {name} must be finite, and gain and step not 0")
    frequency = tensors.get("tables.frequency", np.empty(0, np.uint16))
    if frequency.dtype != np.uint16:
        raise CAEConfigurationError(
            f"cae: weights file {path}: expected tables.frequency as uint16, got {frequency.dtype}"
        )
    lengths = tensors["tables.length"]
    ends = np.cumsum(lengths.astype(np.int64).sum(1))
    if (lengths < 2).any() or ends[-1] != len(frequency):
        raise CAEConfigurationError(
            f"cae: weights file {path}: tables.frequency has {len(frequency)} entries, expected {ends[-1]}"
        )
    parts = np.split(frequency, ends[:-1])
    contexts = [_contexts(tensors, row, path) for row in range(count)]
    tables = tuple(map(Tables, tensors["tables.minimum"], lengths, parts, contexts))
    if any(table.channels != shape[1] for table in tables):
        raise CAEConfigurationError(
            f"cae: weights file {path}: expected tables of {shape[1]} channels, got {tables[0].channels}"
        )
    return Weights(info, tensors, tables)


def _contexts(tensors: Mapping[str, npt.NDArray[Any]], row: int, path: Path) -> Contexts | None:
    names = [field.name for field in fields(Contexts)]
    present = [f"contexts.{name}" for name in names if f"contexts.{name}" in tensors]
    if not present:
        return None
    if len(present) != len(names) or any(len(tensors[name]) <= row for name in present):
        raise CAEConfigurationError(
            f"cae: weights file {path}: expected contexts.{{{', '.join(names)}}}, one a quality"
        )
    return Contexts(*(tensors[f"contexts.{name}"][row] for name in names))


def _header(content: bytes, path: Path) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(_LARGEST_HEADER, len(content) - 8):
        raise CAEConfigurationError(f"cae: weights file {path} is not a safetensors file, or is truncated")
    try:
        header = json.loads(content[8 : 8 + size])
    except ValueError as error:
        raise CAEConfigurationError(f"cae: weights file {path} is not a safetensors file: {error}") from error
    return header if isinstance(header, dict) else {}


def _info_of_header(header: dict[str, Any], path: Path) -> WeightsInfo:
    found = header.get("__metadata__")
    metadata: dict[str, Any] = found if isinstance(found, dict) else {}
    if metadata.get("format") != FORMAT:
        raise CAEConfigurationError(
            f"cae: weights file {path} has format {metadata.get('format')!r}, expected {FORMAT!r}; a CompressAI "
            "checkpoint is converted by `zarr-cae weights import FILE`, another format needs a newer zarr-cae"
        )
    try:
        model, metric, qualities = metadata["model"], metadata["metric"], tuple(json.loads(metadata["qualities"]))
        architecture, provenance = json.loads(metadata["architecture"]), json.loads(metadata["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise CAEConfigurationError(f"cae: weights file {path}: metadata is incomplete: {error!r}") from error
    known = all(type(quality) is int and quality in QUALITIES for quality in qualities)
    if (
        metric not in METRICS
        or not qualities
        or not known
        or len(set(qualities)) < len(qualities)
        or model not in MODELS
    ):
        raise CAEConfigurationError(
            f"cae: weights file {path} is for model {model!r}, metric {metric!r}, qualities {qualities}, which this "
            "zarr-cae does not know; install a newer one"
        )
    return WeightsInfo(f"sha256:{path.stem}", path, model, metric, qualities, architecture, provenance)


@lru_cache(maxsize=256)
def _info(path: Path, _modified: int) -> WeightsInfo:
    with path.open("rb") as file:
        size = int.from_bytes(start := file.read(8), "little")
        return _info_of_header(_header(start + file.read(min(size, _LARGEST_HEADER)), path), path)


def pack(
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    model: str,
    metric: str,
    qualities: tuple[int, ...],
    architecture: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> bytes:
    """The bytes of a weights file; the same arguments give the same bytes."""
    metadata = {
        "format": FORMAT, "model": model, "metric": metric, "qualities": json.dumps(qualities),
        "architecture": json.dumps(architecture, sort_keys=True), "provenance": json.dumps(provenance, sort_keys=True),
    }  # fmt: skip
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return _sorted_metadata(safetensors.numpy.save(arrays, metadata))


def _sorted_metadata(content: bytes) -> bytes:
    """Rewrite the header with sorted keys: safetensors writes metadata in the order of a hash map."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def store(content: bytes, folder: Path | None = None) -> WeightsInfo:
    """Verify a weights file's bytes and put it under its digest into `folder` (the cache), whole or not at all."""
    folder = cache_folder() if folder is None else folder
    path = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    weights = _parse(content, path)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
            partial = Path(scratch) / path.name
            partial.write_bytes(content)
            partial.replace(path)
    return weights.info
