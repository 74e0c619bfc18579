"""The methods by name: which algorithm object a name and its options stand for. The algorithms are in `algorithms/`.

method, estimator = make_method(config.method, chain, params, objective, generator, condition)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from algorithms import estimators as named
from algorithms import rlr, truncations
from algorithms.baselines import Baseline, Constant, LeaveOneOut
from algorithms.chain import Chain, Condition, ParameterNoise, Params, of_samples
from algorithms.division import Division
from algorithms.estimators import Estimator
from algorithms.losses import DPOK, PPO, DraftLV
from algorithms.objective import Objective
from algorithms.queue import Queue
from algorithms.shortcut import ShortcutFineTuning
from algorithms.stratified import fitted_truncation
from algorithms.telescoped import FOLDS, band, telescoped
from algorithms.training import FromEstimator, Method
from scale.config import Strict, explain, nearest, parse

if TYPE_CHECKING:
    from scale.config import Method as Choice

LARGEST_LAW = 20_000_000
"""Numbers in a law of credit matrices, 160 MB."""

LEARNS_FROM_DATA = "learns from data, against a critic of its own"


@dataclass(frozen=True)
class Pilot:
    """What an estimator that is fitted on pilot roll-outs needs; `condition` holds at least a pilot batch's samples."""

    chain: Chain
    params: Params
    objective: Objective
    generator: torch.Generator
    condition: Condition


class Options(Strict):
    """A method's options."""

    def check(self, steps: int, batch: int) -> None:
        """Raise ValueError if the options do not suit a chain of `steps` steps and batches of `batch` samples."""


class NoOptions(Options):
    """Of a method that has none."""


class Truncated(Options):
    length: int = Field(default=1, ge=1, description="K, the number of last steps that are back-propagated through")


class AlignProp(Options):
    mean: float | None = Field(
        default=None,
        gt=0,
        description="mean of the number of first steps cut off; null: 84 % of the steps, as 42 of 50",
    )
    std: float | None = Field(
        default=None, gt=0, description="its standard deviation; null: a tenth of the steps, as 5 of 50"
    )
    debiased: bool = Field(default=False, description="divide each step by its probability to be reached")
    full: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="share of chains gone through in full when debiased; AlignProp's own law has none",
    )


class SRT(Options):
    length: float = Field(
        default=4.0, gt=1, description="expected number of last steps that are back-propagated through"
    )
    pilot: int = Field(default=64, ge=2, description="roll-outs on which the law of the lengths is fitted, once")

    def check(self, steps: int, batch: int) -> None:
        if self.length > steps:
            raise ValueError(f"length must lie in (1, {steps}], got {self.length:g}")


class HalfOrder(Options):
    length: int = Field(default=2, ge=1, description="steps in a block, which is back-propagated through at once")


class DDPO(Options):
    clip: float = Field(
        default=0.2, gt=0, lt=1, description="largest change of a step's density that is rewarded, as a ratio"
    )
    epochs: int = Field(default=1, ge=1, description="times that a batch is gone through")
    minibatches: int = Field(default=1, ge=1, description="optimizer steps in an epoch")
    advantage: Literal["standardised", "leave-one-out"] = Field(
        default="standardised",
        description="(return - mean) / std as DDPO has it, or return less the others' mean, unbiased",
    )
    group: int | None = Field(
        default=None, ge=2, description="consecutive samples that share mean and std; null: the whole batch"
    )

    def check(self, steps: int, batch: int) -> None:
        size = self.group or batch
        if size < 2 or batch % size:
            raise ValueError(f"a batch must be whole groups of at least 2, it is {batch} in groups of {size}")
        if self.minibatches > batch:
            raise ValueError(f"minibatches must be <= the batch, {batch}, got {self.minibatches}")


class ZerothOrder(Options):
    std: float = Field(default=1e-3, gt=0, description="standard deviation of the noise on the parameters")
    kind: Literal["gaussian", "rademacher"] = Field(default="gaussian", description="law of that noise")
    antithetic: bool = Field(default=True, description="average over both signs of that noise, on two roll-outs")


