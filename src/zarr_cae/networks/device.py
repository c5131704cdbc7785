"""The choice of a torch device, and the number of torch's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.threads import call_in_child, hold_across_fork

PASS_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Pixels in one forward pass: on a CPU few enough for the caches of a core, on a GPU enough to fill it."""


def choose_device(name: str) -> torch.device:
    """Return the torch device for a `cae.device` setting; a GPU comes with its number.

    "auto" is the first GPU, or the CPU if there is none or if this process was forked from one that used a GPU.

    Raises
    ------
    CAEConfigurationError
        If the device does not exist here, or is a GPU that this forked process can't use.
    """
    forked = _forked_from_cuda()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not forked else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise CAEConfigurationError(f"cae: cae.device must be 'auto', 'cpu' or 'cuda[:N]', got {name!r}") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise CAEConfigurationError(
            f"cae: cae.device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; use 'auto'"
        )
    if device.type not in ("cpu", "cuda"):
        raise CAEConfigurationError(f"cae: cae.device must be 'auto', 'cpu' or 'cuda[:N]', got {name!r}")
    if device.type == "cuda" and forked:
        raise CAEConfigurationError(
            f"cae: cae.device is {name!r}, but CUDA was in use before this process was forked, and does not survive "
            "that; start processes with 'spawn' or 'forkserver', or use 'auto' or 'cpu' in them"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _forked_from_cuda() -> bool:
    """Return whether torch refuses CUDA because a parent process used it. Torch has no public name for that."""
    in_bad_fork: Callable[[], bool] | None = getattr(torch.cuda, "_is_in_bad_fork", None)
    return in_bad_fork is not None and in_bad_fork()


_lock = threading.Lock()


def use_threads(count: int, usual: int) -> None:
    """Set torch's thread count for this thread only; other threads go on with `usual`."""
    if torch.get_num_threads() == count:  # ask first: a thread's first torch operation would undo an earlier setting
        return
    with _lock:
        torch.set_num_threads(count)  # this also sets the count of all threads that start later, so reset that:
        other = threading.Thread(target=torch.set_num_threads, args=(usual,))
        other.start()
        other.join()


def _after_fork() -> None:
    """Use one thread in a forked child: OpenMP's threads do not exist there, and torch would wait for them for ever."""
    torch.set_num_threads(1)


hold_across_fork(_lock)
call_in_child(_after_fork)
