"""Images in Zarr v3 as the entropy-coded latents of a convolutional autoencoder."""

from zarr_cae.bottleneck import BottleneckStore, open_bottleneck
from zarr_cae.codec import CAECodec
from zarr_cae.errors import (
    CAEConfigurationError,
    CAEDataError,
    CAEError,
    FrameError,
    StreamError,
    WeightsNotFoundError,
)
from zarr_cae.latents import CAEBottleneckCodec
from zarr_cae.patches import as_torch_dataset
from zarr_cae.settings import configure

__all__ = [
    "BottleneckStore",
    "CAEBottleneckCodec",
    "CAECodec",
    "CAEConfigurationError",
    "CAEDataError",
    "CAEError",
    "FrameError",
    "StreamError",
    "WeightsNotFoundError",
    "as_torch_dataset",
    "configure",
    "open_bottleneck",
]
