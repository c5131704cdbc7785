"""Images in Zarr v3 as the entropy-coded latents of a convolutional autoencoder.

Public names are imported when they are first used, so that the command line starts quickly, and handles an interrupt
during the import of zarr like any other.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarr_cae.codec.buffered import BufferedArray, buffered
    from zarr_cae.codec.cae import CAECodec
    from zarr_cae.codec.embedded import open  # noqa: A004 - named like `zarr.open`
    from zarr_cae.config import configure
    from zarr_cae.errors import (
        CAEConfigurationError,
        CAEDataError,
        CAEError,
        CAEWearWarning,
        FrameError,
        StreamError,
        WeightsNotFoundError,
    )
    from zarr_cae.latents.codec import CAEBottleneckCodec
    from zarr_cae.latents.dataset import LatentPatches, as_torch_dataset
    from zarr_cae.latents.store import BottleneckStore, open_bottleneck
    from zarr_cae.serve.store import DecodedStore
    from zarr_cae.slides.patches import SlidePatches, slide_patches
    from zarr_cae.training.fit import fit

__all__ = [
    "BottleneckStore",
    "BufferedArray",
    "CAEBottleneckCodec",
    "CAECodec",
    "CAEConfigurationError",
    "CAEDataError",
    "CAEError",
    "CAEWearWarning",
    "DecodedStore",
    "FrameError",
    "LatentPatches",
    "SlidePatches",
    "StreamError",
    "WeightsNotFoundError",
    "__version__",
    "as_torch_dataset",
    "buffered",
    "configure",
    "fit",
    "open",
    "open_bottleneck",
    "slide_patches",
]

__version__ = version("zarr-cae")

_MODULES = {
    "BottleneckStore": "latents.store",
    "BufferedArray": "codec.buffered",
    "CAEBottleneckCodec": "latents.codec",
    "CAECodec": "codec.cae",
    "CAEConfigurationError": "errors",
    "CAEDataError": "errors",
    "CAEError": "errors",
    "CAEWearWarning": "errors",
    "DecodedStore": "serve.store",
    "FrameError": "errors",
    "LatentPatches": "latents.dataset",
    "SlidePatches": "slides.patches",
    "StreamError": "errors",
    "WeightsNotFoundError": "errors",
    "as_torch_dataset": "latents.dataset",
    "buffered": "codec.buffered",
    "configure": "config",
    "fit": "training.fit",
    "open": "codec.embedded",
    "open_bottleneck": "latents.store",
    "slide_patches": "slides.patches",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
