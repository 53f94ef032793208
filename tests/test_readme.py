"""The commands of the README and of docs/, typed as they stand there; on small data, with the length of runs cut."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tar_shards
import tiny_finetune
from classifier_files import save_image

from spark_me import cli, networks
from spark_me.cli.grammar import parse
from spark_me.config.loading import SCHEMAS, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name != "configuration.md")]
PRETRAIN = "model.image_size=64 model.decoder_width=32 train.steps=2 train.batch_size=4 data.workers=0 run.device=cpu"
FINETUNE = "train.steps=2 train.batch_size=4 data.repeats=1 data.workers=0 run.device=cpu"
SHORTER = {
    "spark-me pretrain": f"{PRETRAIN} data.repeats=1",
    "spark-me finetune": FINETUNE,
    "spark-me compare": f"{FINETUNE} --fractions 1 --seeds 1",
    "spark-me bench": "--batch 2 --image-size 64 --runs 1 --warmup 0 --no-memory --device cpu",
    "python tinynet.py pretrain": f"{PRETRAIN} data.repeats=1 train.epochs=1 train.steps=null optim.warmup_epochs=0",
    "python tinynet.py bench": "--batch 2 --runs 1 --warmup 0 --no-memory --device cpu",
}
"""What is typed behind a command besides, so that it takes seconds."""


def commands_of(page: Path) -> list[str]:
    """The indented lines of a page that are commands, continued ones joined, without their comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (?=(?:spark-me|python|torchrun|docker run) )(.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", line) for line in lines]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(networks._OWN, "tinynet", lambda in_channels: networks.dense_network("resnet18"))
    for command in commands_of(page):
        words = shlex.split(re.sub(r"^.*?(spark-me|-m spark_me|tinynet.py|spark_me(:cpu)?) +(?=[a-z])", "", command))
        if "…" in command:  # for whatever is put there
            continue
        args = parse(cli._parser(), words)
        if hasattr(args, "configured") and args.command != "data":
            for config in args.configs:
                if "*" not in str(config):
                    unchecked = ("weights",) if args.command == "evaluate" else ()
                    load_config(config, args.overrides, unchecked=unchecked, schema=SCHEMAS[args.task])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "configs").symlink_to(ROOT / "configs")
    for number in range(16):
        save_image(folder / "images" / f"{number}.png", number)
        save_image(folder / "folder" / f"{number}.jpg", number)
    for name in ("photo.jpg", "photo1.jpg", "photo2.jpg"):
        save_image(folder / name, 0)
    tiny_finetune.write_classes(folder / "labelled")
    (folder / "data").symlink_to(folder / "labelled")
    (folder / "shards").mkdir()
    tar_shards.write_shards(folder / "shards")
    return folder


@pytest.fixture
def typing(place: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(place)


def type_in(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command as a shell would, and return what it prints."""
    for name, stands_for in {
        "/path/to/images": "images",
        "DIR": "labelled",
        "WEIGHTS": "runs/tuned/checkpoints/best.pt",
        "{000000..000126}": "{00..02}",
        "000127.tar": "03.tar",
    }.items():
        command = re.sub(rf"(?<=[ =/]){re.escape(name)}(?= |/|\.|'|$)", stands_for, command)
    longest = max((start for start in SHORTER if command.startswith(start)), key=len, default=None)
    words = shlex.split(f"{command} {SHORTER[longest] if longest else ''}")
    if words[0] == "python":
        original, sys.argv = sys.argv, words[1:]
        try:
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = original
            networks._OWN.pop("tinynet", None)
        code = stop.value.code
    else:
        code = cli.main(words[1:])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def readme_commands(*starts: str) -> list[str]:
    return [command for command in commands_of(PAGES[0]) if command.startswith(starts)]


@pytest.mark.usefixtures("typing", "shallow")
def test_pretraining_and_what_comes_after_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretrain, of_timm = readme_commands("spark-me pretrain")
    printed = type_in(pretrain, capsys)
    # The commands that it proposes are typed, too, but for their beginning that leads to an environment.
    hints = [line.split(maxsplit=1) for line in printed.splitlines() if "spark-me" in line]
    assert [name for name, _ in hints] == ["more", "weights", "next"]
    assert "timm/regnety_016" in of_timm
    for _, hint in hints:
        hint = re.sub(r"^\S*spark-me", "spark-me", hint.replace("YOUR_PHOTO.jpg", "photo.jpg"))
        type_in(hint.replace("/path/above/train/and/val", "labelled").replace("runs/tuned", "runs/hint"), capsys)
    (reconstruct,) = readme_commands("spark-me reconstruct")
    assert "wrote picture.png" in type_in(reconstruct, capsys)
    (most_wanted,) = [block for block in blocks_of(PAGES[0]) if 'get_model("resnet50", pretrained=' in block]
    names: dict = {}
    exec(most_wanted, names)
    assert names["network"].extract_feat is not None
    away, back = readme_commands("spark-me convert")
    type_in(away, capsys)
    type_in("spark-me convert resnet50.safetensors resnet50_1kpretrained_timm_style.pth --to timm", capsys)
    type_in(back, capsys)
    finetune, evaluate = readme_commands("spark-me finetune", "spark-me evaluate")
    assert "images of 64 pixels" in type_in(finetune, capsys)
    assert "confusion.png" in type_in(evaluate, capsys)
    for command in readme_commands("spark-me predict", "spark-me features", "spark-me probe", "spark-me export"):
        type_in(command.replace("--image-size 224 224", "--image-size 64 64"), capsys)
    (compare,) = [command for command in commands_of(ROOT / "docs" / "few_labels.md") if " compare " in command]
    assert "comparison.png" in type_in(compare, capsys)


@pytest.mark.usefixtures("typing")
def test_python_as_it_stands() -> None:
    by_start = {block.splitlines()[0] if block.startswith("#") else block: block for block in blocks_of(PAGES[0])}
    for start, block in by_start.items():
        if start == "# tinynet.py":
            Path("tinynet.py").write_text(block, encoding="utf-8")
        elif "pretrained=True" in block:  # without the download
            exec(block.replace("pretrained=True", "pretrained=False"), {})
        elif "best.pt" not in block:
            exec(block, {})
    assert Path("tinynet.py").is_file()


@pytest.mark.usefixtures("typing")
def test_encoder_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in blocks_of(PAGES[0]) if block.startswith("# tinynet.py")]
    Path("tinynet.py").write_text(block, encoding="utf-8")
    pretrain, *others = readme_commands("python tinynet.py")
    printed = type_in(pretrain, capsys)
    assert "python tinynet.py reconstruct runs/tinynet/checkpoints/best.pt" in printed
    assert len(others) == 3
    for command in others:
        type_in(command, capsys)


@pytest.mark.usefixtures("typing")
def test_commands_about_data(capsys: pytest.CaptureFixture[str]) -> None:
    typed = 0
    for number, command in enumerate(commands_of(ROOT / "docs" / "data.md")):
        # Some need what is elsewhere, or packages that `all` leaves out.
        if any(
            foreign in command for foreign in ("s3://", "/path/saved", "/path/to/tiles", "fetch elpv", "fetch emoji")
        ):
            continue
        type_in(command if "fetch" in command else f"{command} run.dir=runs/data{number} data.workers=0", capsys)
        typed += 1
    assert typed == 4
