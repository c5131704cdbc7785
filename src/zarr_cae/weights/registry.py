"""Find the weights files on this machine by digest, name or configuration; load, store and list them.

A file is looked for among the bundled ones, then in the cache folder, then in the folders that this process has added
(`add_folder`), and never under a path or URL from metadata. A pickled `Digest` tells other processes of added folders.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TypeGuard

from platformdirs import user_cache_path

from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.files import atomic_write
from zarr_cae.weights.families import FAMILIES
from zarr_cae.weights.file import DEFAULT_MODEL, NAME, ZOO_MODEL, Weights, WeightsInfo, read, read_info

CACHE_VARIABLE = "ZARR_CAE_WEIGHTS"
DEFAULT_NAME = "photographs"
"""The name of the bundled family that a codec takes if it gets neither a name nor a digest."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_log = logging.getLogger(__name__)
_added_folders: list[Path] = []


def is_digest(value: object) -> TypeGuard[str]:
    """Return whether a value has the form `sha256:<64 hex digits>`."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def check_digest(digest: object) -> str:
    """Return a digest if it has the form `sha256:<64 hex digits>`; otherwise raise CAEConfigurationError."""
    if not is_digest(digest):
        raise CAEConfigurationError(
            f"cae: weights must be 'sha256:' and 64 lower-case hex digits, got {digest!r:.100}; `zarr-cae weights "
            "import FILE` makes a file known and prints its digest"
        )
    return digest


def cache_folder() -> Path:
    """Return the folder of imported weights: `$ZARR_CAE_WEIGHTS`, or one in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("zarr-cae") / "weights"


def bundled_folder() -> Path:
    """Return the folder of the weights that belong to the package."""
    return Path(str(resources.files("zarr_cae.weights") / "bundled"))


def add_folder(folder: Path) -> None:
    """Let this process look for weights files in one more folder."""
    if folder not in _added_folders:
        _added_folders.append(folder)


