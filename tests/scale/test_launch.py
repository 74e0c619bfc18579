"""A run: all its files, exact resumption after kill and Ctrl-C, and one line for whatever can stand in the way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import verifine
from scale import checkpoints, digits
from scale.config import Config, digest, load_config
from scale.evaluation import read_evaluation
from scale.launch import Launched, chosen, launch
from scale.logs import read_metrics
from scale.lora import load
from scale.task import build

ROOT = Path(__file__).parents[2]
TINY = ["device=cpu", "lora.alpha=3", "prompts.held_out=null"]
BARE = [*TINY, "sampler.steps=3", "training.grid_every=null", "training.micro_batch=null", "logging.tensorboard=false"]
BARE += ["evaluation={samples: 2, batch: 2}", "method={name: policy-gradient}"]

# Brightness; where a test asks for it, a signal goes to the process in the middle of the update after a file is there.
REWARDS = """
import os, pathlib, signal

def plain(images, prompts):
    after = os.environ.get("SIGNAL_AFTER")
    if after and pathlib.Path(after).exists():
        del os.environ["SIGNAL_AFTER"]
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return images.mean((1, 2, 3))

def undefined(images, prompts):
    return images.mean((1, 2, 3)) * float("nan")

def one_for_all(images, prompts):
    return images.mean()
"""


@dataclass(frozen=True)
class Run:
    config: Config
    folder: Path
    launched: Launched


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """The folder of a user's module, which is on the path."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards_of_a_user.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def custom(function: str, differentiable: str = "false") -> str:
    options = f"{{function: 'rewards_of_a_user:{function}', differentiable: {differentiable}}}"
    return f"reward={{name: custom, options: {options}}}"


@pytest.fixture(scope="module")
def shown(cache, tmp_path_factory) -> Run:
    """A finished run with all that a run can show."""
    config = load_config("tiny-brightness", TINY)
    folder = tmp_path_factory.mktemp("shown") / "run"
    return Run(config, folder, launch(config, folder, cache))


@pytest.fixture(scope="module")
def whole(cache, rewards, tmp_path_factory) -> Run:
    """An uninterrupted run of six updates."""
    config = load_config("tiny-brightness", [*BARE, custom("plain"), "training.updates=6"])
    folder = tmp_path_factory.mktemp("whole") / "run"
    return Run(config, folder, launch(config, folder, cache))


def copied(run: Run, folder: Path) -> Path:
    return Path(shutil.copytree(run.folder, folder / "copy"))


