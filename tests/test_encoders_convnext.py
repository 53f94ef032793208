"""Sparse ConvNeXts: the exactness contract (DESIGN §6), and the architectures of torchvision and timm."""

import pytest
import timm
import torch
import torchvision
from conftest import randomise

import spark_me
from spark_me.encoders import registry
from spark_me.encoders.convnext import ConvNeXt
from spark_me.masked_dense import MaskedDenseSparK, masked_dense_encoder

# Reduced networks of every kind: all that is special to a kind, in seconds.
SMALL = {
    "small_v1": (1, (1, 1, 2, 1), (8, 16, 24, 32)),
    "small_v2": (2, (1, 1, 2, 1), (8, 16, 24, 32)),
}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch, one_thread):
    for name, network in SMALL.items():
        monkeypatch.setitem(registry.CONVNEXTS, name, network)
        monkeypatch.setitem(registry.ENCODERS, name, registry.EncoderEntry(registry._convnext(name), drop_path=0.0))


def twins(name, dtype=torch.float64, drop_path=0.0, in_channels=3, backend="fused"):
    arguments = {"decoder_width": 32, "drop_path": drop_path, "in_channels": in_channels}
    model = spark_me.build_model(name, image_size=(96, 128), backend=backend, **arguments)
    model = randomise(model).to(dtype)
    oracle = MaskedDenseSparK(name, **arguments).to(dtype)
    oracle.load_sparse(model.state_dict())
    return model, oracle


def images_like(visible, dtype=torch.float64, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(visible), channels, 96, 128, dtype=torch.float64, generator=generator).to(dtype)


def assert_exact(model, oracle, visible, assert_close):
    images = images_like(visible)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.manual_seed(7)  # stochastic depth draws in the same order
    loss = model(ours, visible)
    torch.manual_seed(7)
    expected = oracle(theirs, visible)
    assert_close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad, "gradient of the images")
    gradients = oracle.from_sparse({name: p.grad for name, p in model.named_parameters()})
    theirs = {name: p.grad for name, p in oracle.named_parameters()}
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(gradients[name], gradient, f"gradient of {name}")
    for name, statistic in oracle.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert_close(dict(model.named_buffers())[name], statistic, name)


@pytest.mark.parametrize("name", SMALL)
def test_loss_and_gradients_equal_the_simulation(name, backend, visible, assert_close):
    assert_exact(*twins(name, drop_path=0.5, backend=backend), visible, assert_close)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_whole_networks_equal_the_simulation(name, visible, assert_close):
    assert_exact(*twins(name, drop_path=0.3), visible[1:5], assert_close)


@pytest.mark.parametrize("name", SMALL)
def test_float32(name, backend, visible, assert_close):
    model, oracle = twins(name, torch.float32, backend=backend)
    images = images_like(visible, torch.float32)
    assert_close(model(images, visible), oracle(images, visible))


@pytest.mark.parametrize("name", SMALL)
def test_other_channel_counts(name, visible, assert_close):
    model, oracle = twins(name, in_channels=4)
    images = images_like(visible, channels=4)
    assert_close(model(images, visible), oracle(images, visible))


