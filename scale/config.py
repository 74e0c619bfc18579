"""The settings of a run: one file for `audit`, `plan`, `launch` and `evaluate`, checked before anything is computed.

config = load_config("digits-brightness", overrides=["training.updates=20", "model.dtype=bfloat16"])

A file is YAML 1.2 (so 1e-3 is a number and no is a word), read without running code, and may leave out whatever keeps
its default. Every wrong key, type, value or combination is one line that names file, key, value and rule.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic import ValidationInfo as Info
from pydantic import field_validator as check_field
from pydantic_core import ErrorDetails, PydanticCustomError

from scale.plain_yaml import one_line, read_yaml

PRESETS = Path(__file__).parent / "presets"

Prompt = str | tuple[str, ...]
"""A text, or texts from coarse to fine, given to equal parts of the chain from its noisy end on."""

STRENGTH_METHODS = ("bilevel", "grid", "random", "bayesian", "weighted-sum")
"""How `tune` may choose a strength, in the order of its table."""

NOT_IN_DIGEST = (
    "audit",
    "device",
    "evaluation",
    "logging",
    "model.checkpointing",
    "prompts.held_out",
    "strength",
    "training.checkpoint_every",
    "training.grid",
    "training.grid_every",
    "training.keep",
    "training.micro_batch",
    "training.updates",
)
"""Keys, or sections, that leave the parameters after each update as they are, up to rounding."""


class Strict(BaseModel):
    """Settings that refuse unknown keys, types that merely look alike, nan and infinity; they cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def broken(key: str, value: object, rule: str) -> PydanticCustomError:
    """Return the error of a rule about `key`, a dotted path below the model whose validator raises it."""
    return PydanticCustomError("rule", "{key} {text}", {"key": key, "text": f"{rule}, got {_shown(value)}"})


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ", did you mean X?", or else what there is to choose from."""
    close = difflib.get_close_matches(word, known, 1, 0.5)
    if close:
        return f", did you mean {close[0]}?"
    return f", known: {', '.join(known)}" if known else ", there are none"


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _baseline(value: object) -> str | float:
    if isinstance(value, int | float) and _is_number(value):
        return float(value)
    if value in ("none", "leave-one-out"):
        return str(value)
    raise broken("", value, "must be none, leave-one-out or a number")


def _last_step(value: object) -> str | float:
    if isinstance(value, int | float) and _is_number(value) and value > 0:
        return float(value)
    if value in ("keep", "frozen"):
        return str(value)
    raise broken("", value, "must be keep, frozen or a number > 0, the last step's standard deviation")


def _prompts(value: object) -> str | tuple[Prompt, ...]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value:
        raise broken("", value, "must be a list of at least one prompt, or the path of a file with one a line")
    return tuple(_prompt(item) for item in value)


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        return tuple(str(text) for text in value)
    rule = "must hold texts, or lists of texts from coarse to fine (a number or true needs quotes)"
    raise broken("", value, rule)


def _data(value: object) -> Any:
    """Return nested options as plain data, refusing what YAML or JSON could not give back."""
    if isinstance(value, list | tuple):
        return [_data(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _data(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool) or _is_number(value):
        return value
    raise broken("", value, "must hold texts, finite numbers, true, false, null, lists and mappings only")


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise broken("", value, "must be a mapping of options")
    return _data(value)


def _reward(name: str) -> str:
    """Check the name of a reward."""
    from scale.rewards import BUILDERS

    if name not in BUILDERS:
        raise broken("", name, f"must be the name of a reward{nearest(name, list(BUILDERS))}")
    return name


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Prompts = Annotated[str | tuple[Prompt, ...], PlainValidator(_prompts)]
OptionValues = Annotated[dict[str, Any], PlainValidator(_options)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Model(Strict):
    """The diffusion model whose weights are fine-tuned."""

    kind: Literal["digits", "pixel", "tiny", "stable-diffusion"] = Field(
        default="digits",
        description="digits: 8x8 handwritten digits, trained here in a minute; tiny: Stable Diffusion's parts with "
        "random weights, for tests; pixel: a diffusers UNet2DModel; stable-diffusion: v1 or v2",
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="local folder or hub id, for pixel (unet/ and scheduler/, weights as safetensors) and for "
        "stable-diffusion",
    )
    revision: str | None = Field(
        default=None, min_length=1, description="commit, tag or branch on the hub; null: the newest"
    )
    no_class: Literal["last", "none"] = Field(
        default="last",
        description="what a pixel model is told for no class. last: its last label, as in digits; none: nothing, since "
        "every label is a class, and then there is no guidance and prompts.conditional is true",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="number type of the frozen weights; what is trained is always float32"
    )
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] | None = Field(
        default=None, description="side of the image in pixels, a multiple of 8; null: the model's own"
    )
    checkpointing: bool = Field(
        default=False,
        description="recompute the network's activations in the backward pass: less memory, a third more time",
    )


class LoRA(Strict):
    """The low-rank matrices that are trained; null: all weights of the network."""

    rank: Count = Field(default=4, description="rank of each pair of matrices")
    alpha: float = Field(default=4.0, gt=0, description="their product is scaled by alpha / rank")
    targets: Texts = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="ends of the names of the layers that get one",
    )


class Sampler(Strict):
    """The chain: how noise becomes a sample, in training and in evaluation."""

    scheduler: Literal["ddim", "ddpm", "euler-ancestral", "lcm", "own"] = Field(
        default="ddim", description="own: the one that the checkpoint names"
    )
    steps: Count = Field(default=20, description="T, the number of denoising steps")
    eta: float = Field(
        default=1.0, ge=0, le=1, description="DDIM's noise scale; 0 is deterministic, and then has no score"
    )
    guidance: float = Field(
        default=1.0, ge=0, description="classifier-free guidance; 1 is none, at half the network's calls"
    )
    last_step: Annotated[Literal["keep", "frozen"] | float, PlainValidator(_last_step)] = Field(
        default="keep",
        description="a last step without noise has no score. keep: as the scheduler has it; frozen: outside the chain, "
        "which is then one step shorter; a number: the standard deviation that it gets",
    )


class PromptSets(Strict):
    """What the samples are conditioned on."""

    train: Prompts = Field(
        default=tuple(str(digit) for digit in range(10)),
        description="a list, or the path of a text file with one prompt a line; a prompt is a text, or a list of texts "
        "from coarse to fine for equal parts of the chain; digits are named 0 to 9",
    )
    held_out: Prompts | None = Field(
        default=None,
        description="prompts to evaluate on, given likewise; null: those of the training, with fresh noise",
    )
    conditional: bool = Field(default=True, description="false: the network is not told the prompt, only the reward is")


class Data(Strict):
    """What sft and sft-pg learn from; the other methods have no use for it."""

    folder: str | None = Field(
        default=None,
        min_length=1,
        description="folder of class sub-folders of PNG and JPEG files, cut to the model's square; the critic does not "
        "see the classes. null: for digits, the images that their model was trained on",
    )


class Reward(Strict):
    """What is maximised."""

    name: str = Field(default="brightness", description="the reward's name, see scale/rewards")
    options: OptionValues = Field(default={}, description="the reward's own options")

    @check_field("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _reward(name)


class Method(Strict):
    """How the gradient is estimated."""

    name: str = Field(default="first-order", description="the method's name, see scale/methods.py")
    options: OptionValues = Field(
        default={}, description="the method's own options; what is left out keeps its default"
    )
    baseline: Annotated[Literal["none", "leave-one-out"] | float, PlainValidator(_baseline)] = Field(
        default="leave-one-out",
        description="taken off the return before it multiplies a score: none, leave-one-out or a number; set to none "
        "where the method has no score or an advantage of its own",
    )

    @check_field("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from scale.methods import METHODS  # here, so that printing settings does not wait for torch

        if name not in METHODS:
            raise broken("", name, f"must be the name of a method{nearest(name, list(METHODS))}")
        return name

    @check_field("options")
    @classmethod
    def _complete(cls, options: dict[str, Any], info: Info) -> dict[str, Any]:
        from scale.methods import complete_options

        return complete_options(info.data["name"], options) if "name" in info.data else options

    @check_field("baseline")
    @classmethod
    def _used(cls, baseline: str | float, info: Info) -> str | float:
        from scale.methods import METHODS

        if "name" not in info.data or METHODS[info.data["name"]].baseline:
            return baseline
        if isinstance(baseline, float):
            raise broken("", baseline, f"must be none: {info.data['name']} takes no baseline")
        return "none"


def _named(value: object) -> object:
    """Read audit.estimators: a method's name alone stands for the method with its default options."""
    if isinstance(value, list | tuple):
        return tuple({"name": item} if isinstance(item, str) else item for item in value)
    return value


