"""The journal of a conversion. It records which blocks are done, so that an interrupted conversion can go on.

The journal is a folder beside the output, `.NAME.converting`, until all is done:

    journal.json   source, settings and the version of the format; another source or setting is refused
    done           one line for each block that is complete
    reduced/       the exact reduced copies of blocks whose parent is not made yet, as .npy files
    out/           the output, which is moved to its final name at the end

A block is recorded only after its shard and its reduced copy are on the disk (fsync), in this order. So a process that
is killed, or a power cut, costs at most the blocks that were in work. A lock keeps two processes from the same journal.
A run that fails before a block is complete removes the journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.files import atomic_write
from zarr_cae.slides.differences import differences
from zarr_cae.slides.pyramid import Block

__all__ = [
    "Journal",
    "check_settings",
    "flush",
    "is_recorded",
    "journal_folder",
    "read_reduced",
    "recorded_blocks",
    "remove_reduced",
    "unfinished",
    "write_reduced",
]

_VERSION = 1


class Journal:
    """The journal beside an output.

    Parameters
    ----------
    output
        The final name of the output.
    settings
        Source and settings of the conversion, as JSON values. All of them must be the same to go on.
    restart
        Whether to remove a journal that is there and begin anew.
    keep_settings
        Whether a run that fails before a block is complete leaves the journal. It does if the settings took long to
        find (fitted weights).

    Attributes
    ----------
    folder
        The journal's folder.
    resumed
        Whether the journal is that of an interrupted conversion.

    Raises
    ------
    CAEConfigurationError
        If there is a journal of another source or of other settings, another process works on it, or the folder of the
        output can't be written to.
    """

    def __init__(
        self, output: Path, settings: Mapping[str, Any], *, restart: bool = False, keep_settings: bool = False
    ) -> None:
        self.folder = journal_folder(output)
        self._keep_settings = keep_settings
        self._lock: IO[bytes] | None = None
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CAEConfigurationError(
                f"cae: folder {output.parent} can't be written to: {error.strerror or error}"
            ) from error
        self._take_lock(output)
        try:
            if restart:
                self._clear()
            self.resumed = self._check(output, settings)
            self._done = set(self._complete_lines())
            self._file = (self.folder / "done").open("ab")
        except BaseException:
            self.close()
            raise

    @property
    def out(self) -> Path:
        """The output under its temporary name."""
        return self.folder / "out"

    def __contains__(self, block: Block) -> bool:
        return block.name in self._done

    def record(self, block: Block) -> None:
        """Record that a block and its reduced copy are on the disk; return when the record is there, too."""
        self._file.write(f"{block.name}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._done.add(block.name)

    def close(self) -> None:
        """Release the journal; it stays for the next run."""
        if hasattr(self, "_file"):
            self._file.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the journal after all is done."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is not None:
            begun = recorded_blocks(self.folder) > 0
            complete = begun and not (self.out / "zarr.json").exists()  # the output has its final name already
            if complete or not (begun or self._keep_settings):
                self.remove()
        self.close()

    def _take_lock(self, output: Path) -> None:
        self._lock = (self.folder / "lock").open("wb")
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise CAEConfigurationError(f"cae: another process is converting to {output}; wait for it") from error

    def _clear(self) -> None:
        for name in ("journal.json", "done"):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("reduced", "images", "out"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _check(self, output: Path, settings: Mapping[str, Any]) -> bool:
        """Return whether to go on with this journal; write its settings if it is new."""
        known = _known_settings(self.folder)
        # Without the output, the process was killed after it got its final name: that conversion is complete.
        if known is None or not (self.out / "zarr.json").exists():
            self._clear()
            (self.folder / "reduced").mkdir()
            with atomic_write(self.folder / "journal.json") as partial:
                partial.write_text(json.dumps({"version": _VERSION, **settings}, indent=1))
            return False
        check_settings(self.folder, output, settings)
        return True

    def _complete_lines(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError):
            content = (self.folder / "done").read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # the process was killed within a line
                with (self.folder / "done").open("r+b") as file:
                    file.truncate(len(whole))
            yield from whole.decode().split()


def journal_folder(output: Path) -> Path:
    """Return the folder of the journal of an output."""
    return output.with_name(f".{output.name}.converting")


def _known_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of a journal; None if it has none, or the process was killed while it wrote them."""
    try:
        found = json.loads((folder / "journal.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_settings(folder: Path, output: Path, settings: Mapping[str, Any]) -> None:
    """Check that a journal is of the same source and settings.

    Raises
    ------
    CAEConfigurationError
        If it is not; the error names the differences.
    """
    known = _known_settings(folder) or {}
    wanted = json.loads(json.dumps({"version": _VERSION, **settings}))
    if known != wanted:
        raise CAEConfigurationError(
            f"cae: an interrupted conversion to {output} had another source or other settings: "
            f"{'; '.join(differences(known, wanted))}. Give the same ones to go on, or --restart to begin anew"
        )


def recorded_blocks(folder: Path) -> int:
    """Return how many blocks a journal records as complete, with those of all images of a group."""
    files = [folder / "done", *(folder / "images").glob(".*.converting/done")]
    return sum(path.read_bytes().count(b"\n") for path in files if path.exists())


def unfinished(path: Path) -> str | None:
    """Return what to say about a path that does not exist because the conversion to it is unfinished, if that is so."""
    for place in (path, *path.parents):
        if not place.name or place.name == ".." or place.exists():
            continue
        known = _known_settings(journal_folder(place))
        if known is not None:
            source = f" of {known['source']}" if "source" in known else ""
            return (
                f"{place} is unfinished: its conversion{source} was interrupted, or still runs; the same `zarr-cae "
                "convert` command goes on with it"
            )
    return None


def flush(files: Iterable[Path], top: Path) -> None:
    """Wait until files, and their names in all folders from `top` down, are on the disk. Missing files are skipped."""
    present = [path for path in files if path.exists()]
    folders = {folder for path in present for folder in path.parents if folder.is_relative_to(top)}
    for path in present:
        _fsync(path)
    if sys.platform != "win32":  # which can't open folders
        for folder in sorted(folders, reverse=True):
            _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_recorded(folder: Path, block: Block) -> bool:
    """Return whether a journal that another process writes records a block as complete."""
    try:
        return block.name.encode() in (folder / "done").read_bytes().split()
    except FileNotFoundError:
        return False


def write_reduced(folder: Path, block: Block, pixels: npt.NDArray[Any]) -> None:
    """Write the reduced copy of a block to the disk, whole or not at all."""
    path = _reduced(folder, block)
    with atomic_write(path) as partial:
        with partial.open("wb") as file:
            np.save(file, pixels, allow_pickle=False)
        flush([partial], partial.parent)
    flush([path], path.parent)


def read_reduced(folder: Path, block: Block) -> npt.NDArray[Any]:
    """Read the reduced copy of a block."""
    return np.asarray(np.load(_reduced(folder, block), allow_pickle=False))


def remove_reduced(folder: Path, block: Block) -> None:
    """Remove the reduced copy of a block, if there is one."""
    _reduced(folder, block).unlink(missing_ok=True)


def _reduced(folder: Path, block: Block) -> Path:
    return folder / "reduced" / (block.name.replace("/", "-") + ".npy")
