"""Logs of a run: always metrics.jsonl and PNG files in its folder; TensorBoard and Weights & Biases where asked for.

metrics.jsonl holds one JSON object per line and update: "update", the scalars by name and, where there are images,
"images" with the paths of their files in the folder. It holds no times, so a deterministic run that was killed and
resumed leaves the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from scale.checkpoints import write_atomically
from scale.grids import save_grid

FILE = "metrics.jsonl"
TRACKERS = ("tensorboard", "wandb")

_NAME = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")
_RESERVED = ("update", "images")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as strings: JSON has no such numbers

Images = Mapping[str, Image.Image]


class Log(Protocol):
    """A place to write what each update saw."""

    def write(self, update: int, scalars: Mapping[str, Any], images: Images | None = None) -> None:
        """Write the scalars and images of one update, once, with updates rising."""
        ...

    def close(self) -> None:
        """Write out what is held back, and release what is open."""
        ...


def open_log(
    folder: Path,
    trackers: Iterable[str] = (),
    resumed: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Log:
    """Return the log of the run in `folder`, to metrics.jsonl and to the trackers named.

    log = open_log(folder, trackers=["tensorboard"])
    log.write(1, {"reward/mean": 0.5}, {"samples": grid(images)})
    log.close()

    Write an update's line before its checkpoint: then a kill in between costs nothing.

    Args:
        trackers: of "tensorboard" (files below folder/tensorboard) and "wandb".
        resumed: None for a new run; else the updates made by the checkpoint that it goes on from. Lines of later
            updates are cut off. At 0 all are, since the loop reports update 0 again before its first update.
        config: what Weights & Biases is to show as the run's configuration.

    Raises:
        ValueError: if a tracker is unknown or not installed, if a new run's folder holds lines already, or if a line
            other than a last, torn one cannot be read.
    """
    names = list(dict.fromkeys(trackers))
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"trackers holds {name!r}, must be of {', '.join(TRACKERS)}")
    # Trackers first: where one is not installed, the folder must stay as it is.
    open_tracker = {"tensorboard": _tensorboard_writer, "wandb": _wandb_module}
    modules = {name: open_tracker[name]() for name in names}
    logs: list[Log] = [JsonLines(folder, resumed)]
    if "tensorboard" in modules:
        logs.append(TensorBoard(modules["tensorboard"], folder, resumed))
    if "wandb" in modules:
        logs.append(WeightsAndBiases(modules["wandb"], folder, resumed, config))
    return logs[0] if len(logs) == 1 else Several(logs)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of folder/metrics.jsonl, each {"update": u, name: number, ...}; a torn last line is left out.

    Raises:
        ValueError: if the file is missing, or a line other than a torn last one is not such an object.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: is missing, must be the metrics of a run")
    return [entry for _, entry in _lines(path)]


class JsonLines:
    """The log in the run's folder: metrics.jsonl, and images as folder/images/<name>-<update>.png."""

    def __init__(self, folder: Path, resumed: int | None) -> None:
        self._folder, path = folder, folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._last = -1
        if path.exists() and path.stat().st_size:
            if resumed is None:
                raise ValueError(f"{path}: holds a run already, must be resumed, or another folder taken")
            until = resumed if resumed > 0 else -1
            kept = [(line, entry["update"]) for line, entry in _lines(path) if entry["update"] <= until]
            write_atomically(path, *(line for line, _ in kept))
            self._last = kept[-1][1] if kept else -1
        self._file = open(path, "ab")  # noqa: SIM115

    def write(self, update: int, scalars: Mapping[str, Any], images: Images | None = None) -> None:
        """Append one line, through to the disk.

        Raises:
            ValueError: if update does not rise, a name is reserved or has characters other than letters, digits and
                _ . - /, or a value is not a number.
            OSError: if the line or an image cannot be written.
        """
        if update <= self._last:
            raise ValueError(f"update must rise, got {update} after {self._last}")
        entry: dict[str, Any] = {"update": int(update)}
        entry |= {_name(name): _jsonable(name, value) for name, value in scalars.items()}
        files = {_name(name): f"images/{name}-{update:06d}.png" for name in images or {}}
        for name, image in (images or {}).items():
            save_grid(self._folder / files[name], image)
        if files:
            entry["images"] = files
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last = update

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files below folder/tensorboard; those of later updates than the resumed one are marked as void."""

    def __init__(self, writer: Any, folder: Path, resumed: int | None) -> None:
        purge = None if resumed is None else resumed + 1 if resumed > 0 else 0
        self._writer = writer(log_dir=str(folder / "tensorboard"), purge_step=purge)

    def write(self, update: int, scalars: Mapping[str, Any], images: Images | None = None) -> None:
        """Add one point to each curve, and the images."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), update)
        for name, image in (images or {}).items():
            self._writer.add_image(name, np.array(image.convert("RGB")), update, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in the folder so that a resumed run goes on with it.

    Its own steps cannot go back, so curves are drawn over "update", and updates made twice have two equal points.
    """

    def __init__(self, wandb: Any, folder: Path, resumed: int | None, config: Mapping[str, Any] | None) -> None:
        self._wandb, id_file = wandb, folder / "wandb-id.txt"
        known = id_file.read_text().strip() if resumed is not None and id_file.exists() else None
        self._run = wandb.init(
            project="verifine", dir=str(folder), id=known, resume="allow" if known else None, config=dict(config or {})
        )
        write_atomically(id_file, f"{self._run.id}\n".encode())
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def write(self, update: int, scalars: Mapping[str, Any], images: Images | None = None) -> None:
        """Send one point of each curve, and the images."""
        pictures = {name: self._wandb.Image(image) for name, image in (images or {}).items()}
        self._run.log({"update": update} | {name: float(value) for name, value in scalars.items()} | pictures)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Several:
    """Several logs as one; the first, which checks what it is given, is that in the run's folder."""

    def __init__(self, logs: list[Log]) -> None:
        self._logs = logs

    def write(self, update: int, scalars: Mapping[str, Any], images: Images | None = None) -> None:
        """Write to each log in turn."""
        for log in self._logs:
            log.write(update, scalars, images)

    def close(self) -> None:
        """Close each log."""
        for log in self._logs:
            log.close()


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as fault:
        raise ValueError(
            f"trackers holds 'tensorboard', which must be installed: pip install tensorboard ({fault})"
        ) from None
    return SummaryWriter


def _wandb_module() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as fault:
        raise ValueError(f"trackers holds 'wandb', which must be installed: pip install wandb ({fault})") from None
    return wandb


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each line as it stands and as a dict; one without an end was torn by a kill, and is left out."""
    *lines, _torn = path.read_bytes().split(b"\n")
    found, last = [], -1
    for number, line in enumerate(lines, start=1):
        try:
            entry = {key: _number(value) for key, value in json.loads(line).items()}
            rising = last < entry["update"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: line {number} must be a JSON object with an update") from None
        if not rising:
            raise ValueError(f"{path}: line {number} has update {entry['update']}, must be above {last}")
        last = entry["update"]
        found.append((line + b"\n", entry))
    return found


def _name(name: str) -> str:
    if name in _RESERVED:
        raise ValueError(f"name must not be {' or '.join(map(repr, _RESERVED))}, got {name!r}")
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"name must be letters, digits and _ . - with / between, got {name!r}")
    return name


def _jsonable(name: str, value: Any) -> int | float | str:
    """Return a number of Python's, or the name of one that is not finite; tensors and arrays of one entry count."""
    try:
        number = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):
        raise ValueError(f"scalar {name!r} must be a single number, got shape {tuple(value.shape)}") from None
    if isinstance(number, bool):
        return int(number)
    if not isinstance(number, int | float):
        raise ValueError(f"scalar {name!r} must be a number, got {type(value).__name__}")
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _number(value: Any) -> Any:
    return _NOT_FINITE[value] if isinstance(value, str) and value in _NOT_FINITE else value
