"""Cut a large plane into pieces with enough of their surroundings for a network to give the pixels of the whole."""

from __future__ import annotations

from collections.abc import Iterator

from zarr_cae.coder.tiles import Patch

HALO = 6
"""Latent positions around a piece that can reach into it: 84 px in the analysis transform of `cae-v1`, 5.25 positions
in its synthesis transform."""
LEAST_COLUMNS = 51
"""Least number of latent columns in the input of a network, if the plane has as many.

In bfloat16 oneDNN sums a convolution whose output has more than 50 columns in another order than a narrower one. That
rounded a few symbols in a million to the other side, which showed as two grey levels. If pieces are on the
same side of 50 columns as the whole plane, at every scale, they get the same symbols.
"""


def pieces(shape: tuple[int, int], edge: int) -> Iterator[tuple[Patch, Patch]]:
    """Cut a plane of `shape` latent positions into patches of about `edge` positions a side, row by row.

    Yield pairs: the patch that the network needs as input, with a margin of `HALO` and at least `LEAST_COLUMNS` columns
    if the plane has them, and the patch itself.
    """
    across = shape[1] if shape[1] <= LEAST_COLUMNS else max(edge, LEAST_COLUMNS - 2 * HALO)
    for top in range(0, shape[0], edge):
        for left in range(0, shape[1], across):
            bottom, right = min(top + edge, shape[0]), min(left + across, shape[1])
            rows = slice(max(0, top - HALO), min(bottom + HALO, shape[0]))
            first = max(0, min(left - HALO, shape[1] - LEAST_COLUMNS))
            columns = slice(first, min(max(right + HALO, first + LEAST_COLUMNS), shape[1]))
            yield Patch(rows, columns), Patch(slice(top, bottom), slice(left, right))
