"""Images in Zarr v3 as the entropy-coded latents of a convolutional autoencoder."""

from importlib.metadata import version

from zarr_cae.codec.cae import CAECodec
from zarr_cae.config import configure
from zarr_cae.errors import (
    CAEConfigurationError,
    CAEDataError,
    CAEError,
    FrameError,
    StreamError,
    WeightsNotFoundError,
)
from zarr_cae.latents.codec import CAEBottleneckCodec
from zarr_cae.latents.dataset import LatentPatches, as_torch_dataset
from zarr_cae.latents.store import BottleneckStore, open_bottleneck
from zarr_cae.serve.store import DecodedStore

__all__ = [
    "BottleneckStore",
    "CAEBottleneckCodec",
    "CAECodec",
    "CAEConfigurationError",
    "CAEDataError",
    "CAEError",
    "DecodedStore",
    "FrameError",
    "LatentPatches",
    "StreamError",
    "WeightsNotFoundError",
    "__version__",
    "as_torch_dataset",
    "configure",
    "open_bottleneck",
]

__version__ = version("zarr-cae")
