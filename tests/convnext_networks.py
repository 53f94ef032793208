"""ConvNeXts of torchvision (V1) and timm (V2) with random weights, and what the tests of their conversion share."""

import timm
import torch
import torchvision
from checkpoints import assert_bitwise, random_like
from published_convnexts import CONVNEXTS

from spark_me.weights.canonical import from_canonical, to_canonical

V1 = [name for name in CONVNEXTS if name.startswith("convnext_")]
SMALL = ["convnext_tiny", "convnextv2_atto", "convnextv2_tiny"]


def library_network(name, **arguments):
    """torchvision's V1, timm's V2, without memory for their weights."""
    with torch.device("meta"):
        return torchvision.models.get_model(name) if name in V1 else timm.create_model(name, **arguments)


def random_library_state(name, seed=0):
    return random_like(library_network(name).state_dict(), seed)


def filled(network, state):
    network.load_state_dict(state, strict=True, assign=True)
    return network.double().eval()


def images_of(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def convert(state, layout):
    return from_canonical(to_canonical(state, "a"), layout)[0]


def library_features(network, images):
    if isinstance(network, torchvision.models.ConvNeXt):
        maps, x = [], images
        for index, layer in enumerate(network.features):
            x = layer(x)
            if index % 2:
                maps.append(x)
        return maps
    return network.forward_intermediates(images, intermediates_only=True)


def assert_same(actual, expected):
    """The same tensors, bitwise, in whatever order."""
    assert_bitwise(dict(sorted(actual.items())), dict(sorted(expected.items())))
