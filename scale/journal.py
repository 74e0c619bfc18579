"""A journal of what was computed, so that a run that was stopped computes none of it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale.checkpoints import write_atomically


class Journal:
    """What was computed, by name, in a file of JSON lines; a line that a kill has cut is left out and written again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last end of a line is empty, or cut
            try:
                entry = json.loads(line)
                self._held[entry["name"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number} is damaged, must be an entry of a journal") from None
        if lines and lines[-1]:
            write_atomically(path, b"\n".join([*lines[:-1], b""]))

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the value of that name, computed now if it is not held; plain data only."""
        if name not in self._held:
            value = compute()
            line = json.dumps({"name": name, "value": value}, allow_nan=False)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(line.encode() + b"\n")
            self._held[name] = json.loads(line)["value"]
        return self._held[name]