class Training(Strict):
    """The loop, by AdamW. An update is one batch of fresh roll-outs."""

    updates: Count = Field(default=100, description="batches to train on; a finished run goes on when this is raised")
    batch: Count = Field(default=16, description="roll-outs in an update, on all processes together")
    micro_batch: Count | None = Field(
        default=None,
        description="roll-outs in memory at once; divides batch; null: all. The gradient stays the batch's",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW")
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_as_tuple)] = Field(
        default=(0.9, 0.999), description="decays of AdamW's two moments"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW, decoupled; 0 gives Adam")
    clip: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="longest gradient, to which a longer one is scaled down; null: no clipping"
    )
    ema: Decay | None = Field(
        default=None, description="decay of a moving average of what is trained; null: none is kept"
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="of all random numbers of the run")
    checkpoint_every: Count = Field(default=10, description="updates between checkpoints")
    keep: Count = Field(default=2, description="checkpoints kept, the newest ones")
    grid_every: Count | None = Field(default=10, description="updates between image grids; null: none")
    grid: Count = Field(default=16, description="images in a grid, of the same noise and prompts each time")


class Evaluation(Strict):
    """How a trained model is compared with the one it came from."""

    samples: Annotated[int, Field(ge=2)] = Field(
        default=64, description="images of each model, of the same noise and prompts"
    )
    batch: Count = Field(default=16, description="images made at once")
    features: str = Field(default="auto", min_length=1, description="what distances between images are measured in")
    reference: str | None = Field(
        default=None,
        min_length=1,
        description="folder of real images to compare with; null: the model's own data, or none",
    )


