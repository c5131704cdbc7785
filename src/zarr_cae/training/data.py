"""Training images: folders and tar files as uint8 RGB in memory, and random crops of them."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import Pixels
from zarr_cae.pixels.pillow import IMAGE_DAMAGE, no_size_limit
from zarr_cae.training.patterns import draw_pattern
from zarr_cae.training.unlike import draw_unlike

if TYPE_CHECKING:
    from zarr_cae.training.trainer import Recipe

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".ppm"}
_TAR_DAMAGE = (tarfile.TarError, OSError, EOFError, KeyError, ValueError, zlib.error, lzma.LZMAError)


def _open(source: Path | io.BytesIO, name: str) -> Pixels:
    try:
        with no_size_limit(), Image.open(source) as image:
            mode = image.mode
            pixels = None if mode[0] in "IF" else np.asarray(image.convert("RGB"))
    except (OSError, *IMAGE_DAMAGE) as error:
        raise CAEConfigurationError(
            f"cae: training image {name} cannot be read; is it damaged? {type(error).__name__}: {error}"
        ) from error
    if pixels is None:
        raise CAEConfigurationError(f"cae: training image {name} has mode {mode}; expected 8-bit samples")
    return pixels


def _members(path: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """Yield the images in a tar file, sorted by name."""
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                stream = archive.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
                if stream is not None:
                    yield member.name, io.BytesIO(stream.read())
    except _TAR_DAMAGE as error:
        raise CAEConfigurationError(
            f"cae: training data {path} cannot be read as a tar file; is it damaged? {type(error).__name__}: {error}"
        ) from error


def _images_of(path: Path) -> Iterator[tuple[str, Pixels]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES or file.suffix == ".tar":
                yield from _images_of(file)
    elif path.suffix == ".tar":
        for name, content in _members(path):
            yield name, _open(content, f"{path}:{name}")
    elif path.exists():
        yield path.name, _open(path, str(path))
    else:
        raise CAEConfigurationError(
            f"cae: training data {path} does not exist; give an image, a folder or a tar file of images"
        )


def _starts(side: int, edge: int) -> list[int]:
    starts = list(range(0, max(1, side - edge + 1), edge))
    if side - starts[-1] - edge >= edge // 4:
        starts.append(side - edge)
    return starts


def read_images(paths: Sequence[Path]) -> list[Pixels]:
    """Read the images under some paths as uint8 (H, W, 3), sorted by name.

    Raises
    ------
    CAEConfigurationError
        If a path does not exist, or a file cannot be read or has other than 8-bit samples.
    """
    found = sorted((item for path in paths for item in _images_of(path)), key=lambda item: item[0])
    return [pixels for _, pixels in found]


class Crops:
    """Random square crops of images, each with a random flip; some become grey, and some become patterns.

    Parameters
    ----------
    paths
        Images, folders and tar files.
    crop
        Edge of the crops in pixels. Smaller images are left out.
    seed
        Of the random choices.
    holdout
        Share of the images that is kept out of training, for `held_out`.
    grey
        Share of the crops that become grey.
    patterns
        Share of the crops that become patterns or noise, see `training.patterns`.

    Raises
    ------
    CAEConfigurationError
        If an image cannot be read, or fewer than two are large enough.
    """

    def __init__(
        self,
        paths: list[Path],
        *,
        crop: int,
        seed: int,
        holdout: float = 0.05,
        grey: float = 0.1,
        patterns: float = 0.0,
    ) -> None:
        self._begin(read_images(paths), crop, seed, holdout, grey, patterns)

    @classmethod
    def of(cls, images: Sequence[Pixels], recipe: Recipe, held_out: Sequence[Pixels] = ()) -> Self:
        """Return crops of images that are in memory, as a recipe says.

        If `held_out` are given, they are the images kept out of training, and all others are trained on.
        """
        crops = cls.__new__(cls)
        crops._begin(  # noqa: SLF001
            images, recipe.crop, recipe.seed, recipe.holdout, 0.1, recipe.patterns, recipe.unlike, held_out
        )
        return crops

    def _begin(
        self,
        images: Sequence[Pixels],
        crop: int,
        seed: int,
        holdout: float,
        grey: float,
        patterns: float,
        unlike: float = 0.0,
        held_out: Sequence[Pixels] = (),
    ) -> None:
        large = [pixels for pixels in images if min(pixels.shape[:2]) >= crop]
        if len(large) < 2:
            raise CAEConfigurationError(
                f"cae: training data: {len(large)} of {len(images)} images are at least {crop} px on both sides; "
                "give at least 2, or a smaller --crop"
            )
        if held_out:
            self._held_out, self._images = list(held_out), large
        else:
            every = min(len(large), max(2, round(1 / holdout)))
            self._held_out = large[every - 1 :: every]
            self._images = [pixels for index, pixels in enumerate(large) if index % every != every - 1]
        areas = np.array([pixels.shape[0] * pixels.shape[1] for pixels in self._images], float)
        self._weight = areas / areas.sum()
        self._crop, self._grey, self._patterns, self._unlike = crop, grey, patterns, unlike
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, size: int) -> Tensor:
        """Return `size` random crops: float32 (size, 3, crop, crop) in [0, 1]."""
        random, crop = self._random, self._crop
        out = np.empty((size, crop, crop, 3), np.float32)
        for row, index in enumerate(random.choice(len(self._images), size, p=self._weight)):
            pixels = self._images[index]
            top, left = (random.integers(side - crop + 1) for side in pixels.shape[:2])
            window = pixels[top : top + crop, left : left + crop]
            if random.random() < 0.5:
                window = window[:, ::-1]
            if random.random() < 0.25:
                window = window.transpose(1, 0, 2)
            if random.random() < self._grey:
                window = window @ random.dirichlet((1.0, 1.0, 1.0)).astype(np.float32)
                window = (np.rint(window) if pixels.dtype == np.uint8 else window)[..., None]
            if self._patterns and random.random() < self._patterns:
                window = draw_pattern(window, random)
            if self._unlike and random.random() < self._unlike:
                window = draw_unlike(crop, random)
            out[row] = window
        return from_numpy(out).permute(0, 3, 1, 2).div_(255)

    def tiles(self, edge: int = 256, largest: int = 512) -> Iterator[Tensor]:
        """Yield windows of the training images.

        Each is float32 (1, 3, H, W) in [0, 1], H and W multiples of 16 and at most `edge`.

        They cover each image, or its first `largest` rows and columns, but for strips of less than a quarter of a
        window. The last ones of an image may lie partly over others, rather than be narrow: contexts and predictions
        know less along borders, and tables fitted to narrow windows would be too wide for whole ones.
        """
        for pixels in self._images:
            for top in _starts(min(pixels.shape[0], largest), edge):
                for left in _starts(min(pixels.shape[1], largest), edge):
                    window = pixels[top : top + edge, left : left + edge]
                    cut = window[tuple(slice(side // 16 * 16) for side in window.shape[:2])]
                    yield from_numpy(cut.copy()).permute(2, 0, 1)[None].float().div_(255)

    @property
    def held_out_images(self) -> list[Pixels]:
        """Return the images that training never sees: uint8 (H, W, 3) each."""
        return self._held_out

    def held_out(self, count: int, crop: int) -> Tensor:
        """Return centre crops of up to `count` held-out images: float32 (n, 3, crop, crop) in [0, 1]."""
        crop = min([crop, *(min(pixels.shape[:2]) // 16 * 16 for pixels in self._held_out)])
        chosen = self._held_out[:: max(1, len(self._held_out) // count)][:count]
        windows = []
        for pixels in chosen:
            top, left = ((side - crop) // 2 for side in pixels.shape[:2])
            windows.append(pixels[top : top + crop, left : left + crop])
        return from_numpy(np.stack(windows)).permute(0, 3, 1, 2).float().div_(255)
