"""Attack the decoders with seeded mutants, truncations, kills and a store that lies.

    python benchmarks/attack.py [--target frame,stream,codec,store,kill] [--mutants N] [--seconds S] [--seed N]

Each mutant must be decoded to symbols or pixels of the right shape, or raise one of this package's errors of data
(CAEDataError), within `HANG` seconds and `MEMORY` bytes. Everything else counts as a finding: another exception, a
process that dies, a hang, an allocation beyond the limit. Each finding is printed with the command that repeats it:

    python benchmarks/attack.py --target frame --seed 0 --only 12345

* frame: the decoders of symbols, masks, exact tiles and corrections on frames of every version with damaged streams,
  sections, headers and bytes. The checksums are computed again, so that the damage gets past them and reaches the
  decoder. What zlib holds is damaged and compressed again.
* stream: the decoder of CompressAI's streams (`legacy.stream`), and chunks of caecodec.
* codec: whole and partial reading of an array through zarr, whose chunks are such mutants; with masks, exact tiles,
  corrections and further channels too.
* store: reading through a store that returns too few bytes, too many, wrong ones, or none.
* kill: processes that write an array and are killed; what they leave must be readable.

The attacker is a process of its own. This process watches it. If a mutant kills it or hangs, another attacker starts
at the next mutant.
"""

import argparse
import asyncio
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.sharedctypes
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from measuring import memory_now
from mutants import PIXELS, corrections, damaged, frames, mutant_frame, mutated, own_header, pixel_shape

HANG = 30.0
START = 900.0
"""Seconds in which an attacker imports and compiles all that it attacks."""
MEMORY = 1 << 30
TARGETS = ("frame", "stream", "codec", "store", "kill")


class Finding(Exception):  # noqa: N818 - it is what this script looks for
    """Something that a decoder must not do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="frame,stream,codec,store,kill", help="some of " + ", ".join(TARGETS))
    parser.add_argument("--mutants", type=int, help="how many of each target; default: as many as --seconds allows")
    parser.add_argument("--seconds", type=float, default=60, help="for each target; default 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="MUTANT", help="repeat this one, in this process")
    arguments = parser.parse_args()
    targets = arguments.target.split(",")
    if not set(targets) <= set(TARGETS):
        parser.error(f"--target is some of {', '.join(TARGETS)}")
    if arguments.only is not None:
        for target in targets:
            print(target, ATTACKS[target](np.random.default_rng([arguments.seed, arguments.only])))
        return
    findings = 0
    for target in targets:
        count, refused, found = attack(target, arguments.mutants, arguments.seconds, arguments.seed)
        print(f"{target}: {count:,} mutants, {refused:,} refused, {len(found)} findings", flush=True)
        for finding in found:
            print(f"  {finding}")
        findings += len(found)
    sys.exit(1 if findings else 0)


def attack(target: str, mutants: int | None, seconds: float, seed: int) -> tuple[int, int, list[str]]:
    """Return how many mutants were tried and refused, and the findings."""
    spawn = multiprocessing.get_context("spawn")
    # The mutant that is tried, how many were refused, milliseconds used, whether the attacker has started.
    state = spawn.Array(ctypes.c_longlong, 4)
    findings, first = [], 0
    budget = seconds if mutants is None else float("inf")
    last = sys.maxsize if mutants is None else mutants
    while first < last and state[2] < 1000 * budget:
        reports, send = spawn.Pipe(duplex=False)
        child = spawn.Process(target=attacker, args=(target, seed, first, last, budget, state, send))
        state[0], state[3] = first, 0
        child.start()
        send.close()
        hung = watch(child, state, reports, findings)
        if child.exitcode == 0:
            first = state[0]
            break
        first = state[0] + 1
        how = f"hung for {HANG:.0f} s" if hung else f"process ended with {child.exitcode}"
        findings.append(f"mutant {state[0]}: {how}")
    return first, state[1], findings


def watch(child: Any, state: Any, reports: Any, findings: list[str]) -> bool:
    """Wait for an attacker to end, gather its findings, and end it if it hangs."""
    seen, since, told = (-1, 0), time.monotonic(), time.monotonic()
    while child.is_alive():
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"  mutant {state[0]:,}, {state[1]:,} refused, {len(findings)} findings", file=sys.stderr, flush=True)
        try:
            while reports.poll(0.2):
                findings.append(reports.recv())
        except EOFError:
            child.join(HANG)
        if (now := (state[0], state[3])) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > (HANG if state[3] else START):
            os.kill(child.pid, signal.SIGABRT)  # faulthandler says where it was
            child.join()
            return True
    child.join()
    while reports.poll():
        try:
            findings.append(reports.recv())
        except EOFError:
            break
    return False


def attacker(target: str, seed: int, first: int, last: int, seconds: float, state: Any, send: Any) -> None:
    """Try mutants one after the other, and report findings."""
    from zarr_cae.errors import CAEDataError

    faulthandler.enable()
    run = ATTACKS[target]
    run(np.random.default_rng([seed, first]), harmless=True)  # loads and compiles, before memory is limited
    limit_memory()
    state[3] = 1
    start, used = time.monotonic(), state[2]
    for mutant in range(first, last):
        state[2] = used + int(1000 * (time.monotonic() - start))
        if state[2] > 1000 * seconds:
            break
        state[0] = mutant
        try:
            run(np.random.default_rng([seed, mutant]))
        except CAEDataError:
            state[1] += 1
        except BaseException as error:  # noqa: BLE001 - every other one is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = Path(where.filename).name
            send.send(f"mutant {mutant}: {type(error).__name__}: {str(error)[:200]} ({name}:{where.lineno})")
    else:
        mutant = last
    state[0] = mutant


def limit_memory() -> None:
    """Let this process allocate no more than `MEMORY` bytes from here on."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_now().virtual + MEMORY, resource.RLIM_INFINITY))


