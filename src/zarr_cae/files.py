"""Files that are written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and give it its own name at the end.

    Another process sees the old file, or the whole new one, and never a part of it. If the block raises an error, the
    old file stays as it was. A process that is killed may leave a folder `.partial-*` beside the file.

    Parameters
    ----------
    path
        The file. Its folder must exist.

    Yields
    ------
    Path
        Where to write the content, in a temporary folder beside `path`.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as scratch:
        partial = Path(scratch) / path.name
        yield partial
        partial.replace(path)
