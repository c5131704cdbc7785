"""Say how the settings of two conversions differ, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zarr_cae.errors import CAEError
from zarr_cae.weights import registry

__all__ = ["differences"]

Settings = Mapping[str, Any]
_MANY = "several images"


def differences(known: Settings, wanted: Settings) -> list[str]:
    """Return one text for each setting that differs, such as "--quality 4, was 6".

    Parameters
    ----------
    known, wanted
        The settings of the journal, and those of this run (`Conversion.settings`).
    """
    if (_MANY in known) != (_MANY in wanted):
        names = [_sources(settings) for settings in (wanted, known)]
        return [f"source {names[0]}, was {names[1]}"]
    found = _source(known, wanted)
    for option, value in _OPTIONS.items():
        now, before = value(wanted), value(known)
        if now != before:
            found.append(f"{option} {now}, was {before}")
    return found or _derived(known, wanted)


def _sources(settings: Settings) -> str:
    return "several files" if _MANY in settings else str(settings.get("source"))


def _source(known: Settings, wanted: Settings) -> list[str]:
    """Return how the source differs: its name, or what happened to it since."""
    if known.get("source") != wanted.get("source"):
        return [f"source {wanted.get('source')}, was {known.get('source')}"]
    changed = any(known.get(name) != wanted.get(name) for name in ("size", "modified"))
    return [f"the source {Path(str(wanted.get('source'))).name} was changed meanwhile"] if changed else []


def _derived(known: Settings, wanted: Settings) -> list[str]:
    """Return the differences that no option explains, such as weights of another release under the same name."""
    names = sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name))
    return [f"{name} {_short(wanted.get(name))}, was {_short(known.get(name))}" for name in names]


def _short(value: object) -> str:
    return re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1...", str(value))


def _listed(name: str, none: str) -> Callable[[Settings], str]:
    """Return a function that shows a setting in the form in which its option is written; `none` is shown for None."""

    def shown(settings: Settings) -> str:
        values = settings.get("values")
        value = settings.get(name, values.get(name) if isinstance(values, dict) else None)
        if isinstance(value, list):
            return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
        return none if value is None else str(value)

    return shown


def _weights(settings: Settings) -> str:
    """Return the names of the weights; the beginning of the digest for those without a name on this machine."""
    weights = settings.get("weights") or registry.DEFAULT_NAME
    if not isinstance(weights, list):
        weights = [weights]
    return ", ".join(dict.fromkeys(_weights_name(str(one)) for one in weights))


def _weights_name(weights: str) -> str:
    try:
        return registry.family_name(weights) or _short(weights)
    except CAEError:  # the name of a family, as it was given for several files
        return _short(weights)


_OPTIONS: dict[str, Callable[[Settings], str]] = {
    "--quality": _listed("qualities", ""),
    "--metric": _listed("metric", ""),
    "--model": _listed("model", ""),
    "--weights": _weights,
    "--chunks": _listed("chunks", ""),
    "--shards": _listed("shards", "none"),
    "--levels": _listed("levels", "auto"),
    "--downsample": _listed("downsample", ""),
    "--value-range": _listed("value_range", "by dtype"),
    "--nodata": _listed("nodata", "not given"),
    "--min-psnr": _listed("min_psnr", "not given"),
    "--value-transform": _listed("value_transform", "not given"),
    "--series": _listed("series", "not given"),
    "--level": _listed("level", "0"),
    "--effort": _listed("effort", "1"),
}
"""By option, a function that shows its value in the settings of a conversion."""