def attack_frame(random: np.random.Generator, *, harmless: bool = False) -> str:
    from zarr_cae.coder import tiles
    from zarr_cae.coder.correction import decode_correction
    from zarr_cae.coder.frame import parse_frame
    from zarr_cae.coder.lossless import decode_mask, decode_pixels

    header, tables, frame = mutant_frame(random)
    if harmless:
        header, tables, frame = frames()[0]
    parsed = parse_frame(frame, header)
    if parsed.mask is not None:
        shape = (header.planes, header.components, header.height, header.width)
        expect(decode_mask(parsed.mask, shape), shape, np.bool_)
    found = tiles.tiles(parsed.header)
    for number, section in parsed.exact.items():
        size = pixel_shape(parsed.header, found[number])
        expect(decode_pixels(section, size, PIXELS), size, PIXELS)
    for number, section in parsed.corrections.items():
        apply_correction(random, decode_correction(section, header.components, found[number].patch.shape))
    symbols = tiles.decode(frame, header, tables)
    expect(symbols, (header.planes, tables.channels, *header.latent_shape), np.int16)
    return "decoded"


def apply_correction(random: np.random.Generator, correction: Any) -> None:
    """Correct a plane of two positions in each direction, and check that its values stay within the limit."""
    from dataclasses import replace

    from zarr_cae.pixels.correct import Area, correct

    plane = random.normal(0.5, 0.5, (1, correction.components, 32, 32)).astype(np.float32)
    corrected = plane.copy()
    correct(corrected, [Area(0, slice(0, 32), slice(0, 32), replace(correction, where=None))])
    expect(corrected, plane.shape, np.float32)
    if np.abs(corrected - plane.clip(0, 1)).max() > correction.limit / 255 + 1e-5:
        raise Finding("a correction changed values beyond its limit")


def expect(values: Any, shape: tuple[int, ...], dtype: Any, *, nan: bool = False) -> None:
    if values.shape != shape or values.dtype != dtype:
        raise Finding(f"decoded to {values.dtype} {values.shape}, expected {np.dtype(dtype)} {shape}")
    if values.dtype.kind == "f" and not (np.isfinite(values) | (nan & np.isnan(values))).all():
        raise Finding("decoded to values that are not finite")


