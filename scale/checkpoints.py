"""Checkpoints of a run: one file each, whole or absent, and refused unless they are what they claim to be.

A file is three parts: a line with the SHA-256 of all that follows, a line of JSON (format version, digest of the run's
configuration, update), and the state as torch.save writes it. One run writes to one folder.

The states of random generators are not kept: update u of `algorithms.training.Trainer` draws from generator_for(u),
a generator of its own, so the number of updates made says all that a resumed run needs.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 1
MAGIC = b"verifine-checkpoint "
_FIRST_LINE = len(MAGIC) + 64 + 1
_NAME = re.compile(r"checkpoint-(\d{6,})\.pt")
_PARTIAL = ".partial"


class Checkpoint(NamedTuple):
    """A state and the number of updates made when it was saved."""

    update: int
    state: dict[str, Any]


class _Damaged(ValueError):
    """A file whose bytes are not those that were written."""


def save(folder: Path, update: int, state: dict[str, Any], digest: str, keep: int) -> Path:
    """Write the state after `update` updates to folder/checkpoint-<update>.pt, and return that path.

    A kill at any moment leaves the file as it was or as it should be. When the new file is safely on the disk, those
    of earlier updates are removed but for the newest keep - 1; those of later updates, which a run that was resumed
    from an old checkpoint will write again, are left.

    Args:
        folder: created where it does not exist.
        update: updates made, >= 0.
        state: as of Trainer.state_dict(): tensors, numbers, strings, None, and dicts, lists and tuples of these. It is
            serialised in memory first, so a save needs room for one copy of it.
        digest: of the run's configuration; `load` asks for the same.
        keep: checkpoints to be kept, >= 1.

    Raises:
        ValueError: if an argument is out of range, or the state holds an object that could not be read back.
        OSError: if the file cannot be written; it names the file, which is then as it was before.
    """
    if update < 0:
        raise ValueError(f"update must be >= 0, got {update}")
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    if not digest:
        raise ValueError("digest must be a non-empty string, got ''")
    _check_plain("state", state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = {"version": VERSION, "digest": digest, "update": update}
    line = json.dumps(header).encode() + b"\n"
    checksum = hashlib.sha256(line)
    checksum.update(payload)
    path = folder / f"checkpoint-{update:06d}.pt"
    try:
        write_atomically(path, MAGIC + checksum.hexdigest().encode() + b"\n", line, payload)
    except OSError as fault:
        good = _newest_good(folder, digest, below=None)
        left = "no good checkpoint is there" if good is None else f"the last good checkpoint is {good.name}"
        reason = os.strerror(fault.errno) if fault.errno else str(fault)
        raise OSError(
            fault.errno or errno.EIO, f"a checkpoint could not be written ({reason}); {left}", str(path)
        ) from fault
    _prune(folder, update, keep)
    return path


def latest(folder: Path) -> Path | None:
    """Return the checkpoint with the largest update in the folder, unread, or None where there is none."""
    return max(_numbered(folder), default=(0, None))[1]


def load(path: Path, digest: str) -> Checkpoint:
    """Read a checkpoint, or the latest one of a folder; tensors are put on the CPU.

    Only tensors and plain values are ever unpickled, so a file from a stranger can hold wrong numbers but no code.

    Raises:
        ValueError: if the file is missing or damaged, of another version of the format or of another configuration,
            or holds anything but a plain state. The line names the file, the rule and, where one is left, the newest
            older checkpoint that is good.
    """
    if path.is_dir():
        newest = latest(path)
        if newest is None:
            raise ValueError(f"{path}: holds no checkpoint, must hold a file checkpoint-<update>.pt")
        path = newest
    try:
        update, payload = _read(path, digest)
        return Checkpoint(update, _state(path, payload))
    except _Damaged as fault:
        named = _NAME.fullmatch(path.name)
        good = _newest_good(path.parent, digest, below=int(named[1]) if named else None)
        advice = (
            "no older checkpoint here is good: start the run anew"
            if good is None
            else f"{good.name} is good: resume from it with --from {good}"
        )
        raise ValueError(f"{fault}; {advice}") from None


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to `path`, through the disk's cache, so that a kill at any moment leaves the old or the new file.

    There must be one writer of a path at a time.

    Raises:
        OSError: if a part cannot be written; the old file is left and no temporary one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_plain(name: str, value: Any) -> None:
    """Refuse now what torch.load(weights_only=True) would refuse when the run is to be resumed."""
    if isinstance(value, Tensor) or value is None or type(value) in (bool, int, float, str):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (int, str):
                raise ValueError(f"{name} has the key {key!r}, keys must be strings or integers")
            _check_plain(f"{name}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(f"{name}[{i}]", item)
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"{name} is a {kind}, must be a tensor, number, string, None, or dict, list or tuple of these")


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return [(int(named[1]), path) for path in folder.iterdir() if (named := _NAME.fullmatch(path.name))]


def _prune(folder: Path, update: int, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` up to `update`, and what killed saves left behind."""
    earlier = sorted((number, path) for number, path in _numbered(folder) if number < update)
    for _, path in earlier[: max(len(earlier) - (keep - 1), 0)]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f".checkpoint-*.pt{_PARTIAL}"):
        path.unlink(missing_ok=True)


def _newest_good(folder: Path, digest: str, below: int | None) -> Path | None:
    for number, path in sorted(_numbered(folder), reverse=True):
        if below is None or number < below:
            try:
                _state(path, _read(path, digest)[1])
            except ValueError:
                continue
            return path
    return None


def _read(path: Path, digest: str) -> tuple[int, memoryview]:
    """Return a file's update and payload, both checked."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _Damaged(f"{path}: is missing, must be a checkpoint") from None
    except OSError as fault:
        raise _Damaged(f"{path}: cannot be read ({fault.strerror})") from None
    if not re.match(re.escape(MAGIC) + rb"[0-9a-f]{64}\n", content):
        raise _Damaged(f"{path}: is not a checkpoint of verifine, or is damaged in its first line")
    rest = memoryview(content)[_FIRST_LINE:]
    if hashlib.sha256(rest).hexdigest().encode() != content[len(MAGIC) : _FIRST_LINE - 1]:
        raise _Damaged(f"{path}: is damaged, its SHA-256 must be that of its first line")
    end = content.find(b"\n", _FIRST_LINE) + 1
    try:
        header = json.loads(content[_FIRST_LINE:end])
        version = header["version"]
    except (ValueError, KeyError, TypeError):
        raise _Damaged(f"{path}: is damaged, its second line must be a header in JSON") from None
    if version != VERSION:
        raise ValueError(f"{path}: has format version {version}, must be {VERSION}, the one that this release reads")
    if header.get("digest") != digest:
        raise ValueError(
            f"{path}: is of the configuration with digest {header.get('digest')}, must be of this run's, {digest}"
        )
    update, named = header.get("update"), _NAME.fullmatch(path.name)
    if named and int(named[1]) != update:
        raise ValueError(f"{path}: holds update {update}, must hold the update of its name")
    return update, memoryview(content)[end:]


def _state(path: Path, payload: memoryview) -> dict[str, Any]:
    if payload[:4] != b"PK\3\4":  # torch.load would take a bare pickle too, in an old format that we never write
        raise _Damaged(f"{path}: is refused, its payload must be an archive as of torch.save")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as fault:  # the checksum is right, so somebody wrote this; the errors that it can cause are many
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise _Damaged(f"{path}: is refused, it must hold tensors and plain values only ({reason})") from None
    if not isinstance(state, dict):
        raise _Damaged(f"{path}: is refused, it holds a {type(state).__name__}, must hold a dict")
    return state
