"""The bits of symbols under the frequency tables, for many symbols at once on any device: the rate in `refine`.

They agree with `coder.tables.ideal_bits`, with two differences. An escape counts by its own size in the contexts of
later channels. Contexts reach across the borders of tiles.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from zarr_cae.coder.contexts import LARGEST_ACTIVITY
from zarr_cae.coder.tables import PRECISION, Tables, escape_bytes

_LARGEST = 64
"""Larger symbols count as if they were this large."""


class CodeLengths:
    """The bits of symbols under frequency tables, on a device.

    Parameters
    ----------
    tables
        The tables of one quality.
    device
        The name of the device.
    """

    def __init__(self, tables: Tables, device: str) -> None:
        channels, classes, contexts = tables.channels, tables.classes, tables.contexts
        values = np.arange(-_LARGEST - 1, _LARGEST + 2)
        entry = values - tables.minimum[:, None].astype(np.int64)
        escape = tables.length[:, None] - 1
        escaped = (entry < 0) | (entry >= escape)
        chosen = tables.frequency[tables.offset[:, None].astype(np.int64) + np.where(escaped, escape, entry)]
        bits = PRECISION - np.log2(chosen) + np.where(escaped, 8.0 * escape_bytes(values), 0.0)
        self._bits = torch.from_numpy(bits.astype(np.float32).reshape(-1)).to(device)
        self._width = len(values)
        self._first = (torch.arange(channels, device=device) * classes)[:, None, None]
        self.predicted = torch.zeros(channels, dtype=torch.bool, device=device)
        """The channels that are coded as differences (M,). Their symbols stay: a move would change three differences.
        """
        self._mixing: Tensor | None = None
        if contexts is not None:
            self.predicted = torch.from_numpy(contexts.predicted.copy()).to(device)
            mixing = np.zeros((channels, channels + 1), np.float32)  # source -1, which is none, goes to the last column
            np.add.at(mixing, (np.arange(channels)[:, None], contexts.source), contexts.weight)
            self._mixing = torch.from_numpy(mixing[:, :channels]).to(device)
            thresholds = np.ascontiguousarray(contexts.threshold.T.astype(np.float32))
            self._thresholds = torch.from_numpy(thresholds).to(device)[..., None, None]

    def around(self, symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bits of symbols (N, M, h, w) and of their neighbours above and below, in their present classes."""
        coded = self._coded(symbols)
        rows = self._first + (0 if self._mixing is None else self._classes(coded))
        entry = rows * self._width + (coded.clamp(-_LARGEST, _LARGEST).long() + _LARGEST + 1)
        return self._bits[entry], self._bits[entry + 1], self._bits[entry - 1]

    def _coded(self, symbols: Tensor) -> Tensor:
        """Put differences in the place of the symbols of predicted channels; see `coder.contexts.to_differences`."""
        if not bool(self.predicted.any()):
            return symbols
        chosen = symbols[:, self.predicted]
        guess = torch.zeros_like(chosen)
        guess[..., 1:, 1:] = ((chosen[..., 1:, :-1] + chosen[..., :-1, 1:] + 1) / 2).floor()
        guess[..., 0, 1:], guess[..., 1:, 0] = chosen[..., 0, :-1], chosen[..., :-1, 0]
        coded = symbols.clone()
        coded[:, self.predicted] = chosen - guess
        return coded

    def _classes(self, coded: Tensor) -> Tensor:
        """Return the class of each symbol; see `coder.contexts`. Escapes count by their own size here."""
        assert self._mixing is not None
        count, channels, rows, columns = coded.shape
        activity = coded.abs().clamp(max=LARGEST_ACTIVITY).reshape(-1, 1, rows, columns)
        kernel = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float32, device=coded.device)
        around = nn.functional.conv2d(activity, torch.outer(kernel, kernel)[None, None], padding=1)
        scores = (self._mixing @ around.reshape(count, channels, -1)).reshape(coded.shape)
        found = torch.zeros_like(coded, dtype=torch.long)
        for threshold in self._thresholds:
            found += scores >= threshold
        return found


code_lengths = lru_cache(maxsize=16)(CodeLengths)
"""Return the code lengths of some tables on a device, made once."""