class Audit(Strict):
    """How the gradient is checked, along random directions, before anything is trained."""

    estimators: Annotated[tuple[Method, ...], BeforeValidator(_named)] = Field(
        default=(),
        description="methods to audit beside this file's own, by name or as {name, options, baseline}",
    )
    directions: Count = Field(
        default=2, description="random directions along which gradients are compared, beside the gradient's own"
    )
    error: float = Field(default=0.01, gt=0, le=0.5, description="probability of any wrong verdict in the whole audit")
    samples: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="most roll-outs of an estimator, after which its verdict is inconclusive; 0: nothing is sampled, "
        "only identities are checked; null: 65536 for networks of at most a million parameters, 0 for larger ones",
    )
    steps: Count | None = Field(
        default=None,
        description="most sampling steps of the chain on which estimators are sampled; null: the sampler's own; "
        "identities and costs are always of the sampler's own",
    )
    pilot: Annotated[int, Field(ge=2)] = Field(
        default=1024,
        description="roll-outs on which an estimator's direction is fitted, in which it tells most; four times as many "
        "for its baseline",
    )
    step: float = Field(
        default=1e-2, gt=0, description="length of the step of a finite difference, the reference of a black-box reward"
    )
    batch: Annotated[int, Field(ge=2)] = Field(default=1024, description="roll-outs at once")
    measured: Annotated[int, Field(ge=4)] = Field(
        default=256, description="roll-outs on which each estimator's variance and time are measured"
    )
    measured_batch: Annotated[int, Field(ge=2, multiple_of=2)] = Field(
        default=16, description="roll-outs at once in that, an even number; peak memory is this batch's"
    )


Positive = Annotated[float, Field(gt=0)]
Positives = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]


