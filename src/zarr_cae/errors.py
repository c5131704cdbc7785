"""The exceptions of this package, and its warning.

    CAEError
    ├── CAEConfigurationError (ValueError)   a codec, array, weights file or command can't do what it is asked for
    │   └── WeightsNotFoundError             metadata name weights that are missing
    └── CAEDataError (ValueError)            stored bytes or pixels are invalid
        ├── FrameError                       a chunk frame is malformed, truncated or of another array
        └── StreamError                      an entropy-coded tile is malformed

    UserWarning
    └── CAEWearWarning                       repeated small writes code the same pixels again and again

Messages begin with `cae:` and name the field, the expected value, the value found, and the remedy.
"""

from __future__ import annotations

__all__ = [
    "CAEConfigurationError",
    "CAEDataError",
    "CAEError",
    "CAEWearWarning",
    "FrameError",
    "StreamError",
    "WeightsNotFoundError",
]


class CAEError(Exception):
    """The base class of all exceptions of this package."""


class CAEConfigurationError(CAEError, ValueError):
    """A codec, array, weights file or command can't do what it is asked for."""


class WeightsNotFoundError(CAEConfigurationError):
    """Metadata names weights that are not on this machine."""


class CAEDataError(CAEError, ValueError):
    """Stored bytes or pixels are invalid."""


class FrameError(CAEDataError):
    """A chunk frame is malformed, truncated or of another array."""


class StreamError(CAEDataError):
    """An entropy-coded tile is malformed."""


class CAEWearWarning(UserWarning):
    """Repeated small writes code the same pixels again and again, and each time they lose quality."""