class RLR(Options):
    h: int = Field(default=2, ge=1, description="length of the half-order block")
    std: float = Field(default=1e-3, gt=0, description="standard deviation of the noise on the parameters")
    reading: Literal["I", "II"] = Field(
        default="I", description="the block: I, steps j..j+h (eq. 5); II, j+1..j+h (the text)"
    )
    zeroth: Literal["antithetic", "one-sided"] = Field(
        default="antithetic",
        description="average over both signs of the parameters' noise, on two roll-outs, or one sign",
    )
    first: int | None = Field(
        default=None, ge=1, description="smallest j, the block's place; null: as small as it can be"
    )
    last: int | None = Field(default=None, ge=1, description="largest j; null: as large as it can be")


class RLRAsPrinted(Options):
    h: int = Field(default=2, ge=1, description="length of the half-order block")
    std: float = Field(default=1e-3, gt=0, description="standard deviation of the noise on the parameters")
    sign: Literal[1, -1] = Field(default=1, description="-1 for the score as printed, 1 for the corrected one")


class RLRAsReleased(Options):
    draws: int = Field(default=2, ge=1, description="single steps that are drawn, with replacement (its chain_len)")
    first: float = Field(default=1.0, description="factor of the last step's first-order part")
    half: float = Field(default=1.0, description="factor of the drawn steps' score part")

    def check(self, steps: int, batch: int) -> None:
        numbers = math.comb(steps + self.draws - 1, self.draws) * steps * (steps + 2)
        if numbers > LARGEST_LAW:
            raise ValueError(f"draws must give a law of <= {LARGEST_LAW} numbers, {self.draws} draws give {numbers}")


class THO(Options):
    width: int = Field(default=2, ge=1, description="steps that are back-propagated through at once")
    pilot: int = Field(default=64, ge=1, description="roll-outs on which the weights are fitted, once")
    batch: int = Field(default=16, ge=1, description="pilot roll-outs at once; four times it divides pilot")
    pathwise: bool | None = Field(
        default=None, description="use the reward's gradient in the last steps; null: if the reward is differentiable"
    )

    def check(self, steps: int, batch: int) -> None:
        band(steps, self.width)
        if self.pilot % (FOLDS * self.batch):
            raise ValueError(
                f"pilot must be a multiple of {FOLDS} * batch, the folds of a cross-validation, got {self.pilot} and "
                f"batch = {self.batch}"
            )


class Queued(Options):
    length: int = Field(
        default=4, ge=1, description="M, batches in flight; each update moves every one by T / M steps, so M divides T"
    )

    def check(self, steps: int, batch: int) -> None:
        if steps % self.length:
            raise ValueError(f"length of the queue must divide the {steps} sampling steps, got {self.length}")


class Copies(Options):
    copies: int = Field(default=2, ge=0, description="re-noised copies of the last step, besides the roll-out's own")


class VADER(Options):
    mode: Literal["last", "rand", "specific"] = Field(
        default="last", description="the last step; a uniform number of last steps; all but the first `skipped`"
    )
    skipped: int = Field(default=15, ge=0, description="first steps left out in mode specific")


class SFT(Options):
    regulariser: Literal["gradient-penalty", "baseline", "conditional-baseline", "spectral"] = Field(
        default="gradient-penalty",
        description="what limits the critic: its gradient's norm (eq. 23); the baseline's error against it, as "
        "released, or as printed in eq. 22, which limits none; or weights of spectral norm one",
    )
    strength: float | None = Field(
        default=None,
        ge=0,
        description="of the regulariser; null: 0.1 for the gradient penalty, and 1 / T for the baseline's squared "
        "errors, whose sum over the steps it multiplies, as in the released code",
    )
    critic_steps: int = Field(default=5, ge=1, description="steps of the critic in an update, a batch for each")
    generator_steps: int = Field(
        default=1, ge=1, description="steps of the sampler in an update, against the same critic"
    )
    critic_learning_rate: float = Field(default=1e-4, gt=0, description="of the critic's and the baseline's Adam")
    critic: Literal["conv", "mlp"] = Field(
        default="conv", description="convolutions that halve the image, or a perceptron on all of its numbers"
    )
    critic_widths: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        min_length=1,
        description="channels after each halving, or widths of the perceptron; null: 32, 64, 128 as far as the image "
        "can be halved, or 128, 128. The paper's: 256, 512, 1024",
    )
    value_widths: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=[128, 128],
        min_length=1,
        description="of the baseline network, a perceptron with gains for every step, trained where it is used; null: "
        "no network, and the other samples' mean return is the baseline. The paper's: 1024, 1024, 256",
    )

    def check(self, steps: int, batch: int) -> None:
        if self.value_widths is None and self.regulariser in ("baseline", "conditional-baseline"):
            raise ValueError(f"value_widths must be given for the regulariser {self.regulariser}, got null")


