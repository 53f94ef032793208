"""Batch normalisation with what follows it: the layer's choice between Triton's kernels and torch's operations.

Without a GPU the kernels run in Triton's interpreter.
"""

import subprocess
import sys

import pytest
import torch
from conftest import contract_masks, randomise, relative_error
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import spark_me
from spark_me import sparse
from spark_me.drop_path import drop_after, residual_ends
from spark_me.encoder import sparsify
from spark_me.sparse import norms
from spark_me.sparse.kernels import batch_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ask_for_triton(monkeypatch):
    """From now on layers take the kernels on any device; the list of the features that they take them for."""
    asked = []
    monkeypatch.setattr(norms, "computes_in_triton", lambda rows: asked.append(rows) or True)
    return asked


@pytest.fixture
def in_triton(monkeypatch):
    return ask_for_triton(monkeypatch)


def encoder_of(kind, stride):
    """A residual block of torchvision's between two convolutions, which drops its branch, at a total stride of 8."""
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, stride, bias=False), nn.BatchNorm2d(8)) if stride > 1 else None
    block = kind(8, 8 // kind.expansion, stride, shortcut)
    for norm in residual_ends(block):
        drop_after(norm, 0.4)
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), block, nn.Conv2d(8, 8, 2 // stride, 2 // stride))
    return sparsify(randomise(network)).to(DEVICE)


def run(encoder):
    """Outputs, gradients and statistics on the contract's masks."""
    pyramid = sparse.Pyramid(contract_masks().to(DEVICE), 8, "native")
    images = torch.randn(6, 3, 24, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    torch.manual_seed(5)  # stochastic depth draws the same
    outputs = [x.F for x in encoder(sparse.to_sparse(images, pyramid))]
    sum(x.square().mean() for x in outputs).backward()
    gradients = {f"gradient of {name}": x.grad for name, x in encoder.named_parameters()}
    results = dict(enumerate(outputs)) | {"gradient of the images": images.grad} | gradients
    return results | dict(encoder.named_buffers())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_residual_blocks_do_not_depend_on_the_kernels(kind, stride, monkeypatch):
    monkeypatch.setattr(norms, "computes_in_triton", lambda rows: False)
    expected = run(encoder_of(kind, stride))
    asked = ask_for_triton(monkeypatch)
    encoder = encoder_of(kind, stride)
    for name, actual in run(encoder).items():
        assert relative_error(actual.double(), expected[name].double()) < 1e-4, name
    assert len(asked) == sum(isinstance(module, sparse.BatchNorm2d) for module in encoder.modules())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_what_follows_a_norm_is_computed_with_it(kind, stride):
    """Stochastic depth, residual sum and ReLU are no steps of their own: on a GPU all is one operation."""
    encoder = encoder_of(kind, stride)
    steps = [step for segment in encoder.segments for step in segment.steps]
    kinds = [type(encoder.get_submodule(step.layer)) for step in steps if step.layer]
    norms = [step for step in steps if isinstance(encoder.get_submodule(step.layer), sparse.BatchNorm2d)]
    assert len(kinds) == len(steps) and set(kinds) == {sparse.Conv2d, sparse.BatchNorm2d}
    last = norms[-1] if stride == 1 else next(step for step in norms if "drop_path" in step.kwargs)
    assert "drop_path" in last.kwargs and sum("relu" in step.kwargs for step in norms) == len(norms) - (stride > 1)
    assert sum("shortcut" in step.kwargs for step in norms) == 1


def test_checkpointing_changes_nothing(in_triton):
    plain, again = encoder_of(BasicBlock, 2), encoder_of(BasicBlock, 2)
    again.checkpointing = True
    results = run(again)
    for name, expected in run(plain).items():
        assert torch.equal(results[name], expected), name


def test_other_sites_are_refused(in_triton):
    x, other = (sparse.to_sparse(torch.zeros(6, 4, 12, 16), sparse.Pyramid(contract_masks(), 4)) for _ in range(2))
    with pytest.raises(ValueError, match="different sites"):
        sparse.BatchNorm2d(4)(x, other)


@pytest.mark.parametrize("triton", [False, True])
def test_norms_synchronise_in_training_with_the_kernels_and_without(triton, monkeypatch):
    told = []

    def fused(norm, rows, shortcut, scale, relu, *, synchronise):
        told.append(synchronise)
        return rows

    monkeypatch.setattr(norms, "computes_in_triton", lambda rows: triton)
    monkeypatch.setattr(batch_norm, "fused_batch_norm", fused)
    monkeypatch.setattr(norms, "several_processes", lambda: True)
    monkeypatch.setattr(norms, "synchronized_batch_norm", lambda rows, norm: rows - 2)
    norm = sparse.convert_sync_batchnorm(nn.Sequential(sparse.BatchNorm2d(4)))[0].to(DEVICE)
    x = sparse.to_sparse(torch.ones(6, 4, 12, 16, device=DEVICE), sparse.Pyramid(contract_masks().to(DEVICE), 4))
    shifted = norm(x, sparse.with_features(x, 4 * x.F)).F, norm(x, relu=True).F
    norm.eval()(x)
    if triton:
        assert told == [True, True, False]
    else:
        assert torch.equal(shifted[0], 3 * x.F) and not shifted[1].any() and not told


def test_importing_the_layers_does_not_import_triton():
    script = "import sys, spark_me.sparse; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
def test_a_whole_encoder_on_a_gpu_equals_float64_on_the_cpu(visible, monkeypatch, assert_close):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = torch.randn(len(visible), 3, 96, 128, generator=torch.Generator().manual_seed(1))
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        model = spark_me.build_model("resnet18", image_size=(96, 128), decoder_width=32, drop_path=0.0)
        encoder = randomise(model).to(device, dtype).encoder
        features = model.encode(images.to(device, dtype), visible.to(device))
        torch.stack([x.square().mean() + x.mean() for x in features]).sum().backward()
        results.append(
            {f"features {number}": x for number, x in enumerate(features)}
            | {f"gradient of {key}": x.grad for key, x in encoder.named_parameters()}
            | {key: x for key, x in encoder.named_buffers() if not key.endswith("tracked")}
        )
    assert results[0].keys() == results[1].keys()
    for key, actual in results[0].items():
        assert_close(actual.cpu().float(), results[1][key].float(), key)


@pytest.mark.parametrize("triton", [False, True])
def test_a_single_site_is_normalised_by_the_running_statistics_and_moves_none(monkeypatch, triton):
    """Features and gradients against the formula."""
    dtype = torch.float32 if triton else torch.float64
    if triton:
        ask_for_triton(monkeypatch)
    norm = randomise(sparse.BatchNorm2d(6)).to(DEVICE, dtype).train()
    before = {name: tensor.clone() for name, tensor in norm.named_buffers()}
    visible = torch.zeros(1, 2, 2, dtype=torch.bool)
    visible[0, 1, 0] = True
    pyramid = sparse.Pyramid(visible, 4, "native")
    rows = torch.randn(1, 6, dtype=dtype).to(DEVICE).requires_grad_()
    x = sparse.at_stride(sparse.to_sparse(torch.zeros(1, 1, 8, 8, device=DEVICE), pyramid), 4, rows)
    out = norm(x, relu=True).F
    out.sum().backward()
    scale = norm.weight / (before["running_var"] + norm.eps).sqrt()
    expected = ((rows - before["running_mean"]) * scale + norm.bias).clamp(min=0)
    assert relative_error(out, expected) < (1e-5 if triton else 1e-12)
    assert relative_error(rows.grad, scale * (expected > 0)) < (1e-5 if triton else 1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.named_buffers())
