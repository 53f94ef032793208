"""Gradient checkpointing of encoders: less memory is kept, and nothing else changes."""

import pytest
import torch
from test_copies import Functions

import spark_me

NETWORKS = {"resnet18": (96, 128), "convnextv2_atto": (96, 128), "timm/seresnet18": (96, 128), "functions": (24, 32)}


def run(name, checkpointing, visible):
    torch.manual_seed(0)
    network, options = (Functions(), {}) if name == "functions" else (name, {"drop_path": 0.3})
    size = NETWORKS[name]
    model = spark_me.build_model(network, image_size=size, decoder_width=32, backend="native", **options)
    model.encoder.checkpointing = checkpointing
    images = torch.randn(len(visible), 3, *size)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.manual_seed(1)
        loss = model(images, visible)
    loss.backward()
    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return model, loss, sum(storage.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_changes_memory_and_nothing_else(name, visible):
    plain, loss, memory = run(name, False, visible)
    checkpointed, same_loss, less_memory = run(name, True, visible)
    assert torch.equal(loss, same_loss)
    for parameter, same in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad)
    for buffer, same in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(buffer, same)
    assert less_memory < (memory if name == "functions" else 0.8 * memory)  # of a tiny one, the decoder has most


def test_in_evaluation_nothing_is_computed_twice(visible):
    """Also the count of batches and the momentum of norms are as they were."""
    model, _, _ = run("resnet18", True, visible)
    norm = model.encoder.bn1
    assert norm.num_batches_tracked == 1 and norm.momentum == 0.1
    before = [buffer.clone() for buffer in model.buffers()]
    images = torch.randn(len(visible), 3, 96, 128)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    model.eval()(images, visible).backward()
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(before, model.buffers(), strict=True))