@pytest.mark.parametrize("name", SMALL)
def test_four_feature_scales_equal_the_simulation(name, backend, visible, assert_close):
    model, oracle = twins(name, backend=backend)
    images = images_like(visible)
    for ours, theirs in zip(model.encode(images, visible), oracle.encoder(images, visible), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_is_close_to_float64(name, visible):
    model, oracle = twins(name, torch.float32)
    images = images_like(visible, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images, visible)
    assert abs(loss.item() / oracle.double()(images.double(), visible).item() - 1) < 1e-2
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_hidden_pixels_reach_neither_model(name, visible):
    model, oracle = twins(name, torch.float32)
    images = images_like(visible, torch.float32)
    hidden = ~visible.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    disturbed = torch.where(hidden, torch.full_like(images, 1e3), images)
    assert torch.equal(model.predict(images, visible), model.predict(disturbed, visible))
    assert torch.equal(oracle.predict(images, visible), oracle.predict(disturbed, visible))


@pytest.mark.parametrize("name", SMALL)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(name, backend, visible, assert_close):
    """Pooling global response norm over the batch would fail this."""
    model, _ = twins(name, backend=backend)
    images = images_like(visible)
    together = model.encode(images, visible)
    for image in (1, 4):
        alone = model.encode(images[image : image + 1], visible[image : image + 1])
        for ours, expected in zip(together, alone, strict=True):
            assert_close(ours[image : image + 1], expected)


@pytest.mark.parametrize("name", SMALL)
def test_stochastic_depth_drops_the_blocks_of_whole_images(name, visible, assert_close):
    """The first stage has one block: each image keeps it, twice as strong, at all its sites or at none."""
    model, oracle = twins(name)
    model.encoder.stages[0][0].drop_path.rate = 0.5
    images, visible = (x[5:].expand(16, *x.shape[1:]) for x in (images_like(visible), visible))
    torch.manual_seed(0)
    shallow = model.encode(images, visible)[0]
    stem, _ = next(iter(oracle.encoder.stages_of()))
    mask = visible[0].repeat_interleave(8, 0).repeat_interleave(8, 1).double()
    dropped = stem(images[:1])[0] * mask
    kept = 2 * oracle.encoder(images[:1], visible[:1])[0][0] - dropped
    was_dropped = [bool((x - dropped).abs().max() < 1e-9) for x in shallow]
    for x, without in zip(shallow, was_dropped):
        assert_close(x, dropped if without else kept)
    assert 2 < sum(was_dropped) < 14


def encode_and_differentiate(name, checkpointing, visible):
    """Features, gradients, and how many numbers are kept between forward and backward pass."""
    model, _ = twins(name, torch.float32, drop_path=0.5)
    model.encoder.checkpointing = checkpointing
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        torch.manual_seed(3)
        features = model.encode(images_like(visible, torch.float32), visible)
    torch.stack([x.square().mean() for x in features]).sum().backward()
    return features, [p.grad for p in model.encoder.parameters()], sum(kept)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_memory_and_nothing_else(name, visible):
    features, gradients, memory = encode_and_differentiate(name, False, visible)
    same_features, same_gradients, less_memory = encode_and_differentiate(name, True, visible)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, same_features, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, same_gradients, strict=True))
    assert less_memory < 0.5 * memory


@pytest.mark.parametrize("name", ["convnext_tiny", "small_v1"])
def test_encode_without_mask_is_torchvisions_network(name, assert_close):
    """The very features of torchvision's modules, run by their own forward pass."""
    model, oracle = twins(name)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected, x = [], images
    for number, layer in enumerate(oracle.encoder.features):
        x = layer(x)
        expected += [x] if number % 2 else []
    for ours, theirs in zip(model.eval().encode(images), expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny"])
def test_encode_without_mask_is_timms_network(name, assert_close):
    """The very features of timm's model, run by its own forward pass."""
    model, oracle = twins(name)
    network = timm.create_model(name, num_classes=0).double().eval()
    own = network.state_dict()  # its small networks have 1×1 convolutions for linear layers, and all a norm at the end
    state = {key: x.view_as(own[key]) for key, x in oracle.encoder.state_dict().items()}
    missing = network.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"head.norm.weight", "head.norm.bias"} and not missing.unexpected_keys
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = network.forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(model.eval().encode(images), expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", list(registry.CONVNEXTS))
def test_every_size_has_the_tensors_of_torchvision_or_timm(name):
    with torch.device("meta"):
        ours = masked_dense_encoder(name).state_dict()
        of_torchvision = registry.CONVNEXTS[name][0] == 1
        network = torchvision.models.get_model(name) if of_torchvision else timm.create_model(name, conv_mlp=False)
    theirs = {key: x for key, x in network.state_dict().items() if key.split(".")[0] not in ("classifier", "head")}
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}


def test_published_parameter_count():
    model = spark_me.build_model("convnextv2_tiny", decoder_width=512)
    assert sum(p.numel() for p in model.parameters()) == 39_729_619
    assert not any("running" in name for name, _ in model.densify.named_buffers())  # layer norm


def test_starts_as_published():
    encoder = ConvNeXt(1, (1, 1, 2, 1), (64, 64, 64, 64), drop_path=0.6)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("kernel", "pwconv1.weight", "pwconv2.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
        elif name.endswith("gamma"):
            assert (parameter == 1e-6).all()
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    rates = [block.drop_path.rate for stage in encoder.stages for block in stage]
    assert rates == pytest.approx([0, 0.15, 0.3, 0.45, 0.6])
    second = dict(ConvNeXt(2, (1, 1, 1, 1), (8, 8, 8, 8)).named_parameters())
    assert not any(name.endswith(".gamma") and "grn" not in name for name in second)
    assert not second["stages.0.0.grn.gamma"].any() and not second["stages.0.0.grn.beta"].any()
