"""Plots of rate-distortion curves, drawn by matplotlib (extra `compare`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.curves import Curve, Measure
from zarr_cae.evaluation.extra import import_extra

_PANELS: tuple[tuple[Measure, str], ...] = (
    ("psnr", "PSNR in dB"),
    ("ms_ssim", "MS-SSIM in dB: -10 log10(1 - x)"),
)


def plot(curves: Iterable[Curve], path: str | Path, title: str = "") -> None:
    """Draw PSNR and MS-SSIM over bits per pixel, both panels in one picture.

    Curves named `cae...` are drawn thicker. The state of pyplot is not touched.

    Parameters
    ----------
    curves
        Drawn in this order.
    path
        The file to write: PNG, PDF or SVG, by its suffix.
    title
        A line above the panels.

    Raises
    ------
    CAEConfigurationError
        If there are no curves, or if matplotlib is missing.
    """
    curves = list(curves)
    if not curves:
        raise CAEConfigurationError("cae: there are no curves to plot")
    figure = import_extra("matplotlib.figure", "plots").Figure(figsize=(12, 5.5), layout="constrained")
    import_extra("matplotlib.backends.backend_agg", "plots").FigureCanvasAgg(figure)
    ticker = import_extra("matplotlib.ticker", "plots")
    panels = figure.subplots(1, len(_PANELS))
    for axes, (measure, label) in zip(panels, _PANELS, strict=True):
        for i, curve in enumerate(curves):
            look = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": curve.name}
            ours = {"marker": "o", "linewidth": 2.5, "zorder": 3} if curve.name.startswith("cae") else {"marker": "."}
            axes.plot(curve.bpp, curve.quality(measure), **look, **ours)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set(xlabel="bits per pixel", ylabel=label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
