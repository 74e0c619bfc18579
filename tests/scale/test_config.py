"""Settings of a run: every wrong line is refused with its key and the nearest right one; what is printed reads back."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scale import plain_yaml
from scale.config import (
    NOT_IN_DIGEST,
    PRESETS,
    Config,
    chain_steps,
    differences,
    digest,
    dotted_keys,
    load_config,
    presets,
    print_config,
    read_prompts,
)
from scale.methods import METHODS

EXPECTED_PRESETS = {
    "alignprop-sd15",
    "bilevel-resnet-sd15",
    "bilevel-strength-sd15",
    "ddpo-sd15",
    "digits-brightness",
    "digits-brightness-ddpo",
    "digits-brightness-tho",
    "digits-digit",
    "digits-implicit",
    "digits-pift",
    "digits-sft",
    "digits-sft-pg",
    "dpok-sd15",
    "draft-sd14",
    "pift-prompts",
    "rlr-sd14",
    "srt-sd15",
    "tho-sd15",
    "tiny-brightness",
}


@pytest.fixture
def load(tmp_path):
    """Load a text, with overrides."""

    def loaded(text="", *overrides):
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(file, overrides)

    return loaded


def refusal(load, text="", *overrides):
    """Return the one line with which the settings are refused."""
    with pytest.raises(ValueError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is ValueError
    return message


# Presets


def test_the_presets_are_those_that_are_promised():
    assert set(presets()) == EXPECTED_PRESETS


@pytest.mark.parametrize("name", sorted(EXPECTED_PRESETS))
def test_a_preset_loads_and_prints_back_to_itself(name, tmp_path):
    config = load_config(name)
    file = tmp_path / "printed.yaml"
    file.write_text(print_config(config), encoding="utf-8")
    again = load_config(file)
    assert again == config
    assert digest(again) == digest(config)
    assert differences(again, config) == []


@pytest.mark.parametrize("name", sorted(EXPECTED_PRESETS))
def test_a_preset_says_where_it_comes_from(name):
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = lines[: lines.index("")]
    assert len(header) >= 3
    assert all(line.startswith("#") and len(line) <= 120 for line in header)


def test_a_preset_is_found_by_name_and_by_file_name_but_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_config("digits-digit")
    for spelling in ("digits-digit.yaml", "presets/digits-digit.yaml", "scale/presets/digits-digit"):
        assert load_config(spelling) == expected
    (tmp_path / "digits-digit").write_text("training: {seed: 5}")
    assert load_config("digits-digit").training.seed == 5


def test_a_missing_file_names_the_nearest_preset(tmp_path):
    with pytest.raises(ValueError, match="digits-brightnes: no such file or preset, did you mean digits-brightness"):
        load_config("digits-brightnes")
    with pytest.raises(ValueError, match="no such file or preset"):
        load_config(tmp_path / "digits-brightness.yaml")  # a folder was named, and it is not there
    with pytest.raises(ValueError, match="is a folder"):
        load_config(tmp_path)


def test_the_papers_settings_are_the_papers():
    rlr = load_config("rlr-sd14")
    assert (rlr.training.learning_rate, rlr.lora.rank, rlr.sampler.guidance, rlr.sampler.steps) == (5e-4, 16, 7.5, 50)
    assert (rlr.training.batch, rlr.training.micro_batch) == (8, 4)
    assert (rlr.method.options["h"], rlr.method.options["std"]) == (2, 1e-3)
    pift = load_config("pift-prompts")
    assert (pift.training.batch, pift.sampler.steps, pift.training.updates, len(pift.prompts.train)) == (
        10,
        50,
        1000,
        4,
    )


# Keys


def test_no_text_is_all_defaults(load):
    assert load("") == load("# a comment\n") == Config()


SECTIONS = [key for key in dotted_keys(Config) if any(k.startswith(key + ".") for k in dotted_keys(Config))]


@pytest.mark.parametrize("key", [k for k in dotted_keys(Config) if not k.startswith("audit.estimators.")])
def test_a_misspelt_key_of_any_level_names_the_nearest(key, load):
    section, _, name = key.rpartition(".")
    misspelt = f"{section}.{name}q".lstrip(".")
    text = f"{section}: {{{name}q: 1}}" if section else f"{name}q: 1"
    message = refusal(load, text)
    assert f"unknown key {misspelt}, did you mean {key}?" in message
    assert "run.yaml" in message
    message = refusal(load, "", f"{misspelt}=1")
    assert message.startswith(f"override {misspelt}=1: unknown key {misspelt}, did you mean {key}?")


def test_a_key_of_another_section_is_found_there(load):
    assert "did you mean training.learning_rate?" in refusal(load, "learning_rate: 1")
    assert "training.batch or evaluation.batch or audit.batch" in refusal(load, "batch: 1")
    assert "known here: name, options, baseline" in refusal(load, "method: {zzz: 1}")


def test_options_of_methods_are_checked_by_their_names(load):
    message = refusal(load, "method: {name: half-order, options: {lenght: 3}}")
    assert "unknown key method.options.lenght, did you mean method.options.length?" in message
    assert "options of first-order: none" in refusal(load, "method: {options: {h: 3}}")
    message = refusal(load, "audit: {estimators: [first-order, {name: rlr, options: {hh: 1}}]}")
    assert "unknown key audit.estimators.1.options.hh, did you mean audit.estimators.1.options.h?" in message
    message = refusal(load, "audit: {estimators: [{name: rlr, option: {}}]}")
    assert "unknown key audit.estimators.0.option, did you mean audit.estimators.0.options?" in message


def test_unknown_names_name_the_nearest(load):
    assert "method.name must be the name of a method, did you mean rlr?" in refusal(load, "method: {name: rrl}")
    assert "did you mean brightness?" in refusal(load, "reward: {name: brightnes}")
    assert "did you mean stable-diffusion?" in refusal(load, "model: {kind: stable-difusion}")


# Values


WRONG = [
    ("training.batch=0", "training.batch must be >= 1, got 0"),
    ("training.batch=16.0", "training.batch must be a whole number, got 16.0"),
    ("training.batch='16'", "training.batch must be a whole number without quotes, got '16'"),
    ("training.batch=true", "training.batch must be a whole number, got true"),
    ("training.learning_rate='1e-3'", "training.learning_rate must be a number without quotes, got '1e-3'"),
    ("training.learning_rate=0", "training.learning_rate must be > 0, got 0"),
    ("training.learning_rate=.inf", "training.learning_rate must be a finite number"),
    ("training.learning_rate=1e-3x", "training.learning_rate must be a number, got 1e-3x"),
    ("training.betas=[0.9]", "training.betas"),
    ("training.betas=[0.9, 0.99, 0.999]", "training.betas must be a list of 2"),
    ("training.betas=[0.9, 1]", "training.betas.1 must be < 1, got 1"),
    ("training.ema=1", "training.ema must be < 1, got 1"),
    ("training.seed=-1", "training.seed must be >= 0"),
    ("training.clip=0", "training.clip must be > 0"),
    ("training=3", "training must be a section with keys, got 3"),
    ("sampler.last_step=0", "sampler.last_step must be keep, frozen or a number > 0"),
    ("sampler.last_step=true", "sampler.last_step must be keep, frozen or a number > 0"),
    ("sampler.eta=1.1", "sampler.eta must be <= 1, got 1.1"),
    ("sampler.scheduler=dddim", "sampler.scheduler must be one of ddim, ddpm, euler-ancestral, lcm, own, got dddim"),
    ("method.baseline=some", "method.baseline must be none, leave-one-out or a number, got some"),
    ("method.baseline=0.5", "method.baseline must be none: first-order takes no baseline, got 0.5"),
    ("prompts.train=[1]", "prompts.train must hold texts"),
    ("prompts.train=[]", "prompts.train must be a list of at least one prompt"),
    ("prompts.train=[[]]", "prompts.train must hold texts"),
    ("prompts.train=there/is/none.txt", "cannot read it: No such file or directory"),
    ("logging.tensorboard=1", "logging.tensorboard must be true or false, got 1"),
    ("logging.wandb=true", "logging.wandb must be text"),
    ("model.path=''", "model.path must not be empty"),
    ("device=gpu", "device must be auto, cpu, mps, cuda or cuda:N, got gpu"),
    ("lora.targets=to_q", "lora.targets must be a list, got to_q"),
    ("reward.options=[1]", "reward.options must be a mapping of options, got [1]"),
    ("reward.options={a: .nan}", "reward.options must hold texts, finite numbers"),
    ("kl=-1", "kl must be >= 0, got -1"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_wrong_value_is_one_line_with_key_value_and_rule(override, message, load):
    found = refusal(load, "", override)
    assert found.startswith(f"override {override}: ")
    assert message in found


def test_the_file_is_named_for_what_it_says_itself_and_the_override_for_what_it_says(load):
    text = "training: {batch: 0}"
    assert "run.yaml: training.batch" in refusal(load, text)
    assert "run.yaml: training.batch" in refusal(load, text, "training.seed=1")
    assert refusal(load, text, "training.batch=-1").startswith("override training.batch=-1: ")
    assert load(text, "training.batch=4").training.batch == 4


def test_several_mistakes_are_counted_and_unknown_keys_come_first(load):
    message = refusal(load, "training: {batch: 0, lerning_rate: 1}")
    assert "unknown key training.lerning_rate" in message
    assert message.endswith("(and 1 more)")


CROSSED = [
    ("training: {batch: 4, micro_batch: 3}", "training.micro_batch must divide training.batch = 4, got 3"),
    ("training: {batch: 4, micro_batch: 8}", "training.micro_batch must divide training.batch = 4, got 8"),
    ("model: {kind: stable-diffusion}", "model.path must be a hub id or a local folder"),
    ("model: {kind: pixel}", "model.path must be a hub id or a local folder"),
    ("model: {kind: tiny, path: x}\nprompts: {train: [a]}", "model.path must be null: tiny is made here, got x"),
    ("model: {revision: main}", "model.revision must be null"),
    ("model: {resolution: 16}", "model.resolution must be null or 8 for digits"),
    ("prompts: {train: [ten]}", 'prompts.train must be digits "0" to "9"'),
    ("prompts: {held_out: [ten]}", 'prompts.held_out must be digits "0" to "9"'),
    (
        "sampler: {steps: 2}\nprompts: {train: [['1', '2', '3']]}",
        "must not have more parts than the chain has steps, 2",
    ),
    (
        "sampler: {steps: 3, last_step: frozen}\nprompts: {held_out: [['1', '2', '3']]}",
        "prompts.held_out must not have more parts than the chain has steps, 2",
    ),
    ("model: {no_class: none}", "model.no_class must be last where model.kind is not pixel, got none"),
    (
        "model: {kind: pixel, path: x, no_class: none}\nsampler: {guidance: 2}",
        "sampler.guidance must be 1 where model.no_class is none, got 2",
    ),
    (
        "model: {kind: pixel, path: x, no_class: none}\nprompts: {conditional: false}",
        "prompts.conditional must be true where model.no_class is none, got false",
    ),
    ("model: {no_class: null}", "model.no_class must be one of last, none"),
    ("sampler: {guidance: 2}\nprompts: {conditional: false}", "sampler.guidance must be 1 when prompts.conditional is"),
    ("sampler: {scheduler: ddpm, eta: 0.5}", "sampler.eta must be 1: ddpm has no noise scale"),
    ("sampler: {steps: 1, last_step: frozen}", "sampler.steps must be >= 2 when the last step is frozen"),
    ("sampler: {eta: 0}\nkl: 1", "sampler.eta must be > 0 where kl = 1 uses the score of a step's noise"),
    ("sampler: {scheduler: ddpm}\nkl: 1", "sampler.last_step must be frozen or a number where kl = 1"),
    ("method: {name: rlr}\nsampler: {steps: 1}", "method.options must suit rlr with 1 steps"),
    ("method: {name: rlr, options: {h: 19}}", "reading 'I' needs h <= T - 2"),
    ("method: {name: rlr, options: {first: 1}}", "law gives j = 1"),
    ("method: {name: half-order, options: {length: 21}}", "length must lie in 1..20, got 21"),
    ("method: {name: half-order, options: {length: 20}}\nsampler: {last_step: frozen}", "length must lie in 1..19"),
    ("method: {name: srt, options: {length: 20.5}}", "length must lie in (1, 20], got 20.5"),
    ("method: {name: tho, options: {width: 21}}", "width must lie in 1..20 (T), got 21"),
    ("method: {name: tho, options: {pilot: 65}}", "pilot must be a multiple of 4 * batch"),
    ("method: {name: ddpo, options: {minibatches: 17}}", "minibatches must be <= the batch, 16, got 17"),
    (
        "method: {name: ddpo, options: {group: 5}}",
        "a batch must be whole groups of at least 2, it is 16 in",
    ),
    ("method: {name: rlr-as-released, options: {draws: 6}}", "draws must give a law of <="),
    ("method: {name: vader, options: {mode: specific, skipped: 20}}", "skipped must lie in 0..19"),
    (
        "method: {name: policy-gradient}\ntraining: {batch: 1}",
        "method.baseline must be none or a number where",
    ),
    ("prompts: {train: [['1', '2', '3']]}\naudit: {steps: 2}", "audit.steps must be >= 3, for prompts of 3 parts"),
    (
        "sampler: {last_step: frozen}\naudit: {steps: 1}",
        "audit.steps must be >= 2, for prompts of 1 parts and a frozen step",
    ),
    ("audit: {estimators: [ddpo]}", "audit.estimators.0.name must be an estimator"),
    ("audit: {estimators: [{name: tho, options: {width: 99}}]}", "audit.estimators.0.options must suit tho"),
]


@pytest.mark.parametrize(("text", "message"), CROSSED)
def test_settings_that_do_not_go_together_are_refused_at_load(text, message, load):
    found = refusal(load, text)
    assert message in found
    assert "run.yaml: " in found


USES_SCORES = {"half-order", "policy-gradient", "ddpo", "dpok", "rlr", "rlr-as-printed", "rlr-as-released", "tho"}
USES_SCORES |= {"sft-pg"}


@pytest.mark.parametrize("name", METHODS)
def test_without_noise_exactly_the_methods_that_use_scores_are_refused(name, load):
    text = f"method: {{name: {name}}}\nsampler: {{eta: 0}}"
    if name in USES_SCORES:
        assert f"sampler.eta must be > 0 where method.name = {name} uses the score" in refusal(load, text)
    else:
        assert load(text).method.name == name


def test_a_last_step_without_noise_is_refused_only_where_its_score_is_used(load):
    text = "sampler: {{scheduler: ddpm, last_step: {}}}\nmethod: {{name: {}}}"
    assert "sampler.last_step must be frozen or a number" in refusal(load, text.format("keep", "policy-gradient"))
    load(text.format("frozen", "policy-gradient"))
    load(text.format("0.01", "policy-gradient"))
    load(text.format("keep", "rlr"))  # step 1 is paid by the reward's gradient, the block begins at step 2


def test_a_rule_broken_by_overrides_together_names_them(load):
    message = refusal(load, "", "training.batch=4", "training.micro_batch=3")
    assert message.startswith("override training.micro_batch=3: training.micro_batch must divide training.batch = 4")
    message = refusal(load, "", "sampler.eta=0", "method.name=ddpo")
    assert "sampler.eta=0" in message
    assert "method.name = ddpo" in message


# YAML


def test_numbers_are_those_of_yaml_1_2(load):
    config = load("training: {learning_rate: 1e-3, weight_decay: 1E+0, seed: 010}\nreward: {options: {a: no, b: 1:30}}")
    assert config.training.learning_rate == 1e-3
    assert config.training.weight_decay == 1.0
    assert config.training.seed == 10
    assert config.reward.options == {"a": "no", "b": "1:30"}
    assert yaml.safe_load("a: 1e-3") == {"a": "1e-3"}  # what would have come of it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {batch: 1, batch: 2}", "line 1: not readable as YAML: key batch is there twice"),
        ("kl: 1\n\nkl: 2", "line 3: not readable as YAML: key kl is there twice"),
        ("kl: &a 1", "anchors and aliases are not read"),
        ("kl: *a", "anchors and aliases are not read"),
        ("1: 2", "a key must be text, got 1"),
        ("? [a]\n: 1", "a key must be text"),
        ("kl: !!python/name:os.system", "could not determine a constructor"),
        ("kl: [1", "not readable as YAML"),
        ("a: 1\n---\nb: 1", "not readable as YAML"),
        ("[1]", "must hold sections with keys, got [1]"),
        ("kl: \x01", "not readable as YAML"),
    ],
)
def test_files_that_are_not_plain_data_are_refused(text, message, load):
    found = refusal(load, text)
    assert message in found
    assert "run.yaml" in found


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"kl: \xff")
    with pytest.raises(ValueError, match=r"run.yaml: cannot read it: it is not UTF-8 text"):
        load_config(file)


def test_overrides_are_yaml_and_the_last_one_wins(load):
    config = load("lora: null", "kl=1", "kl=2.5", "lora.rank=8", "prompts.train=['1', ['2', '3']]", "model.path=")
    assert config.kl == 2.5
    assert config.lora.rank == 8
    assert config.prompts.train == ("1", ("2", "3"))
    for wrong in ("kl", "=1", "training..batch=1"):
        assert "override must be section.key=value" in refusal(load, "", wrong)


def test_settings_cannot_be_changed_and_are_checked_in_python_too():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.kl = 1.0  # pyright: ignore
    with pytest.raises(ValidationError, match="must divide"):
        Config.model_validate({"training": {"batch": 4, "micro_batch": 3}})


# Prompts


def test_prompts_can_be_a_file_with_one_a_line(tmp_path, load):
    file = tmp_path / "prompts.txt"
    file.write_text("1\n\n  2 \n", encoding="utf-8")
    config = load(f"prompts: {{train: {file}}}")
    assert read_prompts(config.prompts.train) == ("1", "2")
    assert digest(config) == digest(load("prompts: {train: ['1', '2']}"))
    before = digest(config)
    file.write_text("1\n3\n", encoding="utf-8")
    assert digest(config) != before
    file.write_text("\n", encoding="utf-8")
    assert "at least one prompt" in refusal(load, f"prompts: {{train: {file}}}")


def test_a_frozen_last_step_is_outside_the_chain(load):
    assert chain_steps(load("sampler: {steps: 7}")) == 7
    assert chain_steps(load("sampler: {steps: 7, last_step: frozen}")) == 6
    load("sampler: {steps: 3, last_step: frozen}\nprompts: {train: [['1', '2']]}")
    load("sampler: {steps: 2}\nprompts: {train: [['1', '2']]}")


# Digest and differences


def leaves(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


OTHER = {
    "model.kind": "stable-diffusion",
    "model.path": "x",
    "model.revision": "main",
    "model.no_class": "none",
    "model.dtype": "float16",
    "model.resolution": 16,
    "model.checkpointing": True,
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.targets": ["to_q"],
    "sampler.scheduler": "own",
    "sampler.steps": 30,
    "sampler.eta": 0.5,
    "sampler.guidance": 2.0,
    "sampler.last_step": "frozen",
    "prompts.train": ["a"],
    "prompts.held_out": ["b"],
    "prompts.conditional": False,
    "reward.name": "redness",
    "reward.options.a": 2,
    "method.name": "zeroth-order",
    "method.options.h": 3,
    "method.options.std": 0.1,
    "method.options.reading": "II",
    "method.options.zeroth": "one-sided",
    "method.options.first": 4,
    "method.options.last": 9,
    "method.baseline": 0.5,
    "kl": 1.0,
    "training.updates": 7,
    "training.batch": 8,
    "training.micro_batch": 4,
    "training.learning_rate": 0.1,
    "training.betas": [0.8, 0.9],
    "training.weight_decay": 0.1,
    "training.clip": None,
    "training.ema": 0.9,
    "training.seed": 1,
    "training.checkpoint_every": 3,
    "training.keep": 3,
    "training.grid_every": None,
    "training.grid": 4,
    "evaluation.samples": 10,
    "evaluation.batch": 5,
    "evaluation.features": "clip",
    "evaluation.reference": "x",
    "strength.upper": "redness",
    "strength.upper_options.a": 2,
    "strength.methods": ["grid"],
    "strength.start": 2.0,
    "strength.low": 0.005,
    "strength.high": 200.0,
    "strength.scale": 2.0,
    "strength.rounds": 2,
    "strength.rise": 0.5,
    "strength.gradient": "mean",
    "strength.samples": 4,
    "strength.lower_weight": 1.0,
    "strength.grid": [1.0],
    "strength.trials": 6,
    "strength.startup": 3,
    "strength.weights": [1.0],
    "strength.pool": 32,
    "strength.gamma": 10.0,
    "strength.updates": 10,
    "strength.step_size": 0.2,
    "strength.gate": 4.0,
    "audit.estimators": ["first-order"],
    "audit.directions": 3,
    "audit.step": 0.1,
    "audit.steps": 5,
    "audit.pilot": 32,
    "audit.measured": 64,
    "audit.measured_batch": 8,
    "audit.error": 0.1,
    "audit.samples": 100,
    "audit.batch": 32,
    "device": "cpu",
    "logging.tensorboard": False,
    "logging.wandb": "x",
}
BASE = {
    "model": {"kind": "pixel", "path": "y"},
    "prompts": {"train": ["a", "c"]},
    "reward": {"options": {"a": 1}},
    "strength": {"upper_options": {"a": 1}},
    "method": {"name": "rlr"},
}
DECIDES_NOTHING = re.compile(
    r"audit\..*|device|evaluation\..*|logging\..*|model.checkpointing|prompts.held_out"
    r"|strength\..*|training.(checkpoint_every|keep|grid|grid_every|updates|micro_batch)"
)


def changed(data, key, value):
    name, _, rest = key.partition(".")
    return {**data, name: changed(data.get(name, {}), rest, value) if rest else value}


def test_every_key_is_in_the_table_of_the_next_test():
    # data.folder belongs to methods that learn from data: tests/scale/test_sft.py
    assert set(leaves(Config.model_validate(BASE).model_dump())) == {*OTHER, "data.folder"}


@pytest.mark.parametrize("key", OTHER)
def test_the_digest_changes_exactly_with_what_decides_the_numbers(key):
    base = Config.model_validate(BASE)
    data = changed(BASE, key, OTHER[key])
    if key == "method.name":
        data["method"]["options"] = {}
    other = Config.model_validate(data)
    assert (digest(base) == digest(other)) == bool(DECIDES_NOTHING.fullmatch(key))
    if key == "method.name":
        assert "method.name" in differences(base, other)
        assert "method.options.h" in differences(base, other)
    else:
        assert differences(base, other) == differences(other, base) == [key]


def test_no_adapter_at_all_is_another_run_and_one_difference():
    base, other = Config(), Config.model_validate({"lora": None})
    assert differences(base, other) == ["lora"]
    assert digest(base) != digest(other)


def test_what_is_left_out_of_the_digest_are_keys():
    assert set(NOT_IN_DIGEST) <= set(dotted_keys(Config))


def test_a_default_that_is_spelt_out_is_the_same_run(load):
    short, long = load("method: {name: rlr}"), load("method: {name: rlr, options: {h: 2, reading: I}}")
    assert short == long
    assert digest(short) == digest(long)
    assert load("method: {name: first-order}").method.baseline == "none"


# Printing


def test_every_key_is_explained_where_it_is_printed():
    lines = print_config(load_config("rlr-sd14")).splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r" *[a-z_]+:( |$)", line)]
    assert len(keys) > 60
    assert all(lines[i - 1].lstrip().startswith("# ") for i in keys)
    assert max(map(len, lines)) <= 120


texts = st.text(max_size=12) | st.sampled_from(
    ["no", "1e-3", "08", "0x1F", "~", "2020-01-01", "a: b", "# x", "- x", "'", "<<"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
positive = st.floats(1e-300, 1e300, exclude_min=True)
configs = st.builds(
    lambda prompts, held, options, rate, betas, seed, step, baseline, lora, ema: Config.model_validate(
        {
            "model": {"kind": "tiny"},
            "lora": lora,
            "sampler": {"last_step": step},
            "prompts": {"train": prompts, "held_out": held},
            "reward": {"options": options},
            "method": {"name": "half-order", "baseline": baseline},
            "training": {"learning_rate": rate, "betas": betas, "seed": seed, "ema": ema},
        }
    ),
    prompts=st.lists(texts | st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4),
    held=st.none() | st.lists(texts, min_size=1, max_size=2),
    options=st.dictionaries(texts, plain, max_size=3),
    rate=positive,
    betas=st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    seed=st.integers(0, 2**64 - 1),
    step=st.sampled_from(["keep", "frozen"]) | positive,
    baseline=st.sampled_from(["none", "leave-one-out"]) | st.floats(-1e9, 1e9),
    lora=st.none() | st.fixed_dictionaries({"rank": st.integers(1, 9), "targets": st.lists(texts, min_size=1)}),
    ema=st.none() | st.floats(0, 1, exclude_max=True),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs)
def test_what_is_printed_reads_back(config, tmp_path):
    file = Path(tmp_path) / "run.yaml"
    file.write_text(print_config(config), encoding="utf-8", newline="\n")
    again = load_config(file)
    assert again == config
    assert again.model_dump() == config.model_dump()
    assert digest(again) == digest(config)


def same(a, b):
    """Equality that tells 1 from 1.0 and True."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@settings(max_examples=200)
@given(plain)
def test_plain_data_on_one_line_reads_back(value):
    line = plain_yaml.one_line(value)
    assert "\n" not in line
    assert same(plain_yaml.read_yaml(f"[{line}]", "here"), [value])
    assert same(plain_yaml.read_yaml(f"a:\n  b:\n    - {line}\n", "here"), {"a": {"b": [value]}})


def test_the_round_trip_can_fail(tmp_path):
    """Planted mistake: texts written without the quotes that they need."""
    config = load_config("digits-brightness")
    file = tmp_path / "run.yaml"
    file.write_text(print_config(config).replace("'0'", "0"), encoding="utf-8")
    with pytest.raises(ValueError, match="prompts.train must hold texts"):
        load_config(file)
    assert math.isinf(plain_yaml.read_yaml(".inf", "here"))


def test_the_module_does_not_wait_for_torch():
    command = "import sys, scale.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=PRESETS.parents[1]).returncode == 0
