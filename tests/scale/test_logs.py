"""Logs: valid JSON, byte-equal after kill and resume, and trackers that say when they are not there."""

import json
import math
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scale.grids import grid
from scale.logs import open_log, read_metrics


def picture(update: int) -> Image.Image:
    return grid(torch.full((1, 1, 2, 2), update / 10), scale=1)


def run(folder: Path, first: int, last: int, resumed: int | None = None, trackers=()) -> None:
    log = open_log(folder, trackers, resumed)
    for update in range(first, last + 1):
        images = {"samples": picture(update)} if update % 2 == 0 else None
        log.write(update, {"reward/mean": update / 3, "norm": math.nan if update == 2 else 1e-30}, images)
    log.close()


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_one_line_of_strict_json_per_update(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    log = open_log(tmp_path / "new" / "run")
    values = {"nan": math.nan, "up": math.inf, "down": -np.inf, "third": 1 / 3, "count": 7}
    log.write(0, values)
    log.write(5, {"single": torch.tensor(0.5), "bf16": torch.tensor([2.0]).bfloat16(), "n": np.float32(0.1)})
    read = [json.loads(line, parse_constant=refuse) for line in lines(tmp_path / "new" / "run")]
    assert [entry["update"] for entry in read] == [0, 5]
    first, second = read_metrics(tmp_path / "new" / "run")  # readable while the run is going on
    assert math.isnan(first.pop("nan"))
    assert first == {"update": 0, "up": math.inf, "down": -math.inf, "third": 1 / 3, "count": 7}
    assert second == {"update": 5, "single": 0.5, "bf16": 2.0, "n": float(np.float32(0.1))}
    assert isinstance(first["count"], int)
    log.close()


def test_images_are_files_that_the_line_names(tmp_path):
    run(tmp_path, 0, 2)
    zero, one, two = read_metrics(tmp_path)
    assert zero["images"] == {"samples": "images/samples-000000.png"}
    assert "images" not in one
    with Image.open(tmp_path / two["images"]["samples"]) as back:
        assert np.array_equal(np.asarray(back), np.asarray(picture(2)))


@pytest.mark.parametrize("torn", ["", '{"update": 8, "rew', '{"update": 8, "norm": 2.0}'])
@pytest.mark.parametrize("resumed", [0, 1, 4, 7])
def test_a_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path, resumed, torn):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0, 9)
    run(killed, 0, 7)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write(torn)  # a kill within the write: no end of line
    run(killed, resumed + 1 if resumed else 0, 9, resumed)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in (killed / "images").iterdir()) == sorted(p.name for p in (whole / "images").iterdir())


def test_lines_are_on_the_disk_when_the_process_is_killed(tmp_path):
    child = os.fork()
    if child == 0:
        log = open_log(tmp_path)
        for update in range(3):
            log.write(update, {"x": update})
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert [entry["x"] for entry in read_metrics(tmp_path)] == [0, 1, 2]


def test_a_resumed_run_whose_log_is_lost_begins_a_new_one(tmp_path):
    run(tmp_path, 5, 6, resumed=4)
    assert [entry["update"] for entry in read_metrics(tmp_path)] == [5, 6]


def test_a_new_run_does_not_overwrite_another(tmp_path):
    run(tmp_path, 0, 3)
    before = lines(tmp_path)
    with pytest.raises(ValueError, match="metrics.jsonl: holds a run already, must be resumed"):
        open_log(tmp_path)
    assert lines(tmp_path) == before


def test_updates_must_rise_also_after_a_resume(tmp_path):
    run(tmp_path, 0, 3)
    log = open_log(tmp_path, resumed=2)
    for update in (2, 1):
        with pytest.raises(ValueError, match=f"update must rise, got {update} after 2"):
            log.write(update, {"x": 1})
    log.write(3, {"x": 1})
    with pytest.raises(ValueError, match="update must rise, got 3 after 3"):
        log.write(3, {"x": 1})
    log.close()


