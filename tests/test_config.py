"""Configurations: inheritance, overrides, and one clear line for whatever is wrong."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spark_me import cli, decoder, sparse
from spark_me.config.loading import differing_keys, load_config, parse_config, to_yaml
from spark_me.config.tasks import BACKENDS, DECODERS, FREE_KEYS, FinetuneConfig, PretrainConfig
from spark_me.config.training import LambConfig
from spark_me.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_layers_win_in_order(write: Write) -> None:
    write("base.yaml", "data: {root: a, workers: 1}\ntrain: {epochs: 100, batch_size: 8}\n")
    path = write("sub/own.yaml", "base: ../base.yaml\ntrain: {epochs: 200}\n")
    config = load_config(path, ["train.batch_size=16", "optim.base_lr=1e-3", "model.image_size=[64, 96]"])
    assert (config.data.root, config.data.workers) == ("a", 1)
    assert (config.train.epochs, config.train.batch_size) == (200, 16)
    assert config.optim.base_lr == 0.001
    assert config.model.image_size == [64, 96]
    assert config.model.mask_ratio == PretrainConfig().model.mask_ratio


def test_lists_are_replaced_not_merged(write: Write) -> None:
    write("base.yaml", "data: {root: a, crop_scale: [0.2, 1.0]}\n")
    path = write("own.yaml", "base: base.yaml\ndata: {crop_scale: [0.5, 0.6]}\n")
    assert load_config(path).data.crop_scale == [0.5, 0.6]


def test_a_number_in_exponent_notation_is_a_number(write: Write) -> None:
    assert load_config(write("c.yaml", "data: {root: a}\noptim: {base_lr: 2e-4}\n")).optim.base_lr == 2e-4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/pretrain*/*.yaml")) + [CONFIGS / "demo" / "pretrain.yaml"])
def test_shipped_files_load(path: Path) -> None:
    own_images = [] if path.parent.name == "demo" else ["data.root=somewhere"]
    load_config(path, own_images)


def test_resolved_configuration_reads_back(write: Write) -> None:
    config = load_config(write("c.yaml", "data: {root: a}\nmodel: {drop_path: 0.1}\n"))
    assert parse_config(to_yaml(config), "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {epoch: 3}", "train.epochs"),
        ("optim: {base_lrr: 3}", "optim.base_lr"),
        ("optim: {mask_ratio: 0.5}", "model.mask_ratio"),
        ("batch_size: 3", "train.batch_size"),
        ("modle: {encoder: resnet18}", "model.encoder"),
        ("model: {image_sizes: {h: 64}}", "model.image_size"),
    ],
)
def test_unknown_key_names_key_file_and_nearest(write: Write, text: str, named: str) -> None:
    path = write("c.yaml", text)
    message = message_of(path)
    assert message.startswith("unknown key ")
    assert str(path) in message
    assert message.endswith(f"did you mean {named}?")


def test_unknown_override_says_so(write: Write) -> None:
    message = message_of(write("c.yaml", "data: {root: a}"), "train.epoch=3")
    assert message == "unknown key train.epoch on the command line: did you mean train.epochs?"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs=", "train.epochs"),
        ("model.image_size=[a,b]", "model.image_size"),
    ],
)
def test_wrong_type_names_the_key(write: Write, override: str, key: str) -> None:
    assert key in message_of(write("c.yaml", "data: {root: a}"), override)


@pytest.mark.parametrize(
    "override",
    [
        "model.mask_ratio=1.2",
        "model.mask_ratio=0",
        "model.mask_ratio=.nan",
        "model.image_size=[100,64]",
        "model.image_size=[64,-32]",
        "model.image_size=[64]",
        "model.image_size=[64,65568]",
        "model.encoder=resnet19",
        "model.backend=dense",
        "model.decoder=linear",
        "model.decoder_width=20",
        "model.decoder_width=0",
        "model.in_channels=0",
        "model.drop_path=1.0",
        "data.kind=zip",
        "data.held_out=-1",
        "data.repeats=0",
        "data.crop_scale=[0.9,0.5]",
        "data.flip=2",
        "data.mean=[0.5]",
        "data.std=[0.5,0.5,0]",
        "data.workers=-1",
        "data.samples=10",
        "data.image_key=png",
        "data.split=test",
        "data.val_split=test",
        "data.shuffle_buffer=0",
        "data.max_unreadable=1",
        "optim.name=sgd",
        "optim.base_lr=0",
        "optim.betas=[0.9,1.0]",
        "optim.weight_decay=-1",
        "optim.warmup_epochs=5000",
        "optim.warmup_epochs=null",
        "optim.clip_norm=0",
        "optim.lamb.max_grad_norm=0",
        "model.init=timm",
        "train.epochs=-3",
        "train.epochs=null",
        "train.batch_size=0",
        "train.precision=fp8",
        "train.accumulate=0",
        "run.seed=-1",
        "run.keep_last=0",
        "run.checkpoint_every_steps=0",
        "run.picture_every_epochs=0",
    ],
)
def test_value_out_of_range_names_the_key(write: Write, override: str) -> None:
    message = message_of(write("c.yaml", "data: {root: a}"), override)
    assert message.startswith(override.partition("=")[0] + "=")


def test_range_error_names_the_file_that_set_the_value(write: Write) -> None:
    base = write("base.yaml", "data: {root: a}\nmodel: {mask_ratio: 1.2}\n")
    own = write("own.yaml", "base: base.yaml\ntrain: {epochs: 50}\n")
    assert message_of(own).startswith(f"model.mask_ratio=1.2 (in {base})")


def test_image_size_error_proposes_one_that_fits(write: Write) -> None:
    assert "[96, 224]" in message_of(write("c.yaml", "data: {root: a}"), "model.image_size=[100,225]")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "data.root=null"),
        (["data.kind=demo", "data.root=x"], "data.root=x"),
        (["data.kind=demo", "data.held_out=2"], "data.held_out=2"),
        (["data.root=x", "data.val_root=y", "data.held_out=2"], "data.held_out=2"),
        (["data.root=x", "data.kind=imagenet", "data.val_root=y"], "data.val_root=y"),
        (["data.root=x", "data.kind=huggingface", "data.val_root=y"], "data.val_root=y"),
        (["data.root=x", "data.kind=huggingface", "data.val_split=y", "data.held_out=2"], "data.held_out=2"),
        (["data.root=x.tar", "data.kind=webdataset", "data.held_out=2"], "data.held_out=2"),
        (["data.root=x.tar", "data.kind=webdataset", "data.samples=0"], "data.samples=0"),
        (["data.root=pipe:cat x", "data.kind=webdataset"], "data.samples=null"),
        (["data.root=pipe:cat x", "data.kind=webdataset", "data.samples=1"], "data.allow_pipe=False"),
        (["data.root=x.tar", "data.kind=webdataset", "data.val_root=pipe:cat y"], "data.val_root=pipe:cat y"),
        (["data.root=x", "model.in_channels=13"], "data.mean=null"),
        (["data.root=x", "model.in_channels=2", "data.mean=[0.5,0.5]"], "data.std=null"),
    ],
)
def test_data_keys_that_exclude_each_other(write: Write, overrides: list[str], key: str) -> None:
    assert message_of(write("c.yaml", ""), *overrides).startswith(key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=0", "train.epochs=null", "optim.warmup_epochs=null", "optim.warmup_share=0"], "train.steps=0"),
        (
            ["train.steps=10"],
            "optim.warmup_epochs=40.0 (by default): must be null with train.steps",
        ),
        (["optim.warmup_share=1.5", "optim.warmup_epochs=null"], "optim.warmup_share=1.5"),
    ],
)
def test_length_and_warm_up_are_in_epochs_or_not(write: Write, overrides: list[str], message: str) -> None:
    assert message_of(write("c.yaml", "data: {root: a}"), *overrides).startswith(message)


def test_the_later_of_two_ways_to_give_a_length_counts(write: Write) -> None:
    small = CONFIGS / "pretrain" / "small.yaml"
    train = load_config(small, ["data.root=a", "train.epochs=2"]).train
    assert (train.epochs, train.steps) == (2, None)
    config = load_config(write("c.yaml", "data: {root: a}"), ["train.steps=10", "optim.warmup_share=0.1"])
    assert (config.train.epochs, config.train.steps) == (None, 10)
    assert (config.optim.warmup_epochs, config.optim.warmup_share) == (None, 0.1)
    data = load_config(small, ["data.root=a", "data.val_root=b"]).data
    assert (data.val_root, data.held_out) == ("b", 0)
    shards = ["data.kind=webdataset", "data.root=a.tar", "data.val_root=b.tar"]
    assert load_config(small, shards).data.held_out == 0
    tuned = load_config(CONFIGS / "finetune" / "small.yaml", ["weights=none", *shards[1:]], schema=FinetuneConfig)
    assert tuned.data.val_root == "b.tar"
    # One file that gives both contradicts itself.
    both = write("both.yaml", "data: {root: a}\ntrain: {epochs: 3, steps: 10}")
    assert message_of(both).startswith("train.steps=10")


def test_the_learning_rate_given_last_counts(write: Write):
    path = write("c.yaml", "data: {root: a}\noptim: {base_lr: 1e-3}")
    optim = load_config(path, ["optim.lr=5e-4"]).optim
    assert (optim.base_lr, optim.lr) == (None, 5e-4)
    optim = load_config(path, ["optim.lr=5e-4", "optim.lr=null", "optim.base_lr=2e-3"]).optim
    assert (optim.base_lr, optim.lr) == (2e-3, None)


def test_a_number_is_the_side_of_a_square(write: Write) -> None:
    path = write("c.yaml", "data: {root: a}\nmodel: {image_size: 96}")
    assert load_config(path).model.image_size == [96, 96]
    assert load_config(path, ["model.image_size=64"]).model.image_size == [64, 64]
    assert message_of(path, "model.image_size=100").startswith("model.image_size=[100, 100]")
    assert "model.image_size" in message_of(path, "model.image_size=true")


def test_a_file_of_the_other_task_is_called_that() -> None:
    pretrain, finetune = CONFIGS / "pretrain" / "small.yaml", CONFIGS / "finetune" / "small.yaml"
    message = message_of(finetune, "data.root=a")
    assert (
        message.startswith(f"{finetune}: is a configuration of `spark-me finetune`") and "configs/pretrain" in message
    )
    with pytest.raises(UserError, match=f"^{pretrain}: is a configuration of `spark-me pretrain`.*configs/finetune$"):
        load_config(pretrain, ["weights=none"], schema=FinetuneConfig)
    with pytest.raises(UserError, match="^model.image_size on the command line is a key of `spark-me pretrain` alone"):
        load_config(finetune, ["weights=none", "model.image_size=64"], schema=FinetuneConfig)


def test_syntax_error_names_file_and_line(write: Write) -> None:
    path = write("c.yaml", "data:\n  root: a\ntrain: {epochs: [}\n")
    assert message_of(path).startswith(f"{path}:3: ")


def test_duplicate_key_is_refused(write: Write) -> None:
    path = write("c.yaml", "train:\n  epochs: 3\n  epochs: 4\n")
    assert message_of(path).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "train: 3\n",
        "42",
        "true",
        "data: !!set {a, b}",
        "train: {steps: !!int abc}",
        "data: {root: !!timestamp 2001-01-01}",
        "null: 3",
        "? [a, b]\n: 3",
        "? {a: b}\n: 3",
        "1: {a: 2}",
        "data: &x {root: *x}",
        "data: {root: a}\n<<: {train: {steps: 3}}",
        "train: {steps: " + "9" * 5000 + "}",
        "data: {root: " + "[" * 3000 + "}",
        "data: " + "{a: " * 3000,
        "base: [a]",
        'base: "a\\0b"',
        "base: 3",
        "a: 1\n---\nb: 2",
        "data: {root: a\x01b}",
        "\ufeff@",
    ],
)
def test_other_content_gets_one_line(write: Write, text: str) -> None:
    assert message_of(write("c.yaml", text))


@pytest.mark.parametrize("override", ["train.epochs", "=3", "data.crop_scale=[0.1"])
def test_override_that_is_none(write: Write, override: str) -> None:
    assert override in message_of(write("c.yaml", "data: {root: a}"), override)


def test_missing_file_and_missing_base(tmp_path: Path, write: Write) -> None:
    assert "none.yaml: no such configuration file" in message_of(tmp_path / "none.yaml")
    assert "none.yaml: no such configuration file" in message_of(write("c.yaml", "base: none.yaml"))


def test_circle_of_bases(write: Write) -> None:
    write("a.yaml", "base: b.yaml")
    assert "inherits from itself" in message_of(write("b.yaml", "base: a.yaml"))


def test_yaml_runs_no_code(write: Write) -> None:
    assert "no valid YAML" in message_of(write("c.yaml", "data: {root: !!python/object/apply:os.getcwd []}"))


def test_statistics_that_are_not_given_are_imagenets_and_recorded(write: Write) -> None:
    path = write("c.yaml", "data: {root: a}")
    assert load_config(path).data.mean == [0.485, 0.456, 0.406]
    assert load_config(path, ["model.in_channels=1"]).data.std == [0.226]
    assert "0.485" in to_yaml(load_config(path))


def test_keys_of_a_section_within_a_section(write: Write) -> None:
    path = write("c.yaml", "data: {root: a}\noptim: {lamb: {max_grad_norm: 1.0}, lamb.always_adapt: true}")
    config = load_config(path, ["optim.lamb.bias_correction=false"])
    assert config.optim.lamb == LambConfig(max_grad_norm=1.0, bias_correction=False, always_adapt=True)
    assert differing_keys(config, parse_config(to_yaml(config), "c")) == []
    assert differing_keys(load_config(path), config) == ["optim.lamb.bias_correction: True → False"]
    for override, problem in (
        ("optim.lamb.max_norm=1", "unknown key optim.lamb.max_norm.*did you mean optim.lamb.max_grad_norm"),
        ("optim.lamb=1", "optim.lamb .*is a section: give its keys, for example optim.lamb.max_grad_norm"),
        ("optim.lamb.always_adapt=2.5", "optim.lamb.always_adapt"),
    ):
        assert re.search(problem, message_of(path, override))


def test_residual_branches_are_said_once(write: Write) -> None:
    """What a run recorded before there was model.init is the same configuration."""
    path = write("c.yaml", "data: {root: a}")
    recorded = to_yaml(load_config(path)).replace("zero_init_residual: null", "zero_init_residual: true")
    earlier = recorded.replace("  init: official\n", "")
    assert earlier.count("init") == 2 and "zero_init_residual: true" in earlier  # and init_from
    assert differing_keys(parse_config(earlier, "c"), load_config(path)) == []
    other = load_config(path, ["model.init=mmpretrain"])
    assert differing_keys(load_config(path), other) == ["model.init: official → mmpretrain"]
    assert load_config(path, ["model.zero_init_residual=false"]).model.zero_init_residual is False


def test_nan_is_the_same_nodata_again(write: Write) -> None:
    path = write("c.yaml", "data: {root: a, nodata: nan}")
    assert differing_keys(load_config(path), parse_config(to_yaml(load_config(path)), "c")) == []
    assert differing_keys(load_config(path), load_config(path, ["data.nodata=0"])) == ["data.nodata: nan → 0.0"]


def test_differing_keys_leave_out_what_does_not_decide_the_result() -> None:
    old, new = PretrainConfig(), PretrainConfig()
    new.run.dir, new.data.workers = "elsewhere", 9
    assert differing_keys(old, new) == []
    new.optim.base_lr, new.model.encoder = 0.5, "resnet18"
    assert differing_keys(old, new) == ["model.encoder: resnet50 → resnet18", "optim.base_lr: 0.0002 → 0.5"]


def test_block_decoder_takes_any_width(write: Write) -> None:
    config = load_config(write("c.yaml", "data: {root: a}"), ["model.decoder=block", "model.decoder_width=20"])
    assert (config.model.decoder, config.model.decoder_width) == ("block", 20)
    with pytest.raises(UserError, match="model.decoder_width"):
        load_config(write("c.yaml", "data: {root: a}"), ["model.decoder=block", "model.decoder_width=0"])


def test_names_that_the_schema_repeats_are_right() -> None:
    assert sparse.BACKENDS == BACKENDS
    assert tuple(decoder.DECODERS) == DECODERS
    for key in FREE_KEYS:
        section, name = key.split(".")
        assert any(hasattr(getattr(schema(), section), name) for schema in (PretrainConfig, FinetuneConfig))


LITERAL = [
    "/x/scans #2", "2024_01", "007", "1e3", "no", "[x] set", "/data/a: b", "@x", "${HOME}", "${oc.env:HOME}", "\\${x}",
    "a=b", "null ", "'quoted'", "- a", "{a", "%", "0x1F", "1:30", "2001-01-01", "a\\b",
]  # fmt: skip


@pytest.mark.parametrize("text", LITERAL)
def test_text_is_taken_as_it_is(write: Write, text: str) -> None:
    path = write("c.yaml", "data: {root: a}")
    config = load_config(path, [f"data.root={text}", f"run.dir={text}"])
    assert (config.data.root, config.run.dir) == (text, text)
    assert parse_config(to_yaml(config), "config.yaml") == config
    quoted = "'" + text.replace("'", "''") + "'"
    assert load_config(write("q.yaml", f"data: {{root: {quoted}}}")).data.root == text


@pytest.mark.parametrize("text", ["2024_01", "007", "1e3", "no", "${HOME}", "0x1F", "1:30", "2001-01-01", "true"])
def test_text_in_a_file_needs_no_quotes(write: Write, text: str) -> None:
    assert load_config(write("c.yaml", f"data:\n  root: {text}\n")).data.root == text


def test_home_directory_in_every_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    path = write("c.yaml", "data: {root: ~/images}\nrun: {dir: '~'}\nmodel: {init_from: ~/w.pt}")
    config = load_config(path, ["data.val_root=~/val", "run.resume=~/a.pt"])
    assert (config.data.root, config.data.val_root) == ("/home/someone/images", "/home/someone/val")
    assert (config.run.dir, config.run.resume) == ("/home/someone", "/home/someone/a.pt")
    assert config.model.init_from == "/home/someone/w.pt"
    finetune = write("f.yaml", "weights: ~/w.pt\ndata: {root: ~}")
    tuned = load_config(finetune, schema=FinetuneConfig)
    assert (tuned.weights, tuned.data.root) == ("/home/someone/w.pt", "/home/someone")
    inherited = write("home/base.yaml", "data: {root: a}")
    monkeypatch.setenv("HOME", str(inherited.parent))
    assert load_config(write("own.yaml", "base: ~/base.yaml")).data.root == "a"


def test_nothing_is_null_and_numbers_are_numbers(write: Write) -> None:
    path = write("c.yaml", "data: {root: a, val_root: null}\nmodel: {init_from: }\noptim: {base_lr: 1e-3}")
    config = load_config(
        path, ["model.drop_path=null", "data.image_key=", "data.nodata=", "train.epochs=300", "data.crop_scale=[.5, 1]"]
    )
    assert config.data.val_root is config.model.init_from is config.model.drop_path is config.data.image_key is None
    assert config.data.nodata is None and load_config(path, ["data.val_root=null"]).data.val_root is None
    assert (config.optim.base_lr, config.train.epochs, config.data.crop_scale) == (1e-3, 300, [0.5, 1.0])


@pytest.mark.parametrize(
    "override", ["data.std=[.inf,1,1]", "data.mean=[.nan,0,0]", "optim.base_lr=.inf", "optim.weight_decay=.nan"]
)
def test_numbers_are_finite(write: Write, override: str) -> None:
    assert message_of(write("c.yaml", "data: {root: a}"), override).endswith("must be finite")


@pytest.mark.parametrize("value", ["[224, {a: 1}]", "[[224], 224]", "[{}, {}]", "[null, 224]"])
def test_lists_hold_plain_values(write: Write, value: str) -> None:
    assert "model.image_size" in message_of(write("c.yaml", f"data: {{root: a}}\nmodel: {{image_size: {value}}}"))


SECRET = "4711"
"""Of an environment variable; a number, as text might be refused for other reasons."""


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "${SECRET}", "$SECRET", "${run.seed}", "${oc.decode:'1'}"])
def test_no_file_and_no_argument_reads_the_environment_or_another_key(
    write: Write, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for name in ("SECRET", "WDS_SECRET"):
        monkeypatch.setenv(name, SECRET)
    write("base.yaml", f'data: {{root: "https://evil/{text}"}}\nrun: {{seed: {SECRET}}}')
    config = load_config(write("c.yaml", f'base: base.yaml\nmodel: {{init_from: "https://evil/{text}"}}'))
    config = parse_config(to_yaml(config), "a checkpoint")
    assert config.data.root == config.model.init_from == f"https://evil/{text}"
    path = write("c.yaml", f'weights: "https://evil/{text}"\ndata: {{root: a}}')
    assert load_config(path, schema=FinetuneConfig).weights == f"https://evil/{text}"
    # Where numbers are needed, texts are none.
    for key, value in (("data.workers", text), ("data.mean", f"[{text}, 1, 1]"), ("data.mean", f"['{text}', 1, 1]")):
        for line in ([f"{key}={value}"], []):
            file = "data: {root: a}" if line else f"data: {{root: a, {key.partition('.')[2]}: {value}}}"
            assert SECRET not in message_of(write("c.yaml", file), *line)


@pytest.mark.parametrize(
    "content",
    [
        "root:$6$secret:19000:0:::",
        "secret",
        "- secret",
        "secret: 3",
        "data: {root: a}\nsecret: 3",
        "data: {'secret",
        "data: {secret: 1, secret: 2}",
        "@secret",
        b"secret\xff",
        "secret" * 100_000,
    ],
)
@pytest.mark.parametrize("name", ["shadow", "shadow.yaml"])
def test_a_base_that_is_no_configuration_is_not_quoted(tmp_path: Path, write: Write, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(write("c.yaml", f"base: {tmp_path / name}"))
    assert "secret" not in message and "0xff" not in message and str(tmp_path / name) in message


def test_a_base_is_a_file(tmp_path: Path, write: Write) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("fifo.yaml", "zero.yaml"):
        assert f"{name}: is no regular file" in message_of(write("c.yaml", f"base: {name}"))


COMMANDS = [
    "pipe:cat x",
    "{pipe,x}:cat x",
    "{p,q}ipe:cat x",
    "p{i,}pe:cat x",
    "{/a,pipe:cat x}",
    "\\pipe:cat x",
    "/a.tar::pipe:cat x",
    "${X}pe:cat x",
]


@pytest.mark.parametrize("root", COMMANDS)
def test_commands_are_allowed_on_the_command_line_alone(tmp_path: Path, write: Write, root: str) -> None:
    shards = f"data: {{kind: webdataset, samples: 9, root: '{root}'"
    path, allowed = write("c.yaml", f"{shards}}}"), "data.allow_pipe=true"
    assert "add data.allow_pipe=true on the command line" in message_of(path)
    config = load_config(path, [allowed])
    assert config.data.allow_pipe and config.data.root == root
    # A run's own record does not allow it either, and may be read.
    text = to_yaml(config)
    assert "allow_pipe" not in text
    recorded = parse_config(text, "x")
    assert not recorded.data.allow_pipe and differing_keys(recorded, config) == []
    assert "data.allow_pipe" in message_of(write("recorded.yaml", text))
    for value in ("true", "false"):
        path = write("own.yaml", f"{shards}, allow_pipe: {value}}}")
        for file in (path, write("heir.yaml", "base: own.yaml")):
            expected = f"data.allow_pipe in {path}: is for the command line alone"
            assert message_of(file, allowed).startswith(expected)
        with pytest.raises(UserError, match="is for the command line alone"):
            parse_config(path.read_text(), "a checkpoint")


@pytest.mark.parametrize("root", ["/data/a:b/{0..9}.tar", "shards/{a:b,c}.tar", "../{0..9}/x:y.tar", "a:b.tar"])
def test_other_shards_need_no_permission(write: Write, root: str) -> None:
    assert load_config(write("c.yaml", f"data: {{kind: webdataset, root: '{root}'}}")).data.root == root


def test_commands_of_data_need_permission(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"pipe:touch {tmp_path / 'executed'}"
    path = str(write("c.yaml", f"data: {{kind: webdataset, samples: 9, root: '{root}'}}\ntrain: {{batch_size: 8}}"))
    for command in (["data", "check"], ["data", "stats"], ["pretrain"], ["schedule"]):
        assert cli.main([*command, path]) == 2
        assert "data.allow_pipe=true" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert cli.main(["data", "check", path, "data.allow_pipe=true"]) == 2
    assert (tmp_path / "executed").exists()
