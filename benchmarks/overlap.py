"""How the stages of a write and a read through zarr overlap.

    python benchmarks/overlap.py [IMAGE ...] [--edge 2048] [--chunk 256] [--quality 4] [--repeats 3]

A picture made of the images (as in throughput.py) is written to and read from a memory store and a local folder. The
fastest of the repeats is shown: for each stage the calls, the seconds that they took, summed over threads, and the
seconds of a core in them (less, where a thread waited for a core or for Python's lock; torch's own threads, where a
batch has several, are not counted); "rest" is what the process used beside them: zarr, the event loop, handing over.
Below, the share of the wall clock in which so many threads were in the network.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import zarr
from images import image_files, mosaic
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore

from zarr_cae import CAECodec
from zarr_cae.coder import tiles
from zarr_cae.networks import engine

STORE, NETWORK = "store", "network"
STAGES = (STORE, "to planes", NETWORK, "entropy coding", "to pixels")


class Span(NamedTuple):
    """One call: when it began and ended on the wall clock, and its seconds of a core."""

    begin: float
    end: float
    core: float


Trace = dict[str, list[Span]]


def traced(function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return await function(*args, **kwargs)
            finally:  # other coroutines ran on this core in the meantime, so that its seconds mean nothing
                spans.append(Span(begin, time.perf_counter(), 0.0))

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin, core = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spans.append(Span(begin, time.perf_counter(), time.thread_time() - core))

    return wrapper


@contextmanager
def tracing(store: Store) -> Iterator[Trace]:
    """Record the calls of each stage."""
    trace: Trace = defaultdict(list)
    places = [
        (type(store), "get", STORE), (type(store), "set", STORE), (engine.Engine, "_code", NETWORK),
        (engine, "to_planes", "to planes"), (engine, "to_chunk", "to pixels"),
        (tiles, "encode_tile", "entropy coding"), (tiles, "decode_tile", "entropy coding"),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name, stage in places:
            stack.enter_context(patch.object(owner, name, traced(getattr(owner, name), trace[stage])))
        yield trace


def shares(spans: list[Span], begin: float, end: float) -> dict[int, float]:
    """Return, for each number of spans, the share of the time in which so many were open."""
    edges = sorted([(span.begin, 1) for span in spans] + [(span.end, -1) for span in spans])
    result: dict[int, float] = defaultdict(float)
    now, open_ones = begin, 0
    for moment, change in [*edges, (end, 0)]:
        result[open_ones] += (moment - now) / (end - begin)
        now, open_ones = moment, open_ones + change
    return result


def best(work: Callable[[], Any], store: Store, repeats: int) -> tuple[float, float, float, Trace]:
    """Return begin and end on the wall clock, the seconds of all cores, and the trace of the fastest run."""
    runs = []
    for _ in range(repeats):
        with tracing(store) as trace:
            begin, core = time.perf_counter(), time.process_time()
            work()
            runs.append((begin, time.perf_counter(), time.process_time() - core, trace))
    return min(runs, key=lambda run: run[1] - run[0])


def report(what: str, begin: float, end: float, core: float, trace: Trace) -> None:
    print(f"\n{what}: {end - begin:.3f} s, {core:.3f} s of all cores")
    print(f"  {'':16}{'calls':>7}{'seconds':>9}{'of a core':>11}")
    for stage in STAGES:
        if spans := trace[stage]:
            print(
                f"  {stage:16}{len(spans):7d}{sum(span.end - span.begin for span in spans):9.3f}"
                f"{sum(span.core for span in spans):11.3f}"
            )
    rest = core - sum(span.core for spans in trace.values() for span in spans)
    print(f"  {'rest':34}{rest:9.3f}")
    parts = [f"{count}: {share:.0%}" for count, share in sorted(shares(trace[NETWORK], begin, end).items())]
    print(f"  threads in the network: {', '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--edge", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pixels = mosaic(image_files(arguments.images), arguments.edge)
    print(f"{arguments.edge} x {arguments.edge} RGB in chunks of {arguments.chunk}, quality {arguments.quality}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for store in (MemoryStore(), LocalStore(folder)):
            array: zarr.Array[Any] = zarr.create_array(
                store, shape=pixels.shape, chunks=(arguments.chunk, arguments.chunk, 3), dtype="uint8",
                serializer=CAECodec(arguments.quality, channel_axis=2), compressors=None,
            )  # fmt: skip
            corner = slice(2 * arguments.chunk)
            array[corner, corner] = pixels[corner, corner]
            np.asarray(array[corner, corner])  # the networks and the coder are there
            name = type(store).__name__
            report(f"{name}, write", *best(lambda a=array: a.__setitem__(..., pixels), store, arguments.repeats))
            report(f"{name}, read", *best(lambda a=array: a[...], store, arguments.repeats))


if __name__ == "__main__":
    main()