class Strength(Strict):
    """How `tune` chooses the entropy strength lambda of guided sampling, a prompt at a time."""

    upper: str = Field(default="clip", description="the upper reward, which chooses; `reward` is the lower one")
    upper_options: OptionValues = Field(default={}, description="the upper reward's own options")
    methods: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=STRENGTH_METHODS, min_length=1, description="methods to compare, of those of scale/strength.py"
    )
    start: Positive = Field(
        default=1.0, description="lambda at first: bilevel's and Bayesian search's; the weighted sum keeps it"
    )
    low: Positive = Field(default=0.01, description="smallest lambda of bilevel, random and bayesian")
    high: Positive = Field(default=100.0, description="largest lambda of these")
    scale: Positive = Field(
        default=1.0,
        description="c: a sample that is m short of its target is guided by c m / s times the score of the tilt "
        "exp(reward / lambda), s the standard deviation of the pre-trained reward",
    )
    rounds: Count = Field(default=7, description="rounds of guided sampling, each towards a higher lower reward")
    rise: Positive = Field(
        default=1.0, description="by how much the target rises each round, in standard deviations of the pre-trained"
    )
    gradient: Literal["own", "mean", "samples"] = Field(
        default="own",
        description="where the lower reward is linearised. own: at each sample; mean: at their mean; samples: the mean "
        "of their gradients",
    )
    samples: Count = Field(default=3, description="guided samples with which a search tries a lambda")
    lower_weight: float = Field(
        default=0.0, ge=0, description="the searches maximise the upper reward plus so much of the lower one"
    )
    grid: Positives = Field(default=(0.01, 0.1, 1.0, 10.0, 100.0), min_length=1, description="lambdas of grid search")
    trials: Count = Field(default=5, description="lambdas of random search, and of Bayesian search")
    startup: Count = Field(default=2, description="of these, those before Bayesian search asks its Gaussian process")
    weights: Positives = Field(
        default=(0.1, 1.0, 10.0), min_length=1, description="weights of the upper reward that the weighted sum tries"
    )
    pool: Annotated[int, Field(ge=4)] = Field(
        default=64, description="pre-trained samples of a prompt, which bilevel re-weights"
    )
    gamma: Positive = Field(default=100.0, description="penalty of the bilevel method")
    updates: Count = Field(default=1000, description="updates of lambda by the bilevel method")
    step_size: Positive = Field(default=0.1, description="of an update, by Adam, in units of lambda")
    gate: Annotated[float, Field(ge=1)] = Field(
        default=8.0,
        description="least effective sample size of the re-weighted pool for an update; below, it is skipped",
    )

    @check_field("upper")
    @classmethod
    def _known_reward(cls, name: str) -> str:
        return _reward(name)

    @check_field("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            if name not in STRENGTH_METHODS:
                raise broken("", name, f"must hold names of methods{nearest(name, STRENGTH_METHODS)}")
        if len(set(methods)) < len(methods):
            raise broken("", list(methods), "must name a method once")
        return methods

    @model_validator(mode="after")
    def _consistent(self) -> Strength:
        if self.low >= self.high:
            raise broken("low", self.low, f"must be < strength.high = {self.high:g}")
        if not self.low <= self.start <= self.high:
            raise broken("start", self.start, f"must lie in [{self.low:g}, {self.high:g}], strength.low and high")
        if self.gate > self.pool:
            raise broken("gate", self.gate, f"must be <= strength.pool = {self.pool}")
        return self


class Logging(Strict):
    """Where curves and grids are shown."""

    tensorboard: bool = Field(default=True, description="write TensorBoard files into the run's folder")
    wandb: str | None = Field(
        default=None, min_length=1, description="project on Weights & Biases; null: nothing is sent"
    )


class Config(Strict):
    """All settings of a run."""

    model: Model = Field(default=Model(), description="the diffusion model")
    lora: LoRA | None = Field(default=LoRA(), description="the low-rank matrices that are trained; null: all weights")
    sampler: Sampler = Field(default=Sampler(), description="the chain, from noise to sample")
    prompts: PromptSets = Field(default=PromptSets(), description="what samples are conditioned on")
    data: Data = Field(default=Data(), description="what sft and sft-pg learn from, instead of the reward")
    reward: Reward = Field(
        default_factory=Reward, description="what is maximised; for sft and sft-pg only shown and evaluated"
    )
    method: Method = Field(default_factory=Method, description="how the gradient is estimated")
    kl: float = Field(
        default=0.0, ge=0, description="strength of the path KL divergence to the base model, taken off the reward"
    )
    training: Training = Field(default=Training(), description="the loop, by AdamW")
    evaluation: Evaluation = Field(default=Evaluation(), description="how the result is compared with the base model")
    strength: Strength = Field(
        default_factory=Strength, description="how tune chooses the entropy strength of guided sampling"
    )
    audit: Audit = Field(default_factory=Audit, description="how the gradient is checked before anything is trained")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda, cuda:N or mps; auto: the fastest",
    )
    logging: Logging = Field(default=Logging(), description="where curves and grids are shown")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        _check_model(self)
        _check_sampler(self)
        _check_prompts(self)
        _check_batches(self)
        _check_method(self.method, "method", self.training.batch, self)
        for i, method in enumerate(self.audit.estimators):
            _check_method(method, f"audit.estimators.{i}", self.audit.measured_batch, self)
        _check_data(self)
        _check_audited(self.audit.estimators)
        _check_audit_steps(self)
        return self


