"""Import libraries of the extra `compare`, or say how to install them."""

from __future__ import annotations

import importlib
from typing import Any

from zarr_cae.errors import CAEConfigurationError

LIBRARIES = ("imagecodecs", "matplotlib", "pytorch_msssim", "scipy", "skimage")
"""All libraries of the extra, by the names under which Python imports them."""


def import_extra(module: str, purpose: str) -> Any:
    """Import a module of the extra `compare`.

    Parameters
    ----------
    module
        Its full name, for instance "skimage.metrics".
    purpose
        The feature that needs it, as the plural subject of the message: "plots", "SSIM and CIE76".

    Returns
    -------
    module

    Raises
    ------
    CAEConfigurationError
        If the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise CAEConfigurationError(
            f"cae: {purpose} need {library}, which can't be imported ({error}); "
            'install the extra: pip install "zarr-cae[compare]"'
        ) from error
