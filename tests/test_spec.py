"""The JSON schemas of the codecs' metadata."""

import json
import re
from importlib import resources

import jsonschema
import numpy as np
import pytest
import zarr
from archives import document
from zarr.storage import MemoryStore

from zarr_cae import BottleneckStore, CAECodec, DecodedStore
from zarr_cae.latents.codec import CAEBottleneckCodec

SPEC = resources.files("zarr_cae") / "spec"


def schema(name):
    found = json.loads((SPEC / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("options", [{}, {"quality": 3, "metric": "ms-ssim", "value_range": (0, 4095)}])
@pytest.mark.parametrize("axis", [None, 2, -1])
def test_metadata_of_the_codecs_fit_the_schemas(options, axis):
    codec = CAECodec(channel_axis=axis, **options)
    for name, metadata in (
        ("cae", codec.to_dict()),
        ("cae_bottleneck", CAEBottleneckCodec(codec, (64, 64, 3)).to_dict()),
    ):
        jsonschema.validate(json.loads(json.dumps(metadata)), schema(name))


def test_colour_fits_the_schemas():
    codec = CAECodec(channel_axis=-1, colour=(1, 0, 2))
    for name, metadata in (
        ("cae", codec.to_dict()),
        ("cae_bottleneck", CAEBottleneckCodec(codec, (64, 64, 4)).to_dict()),
    ):
        jsonschema.validate(json.loads(json.dumps(metadata)), schema(name))


@pytest.mark.parametrize("changed", [{"quality": 9}, {"weights": "sha256:0"}, {"value_range": [1]}, {"unknown": 1}])
def test_the_schema_refuses_other_configurations(changed):
    metadata = json.loads(json.dumps(CAECodec(channel_axis=None).to_dict()))
    metadata["configuration"].update(changed)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(metadata, schema("cae"))


def test_the_specifications_are_in_the_package():
    assert {"cae.md", "cae_bottleneck.md"} <= {path.name for path in SPEC.iterdir()}


def examples(name):
    """Return the JSON blocks of a specification."""
    return [
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", (SPEC / f"{name}.md").read_text(), re.DOTALL)
    ]


def test_the_examples_are_what_this_package_writes_and_shows():
    example, shown = examples("cae")
    latents = examples("cae_bottleneck")[0]
    for name, found in (("cae", example), ("cae_bottleneck", latents)):
        jsonschema.validate(found, schema(name))
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=(256, 256, 3), chunks=(256, 256, 3), dtype="uint8", compressors=None, fill_value=0,
        serializer=CAECodec.from_dict(example),
    )  # fmt: skip
    assert document(zarr.open_array(store, mode="r"))["codecs"] == [example]
    assert document(zarr.open_array(BottleneckStore(store), mode="r"))["codecs"] == [latents]
    assert document(zarr.open_array(DecodedStore(store), mode="r"))["codecs"] == shown["codecs"]
    assert not np.asarray(array[...]).any()


def test_the_documents_have_the_sections_of_the_registry():
    for name in ("cae", "cae_bottleneck"):
        sections = re.findall(r"^## (.*)$", (SPEC / f"{name}.md").read_text(), re.MULTILINE)
        wanted = ["Codec name", "Configuration parameters", "Example", "Supported data types", "Change log",
                  "Current maintainers"]  # fmt: skip
        assert [section for section in sections if section in wanted] == wanted
