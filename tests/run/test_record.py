"""The record of a run that was killed, and went on."""

import json
import math
import re
import resource

import pytest

from fcvit_jax.errors import UserError
from fcvit_jax.run import record
from fcvit_jax.run.record import MetricsWriter, Progress
from fcvit_jax.run.results import as_json, not_finite


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def open_writer(workdir, step=0, evaluated=0):
    return MetricsWriter(workdir, step, evaluated, steps_per_epoch=4)


def test_what_will_be_written_again_is_dropped(tmp_path):
    writer = open_writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": math.pi})
        writer.write(step, {"eval/loss": math.e})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # killed while writing
    open_writer(tmp_path, step=2, evaluated=1).close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-1])  # or just before the end
    writer = open_writer(tmp_path, step=2, evaluated=1)
    writer.write(3, {"train/loss": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "epoch": 0.25, "train/loss": math.pi},
        {"step": 1, "epoch": 0.25, "eval/loss": math.e},
        {"step": 2, "epoch": 0.5, "train/loss": math.pi},
        {"step": 3, "epoch": 0.75, "train/loss": 1.0},
    ]


def test_tensorboard_forgets_what_the_record_drops(tmp_path, monkeypatch):
    """An evaluation of the very step that a run resumes at, but not what was noted of training there."""
    writer = open_writer(tmp_path)
    for step in (4, 8):
        writer.write(step, {"train/loss": 2.0})
        writer.write(step, {"eval/loss": 1.0})
    writer.close()
    starts, written = [], []
    tensorboard = record._TensorBoard

    class Spy(tensorboard):
        def __init__(self, folder, first):
            starts.append(first)
            super().__init__(folder, first)

        def write(self, step, metrics):
            written.append((step, *metrics))
            super().write(step, metrics)

    monkeypatch.setattr(record, "_TensorBoard", Spy)
    writer = open_writer(tmp_path, step=8, evaluated=4)
    writer.write(8, {"eval/loss": 1.0})
    writer.close()
    assert starts == [8] and written == [(8, "train/loss"), (8, "eval/loss")]
    open_writer(tmp_path, step=8, evaluated=8).close()
    assert starts == [8, 9] and len(written) == 2
    assert steps(tmp_path) == [4, 4, 8, 8]


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(4, {"eval/loss": math.nan, "train/grad_norm": -math.inf, "eval/top1": 0.5})
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values == {"step": 4, "epoch": 1.0, "eval/loss": None, "train/grad_norm": None, "eval/top1": 0.5}
    assert json.loads(as_json({"a": [{"b": (math.inf, 1)}]})) == {"a": [{"b": [None, 1]}]}


def test_what_is_not_finite_is_listed_with_the_rest():
    assert not_finite({"loss": 1.0, "rows": [{"iou": None}], "count": 3}) == ""
    assert not_finite({"loss": math.nan, "count": 3, "top1": 0.0}) == "loss nan, top1 0.0"


def test_a_full_disk_is_told_of(tmp_path):
    writer = open_writer(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match="metrics.* cannot be written: File too large"):
            for step in range(9):
                writer.write(step, {"train/loss": 1.0})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_rate_is_that_of_the_steps_whenever_they_are_noted(tmp_path):
    """On a CPU the last two steps before an evaluation are noted at the same time."""
    writer = open_writer(tmp_path)
    progress = Progress(writer, step=0, total=4, batch_size=8, log_every=1)
    for step in range(1, 5):
        progress.update(step, {"train/loss": 0.5}, done=2.0 * step)
    progress.close()
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("train/images_per_second") for line in lines] == [None, 4, 4, 4]


def test_progress_writes_every_few_steps_and_the_last(tmp_path, capsys):
    writer = open_writer(tmp_path)
    progress = Progress(writer, step=0, total=7, batch_size=8, log_every=3)
    for step in range(1, 8):
        with progress.waiting():
            pass
        progress.update(step, {"train/loss": 0.5})
    progress.close()
    writer.close()
    assert steps(tmp_path) == [3, 6, 7]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/images_per_second") == 2
    *_, regular, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert regular["train/images_per_second"] > 0 and 0 <= regular["train/data_wait"] <= 1
    assert "train/images_per_second" not in last
    lines = capsys.readouterr().out.splitlines()
    assert (
        re.fullmatch(r"step 6/7  loss 0.500  \d+ img/s  00:00 left", lines[-2]) and lines[-1] == "step 7/7  loss 0.500"
    )
