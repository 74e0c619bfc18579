"""Chapter *At scale*: the claims of *Estimators* and *RLR* once more, on networks, and what a run on them rests on.

The same claim objects, with checks of kind "scale": `chapter(models)` makes them for any models, so that
`verifine audit` judges a user's own by them, by identities and by samples. Registered are the identities, on a small
Stable Diffusion with random weights and LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms import estimators as named
from algorithms import rlr
from algorithms.baselines import LeaveOneOut
from algorithms.chain import Params, for_reward
from algorithms.credit import Credit
from algorithms.estimators import Estimator, with_baseline
from algorithms.losses import Trajectories
from algorithms.objective import Objective
from algorithms.stratified import fitted_truncation
from algorithms.telescoped import band, telescoped
from claims import estimators, released, variances
from claims import rlr as rlr_claims
from claims import telescoped as telescoping
from claims.claim import Check, Claim
from claims.on_model import SAMPLES, Fewer, Model, Prepared, along_names, identical
from claims.on_samples import Group, Sampled, Sampling, cut_step_by_step, denormalised_twice, sampled, scored, times
from scale import audit
from scale.config import Config, parse
from scale.memory import LiveBytes
from scale.network import checkpoint_blocks
from scale.sampler import gaussian_steps
from scale.task import Task

CHAPTER = "At scale"
PATHWISE, SCORES = 0.1, 0.3  # margins, as shares of the derivative
MU = 1e-3  # noise on the parameters, the one of RLR's appendix A.2
LATENT = ("tiny", "stable-diffusion")

Models = Sequence[Model]


def on_models(base: Claim, name: str, checks: tuple[Check, ...], **changes: Any) -> Claim:
    """Return a claim of another chapter with its checks on networks."""
    # Stated as it is true: the printed form, judged in the paper's own chapter, is a planted error here.
    judged = tuple(
        c if c.printed is None else replace(c, printed=None, controls={"as printed": c.printed, **c.controls})
        for c in checks
    )
    made = replace(
        base,
        id=f"at-scale.{name}",
        chapter=CHAPTER,
        paper="verifine",
        about="own",
        source=f"{base.source}; on networks: {base.id}",
        statement=base.corrected or base.statement,
        printed="holds",
        corrected=None,
        checks=judged,
        figures=lambda context: (),
        tables=lambda context: (),
    )
    return replace(made, **changes)


def own(name: str, title: str, statement: str, why: str, derivation: str, checks: tuple[Check, ...]) -> Claim:
    """Return a claim of this chapter's own."""
    return Claim(
        id=f"at-scale.{name}",
        chapter=CHAPTER,
        paper="verifine",
        about="own",
        source=f"derived in docs/{derivation.partition('#')[0]}",
        title=title,
        statement=statement,
        printed="holds",
        why=why,
        derivation=derivation,
        checks=checks,
    )


# --- what is sampled together -------------------------------------------------------------------------------------


def lengths(at: Sampling) -> np.ndarray:
    """The law of the number of last steps that AlignProp back-propagates through."""
    return np.full(at.steps, 1 / at.steps)


def two_sided(at: Sampling) -> Estimator:
    return named.antithetic(named.zeroth_order(at.steps, MU), "parameters")


def corrected(at: Sampling) -> Estimator:
    return rlr.rlr(at.steps, 1, MU, reading="II", zeroth="antithetic", baseline=at.baseline)


BACK_PROPAGATED = Group(
    "truncated back-propagation",
    leader=lambda at: named.random_truncation(lengths(at), debiased=True),
    support=lambda at: np.eye(1, at.steps + 1).repeat(at.steps, 0),
)
SCORED = Group(
    "the policy gradient",
    leader=lambda at: scored(at, named.policy_gradient(at.steps)),
    support=lambda at: band(at.steps, min(2, at.steps), at.task.objective.reward.differentiable),
)
PERTURBED = Group("zeroth order", leader=two_sided, support=None)
RECURSIVE = Group("RLR", leader=corrected, support=None)


# --- gradients by the sweep and by other means --------------------------------------------------------------------


def swept(at: Prepared, estimator: Estimator, micro_batch: int | None = None, *address: str) -> Params:
    noise, condition = at.noise(SAMPLES, "identity")
    return audit.accumulated(at.task, estimator, at.params, noise, condition, micro_batch)


