import math

import pytest
import torch
import torchvision
from convnext_networks import sparse_shapes

import spark_me
from spark_me.weights.architectures import model_tensors

DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_encoder_tables_are_torchvisions(name, in_channels):
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
        network.conv1 = torch.nn.Conv2d(in_channels, 64, 7, bias=False)
    expected = {("" if key.startswith("fc.") else "encoder.") + key: t.shape for key, t in network.state_dict().items()}
    tables = model_tensors(name, in_channels, num_classes=1000)
    assert {key: spec.shape for key, spec in tables.items()} == expected
    assert list(tables) == list(expected)


@pytest.mark.parametrize("name, width, in_channels", [("resnet18", 512, 3), ("resnet34", 64, 4), ("resnet50", 512, 1)])
def test_tables_are_the_sparse_models(name, width, in_channels):
    """Kernels too, whose rank depends on the layer; ResNet-18 at width 512 has no deepest projection."""
    model = spark_me.build_model(name, decoder_width=width, in_channels=in_channels)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tables = model_tensors(name, in_channels, decoder_width=width)
    actual = {
        key.removesuffix("weight") + "kernel" if spec.kernel else key: spec.sparse_shape or spec.shape
        for key, spec in tables.items()
    }
    assert actual == expected
    assert ("densify.0.projection.weight" in actual) == (name != "resnet18")


@pytest.mark.parametrize(
    "arguments, parameters", [({"num_classes": 1000}, 28_635_496), ({"decoder_width": 512}, 39_729_619)]
)
def test_convnextv2_tiny_has_the_published_number_of_parameters(arguments, parameters):
    tables = model_tensors("convnextv2_tiny", **arguments)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(math.prod(spec.shape) for key, spec in tables.items() if not key.endswith(statistics)) == parameters


@pytest.mark.parametrize("name, width", [("convnext_tiny", 64), ("convnextv2_pico", 512), ("convnextv2_base", 512)])
def test_convnext_tables_are_the_sparse_shapes(name, width):
    tables = model_tensors(name, decoder_width=width)
    actual = {
        key.removesuffix("weight") + "kernel" if spec.kernel else key: spec.sparse_shape or spec.shape
        for key, spec in tables.items()
    }
    assert actual == sparse_shapes(name, width)
    assert ("densify.0.projection.weight" in actual) == (name != "convnextv2_pico")
