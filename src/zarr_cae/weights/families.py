"""The families of weights that come with the package: domain, data and licences. The model card says more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The domain and training data of a family of weights."""

    domain: str
    data: str
    licence: str
    """Of the data. Only weights are distributed."""


FAMILIES = {
    "photographs": Family(
        "photographs, and all other images that no other family is for",
        "BSDS500, imagenet-sample-images, photographs of Debian's wallpaper packages",
        "research and education; research; CC BY-SA and similar",
    ),
    "histology": Family(
        "stained tissue, mostly H&E; at qualities 6 to 8 the weights for photographs",
        "Pathology Atlas, BBBC038, OpenSlide's test slides; beside them all data of the other three families",
        "MIT (Pathology Atlas); CC0; free to use and distribute; and the licences of the other three",
    ),
    "satellite": Family(
        "aerial and satellite images in natural colours",
        "NAIP, OpenAerialMap, OpenDroneMap samples",
        "US public domain and CC BY 4.0; CC BY 4.0; CC0",
    ),
    "microscopy": Family(
        "grey fluorescence microscopy, much of it dark",
        "BBBC038; before it all data of the photographs, and at qualities 6 to 8 also 390 tiles of histology "
        "(Pathology Atlas, BBBC038, OpenSlide's test slides), 229 of satellite (NAIP, OpenAerialMap, OpenDroneMap "
        "samples), 156 of microscopy (BBBC038) and 110 generated patterns",
        "CC0 (BBBC038, OpenDroneMap samples); those of the photographs; at qualities 6 to 8 also MIT (Pathology "
        "Atlas), free to use and distribute (OpenSlide), US public domain and CC BY 4.0 (NAIP), CC BY 4.0 "
        "(OpenAerialMap)",
    ),
}
"""The families by name, as in `CAECodec(weights=...)`. A family is listed if a file of it is on this machine."""
