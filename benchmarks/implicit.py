"""What Implicit Diffusion's single loop costs here, against the same loop in JAX: 5000 steps of 1000 particles.

The problem is that of the released code, a hexagon of Gaussians whose weights are learned from a reward, in its
setting. The loop in JAX is written anew: the potential as a log-sum-exp, derivatives by `jax.grad`, everything of a
step in one `jit`. It is run in two ways, by calling the compiled step from Python as the released script does, and with
all the steps inside one `fori_loop`. It is timed without compilation, and with it: before every such turn JAX's caches
are cleared. Ours takes the mixture's own derivatives, as the library does where a potential has them; for a fair view
ours is timed with autograd's too, and JAX with the closed forms.

That both loops make the same of the same noise is checked before timing. All of them take turns in one process, one
thread each (JAX keeps a thread that executes beside Python's, so its wall time can be less than the processor's);
seconds are medians over the turns. Without JAX, ours alone is timed.

Writes out/bench/implicit.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from algorithms.chain import Params
from algorithms.implicit import BLOCK, ImplicitDiffusion, Langevin, MinusReward
from toy.implicit_experiments import RELEASED
from verdicts.streams import Stream

OUT = Path("out/bench")
STREAM = Stream(7).child("benchmarks", "implicit")
PARTICLES = 1000
REPETITIONS = 10
CHECKED = 20  # steps that both loops make of the same noise
TOLERANCE = 1e-4  # of float32 after these: between two modes a step of Langevin enlarges what has been rounded
MISSING = 'JAX is not installed, so ours alone is timed: pip install "verifine[bench]", or "jax>=0.5"'

Times = dict[str, tuple[float, float]]  # wall and processor seconds


def load_jax() -> Any | None:
    """Return JAX, held to one thread, or None if it is not installed."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    try:
        return importlib.import_module("jax")
    except ImportError:
        return None


def start(repetitions: int) -> Tensor:
    source = torch.Generator().manual_seed(STREAM.child("start").integer())
    return torch.randn(repetitions, PARTICLES, 2, generator=source)


