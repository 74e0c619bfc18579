"""A made-up run with everything that a report must be able to show. None of its numbers was measured."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from claims.records import (
    CheckEvidence,
    Column,
    Evidence,
    Figure,
    Look,
    Panel,
    Provenance,
    Reading,
    Run,
    Series,
    Statement,
    Table,
)


def looks(bias: float, spread: float = 3.0, last: int = 40960, first: int = 256) -> tuple[Look, ...]:
    """Return a confidence sequence that closes in on `bias` like a mean does."""
    noise, taken, path = random.Random(f"{bias}{spread}"), first, []
    while taken <= last:
        middle = bias + noise.gauss(0, spread / 4 / math.sqrt(taken))
        width = spread * math.sqrt((2 + math.log(taken)) / taken)
        path.append(Look(taken, middle, middle - width, middle + width))
        taken = int(taken * 1.5)
    return tuple(path)


def reading(role: Any, name: str, verdict: Any, estimate: Any, reference: Any, **other: Any) -> Reading:
    """Return an exact reading, or a statistical one if `looks` are given."""
    sequence = other.get("looks", ())
    differences = [a - b for a, b in zip(estimate, reference, strict=True)]
    width = (sequence[-1].upper - sequence[-1].lower) / 2 if sequence else 0.0
    values: dict[str, Any] = {
        "lower": tuple(d - width for d in differences),
        "upper": tuple(d + width for d in differences),
        "margin": (0.05 if sequence else 1e-9,) * len(differences),
        "samples": sequence[-1].samples if sequence else 0,
        "seconds": 1.37 if sequence else 0.0004,
        "alpha": 2.5e-9 if sequence else 0.0,
    }
    return Reading(role, name, verdict, tuple(estimate), tuple(reference), **(values | other))


def statement(name: str, chapter: str, title: str, **other: Any) -> Statement:
    """Return a statement about a paper that holds as printed, unless told otherwise."""
    values: dict[str, Any] = {
        "paper": "RLR",
        "about": "paper",
        "source": "RLR, Proposition 4.1",
        "statement": r"The half-order estimator is unbiased: $\mathbb{E}[\hat g_{\mathrm{HO}}] = \nabla_\theta J$.",
        "printed": "holds",
        "corrected": None,
        "why": "Every row of the credit matrix $W$ sums to one, and every source has the same expectation.",
        "derivation": "estimators.md#sweep",
        "kinds": ("exact", "statistical"),
        "controls": ("sign flipped", "one step counted twice"),
    }
    return Statement(f"{chapter.split()[0].lower()}.{name}", chapter, title=title, **(values | other))


def exact(*readings: Reading, name: str = "closed form", coordinates: tuple[str, ...] = ("mean",)) -> CheckEvidence:
    """Return an exact check."""
    return CheckEvidence(
        name,
        "exact",
        r"The expectation over the Gaussian chain, in closed form, against $\nabla_\theta J$.",
        "Rounding: $10^{-9}$ of the largest entry.",
        coordinates,
        readings,
    )


def sampled(*readings: Reading, name: str = "toy chain", coordinates: tuple[str, ...] = ("mean",)) -> CheckEvidence:
    """Return a statistical check."""
    return CheckEvidence(
        name,
        "statistical",
        "The mean of the estimator on the swiss-roll chain against the exact gradient.",
        "Two per cent of the gradient's norm, the size of the smallest bias that would change a choice of step size.",
        coordinates,
        readings,
    )


def _controls(factor: float = 1.0) -> tuple[Reading, Reading]:
    return (
        reading("control", "sign flipped", "refuted", (-1.234567 * factor,), (1.234567,), looks=looks(-2.4, last=1024)),
        reading("control", "one step counted twice", "refuted", (1.61,), (1.234567,), looks=looks(0.38, last=4096)),
    )


def _evidence(s: Statement, *checks: CheckEvidence, **other: Any) -> Evidence:
    values: dict[str, Any] = {"verdict": "verified", "as_recorded": True, "figures": (), "seconds": 3.21}
    return Evidence(s, checks=checks, **(values | other))


def _plain(name: str, chapter: str, title: str, **other: Any) -> Evidence:
    main = reading("claim", "half-order, $h = 2$", "verified", (1.2349,), (1.234567,), looks=looks(0.0003, last=60000))
    return _evidence(statement(name, chapter, title, **other), sampled(main, *_controls()))


FRONTIER = Figure(
    name="frontier",
    title="Error against cost of seven estimators",
    caption="With a differentiable reward, full back-propagation by a sweep is best at every budget; with a black-box "
    "reward, half-order with $h = 2$ below 100 evaluations and the optimal band above.",
    alt="Root mean square error falls with the number of reward evaluations for all estimators but truncated "
    "back-propagation, which levels off at its bias of 0.12.",
    x_label="reward evaluations per update",
    y_label=r"root mean square error of $\hat g$",
    x_scale="log",
    y_scale="log",
    series=tuple(
        Series(
            label,
            x=tuple(float(2**k) for k in range(3, 12)),
            y=tuple(math.hypot(bias, scale / math.sqrt(2**k)) for k in range(3, 12)),
            lower=tuple(0.9 * math.hypot(bias, scale / math.sqrt(2**k)) for k in range(3, 12)) if i == 0 else (),
            upper=tuple(1.1 * math.hypot(bias, scale / math.sqrt(2**k)) for k in range(3, 12)) if i == 0 else (),
        )
        for i, (label, bias, scale) in enumerate(
            [
                ("first order", 0, 0.5),
                ("truncated, K = 2", 0.12, 0.3),
                ("REINFORCE", 0, 6.0),
                ("half-order", 0, 2.2),
                ("zeroth order", 0.01, 9.0),
                ("optimal band", 0, 1.4),
            ]
        )
    ),
)
MATRICES = Figure(
    name="credit",
    title="Credit matrices of four estimators",
    caption="Bias is a row sum: the printed estimator has a row that sums to two.",
    alt="Four matrices with five rows; the first row of RLR as printed sums to 2, all other rows sum to 1.",
    kind="matrix",
    x_label="source $k$",
    y_label="step $t$",
    matrices=(
        ("first order", tuple((1.0, 0.0, 0.0, 0.0, 0.0, 0.0) for _ in range(5))),
        ("truncated, K = 2", tuple((1.0 if t < 2 else 0.0, 0.0, 0.0, 0.0, 0.0, 0.0) for t in range(5))),
        (
            "RLR as printed",
            (
                (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
                *((0.0, 0.0, 1.0, 0.0, 0.0, 0.0),) * 2,
                *((0.0, 0.0, 0.0, 0.0, 0.25, 0.75),) * 2,
            ),
        ),
        ("optimal band", tuple(tuple(1.37 * (j == t) - 0.37 * (j == t + 1) for j in range(6)) for t in range(5))),
    ),
)
CLOUD = Figure(
    name="cloud",
    title="Samples before and after fine-tuning",
    caption="After 200 updates the chain's samples lie on the tilted target's outer arm; 9 of 2000 are off the roll.",
    alt="Two spirals of points; the second has moved to the outer arm.",
    x_label="$x_1$",
    y_label="$x_2$",
    series=tuple(
        Series(
            label,
            x=tuple(r * math.cos(r) for r in radii),
            y=tuple(r * math.sin(r) + random.Random(int(r * 1e6)).gauss(0, 0.3) for r in radii),
            style="points",
        )
        for label, radii in (
            ("before", [2 + 10 * k / 2000 for k in range(2000)]),
            ("after", [8 + 4 * k / 2000 for k in range(2000)]),
        )
    ),
)
BARS = Figure(
    name="alarms",
    title="False alarms of the verifier",
    caption="No false alarm in 2000 runs at a budget of 5 %: the sequence is valid, and careful.",
    alt="Bars of the false-alarm rate: 0.0 at Gaussian noise, 0.021 at exponential noise, below 0.05 in both cases.",
    x_label="degrees of freedom",
    y_label="false-alarm rate",
    series=(
        Series(
            "confidence sequence", (1.0, 2.0, 3.0), (0.0, 0.021, 0.03), (0.0, 0.015, 0.02), (0.002, 0.03, 0.04), "bars"
        ),
        Series("repeated test", (1.0, 2.0, 3.0), (0.31, 0.41, 0.38), (0.29, 0.38, 0.35), (0.34, 0.43, 0.4), "bars"),
        Series("budget", (0.5, 3.5), (0.05, 0.05), style="dashed"),
    ),
)
METHODS = (
    "first order",
    "DRaFT-1",
    "AlignProp",
    "SRT, $m = 2$",
    "DDPO",
    "DPOK",
    "RLR as printed",
    "RLR, $h = 2$",
    "RLR, antithetic",
    "THO, $m = 2$",
    "THO, $m = 3$",
    "zeroth order",
)
GRID = Figure(
    name="frontier",
    title="Variance against cost on linear-Gaussian chains",
    caption="The order of the estimators is the same for every horizon; the gap to first order grows with $d$.",
    alt="Nine panels, T = 4, 10, 50 by d = 1, 16, 256. Zeroth order is worst in all of them.",
    kind="panels",
    x_label="network calls per update",
    y_label="variance / squared norm of the gradient",
    x_scale="log",
    y_scale="log",
    panels=tuple(
        Panel(
            f"$T = {horizon}$, $d = {dimension}$",
            tuple(
                Series(
                    name,
                    (horizon * (1.0 + 0.4 * (i % 4)),),
                    (0.02 * 1.9**i * horizon * dimension ** (0.1 * i),),
                    style="points",
                )
                for i, name in enumerate(METHODS)
            ),
        )
        for horizon in (4, 10, 50)
        for dimension in (1, 16, 256)
    ),
    shared_axes="grid",
)


def _curve(i: int, name: str, updates: int = 200) -> Series:
    noise = random.Random(name)
    x = tuple(float(k) for k in range(updates))
    y = tuple((1.9 - 0.11 * i) * (1 - math.exp(-k / (20.0 + 6 * i))) + noise.gauss(0, 0.01) for k in range(updates))
    width = [0.05 + 0.01 * i + 0.02 * math.sin(0.1 * k) for k in range(updates)]
    lower = tuple(v - w for v, w in zip(y, width, strict=True))
    return Series(name, x, y, lower, tuple(v + w for v, w in zip(y, width, strict=True)))


TRAINING = Figure(
    name="training",
    title="Reward during fine-tuning, at equal cost",
    caption="First order is ahead after 30 updates; truncated back-propagation collapses. Bands: 90 % of 10 seeds.",
    alt="Ten curves rise and level off; first order highest, the antithetic RLR lowest.",
    x_label="thousand network calls",
    y_label="mean reward",
    series=tuple(_curve(i, name) for i, name in enumerate(METHODS[:10])),
    end_labels=True,
)
IMAGES = Figure(
    name="samples",
    title="The same noise during the training",
    caption="Brighter line by line.",
    alt="Two lines of three grey images.",
    kind="images",
    images=tuple(
        (f"after {k} updates", tuple(tuple((0.1 * i, 0.5 + 0.2 * k, 1.0) for _ in range(3)) for i in range(3)))
        for k in range(2)
    ),
)
SMALL = Figure(
    name="coarse-to-fine",
    title="Training with restricted steps",
    caption="Nothing is gained below half of the chain.",
    alt="Four panels of three curves each.",
    kind="panels",
    x_label="update",
    y_label="reward",
    panels=tuple(
        Panel(f"steps 1 to {last}", tuple(_curve(i + last, METHODS[i], 60) for i in range(3))) for last in (2, 4, 8, 10)
    ),
    shared_axes="none",
)
ADVICE = Table(
    name="advice",
    title="Advice by regime",
    caption="A sweep makes first order as cheap in memory as the policy gradient.",
    columns=(Column("Regime", "left"), Column("Take", "left"), Column("Why", "left")),
    rows=(
        ("differentiable reward", "first order by a sweep", "smallest variance at every cost, and flat memory"),
        ("black-box reward, $T \\le 10$", "THO, $m = 2$", "5 to 20 times less variance than corrected RLR"),
        ("black-box reward, long chain", "THO, $m = 3$", "the band's gain grows with $T$, its cost does not"),
    ),
)
COMPARED = Table(
    name="ablation",
    title="The paper's ablation beside ours",
    caption="The order of V1 and V2 is reversed at equal cost; the printed average is off by $0.02$.",
    columns=(
        Column("Method", "left"),
        Column("AQ", group="paper, Table 5"),
        Column("average", group="paper, Table 5"),
        Column("reward at equal cost", group="ours"),
        Column("relative variance", group="ours"),
        Column("sampling floor", group="ours"),
    ),
    rows=tuple(
        (name, f"{0.61 - 0.02 * i:.2f}", f"{0.55 - 0.03 * i:.2f}", f"{0.4 - 0.2 * i:.2f} [{0.3 - 0.2 * i:.2f}, "
         f"{0.5 - 0.2 * i:.2f}]", f"{3.25e-7 * 8**i:.3g}", "0.011")
        for i, name in enumerate(("V1: no first order", "V2: no half-order", "V3: <no> zeroth_order", "RLR | full"))
    ),
)  # fmt: skip
LONG = Table(
    name="variances",
    title="Relative variance of every estimator",
    caption="Thirty rows, which do not fit the rest of a page.",
    columns=(Column("Estimator", "left"), *(Column(f"$T = {t}$", group="variance") for t in (4, 10, 50))),
    rows=tuple((f"{name}, seed {k}", f"{0.1 * k:.1f}", "1e-06", "-2.0") for k in range(5) for name in METHODS[:6]),
)


def full_run() -> Run:
    """Return a finished run of fourteen claims in four chapters."""
    theta = tuple(rf"$\theta_{{{i}}}$" for i in range(1, 13))
    truth = tuple(round(math.sin(3.0 * i) * 1.7, 6) for i in range(1, 13))
    near = tuple(v + 0.003 * math.cos(7.0 * i) for i, v in enumerate(truth))
    twice = (2 * truth[0], *truth[1:])
    foundations, rlr, drtune = "Foundations", "RLR: half-order & recursive likelihood ratio", "Released code <2024/25>"
    claims = (
        _plain("chain-rule", foundations, "The reverse chain's log-likelihood is a sum of Gaussian terms"),
        _evidence(
            statement(
                "ddim-variance",
                foundations,
                r"The variance of a DDIM step with $\eta > 0$",
                source="DDIM, Equation 16",
                printed="holds",
                statement=r"""For $\eta \in [0, 1]$ the step's standard deviation is

