"""Times of algorithms are found where they are known, by one process for all, and a run goes on in those it had."""

import json
import logging
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny_runs import write_images
from torch.distributed import HashStore

from spark_me.cli import main
from spark_me.sparse.kernels import autotune
from spark_me.sparse.kernels.autotune import Choices, Operation
from spark_me.train import algorithms
from spark_me.train.algorithms import Algorithms
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint

CPU = torch.device("cpu")
OPERATION = Operation("convolution", (4, 3), ((64, 6), (5, 6, 3, 3)), (True, True), "float32")
NAMES = ("a 64", "b")
TIMES = {"a 64": 1.0, "b": float("inf")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "algorithms"


def measure():
    return dict(TIMES)


def never():
    raise AssertionError("measured")


def test_what_an_earlier_run_measured_is_read_back(cache):
    assert Algorithms(CPU, None).find(OPERATION, NAMES, measure) == TIMES
    later = Algorithms(CPU, None)
    assert later.find(OPERATION, NAMES, never) == later.find(OPERATION, NAMES, never) == TIMES
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["machine"] == later.machine


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"times": {"a 64": 1.0}}'),
        lambda path: path.write_text('{"times": {"a 64": 1.0, "b": "soon"}}'),
        lambda path: path.write_text('{"times": {"a 64": NaN, "b": 1.0}}'),
        lambda path: path.write_bytes(b"\xff\x00"),
        Path.unlink,
    ],
)
def test_what_is_damaged_or_of_other_algorithms_is_measured_anew(damage, cache):
    Algorithms(CPU, None).find(OPERATION, NAMES, measure)
    damage(*cache.iterdir())
    other = {"a 64": 3.0, "b": 2.0}
    assert Algorithms(CPU, None).find(OPERATION, NAMES, lambda: other) == other
    assert Algorithms(CPU, None).find(OPERATION, NAMES, never) == other


@pytest.mark.parametrize("changed", ["device", "torch", "triton", "sparse"])
def test_another_gpu_or_version_is_measured_anew(changed):
    first = Algorithms(CPU, None)
    first.find(OPERATION, NAMES, measure)
    second = Algorithms(CPU, None)
    second.machine[changed] = "another"
    with pytest.raises(AssertionError, match="measured"):
        second.find(OPERATION, NAMES, never)


def test_another_operation_is_measured_anew():
    first = Algorithms(CPU, None)
    first.find(OPERATION, NAMES, measure)
    with pytest.raises(AssertionError, match="measured"):
        first.find(OPERATION._replace(dtype="bfloat16"), NAMES, never)


def test_a_cache_that_cannot_be_written_costs_a_line(cache, caplog):
    cache.parent.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert Algorithms(CPU, None).find(OPERATION, NAMES, measure) == TIMES
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("which algorithm is the fastest is not kept for other runs: ")


def test_one_process_measures_and_all_take_its_times(monkeypatch, tmp_path):
    """Those that wait do not measure, and the machine's memory is asked by the first alone."""
    store, measured = HashStore(), []
    found = []

    def process(number):
        def measure():
            measured.append(number)
            return {"a 64": float(number), "b": 9.0}

        found.append(Algorithms(CPU, store).find(OPERATION, NAMES, measure))

    threads = [threading.Thread(target=process, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and found == [{"a 64": float(measured[0]), "b": 9.0}] * 4


def test_nobody_waits_for_ever(monkeypatch, caplog):
    monkeypatch.setattr(algorithms, "PATIENCE", timedelta(seconds=0.1))
    store = HashStore()
    with pytest.raises(RuntimeError):
        Algorithms(CPU, store).find(OPERATION, NAMES, lambda: fail())  # the first one breaks off
    with caplog.at_level(logging.WARNING):
        assert Algorithms(CPU, store).find(OPERATION, NAMES, measure) == TIMES
    assert "another process does not say which algorithm is the fastest" in caplog.records[0].message


def fail():
    raise RuntimeError("out of memory")


def test_a_checkpoint_brings_them_back_on_such_a_machine_alone(caplog):
    first = Algorithms(CPU, None)
    first.times[json.dumps(OPERATION)] = dict(TIMES)
    same, other = Algorithms(CPU, None), Algorithms(CPU, None)
    other.machine["device"] = "another"
    with caplog.at_level(logging.WARNING):
        same.restore(first.entry())
        for entry in (None, {}, [], {"times": 3}, {"machine": same.machine}):  # of an earlier version, or damaged
            Algorithms(CPU, None).restore(entry)
        assert not caplog.records
        other.restore(first.entry())
    assert same.find(OPERATION, NAMES, never) == TIMES and not other.times
    assert "measured on another GPU" in caplog.records[0].message


CONFIG = """
model: {{encoder: small, backend: native, image_size: [64, 64], decoder_width: 32}}
data: {{root: {images}, held_out: 0, workers: 0}}
optim: {{name: adamw, base_lr: 0.5, warmup_epochs: 0}}
train: {{epochs: 2, batch_size: 4}}
run: {{device: cpu, picture_every_epochs: 1000, keep_last: 5}}
"""


@pytest.mark.usefixtures("undrawn")
def test_a_run_goes_on_in_the_algorithms_that_it_had(tmp_path, monkeypatch, cache):
    """As on a GPU, where times differ from day to day: one says that tiles are fastest, the next that pairs are."""
    monkeypatch.setattr(autotune, "is_open", lambda rows: True)
    monkeypatch.setattr(autotune, "kernels_run_on", lambda device: False)
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(images=write_images(tmp_path / "images", 8)))

    def run(name, fastest, *overrides):
        times = {"tiles": 1.0, "pairs": 1.0, "dense": 1.0, fastest: 0.5}
        monkeypatch.setattr(autotune, "CHOICES", choices := Choices(lambda work: 1.0))
        monkeypatch.setattr(algorithms, "CHOICES", choices)
        measure = choices._measure
        monkeypatch.setattr(choices, "_measure", lambda *of: {name: times[name] for name in measure(*of)})
        for kept in cache.glob("*"):
            kept.unlink()
        folder = tmp_path / name
        assert main(["pretrain", str(config), f"run.dir={folder}", *overrides]) == 0
        return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])["model"]

    calm = run("calm", "tiles")
    other = run("other", "pairs")
    assert any(not torch.equal(calm[name], other[name]) for name in calm)  # or the test could not fail
    half = tmp_path / "calm/checkpoints" / "step_00000002.pt"
    on = run("on", "pairs", f"run.resume={half}")
    assert all(torch.equal(calm[name], on[name]) for name in calm)
