"""The JSON schemas of the codecs' metadata."""

import json
from importlib import resources

import jsonschema
import pytest

from zarr_cae import CAECodec
from zarr_cae.latents.codec import CAEBottleneckCodec

SPEC = resources.files("zarr_cae") / "spec"


def schema(name):
    found = json.loads((SPEC / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("options", [{}, {"quality": 3, "metric": "ms-ssim", "value_range": (0, 4095)}, {"colour": (1, 0, 2)}])
@pytest.mark.parametrize("axis", [None, 2, -1])
def test_metadata_of_the_codecs_fit_the_schemas(options, axis):
    codec = CAECodec(channel_axis=axis, **options)
    for name, metadata in (
        ("cae", codec.to_dict()),
        ("cae_bottleneck", CAEBottleneckCodec(codec, (64, 64, 3)).to_dict()),
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