@cache
def whole_graph(at: Prepared) -> Params:
    noise, condition = at.noise(SAMPLES, "identity")
    return audit.whole_graph_gradient(at.task, at.params, noise, condition, recomputed=at.large)


@cache
def by_log_densities(at: Prepared, length: int = 1, mean: bool = False) -> Params:
    noise, condition = at.noise(SAMPLES, "identity")
    return audit.score_gradient(at.task, at.params, noise, condition, at.baseline.value, length, mean)


def sized(reference: Callable[[Prepared], Params], subject: Callable[[Prepared], Params]) -> Callable[[Prepared], Any]:
    """Return the components of `subject`'s gradient along `reference`'s and random directions, as shares of its length."""
    return lambda at: at.components(subject(at), reference(at))


def half_order(at: Prepared, length: int) -> Estimator:
    return scored(at, named.half_order(at.steps, length))


def first_order(models: Models) -> Claim:
    """Full back-propagation."""

    def checks(model: Model) -> tuple[Check, ...]:
        exact = identical(
            model,
            "one graph",
            "Is the gradient by the sweep the one of a single graph through sampler, decoder and reward?",
            along_names(model),
            subject=sized(whole_graph, lambda at: swept(at, named.first_order(at.steps))),
            reference=sized(whole_graph, whole_graph),
            controls={
                "first sampling step dropped": sized(
                    whole_graph, lambda at: swept(at, named.truncated(at.steps, at.steps - 1))
                )
            },
        )
        forward = sampled(
            model,
            BACK_PROPAGATED,
            "forward mode",
            "Has first order the mean of forward-mode derivatives of the whole roll-out?",
            subject=lambda at: Sampled(named.first_order(at.steps)),
            margin=PATHWISE,
            controls={
                "outputs detached step by step": cut_step_by_step,
                "images denormalised twice": denormalised_twice,
            },
        )
        return (exact, *forward) if model.differentiable else ()

    return on_models(
        estimators.FIRST_ORDER,
        "first-order",
        tuple(check for model in models for check in checks(model)),
        title="Back-propagation by the sweep is the gradient through sampler, decoder and reward",
        statement="On a network with LoRA the sweep with column 0 gives the gradient of one graph through all sampling steps, the "
        "decoder and the reward, to rounding, whatever the number of steps.",
        printed="holds",
        corrected=None,
        about="own",
        paper="verifine",
        why="The sweep computes each step again and carries the costate: the chain rule in another order. TRL's step-by-step "
        "detaching and a second denormalisation of the images change the gradient, and are refuted.",
    )


def scores(models: Models) -> Claim:
    """Half order and policy gradient."""

    def checks(model: Model) -> tuple[Check, ...]:
        def exact(length: int, what: str) -> Check:
            return identical(
                model,
                f"{what}, by log-densities",
                f"Is {what} by the sweep the gradient of the log-densities, times the return, by autograd?",
                along_names(model),
                subject=sized(lambda at: by_log_densities(at, length), lambda at: swept(at, half_order(at, length))),
                reference=sized(*[lambda at: by_log_densities(at, length)] * 2),
                printed=sized(
                    lambda at: by_log_densities(at, length), lambda at: swept(at, times(half_order(at, length), -1))
                ),
                controls={
                    "a block counted 1.5 times": sized(
                        lambda at: by_log_densities(at, length),
                        lambda at: swept(at, times(half_order(at, length), 1.5)),
                    )
                },
            )

        def mean(length: int, what: str) -> tuple[Check, ...]:
            return sampled(
                model,
                SCORED,
                f"{what}, sampled",
                f"Has {what} the mean of the derivative of the whole roll-out?",
                subject=lambda at: Sampled(scored(at, named.half_order(at.steps, length))),
                margin=SCORES,
                printed=lambda at: Sampled(scored(at, times(named.half_order(at.steps, length), -1))),
                controls={
                    "half the steps left out": lambda at: Sampled(
                        scored(at, without_last_rows(named.half_order(at.steps, length)))
                    )
                },
            )

        if not model.densities:
            return ()
        names = {1: "policy gradient", 2: "half order"}
        fit = {length: what for length, what in names.items() if length <= model.sampled_steps}
        return (*(exact(*each) for each in fit.items()), *(check for each in fit.items() for check in mean(*each)))

    return on_models(estimators.HALF_ORDER, "half-order", tuple(check for model in models for check in checks(model)))


