"""metrics.jsonl across interruptions."""

from pathlib import Path

import pytest

from spark_me.train.logs import MetricsFile, read_metrics


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, first_step=0)
    for step in range(1, 6):
        metrics.append({"step": step, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4, 5]
    MetricsFile(path, first_step=3).append({"step": 4, "loss": 0.25})
    assert read_metrics(path) == [{"step": step, "loss": 0.5} for step in (1, 2, 3)] + [{"step": 4, "loss": 0.25}]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    MetricsFile(path, first_step=0)
    assert path.read_text() == ""


def test_damaged_lines_cost_no_more_than_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "loss": 0.5}',
        b"\0" * 40,
        b"\xff\xfe{",
        b'{"step": null, "loss": 1}',
        b'{"loss": 1}',
        b"[1, 2]",
        b"3",
        b'{"step": 2, "loss": null, "held_out_loss": 0.25, "note": "x"}',
        b'{"step": "3"}',
        b"{" * 100_000,
        b'{"step": 4, "lo',
    ]
    path.write_bytes(b"\n".join(lines))
    good = [{"step": 1, "loss": 0.5}, {"step": 2, "held_out_loss": 0.25}]
    assert read_metrics(path) == good
    MetricsFile(path, first_step=2)
    assert "metrics.jsonl: left out 9 lines that are damaged" in capsys.readouterr().out
    assert read_metrics(path) == good
