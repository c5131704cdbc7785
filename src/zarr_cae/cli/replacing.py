"""Write outputs under a temporary name until they are complete: files, Zarr hierarchies, `.npy` files.

A temporary name is `.NAME.partial-HOST-PID-TOKEN`, beside the output. A process that is killed leaves it behind, and
the next run with the same output removes it, if its process ran on this machine and runs no longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.cli.arguments import refuse

__all__ = [
    "check_parent",
    "create_npy",
    "is_zarr",
    "refuse_existing",
    "refuse_inside",
    "replacing",
    "replacing_zarr",
    "take_place",
]

_METADATA = ("zarr.json", ".zarray", ".zgroup")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""A flag of Linux's renameat2(2)."""


def is_zarr(path: Path) -> bool:
    """Return whether a folder is the root of a Zarr hierarchy."""
    return any((path / name).is_file() for name in _METADATA)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`, which takes its place at the end and vanishes on failure."""
    if path.is_dir():
        refuse(f"{path} is a folder")
    check_parent(path)
    _remove_stale(path)
    partial = _temporary(path, "partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_zarr(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield the name of a temporary folder beside `path`, which takes its place at the end and vanishes on failure."""
    check_parent(path)
    path = Path(path.absolute())
    refuse_existing(path, overwrite=overwrite)
    _remove_stale(path)
    partial = _temporary(path, "partial")
    try:
        yield partial
        take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a Zarr hierarchy and may be overwritten."""
    if path.exists() or path.is_symlink():
        if not overwrite:
            refuse(f"{path} exists; give --overwrite to replace it")
        if not is_zarr(path):
            refuse(f"{path} is not a zarr hierarchy, so it is not replaced")


def take_place(partial: Path, path: Path) -> None:
    """Give a folder its final name, and remove the folder that had that name.

    Linux exchanges the two names in one step, so that there is an output at every moment. Elsewhere the old folder
    has another name for a moment; if the process is killed then, the next run brings the old folder back.
    """
    if not path.exists():
        partial.rename(path)
        return
    old = _temporary(path, "old")
    if _exchange(partial, path):
        partial.rename(old)
    else:
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def create_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Create a `.npy` file and return its array, mapped into memory.

    The file's blocks are reserved first. On a full disk that raises OSError, where a write to the mapping would end
    the process by SIGBUS.
    """
    target = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate") and target.nbytes:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return target


def check_parent(path: Path) -> None:
    """Refuse an output whose folder does not exist, or can't be written to."""
    if not path.parent.is_dir():
        refuse(f"folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        refuse(f"folder {path.parent} can't be written to")


def refuse_inside(out: Path, sources: Iterable[Path]) -> None:
    """Refuse an output that is one of the sources, or lies in one, or has one in it."""
    place = out.resolve()
    for source in sources:
        other = source.resolve()
        if place.is_relative_to(other) or other.is_relative_to(place):
            refuse(f"the output {out} and the source {source} lie in each other; give another output")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", platform.node()) or "host"


def _temporary(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{purpose}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_stale(path: Path) -> None:
    """Remove files that killed processes left of this output; restore an old output that was moved away."""
    form = re.compile(rf"\.{re.escape(path.name)}\.(partial|old)-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}")
    for entry in list(path.parent.iterdir()):
        found = form.fullmatch(entry.name)
        if found is None or _runs(int(found[2])):
            continue
        if found[1] == "old" and not path.exists() and is_zarr(entry):
            entry.rename(path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if sys.platform == "win32":
        return True  # os.kill would end the process there, so stale names stay
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but belongs to another user
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. Return False if the system or the file system can't."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        return bool(library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
    return False
