"""Checkpoints: complete, safe to load, and never lost to a full disk."""

import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from child import Child
from tiny_runs import SMALL, assert_equal, content_of, write_config, write_images
from torch import nn

from spark_me import build_model, cli
from spark_me.config.data import DataConfig
from spark_me.config.tasks import PretrainConfig
from spark_me.config.training import LambConfig, OptimConfig
from spark_me.errors import UserError
from spark_me.spark import SparK
from spark_me.train import pretrain
from spark_me.train.checkpoint import (
    TrainState,
    checkpoint_path,
    checkpoint_size,
    config_of,
    list_checkpoints,
    load_model,
    read_checkpoint,
    require_space,
    restore,
    step_of,
    write_checkpoint,
)
from spark_me.train.schedules import build_optimizer

CONFIG = PretrainConfig(data=DataConfig(root="images", mean=[0.5] * 3, std=[0.25] * 3))


def make_state(encoder: str = SMALL, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = build_model(encoder, image_size=(64, 64), decoder_width=32, backend="native")
    return TrainState(model, build_optimizer(model, PretrainConfig().optim), torch.amp.GradScaler("cpu", enabled=False))


def save(folder: Path, state: TrainState, keep_last: int = 3) -> Path:
    content = content_of(
        state,
        CONFIG,
        task="pretrain",
        steps_per_epoch=10,
        data_fingerprint="4 files",
    )
    return write_checkpoint(folder, content, keep_last=keep_last)


def take_step(state: TrainState) -> None:
    torch.manual_seed(state.step)
    state.optimizer.zero_grad()
    state.model(torch.randn(2, 3, 64, 64)).backward()
    for group in state.optimizer.param_groups:
        group["lr"] = 0.01
    state.optimizer.step()
    state.step += 1


@pytest.fixture(scope="module")
def trained() -> TrainState:
    state = make_state()
    take_step(state)
    state.step = 23
    state.unreadable["a.png"] = "truncated"
    return state


def test_everything_comes_back(trained: TrainState, tmp_path: Path) -> None:
    path = save(tmp_path, trained)
    content = read_checkpoint(path)
    assert (content["step"], content["epoch"], content["step_in_epoch"]) == (23, 2, 3)
    assert content["samples_seen"] == 23 * CONFIG.train.batch_size
    assert content["versions"]["torch"] == torch.__version__
    assert config_of(content, path) == CONFIG

    other = make_state(seed=9)
    restore(other, content, path)
    assert other.step == 23
    assert other.unreadable == {"a.png": "truncated"}


def test_the_next_step_is_bitwise_the_same(tmp_path: Path) -> None:
    # It depends on weights, statistics and the optimizer's moments.
    state, other = make_state(), make_state(seed=9)
    take_step(state)
    path = save(tmp_path, state)
    take_step(state)
    restore(other, read_checkpoint(path), path)
    take_step(other)
    expected = state.model.state_dict()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_only_the_newest_are_kept(trained: TrainState, tmp_path: Path) -> None:
    for step in (1, 2, 10, 300):
        trained.step = step
        save(tmp_path, trained, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010.pt", "step_00000300.pt"]
    assert len(list(tmp_path.iterdir())) == 2
    trained.step = 23


def test_only_what_is_whole_counts_as_kept(trained: TrainState, tmp_path: Path) -> None:
    """A damaged checkpoint takes no place of a good one, be it older or, after a run fell back, newer."""
    for step in (1, 2, 3, 9):
        trained.step = step
        save(tmp_path, trained, keep_last=10)
    flip_bit(checkpoint_path(tmp_path, 3))
    flip_bit(checkpoint_path(tmp_path, 9))
    trained.step = 4
    save(tmp_path, trained, keep_last=2)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 3, 4, 9]
    trained.step = 5
    save(tmp_path, trained, keep_last=1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [5, 9]
    trained.step = 10
    save(tmp_path, trained, keep_last=1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10]
    trained.step = 23


def test_files_of_other_names_are_no_checkpoints(trained: TrainState, tmp_path: Path) -> None:
    others = ["step_00000001_keep_me.pt", "step_best.pt", "step_1.pt", "step_000000099.pt", "step_00000099.pt.bak"]
    for name in others:
        (tmp_path / name).write_text("the user's")
    (tmp_path / "step_00000098.pt").mkdir()
    for step in (5, 123_456_789):
        trained.step = step
        save(tmp_path, trained, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_123456789.pt"]
    assert all((tmp_path / name).read_text() == "the user's" for name in others)
    trained.step = 23


def test_any_flipped_bit_of_the_tensors_is_noticed(trained: TrainState, tmp_path: Path) -> None:
    path = save(tmp_path, trained)
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 20):
        path.write_bytes(whole)
        flip_bit(path, place)
        try:
            content = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # such as the padding between two entries
            assert_equal(dict(content["model"]), dict(trained.model.state_dict()))


def flip_bit(path: Path, place: int | None = None) -> None:
    """One bit, in the middle where the tensors are or at some place."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("step", "23"),
        ("step", -1),
        ("best", "0.5"),
        ("data", None),
        ("unreadable", []),
        ("optimizer", [1]),
        ("scaler", None),
        ("config", 7),
        ("model", {"weight": 1.0}),
    ],
)
def test_entries_that_are_missing_or_of_other_types(
    trained: TrainState, tmp_path: Path, entry: str, value: object
) -> None:
    path = save(tmp_path, trained)
    content = torch.load(path, weights_only=True)
    torch.save({**content, entry: value}, path)
    expect_one_line(path, f"its entry {entry} is missing or of another type|its step is negative or its model holds")
    del content[entry]
    torch.save(content, path)
    expect_one_line(path, f"its entry {entry} is missing or of another type: use an earlier checkpoint")


def test_options_of_the_optimizer_are_those_of_the_run_that_goes_on(trained: TrainState, tmp_path: Path) -> None:
    """`optim` may change where a run goes on from a named checkpoint; averages and counts are the checkpoint's."""
    content = read_checkpoint(save(tmp_path, trained))
    options = OptimConfig(
        betas=[0.8, 0.7], lamb=LambConfig(max_grad_norm=2.0, bias_correction=False, always_adapt=True)
    )
    state = make_state(seed=1)
    state.optimizer = build_optimizer(state.model, options)
    restore(state, content, tmp_path)
    for group in state.optimizer.param_groups:
        assert (group["betas"], group["bias_correction"], group["always_adapt"]) == ((0.8, 0.7), False, True)
        assert group["step"] == 1
    assert state.optimizer.defaults["max_grad_norm"] == 2.0
    assert_equal(state.optimizer.state_dict()["state"], trained.optimizer.state_dict()["state"])


def test_best_is_that_of_the_lowest_held_out_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.9, 0.7, 0.8])
    monkeypatch.setattr(pretrain.Pretraining, "evaluate", lambda *_: {"held_out_loss": next(measured)})
    config = str(write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL, batch_size=8))
    folder, other = tmp_path / "run" / "checkpoints", tmp_path / "other"
    assert cli.main(["pretrain", config, f"run.dir={folder.parent}"]) == 0
    best = read_checkpoint(folder / "best.pt")
    assert (best["step"], best["best"]) == (2, 0.7)
    # A run that goes on knows what was best before.
    assert cli.main(["pretrain", config, f"run.dir={other}", f"run.resume={folder}/best.pt", "train.epochs=3"]) == 0
    assert not (other / "checkpoints" / "best.pt").exists()
    assert read_checkpoint(other / "checkpoints" / "step_00000003.pt")["best"] == 0.7


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated(trained: TrainState, tmp_path: Path, share: float) -> None:
    path = save(tmp_path, trained)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    expect_one_line(path, "damaged or no checkpoint|is truncated or no checkpoint")


