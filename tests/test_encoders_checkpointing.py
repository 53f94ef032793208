import torch

import spark_me


def run(checkpointing, visible):
    torch.manual_seed(0)
    model = spark_me.build_model("resnet18", image_size=(96, 128), decoder_width=32, drop_path=0.3, backend="fused")
    model.encoder.checkpointing = checkpointing
    images = torch.randn(len(visible), 3, 96, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.manual_seed(1)
        loss = model(images, visible)
    loss.backward()
    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return model, loss, sum(storage.values())


def test_checkpointing_changes_memory_and_nothing_else(visible):
    plain, loss, memory = run(False, visible)
    checkpointed, same_loss, less_memory = run(True, visible)
    assert torch.equal(loss, same_loss)
    for parameter, same in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad)
    for buffer, same in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(buffer, same)
    assert less_memory < 0.8 * memory