class SFTPG(SFT):
    regulariser: Literal["gradient-penalty", "baseline", "conditional-baseline", "spectral"] = Field(
        default="baseline", description=SFT.model_fields["regulariser"].description
    )
    batches: Literal["fresh", "clipped", "buffer", "pairs"] = Field(
        default="fresh",
        description="what the sampler's steps see: new roll-outs each, unbiased; one new batch with clipped ratios, "
        "as in PPO; as in algorithm 1, the roll-outs that the critic was trained on; or, as released, single steps of "
        "these",
    )
    ratio_clip: float = Field(
        default=0.2, gt=0, lt=1, description="largest change of a step's density that is rewarded, for clipped batches"
    )

    def check(self, steps: int, batch: int) -> None:
        super().check(steps, batch)
        if self.value_widths is None and batch < 2:
            raise ValueError(f"value_widths must be given where the batch is {batch}, got null")


Make = Callable[[Any, int, Baseline], Estimator]
Fit = Callable[[Any, Pilot, Baseline], Estimator]
Loss = Callable[[Any, int, Baseline, dict[str, Any]], Method]
Shortcut = Callable[[Any, int], ShortcutFineTuning]


@dataclass(frozen=True)
class Entry:
    """A method of the table; exactly one of `make`, `fit`, `loss` and `shortcut` is there.

    Attributes:
        options: its options, with types, defaults, ranges and what they mean.
        published: where it comes from.
        differentiable: whether it needs the reward's gradient.
        unbiased: whether, whatever its options, its mean is the gradient of E[return], smoothed where it puts noise on
            the parameters.
        baseline: whether a baseline is used.
        make: (options, steps, baseline) -> estimator.
        fit: (options, pilot, baseline) -> estimator, from pilot roll-outs.
        loss: (options, steps, baseline, the division by name or nothing) -> method, where it is no estimator.
        shortcut: (options, steps) -> method, where it learns from data by a critic (`scale.shortcut`).
        every_score: whether it uses the score of every step; what `make` gives says so itself.
    """

    options: type[Options]
    published: str
    differentiable: bool
    unbiased: bool
    baseline: bool
    make: Make | None = None
    fit: Fit | None = None
    loss: Loss | None = None
    shortcut: Shortcut | None = None
    every_score: bool = False


def _align_prop(o: AlignProp, steps: int, _: Baseline) -> Estimator:
    mean = 0.84 * steps if o.mean is None else o.mean
    std = 0.1 * steps if o.std is None else o.std
    if not o.debiased:
        return truncations.alignprop(steps, mean, std)
    law = (1 - o.full) * truncations.alignprop_law(steps, mean, std)
    law[-1] += o.full
    return named.random_truncation(law / law.sum(), debiased=True)


def _zeroth_order(o: ZerothOrder, steps: int, baseline: Baseline) -> Estimator:
    estimator = named.with_baseline(named.zeroth_order(steps, o.std, o.kind), baseline)
    return named.antithetic(estimator, over="parameters") if o.antithetic else estimator


def _rlr(o: RLR, steps: int, baseline: Baseline) -> Estimator:
    allowed, law = rlr.starts(steps, o.h, o.reading), None
    if o.first is not None or o.last is not None:
        law = rlr.uniform(o.first or allowed[0], o.last or allowed[-1])
    return rlr.rlr(steps, o.h, o.std, law=law, reading=o.reading, zeroth=o.zeroth, baseline=baseline)


