"""The settings of this machine: what they may be, and `configure`, which sets them.

They are keys of `zarr.config` (`cae.*`), not fields of a codec: none of them is stored with an array.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final, Literal, cast

import zarr

from zarr_cae import threads
from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError

_DEVICE = re.compile(r"auto|(cpu|cuda)(:\d+)?")
_PRECISIONS = ("auto", "float32", "bfloat16")


class _Kept(Enum):
    """Marks what `configure` is not given, where None has a meaning of its own."""

    KEPT = "as it is"

    def __repr__(self) -> str:
        return "<as it is>"


_KEPT: Final = _Kept.KEPT
_Unset = Literal[_Kept.KEPT]


@dataclass(frozen=True)
class Settings:
    """How this process runs the networks; none of it changes what is stored.

    Raises CAEConfigurationError for what no machine has; whether this one has the device shows when it is first used.
    """

    device: str = "auto"
    """"auto" (CUDA if there is any; the CPU in processes forked from one that used it), "cpu", "cuda" or "cuda:N"."""
    threads: int | None = None
    """Cores that the networks use on a CPU, and the entropy coder; None takes torch's number of threads when the
    engine is made, and for the coder OMP_NUM_THREADS, or all cores."""
    tile: int = 1024
    """Edge in pixels of the pieces in which larger planes run; it bounds the memory of a forward pass. However small it
    is, with what lies around them pieces have 816 columns, if the plane has them (`networks.pieces.LEAST_COLUMNS`)."""
    precision: str = "auto"
    """"float32", "auto" (bfloat16 where it is faster and pixels stay within a grey level) or "bfloat16".

    On a GPU, convolutions in float32 round what they multiply to TF32, as is torch's default: pixels differ by less
    than a grey level for it. `torch.backends.cudnn.allow_tf32 = False` makes them exact. That is left to the user, as
    it holds for all networks and threads of the process.
    """
    compile: bool = False
    """Whether the networks go through `torch.compile` first, at the first chunk of each form."""

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise CAEConfigurationError(f"cae: cae.device must be 'auto', 'cpu' or 'cuda[:N]', got {self.device!r}")
        threads_fit = self.threads is None or (type(self.threads) is int and self.threads >= 1)
        if not threads_fit or type(self.tile) is not int or self.tile < STRIDE:
            raise CAEConfigurationError(
                f"cae: cae.tile must be an integer of at least {STRIDE} and cae.threads one of at least 1 (or None), "
                f"got {self.tile!r}, {self.threads!r}"
            )
        if self.precision not in _PRECISIONS:
            raise CAEConfigurationError(
                f"cae: cae.precision must be one of {', '.join(_PRECISIONS)}, got {self.precision!r}"
            )
        if type(self.compile) is not bool:
            raise CAEConfigurationError(f"cae: cae.compile must be True or False, got {self.compile!r}")


def configure(
    *,
    device: str | _Unset = _KEPT,
    threads: int | _Unset | None = _KEPT,
    tile: int | _Unset = _KEPT,
    precision: str | _Unset = _KEPT,
    compile: bool | _Unset = _KEPT,  # noqa: A002 - as torch calls it
    concurrency: int | _Unset = _KEPT,
) -> AbstractContextManager[object]:
    """Set how this process runs the networks, from here on or, in a `with` statement, to its end.

    What is not given stays as it is. The same can be said with `zarr.config.set({"cae.device": "cuda"})` or with
    environment variables (`ZARR_CAE__DEVICE=cuda`), which processes started from this one inherit.

    Parameters
    ----------
    device
        "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N".
    threads
        Threads of the networks on the CPU, and of the entropy coder; None leaves torch's own choice, one for each
        core, or as many as OMP_NUM_THREADS says.
    tile
        Edge in pixels of the pieces in which larger chunks run; it bounds memory.
    precision
        "auto", "float32" or "bfloat16".
    compile
        Whether `torch.compile` makes the networks, which takes a minute or more at the first
        chunks; on CPUs it needs a C++ compiler. On those that were tried it made the networks slower
        (`benchmarks/networks.py --compile`).
    concurrency
        Chunks that zarr codes at a time (its own `async.concurrency`, 10 by default), of which the networks make
        batches: 64 or more fill a GPU. It holds for all arrays of the process, of other codecs too.

    Returns
    -------
    A context manager that restores what was set before.

    Raises
    ------
    CAEConfigurationError
        For a value that cannot be; nothing is set then.

    Examples
    --------
    >>> import zarr_cae
    >>> with zarr_cae.configure(device="cpu", threads=1, concurrency=4):
    ...     pass  # read and write arrays
    """
    given = {"device": device, "threads": threads, "tile": tile, "precision": precision, "compile": compile}
    chosen = {name: value for name, value in given.items() if value is not _KEPT}
    checked = asdict(Settings(**cast("dict[str, Any]", chosen)))
    keys: dict[str, object] = {f"cae.{name}": checked[name] for name in chosen}
    if concurrency is not _KEPT:
        if type(concurrency) is not int or concurrency < 1:
            raise CAEConfigurationError(f"cae: concurrency must be an integer of at least 1, got {concurrency!r}")
        keys["async.concurrency"] = concurrency
        if "max_workers" in zarr.config.get("codec_pipeline"):  # of FusedCodecPipeline, a thread for each chunk
            keys["codec_pipeline.max_workers"] = concurrency
    return cast("AbstractContextManager[object]", zarr.config.set(keys))


def _chosen_threads() -> int | None:
    """Return the smaller of `cae.threads` and zarr's `threading.max_workers`, where they are set."""
    limits = (Settings(threads=zarr.config.get("cae.threads", None)).threads, zarr.config.get("threading.max_workers"))
    return min((limit for limit in limits if limit), default=None)


threads.chosen_threads = _chosen_threads