def _check_model(config: Config) -> None:
    model = config.model
    if model.no_class != "last" and model.kind != "pixel":
        raise broken("model.no_class", model.no_class, "must be last where model.kind is not pixel")
    if model.kind in ("pixel", "stable-diffusion"):
        if model.path is None:
            raise broken("model.path", None, f"must be a hub id or a local folder for model.kind = {model.kind}")
        return
    for key in ("path", "revision"):
        if getattr(model, key) is not None:
            raise broken(f"model.{key}", getattr(model, key), f"must be null: {model.kind} is made here")
    if model.kind == "digits" and model.resolution not in (None, 8):
        raise broken("model.resolution", model.resolution, "must be null or 8 for digits")


def _check_sampler(config: Config) -> None:
    sampler = config.sampler
    if sampler.eta != 1 and sampler.scheduler not in ("ddim", "own"):
        raise broken("sampler.eta", sampler.eta, f"must be 1: {sampler.scheduler} has no noise scale, ddim has")
    if sampler.last_step == "frozen" and sampler.steps < 2:
        raise broken("sampler.steps", sampler.steps, "must be >= 2 when the last step is frozen")
    if sampler.guidance != 1 and not config.prompts.conditional:
        raise broken("sampler.guidance", sampler.guidance, "must be 1 when prompts.conditional is false")
    if config.model.no_class == "none":
        if sampler.guidance != 1:
            raise broken("sampler.guidance", sampler.guidance, "must be 1 where model.no_class is none")
        if not config.prompts.conditional:
            raise broken("prompts.conditional", False, "must be true where model.no_class is none")
    if config.kl > 0:
        _check_noise(range(1, chain_steps(config) + 1), f"kl = {config.kl:g}", sampler)


def _check_prompts(config: Config) -> None:
    for key in ("train", "held_out"):
        given = getattr(config.prompts, key)
        if given is None:
            continue
        try:
            prompts = read_prompts(given)
        except ValueError as error:
            raise broken(f"prompts.{key}", given, str(error)) from error
        for prompt in prompts:
            texts = (prompt,) if isinstance(prompt, str) else prompt
            if len(texts) > chain_steps(config):
                rule = f"must not have more parts than the chain has steps, {chain_steps(config)}"
                raise broken(f"prompts.{key}", list(texts), rule)
            if config.model.kind == "digits" and not all(re.fullmatch("[0-9]", text) for text in texts):
                raise broken(f"prompts.{key}", prompt, 'must be digits "0" to "9" for model.kind = digits')


def _check_batches(config: Config) -> None:
    batch, micro = config.training.batch, config.training.micro_batch
    if micro is not None and batch % micro:
        raise broken("training.micro_batch", micro, f"must divide training.batch = {batch}")


