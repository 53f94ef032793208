"""metrics.jsonl across interruptions."""

from pathlib import Path

from spark_me.train.metrics import MetricsFile, read_metrics


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
