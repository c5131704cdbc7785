"""Everything this package raises on purpose.

    CAEError
    ├── CAEConfigurationError (ValueError)   a codec, array, weights file or command was asked for what cannot be
    │   └── WeightsNotFoundError             metadata names weights that are not on this machine
    └── CAEDataError (ValueError)            stored bytes or pixels are not what they claim to be
        ├── FrameError                       a chunk frame is malformed, truncated or of another array
        └── StreamError                      an entropy-coded tile is malformed

Messages begin with `cae:` and say what was expected, what came, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CAEConfigurationError",
    "CAEDataError",
    "CAEError",
    "FrameError",
    "StreamError",
    "WeightsNotFoundError",
]


class CAEError(Exception):
    """The root of the tree."""


class CAEConfigurationError(CAEError, ValueError):
    """A codec, array, weights file or command was asked for what cannot be."""


class WeightsNotFoundError(CAEConfigurationError):
    """Metadata names weights that are not on this machine."""


class CAEDataError(CAEError, ValueError):
    """Stored bytes or pixels are not what they claim to be."""


class FrameError(CAEDataError):
    """A chunk frame is malformed, truncated or of another array."""


class StreamError(CAEDataError):
    """An entropy-coded tile is malformed."""