def _check_method(method: Method, key: str, batch: int, config: Config) -> None:
    from scale.methods import check_options, scored_steps

    steps = chain_steps(config)
    try:
        check_options(method.name, method.options, steps, batch)
    except ValueError as error:
        text = f"must suit {method.name} with {steps} steps and batches of {batch}: {error}"
        raise PydanticCustomError("rule", "{key} {text}", {"key": f"{key}.options", "text": text}) from error
    if method.baseline == "leave-one-out" and batch < 2:
        rule = f"must be none or a number where the batch is {batch}"
        raise broken(f"{key}.baseline", method.baseline, rule)
    _check_noise(scored_steps(method.name, method.options, steps), f"{key}.name = {method.name}", config.sampler)


def _check_data(config: Config) -> None:
    name, folder = config.method.name, config.data.folder
    if not learns_from_data(config):
        if folder is not None:
            raise broken("data.folder", folder, f"must be null where method.name = {name} learns from the reward")
        return
    if folder is None and config.model.kind != "digits":
        rule = f"must be a folder of images where method.name = {name}, which learns from data, and model.kind is "
        raise broken("data.folder", None, rule + config.model.kind)
    if config.sampler.last_step == "frozen":
        rule = f"must be keep or a number where method.name = {name}: its critic compares the chain's end with data"
        raise broken("sampler.last_step", "frozen", rule)


def learns_from_data(config: Config) -> bool:
    """Return whether the method is shortcut fine-tuning, which learns from `data` and not from the reward."""
    from scale.methods import METHODS

    return METHODS[config.method.name].shortcut is not None


def _check_noise(scored: Sequence[int], user: str, sampler: Sampler) -> None:
    """Refuse a sampler without noise at a step whose score is used."""
    if scored and sampler.scheduler == "ddim" and sampler.eta == 0:
        raise broken("sampler.eta", sampler.eta, f"must be > 0 where {user} uses the score of a step's noise")
    if 1 in scored and sampler.scheduler in ("ddpm", "euler-ancestral", "lcm") and sampler.last_step == "keep":
        rule = (
            f"must be frozen or a number where {user} uses the last step's score, as {sampler.scheduler} has no noise"
        )
        raise broken("sampler.last_step", sampler.last_step, f"{rule} there")


def _check_audited(methods: Sequence[Method]) -> None:
    from scale.methods import METHODS

    for i, method in enumerate(methods):
        if METHODS[method.name].loss:
            rule = "must be an estimator, whose mean can be held against finite differences, not a surrogate loss"
            raise broken(f"audit.estimators.{i}.name", method.name, rule)
        if METHODS[method.name].shortcut:
            rule = "must be an estimator of a reward's gradient, not a method that learns from data"
            raise broken(f"audit.estimators.{i}.name", method.name, rule)


def _check_audit_steps(config: Config) -> None:
    steps, frozen = config.audit.steps, config.sampler.last_step == "frozen"
    if steps is None:
        return
    given = [*read_prompts(config.prompts.train), *read_prompts(config.prompts.held_out or ())]
    parts = max(1 if isinstance(prompt, str) else len(prompt) for prompt in given)
    if steps < parts + frozen:
        rule = f"must be >= {parts + frozen}, for prompts of {parts} parts" + (" and a frozen step" if frozen else "")
        raise broken("audit.steps", steps, rule)


def sampled_settings(config: Config) -> Config:
    """Return the settings of the chain on which an audit samples: `audit.steps` in place of the sampler's own."""
    if config.audit.steps is None or config.audit.steps >= config.sampler.steps:
        return config
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"steps": config.audit.steps})})


def chain_steps(config: Config) -> int:
    """Return the number of steps of the chain: a frozen last step is not one of them."""
    return config.sampler.steps - (config.sampler.last_step == "frozen")