def same(found: Path, wanted: Path, config: Config) -> None:
    """Two runs ended alike, to the bit: parameters, their average, AdamW's moments, history, log and weights."""
    a, b = (checkpoints.load(folder / "checkpoints", digest(config)) for folder in (found, wanted))
    assert a.update == b.update
    for part in ("params", "ema"):
        for name, p in (b.state[part] or {}).items():
            assert torch.equal(a.state[part][name], p), (part, name)
    for place, moments in b.state["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(a.state["optimizer"]["state"][place][name], value), (place, name)
    assert a.state["history"] == b.state["history"]
    (weights,) = (file.relative_to(wanted) for file in wanted.rglob("*.safetensors"))
    for file in ("metrics.jsonl", "evaluation.json", "evaluation.png", weights):
        assert (found / file).read_bytes() == (wanted / file).read_bytes(), file


def refused(capsys, *arguments: object) -> str:
    """Return the line with which the front door refuses, the last on standard error."""
    capsys.readouterr()
    assert verifine.main(["launch", *(str(a) for a in arguments)]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.out == ""
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("verifine: ")
    return line


def sets(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


# A finished run


def test_a_run_leaves_everything_in_its_folder(shown):
    names = {str(f.relative_to(shown.folder)) for f in shown.folder.rglob("*") if f.is_file()}
    assert names - {n for n in names if n.startswith("tensorboard/events")} == {
        "config.yaml",
        "metrics.jsonl",
        "images/samples-000000.png",
        "images/samples-000001.png",
        "images/samples-000002.png",
        "checkpoints/checkpoint-000001.pt",
        "checkpoints/checkpoint-000002.pt",
        "lora/pytorch_lora_weights.safetensors",
        "evaluation.json",
        "evaluation.png",
    }
    assert any(n.startswith("tensorboard/events") for n in names)
    assert shown.launched.finished
    assert shown.launched.update == 2
    assert shown.launched.weights == shown.folder / "lora/pytorch_lora_weights.safetensors"


def test_its_settings_load_back(shown):
    assert load_config(shown.folder / "config.yaml") == shown.config


def test_its_log_has_a_line_for_every_update(shown):
    lines = read_metrics(shown.folder)
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert [line["samples"] for line in lines[1:]] == [8, 16]  # antithetic copies are roll-outs too
    assert all(0 < line["reward/mean"] < 1 and line["gradient/norm"] > 0 for line in lines[1:])
    grids = []
    for line in lines:
        with Image.open(shown.folder / line["images"]["samples"]) as grid:
            grids.append((grid.size, grid.tobytes()))
    assert len({size for size, _ in grids}) == 1
    assert grids[0] != grids[2]  # the same noise, another model


def test_its_evaluation_is_of_its_last_update(shown):
    found = read_evaluation(shown.folder / "evaluation.json")
    assert found == shown.launched.evaluation
    assert (found.config, found.update, found.samples) == (digest(shown.config), 2, 8)
    assert found.kl is not None
    assert found.kl.mean > 0


def test_its_checkpoint_holds_the_parameters_that_are_returned(shown):
    held = checkpoints.load(shown.folder / "checkpoints", digest(shown.config)).state["params"]
    assert held.keys() == shown.launched.params.keys()
    assert all(torch.equal(held[name], p) for name, p in shown.launched.params.items())


def test_diffusers_reads_its_weights(shown, cache):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    base = StableDiffusionPipeline.from_pretrained(cache / "tiny-stable-diffusion", safety_checker=None)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 2, 2, generator=generator)
    states = torch.randn(2, 8, 16, generator=generator)

    def output(unet) -> torch.Tensor:
        with torch.no_grad():
            return unet(x, torch.tensor([10, 700]), encoder_hidden_states=states).sample

    before = output(base.unet)
    base.load_lora_weights(shown.folder / "lora")
    network = build(shown.config, cache).chain.network
    assert torch.equal(output(network), before)
    load(network, shown.launched.params)
    trained = output(network)
    # A file without alpha would be read with two thirds of the change.
    assert float((output(base.unet) - trained).norm()) < 1e-3 * float((trained - before).norm())


# Resumption


def launched_alone(run: Run, folder: Path, cache: Path, rewards: Path, number: str, after: str, *more: str):
    """Launch the run from the shell; the number's signal reaches it in the update after the file `after` is written."""
    path = os.pathsep.join((str(ROOT), str(rewards)))
    environment = dict(os.environ, OMP_NUM_THREADS="1", SIGNAL=number, PYTHONPATH=path)
    environment["SIGNAL_AFTER"] = str(folder / after)
    command = [sys.executable, "-m", "verifine", "launch", str(run.folder / "config.yaml"), "--out", str(folder)]
    command += ["--cache", str(cache), *more]
    return subprocess.run(command, env=environment, cwd=rewards, capture_output=True, text=True, timeout=300)


def test_a_run_that_was_killed_and_then_interrupted_ends_as_the_whole_one(whole, cache, rewards, tmp_path):
    folder = tmp_path / "run"
    killed = launched_alone(whole, folder, cache, rewards, "SIGKILL", "checkpoints/checkpoint-000002.pt")
    assert killed.returncode == -signal.SIGKILL
    assert [c.name for c in sorted((folder / "checkpoints").glob("*.pt"))][-1] == "checkpoint-000002.pt"
    stopped = launched_alone(whole, folder, cache, rewards, "SIGINT", "checkpoints/checkpoint-000003.pt", "--resume")
    assert stopped.returncode == 130
    assert "stopped after update 4" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert checkpoints.load(folder / "checkpoints", digest(whole.config)).update == 4
    assert not (folder / "lora").exists()
    done = launch(whole.config, folder, cache, resume=True)
    assert done.finished
    same(folder, whole.folder, whole.config)


@pytest.fixture(scope="module")
def digits_run(rewards, tmp_path_factory) -> tuple[Run, Path]:
    """An uninterrupted run of the digits' preset, on a network after ten updates, with the cache that it is in."""
    cache, train = tmp_path_factory.mktemp("digits"), digits.train_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_digits", lambda folder, seed, updates: train(folder, seed, 10))
        digits.digits_model(cache)  # under the name of the whole network, which every process finds
    more = ["training.updates=6", "training.checkpoint_every=2", "training.grid_every=1", "training.grid=4"]
    more += ["training.micro_batch=8", "training.ema=0.9", "logging.tensorboard=false"]
    more += ["evaluation={samples: 20, features: 'scale.evaluation:pooled'}"]
    config = load_config("digits-brightness", [*more, "sampler.steps=5", "device=cpu", custom("plain", "true")])
    folder = tmp_path_factory.mktemp("digits-run") / "run"
    return Run(config, folder, launch(config, folder, cache)), cache


def test_a_run_on_digits_that_was_killed_ends_as_the_whole_one(digits_run, rewards, tmp_path):
    """Killed in update 4, when update 3 is in the log but not in a checkpoint."""
    whole, cache = digits_run
    folder = tmp_path / "run"
    killed = launched_alone(whole, folder, cache, rewards, "SIGKILL", "images/samples-000003.png")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [c.name for c in (folder / "checkpoints").glob("*.pt")] == ["checkpoint-000002.pt"]
    assert [line["update"] for line in read_metrics(folder)] == [0, 1, 2, 3]
    done = launch(whole.config, folder, cache, resume=True)
    assert (done.update, done.finished) == (6, True)
    assert sorted(done.params) == sorted(whole.launched.params)
    assert all(torch.equal(p, whole.launched.params[name]) for name, p in done.params.items())
    same(folder, whole.folder, whole.config)


def test_what_a_checkpoint_forgets_would_be_seen(digits_run, tmp_path):
    """Planted mistakes: the last two updates again, without AdamW's moments, or without the average."""
    whole, cache = digits_run
    good = checkpoints.load(whole.folder / "checkpoints/checkpoint-000004.pt", digest(whole.config)).state
    forgotten = {
        "nothing": good,
        "moments": good | {"optimizer": good["optimizer"] | {"state": {}}},
        "average": good | {"ema": good["params"]},
    }
    for name, state in forgotten.items():
        start = checkpoints.save(tmp_path / name, 4, state, digest(whole.config), 1)
        folder = Path(shutil.copytree(whole.folder, tmp_path / f"run-{name}"))
        launch(whole.config, folder, cache, start=start)
        if name == "nothing":
            same(folder, whole.folder, whole.config)
        else:
            with pytest.raises(AssertionError):
                same(folder, whole.folder, whole.config)


def test_ctrl_c_finishes_the_update_at_hand_and_then_resumes_exactly(whole, cache, tmp_path):
    def interrupt(update: int, updates: int, reward: float) -> None:
        if update == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = launch(whole.config, tmp_path / "run", cache, on_update=interrupt)
    assert (stopped.update, stopped.finished, stopped.weights, stopped.evaluation) == (3, False, None, None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    launch(whole.config, tmp_path / "run", cache, resume=True)
    same(tmp_path / "run", whole.folder, whole.config)


def test_a_second_ctrl_c_interrupts_at_once(whole, cache, tmp_path):
    def interrupt(update: int, updates: int, reward: float) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        launch(whole.config, tmp_path / "run", cache, on_update=interrupt)
    assert checkpoints.load(tmp_path / "run" / "checkpoints", digest(whole.config)).update == 1


@pytest.mark.parametrize(
    "method",
    [
        "method={name: tho, options: {pilot: 16, batch: 4}}",
        "method={name: ddpo, options: {epochs: 2}}",
        "training.ema=0.5",
    ],
)
def test_a_finished_run_goes_on_when_its_updates_are_raised(method, cache, tmp_path):
    def config(updates: int) -> Config:
        more = [f"training.updates={updates}", "training.weight_decay=0.1", "sampler.steps=2"]
        return load_config("tiny-brightness", [*BARE, *more, method])

    launch(config(4), tmp_path / "whole", cache)
    first = launch(config(2), tmp_path / "raised", cache)
    assert first.finished
    last = launch(config(4), tmp_path / "raised", cache, resume=True)
    assert last.update == 4
    assert any(not torch.equal(p, first.params[name]) for name, p in last.params.items())
    same(tmp_path / "raised", tmp_path / "whole", config(4))


def test_the_average_is_what_is_judged_where_one_is_kept(cache, tmp_path):
    from safetensors.torch import load_file

    config = load_config("tiny-brightness", [*BARE, "training.ema=0.5", "sampler.steps=2"])
    done = launch(config, tmp_path / "run", cache)
    state = checkpoints.load(tmp_path / "run" / "checkpoints", digest(config)).state
    written = torch.cat([p.flatten() for p in load_file(str(done.weights)).values()]).sort().values
    average, last = (torch.cat([p.flatten() for p in state[k].values()]).sort().values for k in ("ema", "params"))
    assert torch.equal(written, average)
    assert not torch.equal(written, last)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(whole, cache, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for file in ("config.yaml", "metrics.jsonl"):
        shutil.copy(whole.folder / file, folder)
    launch(whole.config, folder, cache, resume=True)
    same(folder, whole.folder, whole.config)


# What stands in the way


def test_a_folder_that_holds_a_run_is_not_overwritten(shown, cache, capsys):
    before = {f: f.read_bytes() for f in shown.folder.rglob("*") if f.is_file()}
    line = refused(capsys, shown.folder / "config.yaml", "--out", shown.folder, "--cache", cache)
    assert line == f"verifine: {shown.folder} holds a run already: resume it, or name another folder"
    assert before == {f: f.read_bytes() for f in shown.folder.rglob("*") if f.is_file()}


def test_a_run_is_resumed_with_its_own_settings_only(shown, cache, capsys):
    other = sets(["training.seed=7", "reward.name=redness"])
    line = refused(capsys, shown.folder / "config.yaml", *other, "--out", shown.folder, "--cache", cache, "--resume")
    assert line.endswith("holds a run with other settings: reward.name, training.seed differ")


def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_goes_on(whole, cache, tmp_path, capsys):
    folder = copied(whole, tmp_path)
    shutil.rmtree(folder / "lora")
    bad, good = folder / "checkpoints/checkpoint-000006.pt", folder / "checkpoints/checkpoint-000005.pt"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    arguments = (folder / "config.yaml", "--out", folder, "--cache", cache)
    line = refused(capsys, *arguments, "--resume")
    assert str(bad) in line
    assert f"--from {good}" in line
    assert verifine.main(["launch", *map(str, arguments), "--from", str(good)]) == 0
    assert "fine-tuned" in capsys.readouterr().out
    same(folder, whole.folder, whole.config)


def test_a_new_folder_goes_on_from_a_checkpoint_of_another(whole, cache, tmp_path):
    launch(whole.config, tmp_path / "run", cache, start=whole.folder / "checkpoints/checkpoint-000005.pt")
    lines = read_metrics(tmp_path / "run")
    assert [line["update"] for line in lines] == [6]
    assert lines == read_metrics(whole.folder)[-1:]
    file = "lora/pytorch_lora_weights.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (whole.folder / file).read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(whole, cache, tmp_path, capsys):
    state = checkpoints.load(whole.folder / "checkpoints", digest(whole.config)).state
    stranger = checkpoints.save(tmp_path, 6, state, "0" * 64, 1)
    folder = copied(whole, tmp_path)
    line = refused(capsys, folder / "config.yaml", "--out", folder, "--cache", cache, "--from", stranger)
    assert f"{stranger}: is of the configuration with digest {'0' * 64}" in line
    line = refused(capsys, folder / "config.yaml", "--out", folder, "--cache", cache, "--from", tmp_path / "none.pt")
    assert f"{tmp_path / 'none.pt'}: is missing" in line


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(whole, cache, tmp_path, capsys, monkeypatch):
    write, folder = checkpoints.write_atomically, tmp_path / "run"

    def full(path: Path, *parts: bytes) -> None:
        if path.name == "checkpoint-000003.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *parts)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    line = refused(capsys, whole.folder / "config.yaml", "--out", folder, "--cache", cache)
    assert "No space left on device" in line
    assert "the last good checkpoint is checkpoint-000002.pt" in line
    assert checkpoints.load(folder / "checkpoints", digest(whole.config)).update == 2
    monkeypatch.undo()
    launch(whole.config, folder, cache, resume=True)
    same(folder, whole.folder, whole.config)


@pytest.mark.parametrize(
    ("function", "said"), [("undefined", "must be finite, got nan at sample 0"), ("one_for_all", "of shape (4,)")]
)
def test_a_reward_that_is_none_ends_the_run(function, said, rewards, cache, tmp_path, capsys):
    ask = ["tiny-brightness", "--out", tmp_path / "run", "--cache", cache, *sets([*BARE, custom(function)])]
    line = refused(capsys, *ask)
    assert f"rewards_of_a_user:{function}" in line
    assert said in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model={kind: stable-diffusion, path: /no/such/folder}"], "model.path: there is no folder '/no/such/folder'"),
        (["training.learning_rat=1"], "did you mean training.learning_rate?"),
        (["reward.name=brightnes"], "did you mean brightness?"),
        (["device=cuda:99"], "'cuda:99' is not there"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_no_run(overrides, said, cache, tmp_path, capsys):
    folder = tmp_path / "run"
    line = refused(capsys, "tiny-brightness", "--out", folder, "--cache", cache, *sets([*BARE, *overrides]))
    assert said in line
    assert not folder.exists() or not list(folder.iterdir())


# The front door


def test_print_config_is_a_file_that_loads_back(capsys, tmp_path):
    assert verifine.main(["launch", "--print-config", "tiny-brightness", *sets(["training.updates=7"])]) == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert load_config(tmp_path / "printed.yaml") == load_config("tiny-brightness", ["training.updates=7"])
    assert yaml.safe_load(text)["training"]["updates"] == 7


def test_evaluate_shows_and_writes_the_same_again(shown, cache, tmp_path, capsys):
    folder = copied(shown, tmp_path)
    for file in ("evaluation.json", "evaluation.png"):
        (folder / file).unlink()
    assert verifine.main(["evaluate", str(folder), "--cache", str(cache)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Fine-tuned against base after update 2: 8 samples of each")
    assert "reward brightness" in said
    assert (folder / "evaluation.json").read_bytes() == (shown.folder / "evaluation.json").read_bytes()
    assert (folder / "evaluation.png").read_bytes() == (shown.folder / "evaluation.png").read_bytes()
    assert verifine.main(["evaluate", str(folder), "--cache", str(cache), *sets(["evaluation.samples=3"])]) == 0
    assert read_evaluation(folder / "evaluation.json").samples == 3


def test_evaluate_refuses_what_is_no_run(cache, tmp_path, capsys):
    assert verifine.main(["evaluate", str(tmp_path), "--cache", str(cache)]) == 2
    assert capsys.readouterr().err == f"verifine: {tmp_path} holds no run: there is no config.yaml in it\n"


def test_what_is_chosen(shown):
    from algorithms.training import FineTuned, History

    params, average = {"p": torch.zeros(1)}, {"p": torch.ones(1)}
    assert chosen(FineTuned(params, None, History())) is params
    assert chosen(FineTuned(params, average, History())) is average
