"""Two processes with different numbers of sites must normalise as one process with all of them."""

import pytest
import torch
from conftest import randomise, relative_error
from torch import distributed, multiprocessing, nn

from spark_me import sparse
from spark_me.sparse import norms
from spark_me.sync_batch_norm import SyncBatchNorm2d

MASKS = torch.tensor([[[True, True], [True, False]], [[False, True], [False, False]]])


class Model(nn.Module):
    """A sparse and a dense norm, as in SparK."""

    def __init__(self):
        super().__init__()
        self.conv = sparse.Conv2d(2, 3, 3, 1, 1, bias=False)
        self.norm = sparse.BatchNorm2d(3)
        self.dense_norm = nn.BatchNorm2d(3)

    def forward(self, images, visible):
        x = self.norm(self.conv(sparse.to_sparse(images, sparse.Pyramid(visible, 4))))
        return self.dense_norm(sparse.to_dense(x)).square().mul(images[:, :1]).sum()


def build():
    return randomise(Model()).double()


def images():
    return torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def worker(rank, store, results, in_triton):
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork
    norms.computes_in_triton = lambda rows: in_triton
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    model = sparse.convert_sync_batchnorm(build())
    model(images()[rank : rank + 1], MASKS[rank : rank + 1]).backward()
    gradients = []
    for parameter in model.parameters():
        distributed.all_reduce(parameter.grad)
        gradients.append(parameter.grad)
    if rank == 0:
        torch.save((gradients, list(model.buffers())), results)
    distributed.destroy_process_group()


@pytest.mark.parametrize("in_triton, tolerance", [(False, 1e-9), (True, 1e-5)])
def test_two_processes_equal_one(in_triton, tolerance, tmp_path):
    """The kernels' statistics are float32, and Triton's interpreter runs them here."""
    arguments = (str(tmp_path / "store"), str(tmp_path / "results"), in_triton)
    multiprocessing.start_processes(worker, arguments, nprocs=2, start_method="fork")  # which imports nothing again
    gradients, buffers = torch.load(tmp_path / "results")
    model = build()
    model(images(), MASKS).backward()
    for actual, parameter in zip(gradients, model.parameters(), strict=True):
        assert relative_error(actual, parameter.grad) < tolerance
    for actual, expected in zip(buffers, model.buffers(), strict=True):
        assert relative_error(actual.double(), expected.double()) < tolerance


def test_conversion_keeps_parameters_statistics_and_mode(assert_close):
    model = build().eval()
    parameters = list(model.parameters())
    converted = sparse.convert_sync_batchnorm(model)
    assert converted is model and type(converted.norm) is sparse.BatchNorm2d and converted.norm.synchronised
    assert type(converted.dense_norm) is SyncBatchNorm2d
    assert not converted.norm.training and not converted.dense_norm.training
    assert all(one is other for one, other in zip(converted.parameters(), parameters, strict=True))
    assert converted.state_dict().keys() == build().state_dict().keys()
    assert_close(converted(images(), MASKS), build().eval()(images(), MASKS))
