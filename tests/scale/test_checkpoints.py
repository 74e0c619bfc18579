"""Checkpoints: whole or absent through kills and full disks, and refused when damaged, foreign or malicious."""

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from algorithms.chain import Chain
from algorithms.training import Settings, Trainer
from scale import checkpoints

ROOT = Path(__file__).parents[2]


def state_of(update: int, size: int = 50) -> dict:
    return {"params": {"w": torch.full((size,), float(update))}, "history": {"samples": [4, 8]}, "ema": None}


def save(folder: Path, update: int, digest: str = "d", keep: int = 10) -> Path:
    return checkpoints.save(folder, update, state_of(update), digest, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_is_read_back_exactly(tmp_path):
    state = {
        "params": {"a": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2).double()},
        "ema": None,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3}]},
        "history": {"mean_return": [1.5, float("nan")], "samples": [4]},
        "settings": {"name": "µ", "clip": None, "on": True},
    }
    path = checkpoints.save(tmp_path / "new", 40, state, "digest", keep=3)
    assert path.name == "checkpoint-000040.pt"
    for source in (path, path.parent):
        update, back = checkpoints.load(source, "digest")
        assert update == 40
        assert torch.equal(back["params"]["a"], state["params"]["a"])
        assert back["params"]["b"].dtype == torch.float64
        assert back["optimizer"]["state"][0]["step"] == 3.0
        assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
        assert back["settings"] == state["settings"]
        assert np.isnan(back["history"]["mean_return"][1])


class Drift:
    """A method of the loop with randomness and no chain."""

    def updates(self, chain, params, objective, samples, generator, condition):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator) - p.detach()
        yield torch.zeros(samples)


def test_a_trainer_resumed_from_a_checkpoint_equals_the_uninterrupted_one(tmp_path):
    def trainer() -> Trainer:
        chain: Chain = None  # type: ignore[assignment]
        settings = Settings(updates=6, samples=2, learning_rate=0.1, weight_decay=0.01, ema=0.9)
        generator_for = torch.Generator().manual_seed
        return Trainer(chain, {"w": torch.ones(5)}, None, Drift(), settings, generator_for)  # type: ignore[arg-type]

    whole = trainer()
    whole.run()
    first = trainer()
    first.run(4)
    checkpoints.save(tmp_path, first.done, first.state_dict(), "d", keep=1)
    second = trainer()
    update, state = checkpoints.load(tmp_path, "d")
    second.load_state_dict(state)
    assert second.done == update == 4
    second.run()
    assert torch.equal(second.result().params["w"], whole.result().params["w"])
    assert torch.equal(second.result().ema["w"], whole.result().ema["w"])
    assert not torch.equal(first.result().params["w"], whole.result().params["w"])


def test_the_latest_is_that_of_the_largest_number(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "none") is None
    for update in (999_999, 1_000_000, 5):  # by name, 1000000 sorts before 999999
        save(tmp_path, update)
    (tmp_path / "checkpoint-9000000.pt.bak").touch()
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-1000000.pt"
    assert checkpoints.load(tmp_path, "d").update == 1_000_000


def test_only_earlier_checkpoints_beyond_keep_are_removed(tmp_path):
    for update in (10, 20, 30):
        save(tmp_path, update, keep=2)
    assert names(tmp_path) == ["checkpoint-000020.pt", "checkpoint-000030.pt"]
    save(tmp_path, 25, keep=2)  # resumed from 20: the new one is not the newest by number, and must survive
    assert names(tmp_path) == ["checkpoint-000020.pt", "checkpoint-000025.pt", "checkpoint-000030.pt"]
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["checkpoint-000030.pt"]


def test_old_checkpoints_are_there_until_the_new_one_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 10)
    seen = []
    sync = checkpoints._sync_folder
    monkeypatch.setattr(checkpoints, "_sync_folder", lambda folder: (seen.append(names(folder)), sync(folder)))
    save(tmp_path, 20, keep=1)
    assert seen == [["checkpoint-000010.pt", "checkpoint-000020.pt"]]
    assert names(tmp_path) == ["checkpoint-000020.pt"]


def test_data_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    save(tmp_path, 1)
    assert events == ["file", "rename", "folder"]