def read_prompts(prompts: str | Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return the prompts of a section's `train` or `held_out`, reading the file where one is named.

    Raises:
        ValueError: if the file cannot be read or holds no prompt.
    """
    if not isinstance(prompts, str):
        return tuple(prompts)
    try:
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"must be a list, or the path of a text file (cannot read it: {_reason(error)})") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ValueError("must be a file with at least one prompt")
    return found


def presets() -> list[str]:
    """Return the names of the packaged presets."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a file, or the packaged preset of that name, and put `overrides` in place of its values.

    Args:
        path: a file; or a preset as "digits-brightness" or "presets/digits-brightness.yaml".
        overrides: "section.key=value" each, the value in YAML; later ones win.

    Raises:
        ValueError: in one line, if there is no such file, it is no YAML, or a key, value or combination is wrong.
    """
    file = _find(path)
    where = str(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: cannot read it: {_reason(error)}") from error
    data = read_yaml(text, where)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ValueError(f"{where}: must hold sections with keys, got {_shown(data)}")
    changed: dict[str, str] = {}
    for override in overrides:
        changed[_override(data, override)] = f"override {override}"
    return parse(Config, data, where, changed)


def _find(path: str | Path) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    parts = [part for part in file.parts if part not in ("scale", "presets", ".")]
    name = parts[0].removesuffix(".yaml") if len(parts) == 1 else ""
    if name in presets():
        return PRESETS / f"{name}.yaml"
    if file.is_dir():
        raise ValueError(f"{path}: is a folder, must be a file or a preset ({', '.join(presets())})")
    raise ValueError(f"{path}: no such file or preset{nearest(name or file.stem, presets())}")


def _override(data: dict[str, Any], override: str) -> str:
    """Put one override into the data, and return its dotted key."""
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"override must be section.key=value, got {override!r}")
    for name in names[:-1]:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    data[names[-1]] = read_yaml(value, f"override {override}")
    return ".".join(names)


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def parse(model: type[AnyModel], data: Any, where: str, changed: Mapping[str, str] | None = None) -> AnyModel:
    """Read plain data into a model.

    Args:
        where: what to call the source of the data in an error.
        changed: other names for the sources of single dotted keys.

    Raises:
        ValueError: in one line: the source, the dotted key, its value and the rule, or the nearest known key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        key, message = explain(found[0], model)
        source = where if found[0]["loc"] or not changed else f"{where} with {', '.join(changed.values())}"
        for changed_key, name in (changed or {}).items():
            if key == changed_key or key.startswith(changed_key + ".") or changed_key.startswith(key + "."):
                source = name
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(f"{source}: {message}{more}") from None


_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text (a number or true needs quotes)",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be auto, cpu, mps, cuda or cuda:N",
    "bool_type": "must be true or false",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must be a list of at least {min_length}",
    "too_long": "must be a list of {max_length}",
    "missing": "must be given",
    "model_type": "must be a section with keys",
    "model_attributes_type": "must be a section with keys",
}


def explain(error: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """Return the dotted key of an error of pydantic's, and what is wrong in our words."""
    key = ".".join(str(part) for part in error["loc"])
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return key, _unknown(key, model)
    if error["type"] == "unknown_option":
        section, key = key, f"{key}.{context['key']}"
        hint = f"did you mean {section}.{context['close']}?" if context["close"] else context["known"]
        return key, f"unknown key {key}, {hint}"
    if error["type"] == "rule":
        key = ".".join(part for part in (key, context["key"]) if part)
        return key, f"{key} {context['text']}"
    if error["type"] == "literal_error":
        choices = [choice.strip("'") for choice in re.split(", | or ", context["expected"])]
        close = difflib.get_close_matches(str(error["input"]), choices, 1)
        hint = f", did you mean {close[0]}?" if close else ""
        return key, f"{key} must be one of {', '.join(choices)}, got {_shown(error['input'])}{hint}"
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    rule = _RULES[error["type"]].format(**limits) if error["type"] in _RULES else error["msg"]
    if error["type"] in ("int_type", "float_type") and _looks_like_number(error["input"]):
        rule += " without quotes"
    return key, f"{key} {rule}, got {_shown(error['input'])}"


def _unknown(key: str, model: type[BaseModel]) -> str:
    place, _, name = key.rpartition(".")
    section = ".".join(part for part in place.split(".") if not part.isdigit())  # an index of a list is no key
    leaves: dict[str, list[str]] = {}
    for known in dotted_keys(model):
        leaves.setdefault(known.rpartition(".")[2], []).append(known)
    here = [leaf for leaf, keys in leaves.items() if f"{section}.{leaf}".lstrip(".") in keys]
    close = difflib.get_close_matches(name, here, 1, 0.5)
    if close:
        return f"unknown key {key}, did you mean {'.'.join(filter(None, (place, close[0])))}?"
    close = difflib.get_close_matches(name, list(leaves), 1, 0.8)
    if close:
        return f"unknown key {key}, did you mean {' or '.join(leaves[close[0]])}?"
    return f"unknown key {key}, known here: {', '.join(here) or 'none'}"


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a model and of the models inside it, a section before its keys."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _section(field.annotation)
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{name}.")


def _section(annotation: Any) -> type[Strict] | None:
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, Strict):
            return kind
    return None