@cache
def old_chunks() -> list[tuple[Any, tuple[int, int], bytes]]:
    """Return tables, shape and streams in CompressAI's form."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import caecodec

    from zarr_cae.legacy.stream import CumulativeTables

    made, random = [], np.random.default_rng(0)
    for channels, spread in ((1, 3), (4, 30), (48, 2), (12, 30000)):
        table = caecodec.tables(random, channels)
        symbols = random.integers(-spread, spread + 1, (channels, 4, 3)).astype(np.int16)
        made.append((CumulativeTables(*table), (4, 3), caecodec.encode(symbols, *table)))
    return made


def attack_stream(random: np.random.Generator, *, harmless: bool = False) -> str:
    import struct

    from zarr_cae.legacy import chunk, stream

    tables, shape, content = old_chunks()[random.integers(0, len(old_chunks()))]
    if harmless:
        stream.decode(content, shape, tables)
        return "decoded"
    if random.random() < 0.6:
        expect(stream.decode(mutated(random, content), shape, tables), (tables.channels, *shape), np.int16)
    else:
        whole = struct.pack(">4Q", 60, 47, 4, 1) + content
        header, symbols = chunk.symbols(memoryview(mutated(random, whole)), tables)
        expect(symbols, (tables.channels, *header.latent_shape), np.int16)
    return "decoded"


@cache
def arrays() -> list[tuple[Any, str, bytes, Any]]:
    """Return arrays of one chunk in memory, each with the chunk's key, frame and header."""
    from dataclasses import replace

    import zarr
    from zarr.storage import MemoryStore

    import zarr_cae
    from zarr_cae.codec.cae import loaded
    from zarr_cae.coder.frame import pack, parse_frame

    made, random = [], np.random.default_rng(0)
    for shape, dtype, settings in (
        ((48, 40, 3), "uint8", {"quality": 1}),
        ((33, 17), "uint8", {"quality": 7}),
        ((48, 40, 3), "uint8", {"quality": 2, "nodata": 0}),
        ((40, 70), "float32", {"quality": 3, "value_range": (0, 255), "nodata": float("nan")}),
        ((90, 40), "uint16", {"quality": 8, "value_range": (0, 4095), "min_psnr": 99}),
        ((48, 40, 4), "uint8", {"quality": 4, "colour": (0, 1, 2), "nodata": 3, "min_psnr": 45}),
        ((40, 560, 3), "uint8", {"quality": 6}),
        ((40, 530), "float32", {"quality": 6, "value_range": (0, 255), "value_transform": "sqrt"}),
    ):
        codec = zarr_cae.CAECodec(channel_axis=-1 if len(shape) == 3 else None, **settings)
        array = zarr.create_array(
            MemoryStore(), shape=shape, chunks=shape, dtype=dtype, compressors=None, serializer=codec
        )
        image = random.integers(0, 256, shape).astype(dtype)
        if "nodata" in settings:
            image[5:20, :9] = settings["nodata"]
        array[...] = image
        key = "c/" + "/".join("0" * len(shape))
        frame = read(array.store_path.store, key)
        header = own_header(frame)
        made.append((array, key, frame, header))
        if max(shape) > 512:
            parsed = parse_frame(frame, header)
            third = replace(header, version=3, row=loaded(codec).row(codec.quality))
            for _ in range(3):
                frame = pack(third, parsed.streams, exact=parsed.exact, corrections=corrections(random, third))
                made.append((array, key, frame, third))
    return made


def read(store: Any, key: str) -> bytes:
    from zarr.buffer import default_buffer_prototype

    return asyncio.run(store.get(key, default_buffer_prototype())).to_bytes()


def write(store: Any, key: str, content: bytes) -> None:
    from zarr.buffer import default_buffer_prototype

    asyncio.run(store.set(key, default_buffer_prototype().buffer.from_bytes(content)))


def attack_codec(random: np.random.Generator, *, harmless: bool = False) -> str:
    array, key, frame, header = arrays()[random.integers(0, len(arrays()))]
    wrong = damaged(random, frame, header) if random.random() < 0.7 else mutated(random, frame)
    write(array.store_path.store, key, frame if harmless else wrong)
    window = tuple(slice(int(a), int(a) + int(random.integers(1, n - a + 1))) for n in array.shape
                   for a in [random.integers(0, n)])  # fmt: skip
    window = (slice(None),) * array.ndim if random.random() < 0.5 else window
    pixels = array[window]
    expect(pixels, tuple(len(range(*part.indices(n))) for part, n in zip(window, array.shape, strict=True)),
           array.dtype, nan=array.dtype.kind == "f")  # fmt: skip
    return "decoded"