@pytest.mark.parametrize(
    ("scalars", "images", "rule"),
    [
        ({"update": 1}, None, "name must not be 'update' or 'images'"),
        ({"images": 1}, None, "name must not be"),
        ({"a b": 1}, None, "name must be letters"),
        ({"x": "high"}, None, "scalar 'x' must be a number, got str"),
        ({"x": None}, None, "scalar 'x' must be a number, got NoneType"),
        ({"x": torch.ones(2)}, None, r"scalar 'x' must be a single number, got shape \(2,\)"),
        ({"x": np.ones(3)}, None, r"scalar 'x' must be a single number, got shape \(3,\)"),
        ({}, {"../out": picture(1)}, "name must be letters"),
        ({}, {"/tmp/out": picture(1)}, "name must be letters"),
    ],
)
def test_bad_entries_are_refused_and_leave_no_trace(tmp_path, scalars, images, rule):
    log = open_log(tmp_path / "run")
    with pytest.raises(ValueError, match=rule):
        log.write(1, scalars, images)
    log.write(1, {"x": 2})
    log.close()
    assert read_metrics(tmp_path / "run") == [{"update": 1, "x": 2}]
    assert [p.name for p in tmp_path.rglob("*.png")] == []


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ('{"update": 0}\n{"upd\n{"update": 2}\n', "line 2 must be a JSON object with an update"),
        ('{"update": 0}\n{"x": 1}\n', "line 2 must be a JSON object with an update"),
        ("[1]\n", "line 1 must be a JSON object"),
        ('{"update": 3}\n{"update": 3}\n', "line 2 has update 3, must be above 3"),
    ],
)
def test_a_damaged_log_is_refused_and_left_as_it_is(tmp_path, content, rule):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rule):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=rule):
        open_log(tmp_path, resumed=9)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_missing_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl: is missing"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_cut(tmp_path, monkeypatch, tracker, module):
    run(tmp_path, 0, 3)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"'{tracker}', which must be installed: pip install {tracker}"):
        open_log(tmp_path, [tracker], resumed=1)
    assert len(lines(tmp_path)) == 4
    with pytest.raises(ValueError, match="trackers holds 'mlflow', must be of tensorboard, wandb"):
        open_log(tmp_path, ["mlflow"], resumed=1)


def test_tensorboard_shows_what_was_written_and_no_update_twice(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 0, 5, trackers=["tensorboard"])
    run(tmp_path, 3, 4, resumed=2, trackers=["tensorboard"])  # stops before 5, which must not be left of the first run
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    curve = events.Scalars("reward/mean")
    assert [point.step for point in curve] == [0, 1, 2, 3, 4]
    assert [point.value for point in curve] == pytest.approx([u / 3 for u in range(5)])
    assert math.isnan(events.Scalars("norm")[2].value)
    assert [image.step for image in events.Images("samples")] == [0, 2, 4]
    assert [entry["update"] for entry in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


class FakeRun:
    def __init__(self, id: str) -> None:
        self.id, self.points, self.finished, self.metrics = id, [], False, []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, point):
        self.points.append(point)

    def finish(self):
        self.finished = True


def test_weights_and_biases_gets_every_update_and_its_run_goes_on(tmp_path, monkeypatch):
    """A double: the calls are those that wandb 0.31 took offline, which the suite does not install."""
    runs, asked = [], []

    def init(**options):
        asked.append(options)
        runs.append(FakeRun(options["id"] or f"new{len(runs)}"))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init, module.Image = init, lambda image: ("picture", image.size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = open_log(tmp_path, ["wandb"], config={"learning_rate": 0.1})
    log.write(0, {"x": torch.tensor(1.5)}, {"samples": picture(0)})
    log.write(1, {"x": 2})
    log.close()
    assert runs[0].points == [{"update": 0, "x": 1.5, "samples": ("picture", picture(0).size)}, {"update": 1, "x": 2}]
    assert runs[0].metrics == [("update", None), ("*", "update")]
    assert runs[0].finished
    assert asked[0]["config"] == {"learning_rate": 0.1}
    assert (asked[0]["id"], asked[0]["resume"]) == (None, None)
    open_log(tmp_path, ["wandb"], resumed=1).close()
    assert (asked[1]["id"], asked[1]["resume"]) == ("new0", "allow")
    assert len(read_metrics(tmp_path)) == 2