def without_last_rows(estimator: Estimator) -> Estimator:
    """Planted error: the earlier half of the sampling steps gets no credit."""
    matrices = estimator.credit.matrices.copy()
    matrices[:, matrices.shape[1] // 2 :] = 0
    return replace(estimator, credit=replace(estimator.credit, matrices=matrices))


def zeroth_order(models: Models) -> Claim:
    def checks(model: Model) -> tuple[Check, ...]:
        return sampled(
            model,
            PERTURBED,
            "two-sided",
            "Has the two-sided zeroth-order estimator, with noise of 0.001 on every step's weights, the derivative's mean?",
            subject=lambda at: Sampled(two_sided(at)),
            margin=SCORES,
            controls={"sign flipped": lambda at: Sampled(times(two_sided(at), -1))},
        )

    return on_models(
        variances.ANTITHETIC, "zeroth-order", tuple(check for model in models for check in checks(model)),
        title="Two-sided zeroth order with noise on every step's adapters has the gradient as its mean",
        statement="With noise of standard deviation 0.001 on every sampling step's LoRA weights, and both of its signs on the same "
        "roll-out, the zeroth-order estimator has the gradient as its mean, up to the smoothing.",
        printed="holds", corrected=None, about="own", paper="verifine",
    )  # fmt: skip


def log_densities(models: Models) -> Claim:
    """The sum over dimensions."""

    def checks(model: Model) -> tuple[Check, ...]:
        if not model.densities:
            return ()
        return (
            identical(
                model,
                "sum over the latent",
                "Is the policy gradient the gradient of log-densities summed over the latent's dimensions?",
                along_names(model),
                subject=sized(by_log_densities, lambda at: swept(at, half_order(at, 1))),
                reference=sized(by_log_densities, by_log_densities),
                printed=sized(by_log_densities, lambda at: by_log_densities(at, mean=True)),
                controls={
                    "last step's density left out": sized(
                        by_log_densities, lambda at: swept(at, without_first_row(half_order(at, 1)))
                    )
                },
            ),
        )

    return on_models(
        released.LOG_PROB_MEAN, "log-prob-sum", tuple(check for model in models for check in checks(model))
    )


def without_first_row(estimator: Estimator) -> Estimator:
    """Planted error: the last sampling step gets no credit."""
    matrices = estimator.credit.matrices.copy()
    matrices[:, 0] = 0
    return replace(estimator, credit=replace(estimator.credit, matrices=matrices))


def truncation(models: Models) -> Claim:
    """AlignProp's random truncation."""

    def checks(model: Model) -> tuple[Check, ...]:
        if not model.differentiable:
            return ()
        return sampled(
            model,
            BACK_PROPAGATED,
            "random truncation",
            "Has random truncation, with every step divided by its probability to be reached, the derivative's mean?",
            subject=lambda at: Sampled(named.random_truncation(lengths(at), debiased=True)),
            margin=PATHWISE,
            printed=lambda at: Sampled(named.random_truncation(lengths(at))),
            controls={"last step only": lambda at: Sampled(named.truncated(at.steps, 1))},
        )

    return on_models(
        released.RANDOM_TRUNCATION, "random-truncation", tuple(check for model in models for check in checks(model))
    )


def recursive(models: Models) -> Claim:
    """RLR."""

    def mean_of(at: Prepared, credit: Credit) -> Params:
        """Return an estimator's mean on the batch: each step's gradient times its expected row sum."""
        w = np.zeros((at.steps, at.steps + 2))
        w[:, 0] = credit.row_sums()
        return swept(at, Estimator("row sums", Credit.of(w)))

    def law(at: Prepared, reading: Any) -> Credit:
        return rlr.rlr(at.steps, 1, MU, reading=reading).credit

    def checks(model: Model) -> tuple[Check, ...]:
        if not model.differentiable or model.sampled_steps < 3:  # shorter chains leave RLR no block
            return ()
        means = tuple(
            identical(
                model,
                f"row sums, reading {reading}",
                f"Is the mean of corrected RLR in reading {reading}, step gradients times row sums, the gradient of one graph?",
                along_names(model),
                subject=sized(whole_graph, lambda at, reading=reading: mean_of(at, law(at, reading))),
                reference=sized(whole_graph, whole_graph),
                printed=sized(whole_graph, lambda at: mean_of(at, rlr.as_printed(at.steps, 1, 1)))
                if reading == "I"
                else None,
                controls={
                    "the released code": sized(whole_graph, lambda at: mean_of(at, rlr.as_released(at.steps, 2)))
                },
            )
            for reading in ("I", "II")
        )
        if not model.densities:
            return means
        return means + sampled(
            model,
            RECURSIVE,
            "RLR(1), reading II",
            "Has corrected RLR, both signs of its noise taken, the mean of the derivative of the whole roll-out?",
            subject=lambda at: Sampled(corrected(at)),
            margin=SCORES,
            controls={"block and zeroth order with the sign flipped": lambda at: Sampled(flipped(corrected(at)))},
        )

    return on_models(
        rlr_claims.INDEX_SET, "rlr", tuple(check for model in models for check in checks(model)),
        title="On networks too the printed RLR counts the last sampling step twice; corrected it has the gradient as its mean",
    )  # fmt: skip


def flipped(estimator: Estimator) -> Estimator:
    """Planted error: the scores' and the parameter noise's columns with the other sign."""
    matrices = estimator.credit.matrices.copy()
    matrices[:, :, 1:] *= -1
    return replace(estimator, credit=replace(estimator.credit, matrices=matrices))


@cache
def fitted_weights(at: Sampling) -> Estimator:
    """Return THO of width 2, fitted on roll-outs that are used for nothing else."""
    task, pilot = at.task, 4 * min(64, at.task.config.audit.batch)
    support = band(at.steps, 2, task.objective.reward.differentiable)
    return telescoped(
        task.chain, task.params, task.objective, support, task.generator("audit", "telescoped"),
        baseline=at.baseline, pilot=pilot, batch=pilot // 4, condition=task.condition(pilot // 4),
    )  # fmt: skip


def telescope(models: Models) -> Claim:
    def checks(model: Model) -> tuple[Check, ...]:
        if not model.densities or model.sampled_steps < 2:
            return ()
        return sampled(
            model,
            SCORED,
            "THO(2)",
            "Has THO of width 2, with weights fitted on other roll-outs, the derivative's mean?",
            subject=lambda at: Sampled(fitted_weights(at)),
            margin=SCORES,
            controls={"weights that sum to 0.5": lambda at: Sampled(times(fitted_weights(at), 0.5))},
        )

    return on_models(
        telescoping.TELESCOPED, "telescoped", tuple(check for model in models for check in checks(model)),
        title="Telescoped half order is unbiased on networks, with weights fitted on a pilot",
        statement=r"THO of width 2 with weights fitted on other roll-outs, whose rows sum to one, has the gradient as its mean.",
    )  # fmt: skip


@cache
def fitted_lengths(at: Sampling) -> Estimator:
    """Return SRT of expected length 3, fitted on other roll-outs.

    Its lengths are drawn one by one: what is sampled are single samples.
    """
    task, pilot = at.task, min(256, at.task.config.audit.batch)
    arguments = (task.chain, task.params, task.objective, min(3.0, at.steps), task.generator("audit", "stratified"))
    made = fitted_truncation(*arguments, pilot=pilot, condition=task.condition(pilot))
    return replace(made, credit=replace(made.credit, stratified=False))


def stratified(models: Models) -> Claim:
    def unweighted(at: Sampling) -> Estimator:
        made = fitted_lengths(at)
        ones = (made.credit.matrices != 0).astype(float)
        return replace(made, credit=replace(made.credit, matrices=ones))

    def checks(model: Model) -> tuple[Check, ...]:
        if not model.differentiable or model.sampled_steps < 2:
            return ()
        return sampled(
            model,
            BACK_PROPAGATED,
            "SRT(3)",
            "Has debiased truncation with lengths of a law fitted on other roll-outs the derivative's mean?",
            subject=lambda at: Sampled(fitted_lengths(at)),
            margin=PATHWISE,
            controls={"steps not divided by their probability": lambda at: Sampled(unweighted(at))},
        )

    return on_models(
        telescoping.STRATIFIED, "stratified", tuple(check for model in models for check in checks(model)),
        title="Truncation with fitted lengths, debiased, has the gradient as its mean on networks",
        statement="With lengths drawn from a law fitted on other roll-outs, and every step divided by its probability to be reached, "
        "truncated back-propagation has the gradient as its mean. (Stratifying the draws changes no sample's law.)",
    )  # fmt: skip


# --- memory -------------------------------------------------------------------------------------------------------

HORIZONS = (5, 10, 50)


@dataclass(frozen=True)
class MeanSquare:
    """A reward of the latents: without a decoder, whose graph first order keeps once, whatever T is."""

    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return -x0.square().flatten(1).mean(1)


def memory(models: Models) -> Claim:
    """Peak bytes of full back-propagation by the sweep against the policy gradient's."""

    def longer(task: Task, steps: int) -> Task:
        scheduler = task.parts["scheduler"]
        sampler = gaussian_steps(scheduler, steps, 1.0) if scheduler.__class__.__name__ == "DDIMScheduler" else None
        chain = replace(task.chain, sampler=sampler or task.chain.sampler)
        return replace(task, chain=chain, objective=Objective(MeanSquare()))

    def peaks(at: Prepared, gradient: Callable[[Task, Any, Any], object]) -> np.ndarray:
        found = []
        for steps in HORIZONS:
            task = longer(at.task, steps)
            noise = named.policy_gradient(steps).draw(task.chain, at.params, 2, task.generator("memory"))
            with LiveBytes() as live:
                gradient(task, noise, task.condition(2))
            found.append(live.peak)
        return np.array(found, float)

    def by(estimator: Callable[[int], Estimator]) -> Callable[[Prepared], np.ndarray]:
        return lambda at: peaks(
            at, lambda task, noise, c: audit.accumulated(task, estimator(task.chain.steps), at.params, noise, c)
        )

    def stored(at: Prepared) -> np.ndarray:
        return peaks(at, lambda task, noise, c: audit.whole_graph_gradient(task, at.params, noise, c))

    def checks(model: Model) -> tuple[Check, ...]:
        apt = model.differentiable and model.densities and model.settings.sampler.scheduler == "ddim"
        if not apt or model.large:  # there a graph of 50 steps fits no memory; `plan` predicts what is needed
            return ()
        scores = by(named.policy_gradient)
        return (
            Check(
                f"{model.name}: peak bytes",
                "scale",
                "Is the peak of full back-propagation by the sweep at most 1.2 times the policy gradient's?",
                tuple(f"T = {steps}" for steps in HORIZONS),
                Fewer(model, 1.2),
                lambda at: (by(named.first_order)(at), scores(at)),
                {"one stored graph": lambda at: (stored(at), scores(at))},
                margin_from="20 per cent, of the issue that asked; bytes of tensors alive, counted, not timed",
            ),
        )

    return on_models(
        variances.MEMORY, "memory", tuple(check for model in models for check in checks(model)),
        title="Full back-propagation by the sweep needs the memory of the policy gradient, for 5, 10 and 50 steps",
        statement="For a reward of the latents, the peak of full back-propagation by the sweep is at most 1.2 times the policy gradient's, whatever the number of steps; "
        "one stored graph's grows with them.",
        why="Both hold one step's activations and the latents; a stored graph holds every step's. (The reward here is one of the "
        "latents: a decoder's graph comes on top for first order, once, whatever the number of steps.)",
    )  # fmt: skip


# --- what a run rests on ------------------------------------------------------------------------------------------


def ratio(models: Models) -> Claim:
    def ratios(at: Prepared, params: Callable[[Prepared], Params]) -> np.ndarray:
        noise, condition = at.noise(SAMPLES, "ratio")
        task = at.task
        batch = Trajectories.of(task.chain, at.params, task.objective, noise, condition)
        found = []
        for t in range(1, at.steps + 1):
            mean = task.chain.mean(params(at), batch.roll.latents[t], t, condition.steps[t - 1])  # type: ignore[union-attr]
            z = (batch.roll.latents[t - 1] - mean) / task.chain.std(t)
            log_prob = -0.5 * z.flatten(1).square().sum(1)
            found.append((log_prob - batch.log_probs[t - 1]).abs().max())
        return np.array([float(torch.stack(found).max())])

    return own(
        "importance-ratio",
        "Before any update every importance ratio is one",
        "The density of every step of a roll-out, computed again with the parameters that drew it, is the one that was "
        "noted: $\\log \\rho_t = 0$.",
        "Precision, another batch shape or another timestep would show here; reports of flat rewards often end in a ratio that "
        "was not one.",
        "scale.md#what-an-audit-checks",
        tuple(
            identical(
                model,
                "log ratio",
                "Is the largest |log importance ratio| over samples and steps zero?",
                ("max |log ρ|",),
                subject=lambda at: ratios(at, lambda p: p.params),
                reference=lambda at: np.zeros(1),
                controls={"parameters of the next update": lambda at: ratios(at, next_update)},
            )
            for model in models
            if model.densities
        ),
    )


def next_update(at: Prepared) -> Params:
    """Parameters a small step away."""
    (direction,) = at.directions(1)
    return {name: p + 1e-2 * direction[name] for name, p in at.params.items()}


def adapters_off(models: Models) -> Claim:
    def differing(at: Prepared, params: Params) -> np.ndarray:
        """How many numbers of a step's mean differ from the network's without adapters."""
        noise, condition = at.noise(SAMPLES, "base")
        x = at.task.chain.initial(noise.initial)
        with torch.no_grad():
            own = at.task.chain.mean(params, x, at.steps, condition.steps[-1])  # type: ignore[union-attr]
            with without_adapters(at.task.chain.network):
                base = at.task.chain.mean({}, x, at.steps, condition.steps[-1])  # type: ignore[union-attr]
        return np.array([float((own != base).sum())])

    return own(
        "adapters-off",
        "At the start the model with adapters is the base model, bit for bit",
        "With LoRA's second factors at zero, as a run begins, every number of a sampling step is the one of the network "
        "without adapters.",
        "So the reference of the KL is the base model, and what an evaluation calls before is before.",
        "scale.md#what-an-audit-checks",
        tuple(
            identical(
                model,
                "numbers that differ",
                "How many numbers of a step's mean differ from the base network's: is it none?",
                ("numbers that differ",),
                subject=lambda at: differing(at, at.task.params),
                reference=lambda at: np.zeros(1),
                controls={"after a step": lambda at: differing(at, at.params)},
            )
            for model in models
            if model.settings.lora is not None
        ),
    )


@contextmanager
def without_adapters(network: torch.nn.Module) -> Iterator[None]:
    """Switch the adapters off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)


def micro_batches(models: Models) -> Claim:
    def estimator(at: Prepared) -> Estimator:
        return with_baseline(named.half_order(at.steps, min(2, at.steps)), LeaveOneOut())

    def forgetful(at: Prepared) -> Params:
        """Planted error: each micro-batch with a baseline of its own."""
        noise, condition = at.noise(SAMPLES, "identity")
        parts = [slice(start, start + 2) for start in range(0, SAMPLES, 2)]
        total: Params = {}
        for part in parts:
            chosen = for_reward(condition)
            assert chosen is not None
            gradient = audit.accumulated(
                at.task, estimator(at), at.params, noise.of(part), at.task.of_prompts(chosen[part])
            )
            total = {name: total.get(name, 0) + g / len(parts) for name, g in gradient.items()}
        return total

    def whole(at: Prepared) -> Params:
        return swept(at, estimator(at))

    return own(
        "micro-batches",
        "Micro-batches give the gradient of the whole batch, leave-one-out baseline included",
        f"{SAMPLES} samples one at a time, two at a time and all at once give the same gradient, to rounding.",
        "All randomness is drawn for the batch; the baseline sees the whole of it, the network a few samples at a time.",
        "scale.md#what-an-audit-checks",
        tuple(
            identical(
                model,
                f"micro-batches of {size}",
                f"Is the gradient in micro-batches of {size} the one of the whole batch?",
                along_names(model),
                subject=sized(whole, lambda at, size=size: swept(at, estimator(at), size)),
                reference=sized(whole, whole),
                controls={"a baseline in every micro-batch": sized(whole, forgetful)},
            )
            for model in models
            if model.densities
            for size in (1, 2)
        ),
    )


def checkpointing(models: Models) -> Claim:
    def switched(at: Prepared, on: Callable[[Any], None]) -> Params:
        """Return first order's gradient on a copy of the network that is switched on."""
        network: Any = copy.deepcopy(at.task.chain.network)
        on(network)
        task = replace(at.task, chain=replace(at.task.chain, network=network))
        return swept(replace(at, task=task), named.first_order(at.steps))

    def librarys(network: Any) -> None:
        network.enable_gradient_checkpointing()
        for name, p in network.named_parameters():  # as a library leaves adapters; else its recomputation fails
            p.requires_grad_(".lora_" in name)

    return own(
        "checkpointing",
        "Recomputing the network's blocks in the backward pass leaves the gradient as it is",
        "With block-wise gradient checkpointing the gradient is the same; with the library's own switch, under parameters "
        "that are passed as arguments, it is another one.",
        "torch's checkpoint runs a block a second time when the parameters that were passed in are gone; ours holds them. No error "
        "is raised: the gradient is simply wrong.",
        "scale.md#gradient-checkpointing",
        tuple(
            identical(
                model,
                "blocks computed again",
                "Is the gradient with block-wise checkpointing the one without?",
                along_names(model),
                subject=sized(whole_graph, lambda at: switched(at, checkpoint_blocks)),
                reference=sized(whole_graph, whole_graph),
                controls={"the library's own switch": sized(whole_graph, lambda at: switched(at, librarys))},
            )
            for model in models
            # A pixel U-Net's own switch leaves attention alone, where the adapters are: nothing is wrong there.
            if model.differentiable and model.settings.lora is not None and model.settings.model.kind in LATENT
        ),
    )


@dataclass(frozen=True)
class Told:
    """A score that tells which prompt it was given: what pairing is checked with."""

    first_only: bool = False
    name: str = "told"
    differentiable: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        given = [prompts[0]] * len(prompts) if self.first_only else prompts
        return torch.tensor([float(sum(map(ord, text))) for text in given])


def images_and_prompts(models: Models) -> Claim:
    def decoded(at: Prepared, twice: bool) -> np.ndarray:
        noise, condition = at.noise(SAMPLES, "images")
        made = by_the_book(at, noise.initial)
        own = at.task.decode(noise.initial, for_reward(condition))
        if twice:
            own = own / 2 + 0.5
        return (own if made is None else own - made).flatten().detach().cpu().numpy()[:4]

    def told(at: Prepared, scorer: Told) -> np.ndarray:
        noise, condition = at.noise(SAMPLES, "images")
        reward: Any = at.task.objective.reward
        return replace(reward, scorer=scorer)(noise.initial, for_reward(condition)).numpy()

    def expected(at: Prepared) -> np.ndarray:
        count = at.task.training
        texts = [at.task.prompts.texts[i % count] for i in range(SAMPLES)]
        return np.array([float(sum(map(ord, text))) for text in texts])

    checks = []
    for model in models:
        checks.append(
            identical(
                model,
                "image range",
                "Are decoded images those of the library's own post-processing, in [0, 1], converted once?",
                tuple(f"number {i + 1}" for i in range(4)),
                subject=lambda at: decoded(at, False),
                reference=lambda at: np.zeros(4),
                controls={"denormalised twice": lambda at: decoded(at, True)},
            )
        )
        checks.append(
            identical(
                model,
                "prompts",
                "Is every image scored with its own prompt?",
                tuple(f"sample {i + 1}" for i in range(SAMPLES)),
                subject=lambda at: told(at, Told()),
                reference=expected,
                controls={"every image with the first prompt": lambda at: told(at, Told(first_only=True))},
            )
        )
    return own(
        "images-and-prompts",
        "The reward sees images in [0, 1], converted once, each with its own prompt",
        "Decoded images are those of the library's own post-processing; sample $i$ is scored with the prompt it was sampled with.",
        "Two released codes convert the range twice, which washes the images out; one scores every image with the first prompt.",
        "scale.md#what-an-audit-checks",
        tuple(checks),
    )


def by_the_book(at: Prepared, latents: Tensor) -> Tensor:
    """Decode by the library's own means: the pipeline's image processor, or for pixels its formula."""
    pipeline = at.task.parts.get("pipeline")
    if pipeline is None:
        return ((latents + 1) / 2).clamp(0, 1)
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(raw, output_type="pt")


# --- the chapter --------------------------------------------------------------------------------------------------

MAKERS: tuple[Callable[[Models], Claim], ...] = (
    first_order,
    scores,
    zeroth_order,
    log_densities,
    truncation,
    recursive,
    telescope,
    stratified,
    memory,
    ratio,
    adapters_off,
    micro_batches,
    checkpointing,
    images_and_prompts,
)


def chapter(models: Models) -> tuple[Claim, ...]:
    """Return the chapter's claims with their checks on each of the models; those that apply to none are left out."""
    return tuple(claim for claim in (make(models) for make in MAKERS) if claim.checks)


TINY = Model(
    "tiny Stable Diffusion",
    parse(
        Config,
        {
            "model": {"kind": "tiny"},
            "sampler": {"steps": 8},
            "prompts": {"train": ["a dog", "the cat"]},
        },
        "the tiny Stable Diffusion of the chapter At scale",
    ),
    sampled=False,  # as many roll-outs as the error share of a whole report asks for would take many minutes
)
CLAIMS: tuple[Claim, ...] = chapter((TINY,))
