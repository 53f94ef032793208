"""`spark-me bench` as typed: what it prints and writes, and what it refuses."""

import json

import pytest

from spark_me.cli import main

TINY_ARGUMENTS = "bench --encoder resnet18 --batch 2 --image-size 64 --mask-ratio 0.5 --decoder-width 32 --device cpu"
QUICK = "--runs 1 --warmup 0 --no-memory"


pytestmark = pytest.mark.usefixtures("one_thread")


def run(arguments: str, *more: str) -> int:
    return main([*arguments.split(), *more])


def test_command_prints_and_writes(capsys, tmp_path):
    target = tmp_path / "bench.json"
    assert run(f"{TINY_ARGUMENTS} {QUICK} --scope encoder --backends native dense", "--json", str(target)) == 0
    content = json.loads(target.read_text())
    assert content["case"]["image_size"] == [64, 64] and content["runs"] == 1
    (result,) = content["scopes"]
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert f"{row['median']:.4f}" in printed
    assert list(tmp_path.iterdir()) == [target]


def test_command_compares_a_convnext_with_all_backends(capsys):
    arguments = TINY_ARGUMENTS.replace("resnet18", "convnextv2_atto")
    assert run(f"{arguments} {QUICK} --scope both") == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{backend} ") == 2 for backend in ("native", "minkowski"))
    assert all(printed.count(f"\n{backend} ") == 4 for backend in ("masked_dense", "dense"))


def test_command_compares_steps_with_the_block_decoder(capsys, tmp_path):
    target = tmp_path / "bench.json"
    assert run(f"{TINY_ARGUMENTS} {QUICK} --scope step --decoder block", "--json", str(target)) == 0
    content = json.loads(target.read_text())
    assert content["case"]["decoder"] == "block"
    assert {row["backend"] for row in content["scopes"][0]["rows"]} == {"native", "minkowski", "masked_dense", "dense"}
    assert "\nstep with block decoder, forward + backward\n" in capsys.readouterr().out
    assert run("bench --table", str(target)) == 0
    assert "| resnet18 with block decoder | float32 |" in capsys.readouterr().out


def test_command_sweeps(capsys, tmp_path):
    table, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    outputs = ["--json", str(table), "--plot", str(plot)]
    assert run(f"{TINY_ARGUMENTS} {QUICK} --backends native --sweep batch --values 1 2", *outputs) == 0
    content = json.loads(table.read_text())
    assert [report["case"]["batch"] for report in content["reports"]] == content["values"] == [1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "visible share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--encoder resnet5", "did you mean resnet50"),
        ("--backends nativ", "did you mean native"),
        ("--image-size 100", "no multiple of the encoder's patch size 32"),
        ("--image-size 64 64 64", "--image-size"),
        ("--mask-ratio 0.9", "leaves no patch visible"),
        ("--mask-ratio nan", "--mask-ratio"),
        ("--mask-ratio -1", "--mask-ratio"),
        ("--scope step --decoder-width 33", "decoder_width=33"),
        ("--mask-ratio 0 --scope step", "--scope encoder"),
        ("--dtype float8", "unknown dtype"),
        ("--dtype tf32", "--dtype float32"),
        ("--largest-batch", "--device cuda"),
        ("--largest-batch --scope both", "--scope encoder"),
        ("--table nowhere.json", "nowhere.json"),
        ("--device tpu", "unknown device"),
        ("--device cuda:1", "unknown device"),
        ("--batch 0", "--batch"),
        ("--batch 1 --mask-ratio 0.75", "one visible patch"),
        ("--runs 0", "--runs"),
        ("--plot sweep.png", "--sweep"),
        ("--values 1 2", "--sweep"),
        ("--sweep batch --values 1.5", "whole numbers"),
        ("--sweep batch --plot sweep.jpg", ".png"),
        ("--sweep mask_ratio --values 0.5 0 --scope step", "--scope encoder"),
        ("--json nowhere/bench.json", "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # repeated options: the last one counts
    assert run(f"{TINY_ARGUMENTS} {QUICK} {arguments}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())
