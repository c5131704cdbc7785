"""The command line `zarr-cae`: arguments, progress, printing.

Each module holds a group of commands. Its function `add(commands)` declares the arguments, and other functions run the
commands. They import slow packages (torch, zarr, numba, matplotlib) themselves, so that `--help` is quick.

Exit codes: 0 for success; 1 for a mistake in the input, with one line on stderr; 2 for wrong usage; 130 after Ctrl-C,
143 after SIGTERM. Bugs show their traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zarr_cae.cli.interrupts import TerminatedError
from zarr_cae.errors import CAEError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zarr-cae` with these arguments (by default the process's own) and return its exit code."""
    try:
        arguments = _parse(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except TerminatedError as error:
        return _say("terminated", 143, error)
    except KeyboardInterrupt as error:
        return _say("interrupted", 130, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
        return 141
    except Exception as error:
        if not isinstance(error, (CAEError, OSError, *_zarr_errors())):
            raise
        return _say(_described(error), 1, error)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # Imported here, so that an interrupt meanwhile ends as any other does.
    from zarr_cae.cli import (
        archive,
        bottleneck,
        compare,
        convert,
        demo,
        evaluate,
        migrate,
        serve,
        train,
        verify,
        weights_files,
    )

    parser = argparse.ArgumentParser(
        prog="zarr-cae", description="Images in Zarr v3 as the entropy-coded latents of a convolutional autoencoder."
    )
    parser.add_argument("--version", action="version", version=f"zarr-cae {version('zarr-cae')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands_of = (
        archive,
        verify,
        convert,
        migrate,
        bottleneck,
        serve,
        demo,
        compare,
        evaluate,
        weights_files,
        train,
    )
    for group in commands_of:
        group.add(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and hasattr(arguments, "paths") and not any(word.startswith("-") for word in rest):
        arguments.paths += rest  # argparse takes only one run of positional arguments between the options
    elif rest:
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")  # with the usage of the command
    return arguments


def _zarr_errors() -> tuple[type[Exception], ...]:
    """Return zarr's own exceptions; none if zarr was never imported."""
    module: Any = sys.modules.get("zarr.errors")
    return () if module is None else (module.BaseZarrError,)


def _described(error: Exception) -> str:
    """Return the message of an error. Those of the system name the file first."""
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return str(error) or type(error).__name__
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else str(error.filename)
    if isinstance(error, FileNotFoundError):
        from zarr_cae.cli.images import absent

        return absent(Path(path))
    return f"{path}: {error.strerror}"


def _say(message: str, code: int, error: BaseException) -> int:
    """Print a message and the notes of the error in one line on stderr. Return the exit code."""
    text = "; ".join([message.removeprefix("cae: "), *getattr(error, "__notes__", ())])
    print(f"zarr-cae: {' '.join(text.split())}", file=sys.stderr)
    return code