def test_missing(tmp_path: Path) -> None:
    expect_one_line(tmp_path / "none.pt", "no such checkpoint")


def test_foreign_file(tmp_path: Path) -> None:
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "foreign.pt")
    expect_one_line(tmp_path / "foreign.pt", "is no checkpoint of spark-me pretrain")
    (tmp_path / "text.pt").write_text("hello")
    expect_one_line(tmp_path / "text.pt", "is truncated or no checkpoint")
    torch.save({"format": "spark_me.finetune"}, tmp_path / "tuned.pt")
    expect_one_line(
        tmp_path / "tuned.pt", "is a checkpoint of `spark-me finetune`, where one of `spark-me pretrain` is"
    )


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    # A whole pickled module would need its class to be called.
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    expect_one_line(tmp_path / "module.pt", "is truncated or no checkpoint")


def expect_one_line(path: Path, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_another_model(trained: TrainState, tmp_path: Path) -> None:
    path = save(tmp_path, trained)
    other: SparK = build_model(SMALL, image_size=(64, 64), decoder_width=64)
    with pytest.raises(UserError, match="is of another model") as caught:
        load_model(other, read_checkpoint(path), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_disk_that_fills_up_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    # A limit on file size fails inside torch.save as a full disk does; it needs a process of its own.
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    def fill_up() -> None:
        state = make_state()
        state.step = 1
        save(folder, state)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        state.step = 2
        with pytest.raises(UserError) as refused:
            save(folder, state, keep_last=1)
        print(refused.value)

    child = Child(fill_up)
    assert child.wait() == 0, child.output
    assert [path.name for path in folder.iterdir()] == ["step_00000001.pt"]
    assert read_checkpoint(folder / "step_00000001.pt")["step"] == 1
    (line,) = child.output.splitlines()
    assert "step_00000002.pt: cannot be written" in line
    assert f"the last good checkpoint is {folder / 'step_00000001.pt'}" in line


def test_size_is_known_before_the_first_step(tmp_path: Path) -> None:
    trained = make_state("resnet18")  # large enough that names do not count
    take_step(trained)
    average = {"ema": trained.model.state_dict()}
    untrained = checkpoint_size(make_state("resnet18"), {})
    assert untrained == checkpoint_size(trained, {})
    assert untrained == pytest.approx(save(tmp_path, trained).stat().st_size, rel=0.02)
    content = content_of(
        trained,
        CONFIG,
        task="finetune",
        steps_per_epoch=10,
        data_fingerprint="",
        entries=average,
    )
    (tmp_path / "averaged").mkdir()
    size = write_checkpoint(tmp_path / "averaged", content, keep_last=1).stat().st_size
    assert checkpoint_size(trained, average) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("keep_last", "writes", "there", "most"),
    [
        (3, 100, 0, 5),  # three, the best, and the one that is being written
        (3, 2, 0, 3),  # no more than are ever written
        (1, 100, 0, 3),
        (3, 100, 2, 3),  # two of them lie there already
    ],
)
def test_disk_that_is_too_small_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int, writes: int, there: int, most: int
) -> None:
    size, folder = 1000, tmp_path / "run" / "checkpoints"
    for number in range(there):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step_0000000{number}.pt").write_bytes(bytes(size))

    def usage(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))

    usage(most * size)
    assert "checkpoints of 1 kB in" in require_space(folder, size, keep_last=keep_last, writes=writes)
    usage(most * size - 1)
    with pytest.raises(UserError, match=f"{folder}: .* are free.* lower run.keep_last={keep_last}"):
        require_space(folder, size, keep_last=keep_last, writes=writes)
    require_space(folder, size, keep_last=keep_last, writes=0)  # a run that is complete


def test_run_on_a_full_disk_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**6))
    assert cli.main(["pretrain", str(config), f"run.dir={tmp_path / 'run'}"]) == 2
    assert "1 MB are free, and the checkpoints of this run take 677 MB (5 of 135 MB)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