class Digest(str):
    """The digest of a weights file. Its pickle also names the folder of the file, if this process has added that.

    An array from `zarr_cae.open` reaches the workers of a DataLoader or of Dask as a pickle, and they have not added
    the folder with the weights of its archive. A codec within shards is pickled as its metadata, so the digest is all
    that every pickle has. In comparisons, hashes and JSON it is a plain string. Whoever loads a file checks its digest.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[str, str | None], Digest], tuple[str, str | None]]:
        folder = next((folder for folder in _added_folders if _path(folder, self).is_file()), None)
        return _unpickled, (str(self), None if folder is None else str(folder))


def _unpickled(digest: str, folder: str | None) -> Digest:
    """Return a digest from another process, and look for its file in the folder that this process has added."""
    if folder is not None and _path(Path(folder), digest).is_file():
        add_folder(Path(folder))
    return Digest(digest)


def _path(folder: Path, digest: str) -> Path:
    """Return the path of a weights file in a folder."""
    return folder / f"{digest.removeprefix('sha256:')}.safetensors"


def _folders() -> tuple[Path, ...]:
    return (bundled_folder(), cache_folder(), *_added_folders)


def available() -> Iterator[WeightsInfo]:
    """Yield every weights file on this machine, the bundled ones first.

    Entries of the folders that are not readable weights files are logged and left out.
    """
    seen: set[str] = set()
    for folder in _folders():
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            digest = f"sha256:{path.stem}"
            if _DIGEST.fullmatch(digest) and digest not in seen:
                try:
                    yield read_info(path)
                except (CAEConfigurationError, OSError) as error:  # one bad entry must not hide the others
                    _log.warning("%s", error)
                else:
                    seen.add(digest)


def default_digest(model: str, quality: int, metric: str) -> str:
    """Return the digest of the weights that a new array of this configuration uses.

    Raises
    ------
    WeightsNotFoundError
        If no file on this machine serves the configuration.
    """
    for info in available():
        serves = info.model == model and info.metric == metric and quality in info.qualities
        of_caecodec = info.architecture.get("margin")  # made for migrated arrays only
        if serves and not of_caecodec and _name(info) == DEFAULT_NAME:
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


def is_named(info: WeightsInfo) -> bool:
    """Return whether weights are of a family that codecs find by name: all bundled ones, and those with a name."""
    return info.name is not None or info.path.parent == bundled_folder()


def _name(info: WeightsInfo) -> str:
    """Return the name of a family. Files without a name count as the default one."""
    return info.name or DEFAULT_NAME


def family_name(digest: str) -> str | None:
    """Return the name of the family of weights; None if they have none, or are not on this machine."""
    info = find_digest(digest)
    return _name(info) if info is not None and is_named(info) else None


def resolve(weights: object, *, model: str, quality: int, metric: str) -> str:
    """Return the digest for the `weights` that a codec is made with.

    A digest gives itself. But that of a bundled file which does not serve the configuration gives the digest of the
    file of the same family that does, if there is one.

    Parameters
    ----------
    weights
        A digest, the name of a family ("photographs", or one that `zarr-cae weights list` shows), or None for the
        default. A bundled family has the default's weights at qualities where its own files would save too little.
    model, quality, metric
        The configuration that the weights must serve, if they are given by name.

    Raises
    ------
    WeightsNotFoundError
        If no file on this machine has the name and serves the configuration.
    CAEConfigurationError
        If `weights` is neither a name nor a digest.
    """
    if weights is None or weights == DEFAULT_NAME:
        return default_digest(model, quality, metric)
    if not isinstance(weights, str) or not NAME.fullmatch(weights):
        return _within_family(check_digest(weights), model, quality, metric)
    known = list(available())
    for info in known:
        if (info.name, info.model, info.metric) == (weights, model, metric) and quality in info.qualities:
            return info.digest
    metrics = {info.metric for info in known if (info.name, info.model) == (weights, model)}
    if metrics and metric not in metrics:
        raise WeightsNotFoundError(
            f"cae: the weights named {weights!r} are for metric {' and '.join(sorted(metrics))}, not {metric!r}; give "
            "that metric, or no weights"
        )
    if metrics and weights in FAMILIES:
        return default_digest(model, quality, metric)
    names = sorted({_name(info) for info in known if info.model == DEFAULT_MODEL})
    raise WeightsNotFoundError(
        f"cae: no weights named {weights!r} for model {model!r}, quality {quality}, metric {metric!r} on this "
        f"machine; known names are {', '.join(names)}: see `zarr-cae weights list`"
    )


def _within_family(digest: str, model: str, quality: int, metric: str) -> str:
    """Return the digest of the bundled file that serves a configuration and is of the same family as a bundled file.

    Return the same digest if that file serves, if none of its family does, or if it is not bundled.
    """
    path = _path(bundled_folder(), digest)
    if not path.is_file():
        return digest
    info = read_info(path)
    if info.model != model or (info.metric == metric and quality in info.qualities):
        return digest
    try:
        return resolve(_name(info), model=model, quality=quality, metric=metric)
    except WeightsNotFoundError:
        return digest


def find(digest: str, *, model: str, quality: int, metric: str) -> WeightsInfo:
    """Return the file with this digest, which must serve this configuration.

    Raises
    ------
    WeightsNotFoundError
        If no file has the digest. The message names all four parameters.
    CAEConfigurationError
        If the file is of another model, quality or metric.
    """
    info = find_digest(digest)
    if info is None:
        raise WeightsNotFoundError(
            f"cae: weights {digest} (model {model!r}, quality {quality}, metric {metric!r}) are missing; open the "
            "archive with `zarr_cae.open(...)`, or run `zarr-cae weights import OUT.zarr` (or FILE)"
        )
    if (info.model, info.metric) != (model, metric) or quality not in info.qualities:
        raise CAEConfigurationError(
            f"cae: weights {digest} are for model {info.model!r}, metric {info.metric!r}, qualities "
            f"{list(info.qualities)}, not for model {model!r}, quality {quality}, metric {metric!r}; for a new array "
            'give weights="", the name of a family, or the digest of weights that serve these'
        )
    return info


def find_digest(digest: str) -> WeightsInfo | None:
    """Return the file with this digest, or None if it is not on this machine."""
    check_digest(digest)
    for folder in _folders():
        path = _path(folder, digest)
        if path.is_file():
            return read_info(path)
    return None


@lru_cache(maxsize=16)
def load(path: Path) -> Weights:
    """Read and verify the file that `find` returned.

    Raises
    ------
    CAEConfigurationError
        If the file is damaged or incomplete.
    """
    return read(path)


@contextmanager
def temporary(content: bytes) -> Iterator[Weights]:
    """Yield the weights of a file that is not stored, to try them.

    Raises
    ------
    CAEConfigurationError
        If the bytes are not a valid weights file.
    """
    with tempfile.TemporaryDirectory(prefix="zarr-cae-weights-") as folder:
        yield read(store(content, Path(folder)).path)


def store(content: bytes, folder: Path | None = None) -> WeightsInfo:
    """Verify the bytes of a weights file and write it, under its digest, to a folder.

    Parameters
    ----------
    content
        The whole file.
    folder
        Where it goes; None is the cache folder. The file is written whole or not at all.

    Raises
    ------
    CAEConfigurationError
        If the bytes are not a valid weights file. Nothing is written then.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    if path.is_file():
        return read(path).info
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(content)
        read(partial)
    return read_info(path)
