"""`LegacyLatents`: chunks of zarr v2 of the codec `cae` decoded to their latents. It needs no torch."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy

from zarr_cae.latents.codec import NAME, refuse_writing
from zarr_cae.legacy.codec import ConvolutionalAutoencoder

__all__ = ["LegacyLatents"]


class LegacyLatents(Codec):  # type: ignore[misc]
    """The compressor that `BottleneckStore` names in arrays of zarr v2. It only reads.

    Parameters
    ----------
    cae
        The codec that wrote the chunks.
    """

    codec_id = NAME

    def __init__(self, cae: ConvolutionalAutoencoder) -> None:
        self.cae = cae

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the codec that rewritten metadata describe. They have the same fields as those of the codec `cae`."""
        return cls(ConvolutionalAutoencoder.from_config(config))

    def get_config(self) -> dict[str, Any]:
        """Return the fields of the codec `cae`."""
        return {**self.cae.get_config(), "id": self.codec_id}

    def encode(self, buf: npt.NDArray[Any]) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError."""
        refuse_writing()

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return the latents of a chunk, float32 (rows, columns, M).

        Raises
        ------
        FrameError, StreamError
            If the chunk is malformed.
        CAEConfigurationError
            If its weights are not on this machine.
        """
        values: npt.NDArray[np.float32] = self.cae.latents(memoryview(ensure_contiguous_ndarray(buf)).cast("B"))
        return values if out is None else ndarray_copy(values, out)