def _looks_like_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return isinstance(value, str)


def _shown(value: object) -> str:
    """Return a value as YAML, short enough for one line."""
    try:
        text = one_line(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        text = " ".join(repr(value).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is not UTF-8 text"


def print_config(config: Config) -> str:
    """Return the settings as YAML with a comment on every key, which `load_config` reads back to the same settings."""
    from scale.methods import METHODS

    comments = dict(_descriptions(Config))
    options = METHODS[config.method.name].options
    comments |= {f"method.options.{name}": field.description or "" for name, field in options.model_fields.items()}
    lines = ["# Settings of verifine at scale. What is left out keeps its default."]
    lines += _section_lines(config.model_dump(), comments, "", {"method.options"})
    return "\n".join(lines) + "\n"


def _section_lines(
    data: dict[str, Any], comments: Mapping[str, str], prefix: str, blocks: set[str] | None = None
) -> list[str]:
    indent = "  " * prefix.count(".")
    lines: list[str] = []
    sections = {key for key in comments if any(other.startswith(key + ".") for other in comments)}
    for name, value in data.items():
        key = prefix + name
        lines += [""] * (not prefix)
        width = 118 - len(indent)
        lines += [f"{indent}# {line}" for line in textwrap.wrap(comments.get(key, ""), width, break_on_hyphens=False)]
        if isinstance(value, dict) and value and (key in sections or key in (blocks or set())):
            lines += [f"{indent}{one_line(name)}:", *_section_lines(value, comments, key + ".", blocks)]
        elif isinstance(value, list | tuple) and len(one_line(value)) > 100:
            lines += [f"{indent}{one_line(name)}:", *(f"{indent}  - {one_line(item)}" for item in value)]
        else:
            lines.append(f"{indent}{one_line(name)}: {one_line(value)}")
    return lines


def _descriptions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        inner = _section(field.annotation)
        if inner is not None:
            yield from _descriptions(inner, f"{prefix}{name}.")


def digest(config: Config) -> str:
    """Return a SHA-256 (hex) of all that decides the parameters after each update, to recognise a run by.

    What it leaves out is `NOT_IN_DIGEST`. Options that are left to their defaults count with their values, and a file
    of prompts with its prompts.
    """
    data = config.model_dump()
    data["prompts"]["train"] = read_prompts(config.prompts.train)
    if config.data.folder is None:  # so that a run that learns from no folder is known by what it always was
        del data["data"]
    for key in NOT_IN_DIGEST:
        section, _, name = key.rpartition(".")
        del (data[section] if section else data)[name]
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differences(a: Config, b: Config) -> list[str]:
    """Return the dotted keys whose values differ, in the order of the settings."""
    return list(_differing(a.model_dump(), b.model_dump(), ""))


def _differing(a: dict[str, Any], b: dict[str, Any], prefix: str) -> Iterator[str]:
    for name in {**a, **b}:
        one, other = a.get(name), b.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differing(one, other, f"{prefix}{name}.")
        elif one != other or (name in a) != (name in b):
            yield prefix + name