def _rlr_as_printed(o: RLRAsPrinted, steps: int, baseline: Baseline) -> Estimator:
    return Estimator("RLR as printed", rlr.as_printed(steps, o.h, o.sign), ParameterNoise(o.std), baseline)


def _rlr_as_released(o: RLRAsReleased, steps: int, baseline: Baseline) -> Estimator:
    return Estimator("RLR as released", rlr.as_released(steps, o.draws, o.first, o.half), baseline=baseline)


def _srt(o: SRT, pilot: Pilot, _: Baseline) -> Estimator:
    return fitted_truncation(
        pilot.chain,
        pilot.params,
        pilot.objective,
        o.length,
        pilot.generator,
        pilot=o.pilot,
        condition=_first(pilot.condition, o.pilot),
    )


def _tho(o: THO, pilot: Pilot, baseline: Baseline) -> Estimator:
    pathwise = pilot.objective.reward.differentiable if o.pathwise is None else o.pathwise
    return telescoped(
        pilot.chain,
        pilot.params,
        pilot.objective,
        band(pilot.chain.steps, o.width, pathwise),
        pilot.generator,
        baseline=baseline,
        pilot=o.pilot,
        batch=o.batch,
        condition=_first(pilot.condition, o.batch),
    )


def _shortcut(o: SFT, steps: int) -> ShortcutFineTuning:
    regulariser: Any = o.regulariser.replace("-", " ")
    chosen = o.strength if o.strength is not None else 0.1 if o.regulariser == "gradient-penalty" else 1 / steps
    own: dict[str, Any] = {"batches": o.batches, "ratio_clip": o.ratio_clip} if isinstance(o, SFTPG) else {}
    return ShortcutFineTuning(
        "policy" if isinstance(o, SFTPG) else "pathwise",
        regulariser,
        o.critic_steps,
        o.generator_steps,
        chosen,
        critic_learning_rate=o.critic_learning_rate,
        **own,
    )


def _first(condition: Condition, samples: int) -> Condition:
    """Return the condition of the first samples, of which there must be enough."""
    part = of_samples(condition, slice(0, samples))
    found = part if part is None or isinstance(part, torch.Tensor) else part.steps[0]
    if found is not None and len(found) < samples:
        raise ValueError(f"condition must hold the pilot's {samples} samples, got {len(found)}")
    return part