$$\sigma_t(\eta) = \eta \sqrt{\frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}} 
\sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_{t-1}}},
\qquad x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\hat x_0
+ \sqrt{1 - \bar\alpha_{t-1} - \sigma_t^2}\;\epsilon_\theta(x_t, t) + \sigma_t \epsilon .$$""",
                kinds=("exact",),
            ),
            exact(
                reading("claim", "DDIM step", "verified", (0.125, 1e-6, 1e30), (0.125, 1e-6, 1e30)),
                reading("control", "sign flipped", "refuted", (-0.125, -1e-6, math.inf), (0.125, 1e-6, 1e30)),
                reading("control", "one step counted twice", "refuted", (0.25, 2e-6, 2e30), (0.125, 1e-6, 1e30)),
                coordinates=("$t = 1$", "$t = 2$", "$t = 1000$"),
            ),
        ),
        _plain("tweedie", foundations, "Tweedie's formula gives the posterior mean", source="Efron (2011), Theorem 1"),
        _evidence(
            statement(
                "estimator",
                rlr,
                "The RLR estimator counts its first step twice",
                source="RLR, Equation 12",
                printed="refuted",
                corrected=r"Drop the likelihood-ratio term of step 1:"
                r" $$\hat g = \partial_\theta x_0^\top \nabla r(x_0) + \sum_{t=2}^{h} \frac{r(x_0) - b}{\sigma_t}"
                r" \Bigl(\frac{\partial \mu_t}{\partial \theta}\Bigr)^{\!\top} \epsilon_t"
                r" + \sum_{t>h} \frac{r(x_0(\theta + \sigma z)) - r(x_0)}{\sigma}\, z_t .$$",
                statement=r"The estimator $$\hat g_{\mathrm{RLR}} = \underbrace{\partial_\theta x_0^\top \nabla r(x_0)}"
                r"_{\text{first order}} + \sum_{t=1}^{h} \frac{r(x_0)}{\sigma_t}"
                r"\Bigl(\frac{\partial\mu_t}{\partial\theta}\Bigr)^{\!\top}\epsilon_t + \dots$$ is unbiased.",
                why="The first step's gradient enters through the reward *and* through its noise, so row 1 of the "
                "credit matrix sums to two. See the matrices below: $W_{10} + W_{11} = 2$.",
            ),
            exact(
                reading("claim", "corrected RLR", "verified", truth, truth),
                reading("printed", "RLR as printed", "refuted", twice, truth, note="Off by exactly $g_1$."),
                reading("control", "sign flipped", "refuted", tuple(-v for v in truth), truth),
                coordinates=theta,
            ),
            sampled(
                reading("claim", "corrected RLR", "verified", near, truth, looks=looks(0.0004, last=90000), looks_of=2),
                reading("printed", "RLR as printed", "refuted", twice, truth, looks=looks(0.24, last=9000)),
                reading(
                    "control", "sign flipped", "refuted", tuple(-v for v in truth), truth, looks=looks(-0.48, 3, 3000)
                ),
                reading("control", "one step counted twice", "refuted", twice, truth, looks=looks(3.3, 9, 1000)),
                coordinates=theta,
            ),
            figures=(MATRICES, FRONTIER),
        ),
        _evidence(
            statement(
                "variance",
                rlr,
                "The variance bound lacks a factor of the horizon",
                source="RLR, Theorem 4.3",
                printed="holds-corrected",
                corrected=r"$\operatorname{tr}\operatorname{Cov}\hat g \le \frac{T(T+1)}{2} L^2 \max_t \sigma_t^{-2}$",
                statement=r"$\operatorname{tr}\operatorname{Cov}\hat g \le T\, L^2 \max_t \sigma_t^{-2}$",
                controls=("one step counted twice",),
            ),
            exact(
                reading("claim", "corrected bound", "verified", (3.5,), (3.5,)),
                reading("printed", "bound as printed", "refuted", (1.0,), (3.5,)),
                reading("control", "one step counted twice", "refuted", (7.0,), (3.5,)),
            ),
            figures=(TRAINING, SMALL, IMAGES),
            tables=(COMPARED, LONG),
        ),
        _plain("half-order", rlr, "Half-order estimators are unbiased for every block length h"),
        _evidence(
            statement(
                "rate", rlr, "The estimator's error falls as the square root of the budget", source="RLR, Figure 3"
            ),
            sampled(
                reading("claim", "slope", "inconclusive", (-0.47,), (-0.5,), looks=looks(0.03, 6, 20000)),
                *_controls(),
            ),
            verdict="inconclusive",
        ),
        _evidence(
            statement(
                "memory",
                rlr,
                "Full back-propagation is infeasible",
                source="RLR, Section 4.1",
                printed="refuted",
                why="A sweep needs one step's activations plus the latents, whatever $T$ is.",
            ),
            exact(
                reading("claim", "peak memory of the sweep / that of REINFORCE", "verified", (1.0,), (1.0,)),
                reading("printed", "ratio as printed", "refuted", (50.0,), (1.0,)),
                reading("control", "sign flipped", "refuted", (-1.0,), (1.0,)),
                reading("control", "one step counted twice", "refuted", (2.0,), (1.0,)),
            ),
            figures=(CLOUD,),
        ),
        _evidence(
            statement(
                "step-index",
                drtune,
                "The scheduler's last step reads the wrong variance",
                paper="drtune",
                about="code",
                source="drtune v0.3, sampler.py, line 112",
                printed="refuted",
                statement="`variance[t + 1]` is used for step `t`.",
                corrected="`variance[t]`; at the last step the index is past the table.",
            ),
            sampled(
                reading("claim", "corrected index", "verified", (0.0206,), (0.0206,), looks=looks(0.0, 1.0, 5000)),
                reading("printed", "released code", "refuted", (0.0311,), (0.0206,), looks=looks(0.4, 1.0, 5000)),
                *_controls(),
            ),
        ),
        _evidence(
            statement(
                "clip",
                drtune,
                "Clipping of $x_0$ breaks the likelihood | a `pipe` & <tags> #5 costs $3 or $4",
                about="code",
                paper="drtune",
                source="a_b*c [sic] <code> @x #1 ~ ^",
                printed="refuted",
                statement="The log-likelihood of a clipped step is the Gaussian one.",
            ),
            error='Traceback: ValueError: argument "x" is <bad> & #wrong \\ $y_{$ at\n  line 3',
            verdict="inconclusive",
            as_recorded=False,
        ),
        _evidence(
            statement(
                "lora",
                drtune,
                "Adapters with a scale of their own reload unchanged",
                about="code",
                paper="drtune",
                source="drtune v0.3, save.py",
                controls=("sign flipped", "never tried"),
            ),
            sampled(
                reading("claim", "reloaded weights", "verified", (0.0,), (0.0,), looks=looks(0.0002, 3, 60000)),
                reading("control", "sign flipped", "inconclusive", (0.01,), (0.0,), looks=looks(0.01, 9, 6000)),
            ),
            verdict="inconclusive",
            as_recorded=False,
        ),
        _evidence(
            statement(
                "coverage",
                "Verifier",
                "The confidence sequences cover at every sample size",
                about="verifier",
                paper="verifine",
                source="verifine",
                controls=("repeated test",),
            ),
            sampled(
                reading("claim", "miscoverage", "verified", (0.021,), (0.0,), looks=looks(0.0, 3, 60000)),
                reading("control", "repeated test", "refuted", (0.41,), (0.0,), looks=looks(0.4, 3, 2000)),
            ),
            figures=(BARS,),
        ),
        _plain(
            "power", "Verifier", "A bias of one margin is found", about="verifier", paper="verifine", source="verifine"
        ),
        _evidence(
            statement(
                "seeds",
                "Verifier",
                "Results do not depend on order",
                about="verifier",
                paper="verifine",
                source="verifine",
                controls=(),
                kinds=("exact",),
                derivation="",
            ),
            exact(reading("claim", "two orders", "refuted", (math.nan,), (1.0,))),
            verdict="refuted",
            as_recorded=False,
        ),
    )
    return Run(
        Provenance(
            seed=20240607,
            profile="ci",
            alpha=1e-6,
            started="2025-11-21T22:10:00Z",
            seconds=412.4,
            commit="0123456789abcdef0123456789abcdef01234567",
            machine="2 × AMD EPYC, Linux",
            versions={"python": "3.11.7", "numpy": "2.4.6", "torch": "2.13.0+cpu"},
            jobs=2,
            selected=tuple(e.statement.id for e in claims),
            finished=True,
        ),
        claims,
    )


def partial_run() -> Run:
    """Return the same run as it was after three claims."""
    run = full_run()
    return replace(run, evidence=run.evidence[:3], provenance=replace(run.provenance, finished=False))


def empty_run() -> Run:
    """Return a run that has measured nothing."""
    run = full_run()
    return replace(run, evidence=(), provenance=replace(run.provenance, selected=(), commit="", versions={}))