@cache
def lying() -> Any:
    """Make a store in memory whose answers are changed by `lie`."""
    from zarr.storage import MemoryStore

    class LyingStore(MemoryStore):
        lie: Any = staticmethod(lambda content: content)

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await super().get(key, prototype, byte_range)
            if value is None or key.endswith(".json"):
                return value
            content = type(self).lie(value.to_bytes())
            return None if content is None else prototype.buffer.from_bytes(content)

        def get_sync(self, key: str, *, prototype: Any = None, byte_range: Any = None) -> Any:
            value = super().get_sync(key, prototype=prototype, byte_range=byte_range)  # type: ignore[misc]
            if value is None or key.endswith(".json"):
                return value
            content = type(self).lie(value.to_bytes())
            return None if content is None else type(value).from_bytes(content)

    return LyingStore


@cache
def lying_array() -> Any:
    import zarr

    import zarr_cae

    array = zarr.create_array(
        lying()(), shape=(96, 160, 3), chunks=(96, 80, 3), dtype="uint8", compressors=None,
        serializer=zarr_cae.CAECodec(quality=3),
    )  # fmt: skip
    array[...] = np.random.default_rng(0).integers(0, 256, array.shape).astype(np.uint8)
    return array


def attack_store(random: np.random.Generator, *, harmless: bool = False) -> str:
    array = lying_array()
    lies = [
        lambda content: content[: int(random.integers(0, len(content) + 1))],
        lambda content: content + random.bytes(int(random.integers(1, 100))),
        lambda content: mutated(random, content) if content else content,
        lambda content: None,  # noqa: ARG005
        lambda content: random.bytes(len(content)),
        lambda content: b"",  # noqa: ARG005
        lambda content: content,
    ]
    lie = lies[int(random.integers(0, len(lies)))]
    chance = random.random()
    lying().lie = staticmethod(lambda content: lie(content) if not harmless and random.random() < chance else content)
    top, left = int(random.integers(0, 95)), int(random.integers(0, 159))
    window = (slice(top, top + int(random.integers(1, 96))), slice(left, left + int(random.integers(1, 60))))
    pixels = array[window] if random.random() < 0.8 else array[...]
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise Finding(f"decoded to {pixels.dtype} {pixels.shape}")
    return "decoded"


WRITER = """
import sys, numpy as np, zarr, zarr_cae
array = zarr.open(sys.argv[1], mode="r+")
random = np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
while True:
    row = 16 * int(random.integers(0, 6))
    array[row : row + int(random.integers(1, 48))] = random.integers(0, 256)
"""


def attack_kill(random: np.random.Generator, *, harmless: bool = False) -> str:
    """Kill a writer at a random moment, and read all that it left."""
    import subprocess

    import zarr

    import zarr_cae

    with tempfile.TemporaryDirectory() as folder:
        zarr.create_array(
            f"{folder}/a.zarr", shape=(96, 64, 3), chunks=(32, 32, 3), dtype="uint8", compressors=None,
            serializer=zarr_cae.CAECodec(quality=2), config={"write_empty_chunks": True},
        )  # fmt: skip
        command = [sys.executable, "-c", WRITER, f"{folder}/a.zarr", str(int(random.integers(0, 1 << 30)))]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(float(random.random()) * 0.5 + (1 if harmless else 0))
            writer.kill()
        try:
            pixels = zarr.open(f"{folder}/a.zarr", mode="r")[...]
        except Exception as error:
            raise Finding(f"a killed writer left what can't be read: {error}") from error
        expect(pixels, (96, 64, 3), np.uint8)
    return "readable"


ATTACKS: dict[str, Any] = {
    "frame": attack_frame, "stream": attack_stream, "codec": attack_codec, "store": attack_store, "kill": attack_kill,
}  # fmt: skip


if __name__ == "__main__":
    main()