METHODS: dict[str, Entry] = {
    "first-order": Entry(
        NoOptions,
        "full back-propagation; RLR, eq. 9",
        differentiable=True,
        unbiased=True,
        baseline=False,
        make=lambda o, steps, b: named.first_order(steps),
    ),
    "truncated": Entry(
        Truncated,
        "DRaFT-K, Clark et al. 2023, arXiv:2309.17400",
        differentiable=True,
        unbiased=False,
        baseline=False,
        make=lambda o, steps, b: named.truncated(steps, o.length),
    ),
    "align-prop": Entry(
        AlignProp,
        "AlignProp, Prabhudesai et al. 2023, arXiv:2310.03739; its released code's law",
        differentiable=True,
        unbiased=False,
        baseline=False,
        make=_align_prop,
    ),
    "srt": Entry(
        SRT,
        "verifine: unbiased truncation with stratified lengths, docs/stratified.md",
        differentiable=True,
        unbiased=True,
        baseline=False,
        fit=_srt,
    ),
    "half-order": Entry(
        HalfOrder,
        "RLR, eq. 7",
        differentiable=False,
        unbiased=True,
        baseline=True,
        make=lambda o, steps, b: named.with_baseline(named.half_order(steps, o.length), b),
    ),
    "policy-gradient": Entry(
        NoOptions,
        "REINFORCE along the chain; DDPO-SF, Black et al. 2023, arXiv:2305.13301",
        differentiable=False,
        unbiased=True,
        baseline=True,
        make=lambda o, steps, b: named.with_baseline(named.policy_gradient(steps), b),
    ),
    "ddpo": Entry(
        DDPO,
        "DDPO-IS, Black et al. 2023, arXiv:2305.13301",
        differentiable=False,
        unbiased=False,
        baseline=False,
        loss=lambda o, steps, b, division: PPO(o.clip, o.epochs, o.minibatches, o.advantage, o.group, **division),
        every_score=True,
    ),
    "dpok": Entry(
        NoOptions,
        "DPOK, Fan et al. 2023, arXiv:2305.16381; unbiased only where kl = 0",
        differentiable=False,
        unbiased=False,
        baseline=True,
        loss=lambda o, steps, b, division: DPOK(b, **division),
        every_score=True,
    ),
    "zeroth-order": Entry(
        ZerothOrder, "RLR, eq. 8", differentiable=False, unbiased=True, baseline=True, make=_zeroth_order
    ),
    "rlr": Entry(
        RLR,
        "RLR, eq. 11 with its corrections, docs/rlr.md",
        differentiable=True,
        unbiased=True,
        baseline=True,
        make=_rlr,
    ),
    "rlr-as-printed": Entry(
        RLRAsPrinted, "RLR, eq. 11", differentiable=True, unbiased=False, baseline=True, make=_rlr_as_printed
    ),
    "rlr-as-released": Entry(
        RLRAsReleased,
        "RLR, its released code, idealised",
        differentiable=True,
        unbiased=False,
        baseline=True,
        make=_rlr_as_released,
    ),
    "tho": Entry(
        THO,
        "verifine: telescoped half order, docs/telescoped.md",
        differentiable=False,
        unbiased=True,
        baseline=True,
        fit=_tho,
        every_score=True,
    ),
    "draft-lv": Entry(
        Copies,
        "DRaFT-LV, Clark et al. 2023, arXiv:2309.17400",
        differentiable=True,
        unbiased=False,
        baseline=False,
        loss=lambda o, steps, b, division: DraftLV(o.copies, **division),
    ),
    "implicit-diffusion": Entry(
        Queued,
        "Implicit Diffusion, Marion et al. 2024, arXiv:2402.05468, algorithm 2: a queue of batches, late gradients",
        differentiable=True,
        unbiased=False,
        baseline=False,
        loss=lambda o, steps, b, division: Queue(named.first_order(steps), o.length, **division),
    ),
    "vader": Entry(
        VADER,
        "VADER, Prabhudesai et al. 2024, arXiv:2407.08737; its released code's modes",
        differentiable=True,
        unbiased=False,
        baseline=False,
        make=lambda o, steps, b: truncations.vader(steps, o.mode, o.skipped),
    ),
    "sft": Entry(
        SFT,
        "SFT, Fan and Lee 2023, arXiv:2301.13362, eq. 15: from data, through the critic's gradient",
        differentiable=False,
        unbiased=False,
        baseline=False,
        shortcut=_shortcut,
    ),
    "sft-pg": Entry(
        SFTPG,
        "SFT-PG, Fan and Lee 2023, arXiv:2301.13362, algorithm 1: from data, by the policy gradient",
        differentiable=False,
        unbiased=False,
        baseline=False,
        shortcut=_shortcut,
        every_score=True,
    ),
}


def find(name: str) -> Entry:
    """Return the entry of a method.

    Raises:
        ValueError: if there is none of that name; it says which is the nearest.
    """
    if name not in METHODS:
        raise ValueError(f"name must be the name of a method{nearest(name, list(METHODS))}, got {name!r}")
    return METHODS[name]


