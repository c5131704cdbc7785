"""`CAECodec`: zarr chunks to frames and back."""

from zarr_cae.codec.cae import CAECodec

__all__ = ["CAECodec"]