def test_leavings_of_a_killed_save_are_removed_by_the_next(tmp_path):
    (tmp_path / ".checkpoint-000010.pt.partial").write_bytes(b"half")
    assert checkpoints.latest(tmp_path) is None
    save(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-000020.pt"]


@pytest.mark.parametrize("target", ["fsync", "write"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, target):
    save(tmp_path, 10)
    before = (tmp_path / "checkpoint-000010.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if target == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:

        class Full(io.BytesIO):
            write = full

        monkeypatch.setattr("builtins.open", lambda *_: (tmp_path / ".checkpoint-000020.pt.partial").touch() or Full())
    with pytest.raises(OSError, match=r"No space left on device\); the last good checkpoint is checkpoint-000010") as e:
        save(tmp_path, 20, keep=1)
    monkeypatch.undo()
    assert e.value.errno == errno.ENOSPC
    assert e.value.filename == str(tmp_path / "checkpoint-000020.pt")
    assert names(tmp_path) == ["checkpoint-000010.pt"]
    assert (tmp_path / "checkpoint-000010.pt").read_bytes() == before


def test_a_write_that_the_system_cuts_short_leaves_the_old_file_of_the_same_update(tmp_path):
    """No simulation: the kernel refuses to let a file grow beyond 20 kB."""
    path = save(tmp_path, 10)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written") as e:
            checkpoints.save(tmp_path, 10, state_of(11, size=10_000), "d", keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.errno == errno.EFBIG
    assert names(tmp_path) == ["checkpoint-000010.pt"]
    assert path.read_bytes() == before


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path):
    path = save(tmp_path, 10)
    whole = path.read_bytes()
    step = max(len(whole) // 150, 1)
    for i in [*range(250), *range(250, len(whole), step), len(whole) - 1]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError, match="checkpoint-000010.pt: is (not a checkpoint|damaged).*start the run anew"):
            checkpoints.load(path, "d")
    for size in (0, 1, 30, 84, 85, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.load(path, "d")
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.load(path, "d")
    path.write_bytes(whole)
    assert checkpoints.load(path, "d").update == 10


def test_damage_points_to_the_newest_older_checkpoint_that_is_good(tmp_path):
    for update in (10, 20, 30, 40, 50):
        save(tmp_path, update, digest="other" if update == 20 else "d")
    for update in (30, 40):
        path = tmp_path / f"checkpoint-0000{update}.pt"
        path.write_bytes(path.read_bytes()[:-5])
    good = tmp_path / "checkpoint-000010.pt"  # 20 is of another configuration, 30 is damaged, 50 is newer
    with pytest.raises(ValueError, match="checkpoint-000040.pt: is damaged") as e:
        checkpoints.load(tmp_path / "checkpoint-000040.pt", "d")
    assert str(e.value).endswith(f"; checkpoint-000010.pt is good: resume from it with --from {good}")
    assert "\n" not in str(e.value)
    good.unlink()
    with pytest.raises(ValueError, match="no older checkpoint here is good: start the run anew"):
        checkpoints.load(tmp_path / "checkpoint-000040.pt", "d")


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoints.load(tmp_path, "d")
    save(tmp_path, 10)
    with pytest.raises(ValueError, match="checkpoint-000020.pt: is missing.*checkpoint-000010.pt is good"):
        checkpoints.load(tmp_path / "checkpoint-000020.pt", "d")


def test_another_configuration_is_refused(tmp_path):
    path = save(tmp_path, 10, digest="mine")
    with pytest.raises(ValueError, match="checkpoint-000010.pt: is of the configuration with digest mine.*yours"):
        checkpoints.load(path, "yours")


def test_a_file_under_another_update_s_name_is_refused(tmp_path):
    save(tmp_path, 10).rename(tmp_path / "checkpoint-000020.pt")
    with pytest.raises(ValueError, match="holds update 10, must hold the update of its name"):
        checkpoints.load(tmp_path, "d")
    (tmp_path / "checkpoint-000020.pt").rename(tmp_path / "kept.pt")
    assert checkpoints.load(tmp_path / "kept.pt", "d").update == 10


def forged(path: Path, payload: bytes, **changes) -> Path:
    """A file whose checksum is right, as an attacker would write it; the format is written out here once more."""
    header = {"version": 1, "digest": "d", "update": 10} | changes
    rest = json.dumps(header).encode() + b"\n" + payload
    path.write_bytes(b"verifine-checkpoint " + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
    return path


def serialised(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_another_version_of_the_format_is_refused(tmp_path):
    path = forged(tmp_path / "checkpoint-000010.pt", serialised({"a": 1}))
    assert checkpoints.load(path, "d") == (10, {"a": 1})
    forged(path, b"a layout of the future", version=2)
    with pytest.raises(ValueError, match="checkpoint-000010.pt: has format version 2, must be 1"):
        checkpoints.load(path, "d")


def test_payloads_in_formats_that_are_never_written_are_refused(tmp_path):
    path, buffer = tmp_path / "checkpoint-000010.pt", io.BytesIO()
    torch.save({"a": 1}, buffer, _use_new_zipfile_serialization=False)
    for payload, rule in (
        (buffer.getvalue(), "must be an archive"),
        (serialised([1]), "holds a list, must hold a dict"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-000010.pt: is refused.*{rule}"):
            checkpoints.load(forged(path, payload), "d")


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_malicious_pickles_are_refused_unrun(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "checkpoint-000010.pt"
    attack = Malicious(victim)
    attacks = [serialised({"params": attack}), pickle.dumps(attack), pickle.dumps({"a": attack}, protocol=0)]
    for payload in attacks:
        forged(path, payload)
        with pytest.raises(ValueError, match="checkpoint-000010.pt: is refused"):
            checkpoints.load(path, "d")
        path.write_bytes(payload)
        with pytest.raises(ValueError, match="checkpoint-000010.pt: is not a checkpoint"):
            checkpoints.load(path, "d")
    assert not victim.exists()
    pickle.loads(attacks[1])  # the attack is a real one
    assert victim.exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [(Path("x"), "PosixPath"), (np.float64(1.0), "numpy.float64"), ({1, 2}, "set"), (Settings(1, 1, 0.1), "Settings")],
)
def test_a_state_that_could_not_be_read_back_is_refused_before_the_run_depends_on_it(tmp_path, value, kind):
    with pytest.raises(ValueError, match=rf"state\['a'\]\[0\] is a .*{kind}, must be a tensor"):
        checkpoints.save(tmp_path, 1, {"a": [value]}, "d", 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [({"update": -1}, "update must be >= 0"), ({"keep": 0}, "keep must be >= 1"), ({"digest": ""}, "digest must be")],
)
def test_arguments_out_of_range_are_refused(tmp_path, change, rule):
    arguments = {"update": 1, "state": {}, "digest": "d", "keep": 1} | change
    with pytest.raises(ValueError, match=rule):
        checkpoints.save(tmp_path, **arguments)


SAVER = """
import sys
from pathlib import Path
import torch
from scale import checkpoints
update = 0
while True:
    update += 1
    state = {"update": update, "w": torch.full((300_000,), float(update))}
    checkpoints.save(Path(sys.argv[1]), update, state, "d", keep=2)
    print(update, flush=True)
"""


@pytest.mark.parametrize("reported", [1, 5])
def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, reported):
    """SIGKILL from outside, likely within a save: the newest file is whole, and no older than the last reported."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == reported:
            break
    process.send_signal(signal.SIGKILL)
    last = int((process.communicate()[0].split() or [reported])[-1])
    assert process.returncode == -signal.SIGKILL
    update, state = checkpoints.load(tmp_path, "d")
    assert last <= update <= last + 1
    assert state["update"] == update
    assert torch.equal(state["w"], torch.full((300_000,), float(update)))


REAL_OPEN = open


class HalfWritten:
    """A file whose process dies when a part of the payload is on the disk."""

    def __init__(self, path, mode) -> None:
        self.file = REAL_OPEN(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, part) -> None:
        self.file.write(part[: len(part) // 2])
        self.file.flush()
        if len(part) > 1000:
            os.kill(os.getpid(), signal.SIGKILL)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("target", "substitute", "left", "partial"),
    [
        ("builtins.open", HalfWritten, 20, True),
        ("os.fsync", die, 20, True),
        ("os.replace", die, 20, True),
        ("scale.checkpoints._sync_folder", die, 30, False),
        ("scale.checkpoints._prune", die, 30, False),
    ],
    ids=["half written", "before the sync", "before the rename", "after the rename", "before the removal"],
)
def test_a_kill_at_each_stage_of_a_save(tmp_path, monkeypatch, target, substitute, left, partial):
    save(tmp_path, 10)
    save(tmp_path, 20)
    monkeypatch.setattr(target, substitute)
    child = os.fork()
    if child == 0:
        save(tmp_path, 30, keep=1)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    monkeypatch.undo()
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / ".checkpoint-000030.pt.partial").exists() == partial
    assert (tmp_path / "checkpoint-000020.pt").exists()  # with keep=1 it goes only after the new one is in place
    update, state = checkpoints.load(tmp_path, "d")
    assert update == left
    assert torch.equal(state["params"]["w"], torch.full((50,), float(left)))
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["checkpoint-000030.pt"]