def complete_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a method with the defaults of those that are left out.

    Raises:
        PydanticCustomError: if an option is unknown or wrong, for the validator of the settings to report.
    """
    kind = find(name).options
    try:
        return kind.model_validate(options).model_dump()
    except ValidationError as error:
        first = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
    key, message = explain(first, kind)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, kind.model_fields, 1, 0.5)
        known = f"options of {name}: {', '.join(kind.model_fields) or 'none'}"
        context = {"key": key, "close": close[0] if close else "", "known": known}
        raise PydanticCustomError("unknown_option", "unknown option {key}; {known}", context)
    raise PydanticCustomError("rule", "{key} {text}", {"key": key, "text": message.removeprefix(f"{key} ")})


def read_options(name: str, options: dict[str, Any]) -> Options:
    """Return a method's options as an object, those left out at their defaults.

    Raises:
        ValueError: in one line, if there is no such method, or an option is unknown or wrong.
    """
    return parse(find(name).options, options, f"options of {name}")


def check_options(name: str, options: dict[str, Any], steps: int, batch: int) -> None:
    """Check options against the length of the chain and the size of the batch.

    Raises:
        ValueError: if they do not suit.
    """
    read_options(name, options).check(steps, batch)
    scored_steps(name, options, steps)


def scored_steps(name: str, options: dict[str, Any], steps: int) -> Sequence[int]:
    """Return the steps t whose noise's score a method uses, which must have std(t) > 0.

    Raises:
        ValueError: if the options do not suit a chain of that length.
    """
    entry = find(name)
    if entry.make is None:
        return range(1, steps + 1) if entry.every_score else ()
    estimator = entry.make(read_options(name, options), steps, Constant())
    return [column for column in estimator.credit.columns if column > 0]


def make_baseline(baseline: str | float) -> Baseline:
    """Return the baseline that the settings name: "none", "leave-one-out" (over the whole batch) or a number."""
    if isinstance(baseline, str):
        if baseline not in ("none", "leave-one-out"):
            raise ValueError(f"baseline must be 'none', 'leave-one-out' or a number, got {baseline!r}")
        return LeaveOneOut() if baseline == "leave-one-out" else Constant(0.0)
    return Constant(baseline)


def make_estimator(
    choice: Choice,
    chain: Chain,
    params: Params,
    objective: Objective,
    generator: torch.Generator,
    condition: Condition = None,
) -> Estimator:
    """Return the estimator that the settings name; SRT and THO are fitted here, on pilot roll-outs of their own.

    Args:
        choice: name, options and baseline: `config.method`, or one of `config.audit.estimators`.
        generator: draws the pilot; not touched by the methods that need none.
        condition: of at least as many samples as a pilot batch has.

    Raises:
        ValueError: if the method is a surrogate loss; if options do not suit the chain; if the reward is not
            differentiable and must be.
    """
    entry, options = _checked(choice, objective)
    baseline = make_baseline(choice.baseline)
    if entry.make is not None:
        return entry.make(options, chain.steps, baseline)
    if entry.fit is None:
        kind = "is a surrogate loss" if entry.shortcut is None else LEARNS_FROM_DATA
        raise ValueError(f"name must be that of an estimator, {choice.name} {kind}")
    fixed = {name: p.detach() for name, p in params.items()}
    return entry.fit(options, Pilot(chain, fixed, objective, generator, condition), baseline)


def make_method(
    choice: Choice,
    chain: Chain,
    params: Params,
    objective: Objective,
    generator: torch.Generator,
    condition: Condition = None,
    division: Division | None = None,
) -> tuple[Method, Estimator | None]:
    """Return the method of the fine-tuning loop that the settings name, and its estimator unless it is a loss.

    Args:
        division: of each batch into micro-batches and over processes; None: none. A pilot is not divided.

    Raises:
        ValueError: as `make_estimator` does, but for losses.
    """
    entry, options = _checked(choice, objective)
    given: dict[str, Any] = {} if division is None else {"division": division}
    if entry.loss is not None:
        return entry.loss(options, chain.steps, make_baseline(choice.baseline), given), None
    if entry.shortcut is not None:
        raise ValueError(f"name must be that of a method that learns from a reward, {choice.name} {LEARNS_FROM_DATA}")
    estimator = make_estimator(choice, chain, params, objective, generator, condition)
    return FromEstimator(estimator, **given), estimator


def _checked(choice: Choice, objective: Objective) -> tuple[Entry, Options]:
    entry = find(choice.name)
    if entry.differentiable and not objective.reward.differentiable:
        raise ValueError(
            f"method {choice.name} needs a differentiable reward, {type(objective.reward).__name__} is not"
        )
    return entry, read_options(choice.name, choice.options)
