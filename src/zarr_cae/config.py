"""The settings of this machine: their valid values, and `configure`, which sets them.

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
_MOST_THREADS = 1024
"""A larger `cae.threads` is a mistake: each network request could start as many threads."""
MOST_STEPS = 1000
"""A larger `cae.effort` is a mistake: the gain of each step falls fast."""


class _Kept(Enum):
    """The default of `configure`'s parameters; None already has another meaning."""

    KEPT = "as it is"

    def __repr__(self) -> str:
        return "<as it is>"


_KEPT: Final = _Kept.KEPT
_Unset = Literal[_Kept.KEPT]


@dataclass(frozen=True)
class Settings:
    """How this process runs the networks. None of this is stored, or needed to read stored arrays.

    Whether this machine has the device is checked when the device is first used.

    Raises
    ------
    CAEConfigurationError
        If a value is invalid on any machine.
    """

    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N". "auto" is the first CUDA device if there is any, but the CPU in a process
    forked from one that used CUDA."""
    threads: int | None = None
    """Threads of the networks on a CPU, and of the entropy coder: 1 to 1,024. None takes torch's number of threads for
    the networks, and OMP_NUM_THREADS or all cores for the coder."""
    tile: int = 1024
    """Edge in pixels of the pieces in which larger planes run. It bounds the memory of a forward pass. With its
    surroundings a piece has at least 816 columns, if the plane has them (`networks.pieces.LEAST_COLUMNS`)."""
    precision: str = "auto"
    """"float32", "bfloat16" or "auto": bfloat16 where it is faster and pixels stay within a grey level.

    In float32 a GPU rounds the factors of convolutions to TF32, which is torch's default; pixels differ by less than a
    grey level. `torch.backends.cudnn.allow_tf32 = False` turns that off for all networks of the process.
    """
    compile: bool = False
    """Whether `torch.compile` compiles the networks, at the first chunk of each shape."""
    effort: int = 1
    """How much work to put into each whole chunk that is written, 0 to 1,000. From 1 on the chunk is decoded as well,
    its tiles get corrections (see `codec.correct`), and none is stored that is worse than its mean. That takes nearly
    twice as long as 0. From 2 on it is the number of steps that refine the latents besides (see `networks.refine`),
    each of which takes as long as several chunks with 0. Reading stays as fast. Weights for MS-SSIM and writes of parts
    of a chunk do not use it; chunks with exact tiles are not refined."""

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise CAEConfigurationError(f"cae: cae.device must be 'auto', 'cpu' or 'cuda[:N]', got {self.device!r}")
        if self.threads is not None and not (type(self.threads) is int and 1 <= self.threads <= _MOST_THREADS):
            raise CAEConfigurationError(
                f"cae: cae.threads must be an integer from 1 to {_MOST_THREADS}, or None, got {self.threads!r}"
            )
        if type(self.tile) is not int or self.tile < STRIDE:
            raise CAEConfigurationError(f"cae: cae.tile must be an integer of at least {STRIDE}, got {self.tile!r}")
        if self.precision not in _PRECISIONS:
            raise CAEConfigurationError(
                f"cae: cae.precision must be one of {', '.join(_PRECISIONS)}, got {self.precision!r}"
            )
        if type(self.compile) is not bool:
            raise CAEConfigurationError(f"cae: cae.compile must be True or False, got {self.compile!r}")
        if not (type(self.effort) is int and 0 <= self.effort <= MOST_STEPS):
            raise CAEConfigurationError(
                f"cae: cae.effort must be an integer from 0 to {MOST_STEPS}, got {self.effort!r}"
            )


def configure(
    *,
    device: str | _Unset = _KEPT,
    threads: int | _Unset | None = _KEPT,
    tile: int | _Unset = _KEPT,
    precision: str | _Unset = _KEPT,
    compile: bool | _Unset = _KEPT,  # noqa: A002 - torch's name
    effort: int | _Unset = _KEPT,
    concurrency: int | _Unset = _KEPT,
) -> AbstractContextManager[object]:
    """Set how this process runs the networks, from now on or until the end of a `with` statement.

    Parameters that are not given stay as they are. `zarr.config.set({"cae.device": "cuda"})` does the same, and so do
    environment variables (`ZARR_CAE__DEVICE=cuda`), which child processes inherit.

    Parameters
    ----------
    device
        "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N".
    threads
        Threads of the networks on a CPU, and of the entropy coder: 1 to 1,024. None leaves torch's own choice: one for
        each core, or OMP_NUM_THREADS.
    tile
        Edge in pixels of the pieces in which larger chunks run. It bounds memory. At least 16.
    precision
        "auto", "float32" or "bfloat16".
    compile
        Whether `torch.compile` compiles the networks. That takes a minute or more at the first chunks, and on CPUs it
        needs a C++ compiler. It made the networks slower on the CPUs that were tried
        (`benchmarks/networks.py --compile`).
    effort
        How much work to put into each whole chunk that is written, 0 to 1,000: fewer bytes at equal PSNR, for more
        encoding time (see benchmarks/README.md). 0 stores the latents as they come from the network, which is fastest.
        1, the default, decodes each chunk as well, and stores corrections of what comes back. From 2 on it is the
        number of steps that refine the latents besides: slow, and 10 steps give most of the gain. It needs weights for
        mean squared error, such as the default ones. The speed of reading does not change. Writes of parts of chunks do
        not use it.
    concurrency
        Number of chunks that zarr codes at the same time (its `async.concurrency`, 10 by default). They share batches
        of the networks; a GPU needs 64 or more. It holds for all arrays of the process, also those of other codecs.

    Returns
    -------
    context manager
        Its exit restores the earlier settings.

    Raises
    ------
    CAEConfigurationError
        If a value is invalid. Then nothing is set.

    Examples
    --------
    >>> import zarr_cae
    >>> with zarr_cae.configure(device="cpu", threads=1, concurrency=4):
    ...     pass  # read and write arrays
    """
    given = {"device": device, "threads": threads, "tile": tile, "precision": precision, "compile": compile,
             "effort": effort}  # fmt: skip
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


def process_settings() -> Settings:
    """Return the settings of this process, as `configure` or zarr's configuration left them.

    Raises
    ------
    CAEConfigurationError
        If a value is invalid, or there is no such setting.
    """
    try:
        return Settings(**zarr.config.get("cae", {}))
    except TypeError as error:
        raise CAEConfigurationError(f"cae: zarr.config key cae.*: {error}") from error


def _chosen_threads() -> int | None:
    """Return the smaller of `cae.threads` and zarr's `threading.max_workers`, where they are set."""
    limits = (Settings(threads=zarr.config.get("cae.threads", None)).threads, zarr.config.get("threading.max_workers"))
    return min((limit for limit in limits if limit), default=None)


threads.chosen_threads = _chosen_threads
