"""The golden arrays and frames decode alike with a decoder that was written from the specification alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from reference_decoder import decode, decode_latents, decode_stream, parse_frame, read_weights

FIXTURES = Path(__file__).parent / "fixtures"
ARRAYS = sorted(FIXTURES.glob("arrays/*/*.zarr"))
FRAMES = sorted(FIXTURES.glob("frames/*.bin"))


def find_weights(name: str) -> dict:
    import zarr_cae

    for path in Path(zarr_cae.__file__).parent.rglob("*.safetensors"):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == name.removeprefix("sha256:"):
            return read_weights(content)
    pytest.skip("the weights file is not here")


def test_golden_corrections_are_of_all_forms() -> None:
    """Colours and grey, knots of values and of roots, whole and partly corrected tiles, several tiles of a plane."""
    found = set()
    for path in FIXTURES.glob("arrays/2026-11-corrected/*/c/**/*"):
        if path.is_file():
            frame = parse_frame(path.read_bytes())
            found |= {(frame.grey, section[0], place[2] > 0) for place, section, *_ in frame.tiles if section}
    assert found == {(False, 0, False), (False, 1, False), (True, 0, True), (True, 2, False)}


@pytest.mark.slow
@pytest.mark.parametrize("path", ARRAYS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_array(path: Path) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    (codec,) = metadata["codecs"]
    configuration = codec["configuration"] | {"fill_value": metadata["fill_value"]}
    axis = configuration["channel_axis"]
    weights = find_weights(configuration["weights"])
    shape, edges = list(metadata["shape"]), list(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    if axis is not None:
        shape.pop(axis)
        edges.pop(axis)
    whole = [-(-length // edge) * (edge + -edge % 16) for length, edge in zip(shape, edges, strict=True)]
    pixels = latents = None
    for chunk in (p for p in path.glob("c/**/*") if p.is_file()):
        index = [int(k) for k in chunk.relative_to(path / "c").parts]
        if axis is not None:
            index.pop(axis)
        frame = parse_frame(chunk.read_bytes())
        lat = np.concatenate(decode_latents(frame, weights, configuration["quality"]))
        pix = decode(frame, weights, configuration, np.dtype(metadata["data_type"]))[0]
        if pixels is None or latents is None:
            pixels = np.zeros((len(pix), *whole), pix.dtype)
            latents = np.zeros((len(lat), *(length // 16 for length in whole)), np.float32)
        y, x = (k * edge for k, edge in zip(index, edges, strict=True))
        latents[:, y // 16 :, x // 16 :][:, : lat.shape[1], : lat.shape[2]] = lat
        pixels[:, y:, x:][:, : pix.shape[1], : pix.shape[2]] = pix
    assert pixels is not None
    assert latents is not None
    h, w = shape
    latents, pixels = latents[:, : -(-h // 16), : -(-w // 16)], pixels[:, :h, :w]
    latents = np.moveaxis(latents, 0, -1 if axis is None else axis)
    pixels = pixels[0] if axis is None else np.moveaxis(pixels, 0, axis)
    digest = hashlib.sha256(np.ascontiguousarray(latents).tobytes()).hexdigest()
    assert digest == json.loads((path.parent / "latents.json").read_text())[path.stem]
    with np.load(path.parent / "pixels.npz") as arrays:
        expected = arrays[path.stem]
    low, high = configuration.get("value_range", [0, 255])
    np.testing.assert_allclose(pixels.astype(float), expected.astype(float), rtol=0, atol=(high - low) / 255)


@pytest.mark.parametrize(
    ("name", "first", "row", "shape"),
    [
        ("wide_alphabet", -255, [8] * 512, (2, 1, 900)),
        ("one_lane_escapes", -4, [1, 15, 90, 500, 2048, 500, 90, 15, 837], (6, 1, 40)),
    ],
)
def test_streams_without_contexts(name: str, first: int, row: list[int], shape: tuple[int, ...]) -> None:
    """Streams of frames of version 1, and the symbols that `test_rans` made them of."""
    data = (FIXTURES / "streams" / f"{name}.p12.bin").read_bytes()
    tables = {"minimum": [first] * shape[0], "frequency": [row] * shape[0]}
    got = decode_stream(data, tables, *shape[1:], version=1)
    if name == "wide_alphabet":
        expected = np.arange(2 * 900).reshape(shape) * 6151 % 520 - 260
    else:
        expected = np.arange(6 * 40).reshape(shape) * 7919 % 31 % 9 - 4
        expected[2] = 0
        expected[4, 0, 5], expected[4, 0, 6], expected[5, 0, 39] = -32768, 300, 32767
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("path", FRAMES, ids=lambda p: p.stem)
def test_frame(path: Path) -> None:
    data = path.read_bytes()
    frame = parse_frame(data)
    assert frame.tiles
    for k in range(len(data)):
        with pytest.raises(AssertionError):
            parse_frame(data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :])


def is_empty(pixels: np.ndarray, nodata: float) -> np.ndarray:
    return np.isnan(pixels) if np.isnan(nodata) else pixels == nodata


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "settings"),
    [
        ((2, 4, 33, 20), "uint8", {"channel_axis": 1, "colour": (2, 0, 1), "value_range": (0, 255), "nodata": 0}),
        ((40, 37), "float32", {"channel_axis": None, "value_range": (1, 4), "nodata": float("nan"), "min_psnr": 70}),
        ((40, 3, 37), ">u2", {"channel_axis": 1, "value_range": (3, 120), "nodata": 120, "value_transform": "sqrt"}),
        ((17, 33), "int32", {"channel_axis": None, "value_range": (-20, 100), "nodata": 50, "min_psnr": 45}),
    ],
    ids=["colours of two images", "exact floats", "square roots", "exact integers"],
)
def test_new_frames(shape: tuple[int, ...], dtype: str, settings: dict) -> None:
    """Frames that are written today, with few, many and clustered pixels without data."""
    import zarr

    import zarr_cae

    random = np.random.default_rng(0)
    low, high = settings["value_range"]
    pixels = (low + (high - low) * random.random(shape)).astype(dtype)
    pixels[random.random(shape) < 0.1] = settings["nodata"]
    pixels[..., :9, 5:12] = settings["nodata"]
    store: dict = {}
    array = zarr.create_array(
        store, shape=shape, chunks=shape, dtype=dtype, fill_value=low, compressors=None,
        serializer=zarr_cae.CAECodec(6, **settings),
    )  # fmt: skip
    array[...] = pixels
    (codec,) = json.loads(store["zarr.json"].to_bytes())["codecs"]
    (chunk,) = (content for key, content in store.items() if key != "zarr.json")
    frame, configuration = parse_frame(chunk.to_bytes()), codec["configuration"]
    assert any(exact for *_, exact in frame.tiles) == ("min_psnr" in settings)
    images = 2 if "colour" in settings else 1
    got = decode(frame, find_weights(configuration["weights"]), configuration, np.dtype(dtype), images)
    expected = np.moveaxis(array[...], settings["channel_axis"], -3) if len(shape) == 3 else array[...]
    got, written = got.reshape(expected.shape), np.moveaxis(pixels, 1, 0) if len(shape) == 3 else pixels
    for decoded in (got, expected):
        np.testing.assert_array_equal(is_empty(decoded, settings["nodata"]), is_empty(written, settings["nodata"]))
    level = max((high - low) / 255, 1 if np.dtype(dtype).kind in "iu" else 0)
    np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=0, atol=level)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("margin", [0, 1, 2])
def test_networks_with_a_margin(margin: int) -> None:
    """Networks of CompressAI, whose planes may be continued by reflection, also past the other edge of a small one."""
    import zarr

    import zarr_cae
    from zarr_cae.weights import compressai, registry
    from zarr_cae.weights.file import pack

    checkpoint = compressai.convert(FIXTURES / "legacy" / "checkpoint.safetensors", quality=1, metric="mse")
    with registry.temporary(checkpoint) as plain:
        info, tensors = plain.info, dict(plain.tensors)
    content = pack(
        tensors, model=info.model, metric=info.metric, qualities=info.qualities, provenance={},
        architecture={**info.architecture, **({"margin": margin} if margin else {})},
    )  # fmt: skip
    digest = registry.store(content).digest
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 60), np.uint8)
    pixels[1, :, :40] //= 4
    store: dict = {}
    array = zarr.create_array(
        store, shape=(2, 20, 60), chunks=(2, 10, 60), dtype="uint8", compressors=None,
        serializer=zarr_cae.CAECodec(1, model=info.model, weights=digest),
    )  # fmt: skip
    array[...] = pixels
    for number in range(2):  # rows of one latent, which has nothing to reflect, and columns of four
        frame = parse_frame(store[f"c/0/{number}/0"].to_bytes())
        got = decode(frame, read_weights(content), {"quality": 1}, np.dtype("uint8"))
        expected = array[:, 10 * number : 10 * number + 10]
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(got.reshape(expected.shape).astype(float), expected.astype(float), rtol=0, atol=1)