def source(repetition: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed(STREAM.child(repetition, block).integer())


def our_loop(repetitions: int, autograd: bool = False) -> ImplicitDiffusion:
    """Return the library's loop, with closed-form derivatives or with autograd's."""
    known = RELEASED.mixture

    def bare(params: Params, x: Tensor) -> Tensor:
        return known(params, x)

    return ImplicitDiffusion(
        Langevin(bare if autograd else known, RELEASED.gamma),
        MinusReward(RELEASED.reward, unbiased=False),
        RELEASED.params(repetitions),
        start(repetitions),
        lambda tensors: torch.optim.SGD(tensors, lr=RELEASED.rate, foreach=False),
        source,
        order="released",
    )


class JaxLoop:
    """The same loop in JAX, of one repetition: theta (6,), particles (n, 2); with `known`, by closed forms."""

    def __init__(self, jax: Any, known: bool = False) -> None:
        self.jax, np = jax, jax.numpy
        centres, centre = np.asarray(RELEASED.mixture.centres.numpy()), np.asarray(RELEASED.reward.centre)

        def potential(theta: Any, x: Any) -> Any:
            square = ((x[:, None] - centres) ** 2).sum(-1)
            return -jax.nn.logsumexp(jax.nn.log_softmax(theta) - square / (2 * RELEASED.variance), axis=-1)

        def reward(x: Any) -> Any:
            square = ((x - centre) ** 2).sum(-1)
            return (x[:, 0] > 0) * np.exp(-square / RELEASED.reward.width) / RELEASED.reward.scale

        def slope(theta: Any, x: Any) -> Any:
            if known:
                return (x - posterior(theta, x) @ centres) / RELEASED.variance
            return jax.grad(lambda x: potential(theta, x).sum())(x)

        def pull(theta: Any, x: Any, weight: Any) -> Any:
            if known:
                return jax.nn.softmax(theta) * weight.sum() - weight @ posterior(theta, x)
            return jax.grad(lambda theta: (weight * potential(theta, x)).sum())(theta)

        def posterior(theta: Any, x: Any) -> Any:
            half = (centres**2).sum(-1) / 2
            return jax.nn.softmax(theta + (x @ centres.T - half) / RELEASED.variance)

        def move(theta: Any, x: Any, noise: Any) -> tuple[Any, Any]:
            x = x - RELEASED.gamma * slope(theta, x) + (2 * RELEASED.gamma) ** 0.5 * noise
            earned = reward(x)
            return theta - RELEASED.rate * pull(theta, x, (earned - earned.mean()) / len(x)), x

        self.move = jax.jit(move)

        def step(theta: Any, x: Any, key: Any) -> tuple[Any, Any, Any]:
            key, drawn = jax.random.split(key)
            return *self.move(theta, x, jax.random.normal(drawn, x.shape)), key

        def whole(theta: Any, x: Any, key: Any, steps: int) -> tuple[Any, Any, Any]:
            return jax.lax.fori_loop(0, steps, lambda _, state: step(*state), (theta, x, key))

        self.step, self.whole = jax.jit(step), jax.jit(whole, static_argnums=3)
        theta = np.asarray(RELEASED.params(1)["theta"][0].numpy())
        self.state = theta, np.asarray(start(1)[0].numpy()), jax.random.key(0)

    def call_steps(self, steps: int) -> None:
        state = self.state
        for _ in range(steps):
            state = self.step(*state)
        self.state = self.jax.block_until_ready(state)

    def call_whole(self, steps: int) -> None:
        self.state = self.jax.block_until_ready(self.whole(*self.state, steps))


def disagreement(jax: Any, autograd: bool = False, known: bool = False) -> float:
    """Return by how much theta and the particles differ at most, after the same noise in JAX and in ours."""
    ours, other = our_loop(1, autograd), JaxLoop(jax, known)
    ours.run(CHECKED)
    theta, x, _ = other.state
    for noise in torch.randn(BLOCK, PARTICLES, 2, generator=source(0, 0))[:CHECKED]:
        theta, x = other.move(theta, x, jax.numpy.asarray(noise.numpy()))
    pairs = ((ours.params["theta"][0].detach(), theta), (ours.particles[0], x))
    return max(float((mine - torch.tensor(theirs.tolist())).abs().max()) for mine, theirs in pairs)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def our_times(steps: int, repetitions: int, autograd: bool = False) -> Times:
    return {"without compilation": seconds(lambda: our_loop(repetitions, autograd).run(steps))}


def jax_times(jax: Any, steps: int, whole: bool = False, known: bool = False) -> Times:
    jax.clear_caches()
    loop = JaxLoop(jax, known)
    run = loop.call_whole if whole else loop.call_steps
    return {kind: seconds(lambda: run(steps)) for kind in ("with compilation", "without compilation")}


def measure(jax: Any | None, steps: int, turns: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a row of medians for every way to run the loop."""
    works: dict[tuple[str, int], Callable[[], Times]] = {
        ("ours", 1): lambda: our_times(steps, 1),
        ("ours, autograd", 1): lambda: our_times(steps, 1, autograd=True),
        ("ours", REPETITIONS): lambda: our_times(steps, REPETITIONS),
    }
    if jax is not None:
        works[("JAX, jitted step", 1)] = lambda: jax_times(jax, steps)
        works[("JAX, fori_loop", 1)] = lambda: jax_times(jax, steps, whole=True)
        works[("JAX, jitted step, closed forms", 1)] = lambda: jax_times(jax, steps, known=True)
    found: dict[tuple[str, int], list[Times]] = {name: [] for name in works}
    our_times(min(steps, 100), 1)  # warms up
    for turn in range(turns):
        for name, work in works.items():
            say(f"turn {turn + 1} of {turns}: {name[0]}, {name[1]} at once")
            found[name].append(work())
    return [row(name, repetitions, steps, times) for (name, repetitions), times in found.items()]


def row(name: str, repetitions: int, steps: int, turns: Sequence[Times]) -> dict[str, Any]:
    medians = {
        # Ours compiles nothing.
        f"{clock}, {kind}": statistics.median(times.get(kind, times["without compilation"])[i] for times in turns)
        for kind in ("without compilation", "with compilation")
        for i, clock in enumerate(("wall", "processor"))
    }
    each = 1e3 * medians["processor, without compilation"] / steps / repetitions
    return {"loop": name, "repetitions": repetitions, **medians, "ms a step and repetition": each}


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ours over JAX, for every pair of one repetition each."""
    clocks = [key for key in rows[0] if key.startswith(("wall", "processor"))]
    single = [each for each in rows if each["repetitions"] == 1]
    return [
        {"pair": f"{one['loop']} / {other['loop']}"} | {clock: one[clock] / other[clock] for clock in clocks}
        for other in single
        for one in single
        if other["loop"].startswith("JAX") and one["loop"].startswith("ours")
    ]


def shown(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for each in rows:
        table.add_row(*[f"{value:.3g}" if isinstance(value, float) else str(value) for value in each.values()])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of Implicit Diffusion's single loop.")
    parser.add_argument("--quick", action="store_true", help="fewer steps, two turns: some seconds")
    quick = parser.parse_args(arguments).quick
    steps, turns = (100, 2) if quick else (5000, 5)
    torch.set_num_threads(1)
    console, jax = Console(), load_jax()
    if jax is None:
        console.print(MISSING, highlight=False, markup=False)
    elif not max(disagreement(jax), disagreement(jax, known=True)) < TOLERANCE:
        raise RuntimeError("the two loops do not compute the same")
    with console.status("") as status:
        rows = measure(jax, steps, turns, status.update)
    compared = ratios(rows)
    console.print(shown(rows, f"{steps} steps of {PARTICLES} particles: seconds, median of {turns} turns"))
    if compared:
        console.print(shown(compared, "Ours / JAX"))
    machine = (
        f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}, "
        f"jax {'not installed' if jax is None else jax.__version__}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "quick": quick, "steps": steps, "seconds": rows, "ratios": compared}
    (OUT / "implicit.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{machine}\nwritten to {OUT}/implicit.json", highlight=False)


if __name__ == "__main__":
    main()
