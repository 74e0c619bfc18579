"""What SFT-PG's toy experiments cost here, against plain `torch.nn` loops: pre-training, and an epoch of fine-tuning.

Pre-training: the plain loop is the one that a reader of the paper would write: `nn.Linear` times `nn.Embedding`, one
seed, every batch drawn when it is needed, Adam as it comes. It computes the library's noise and gradients, which the
tests check.

Fine-tuning by SFT-PG (B) at T = 10: an epoch is 10 000 points of data, a critic step for every batch and a generator
step for every fifth. The plain loop does it as the released script does, written anew: it keeps the sampler's graph
through the roll-out, scores x_0 once more for every t, and goes back through the sampler with the critic's loss. Its
generator step takes one (sample, t) pair for each of the batch, and so does ours ("pairs"). Two sizes: the
paper's (batches of 64, networks of 128) and the released script's (128 and 256).

Both ways train the same networks, and take turns in one process on one thread; seconds are the processor's, medians
over the turns.

Writes out/bench/shortcut.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from algorithms.chain import Params
from algorithms.critics import MLPCritic, MLPValue
from algorithms.shortcut import Adversary, ShortcutFineTuning, ShortcutTrainer
from algorithms.training import Settings
from toy.few_step import StepConditionedChain, fit, schedule, training_set
from verdicts.streams import Stream

OUT = Path("out/bench")
STREAM = Stream(6).child("benchmarks", "shortcut")
BATCH = 64
WIDTH = 128
SEEDS = 5
STEPS = 10  # of the sampler that is fine-tuned
CRITIC_STEPS = 5
RATE = 5e-5  # of the generator

Row = dict[str, float]


class ScaledLinear(nn.Module):
    """A linear layer, multiplied by an embedding of the step."""

    def __init__(self, size_in: int, size_out: int, steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size_in, size_out)
        self.scale = nn.Embedding(steps, size_out)
        nn.init.uniform_(self.scale.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale(t - 1) * self.linear(x)


class PlainNetwork(nn.Module):
    """The noise network of one seed, told the step t = 1..T of each state."""

    def __init__(self, steps: int, width: int = WIDTH) -> None:
        super().__init__()
        sizes = [(2, width), (width, width), (width, width)]
        self.hidden = nn.ModuleList([ScaledLinear(*size, steps) for size in sizes])
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.hidden:
            x = nn.functional.softplus(layer(x, t))
        return self.last(x)

    def load(self, params: Params) -> None:
        """Take over the parameters of one seed of a `StepConditionedChain`."""
        named = {"last.weight": params["w4"].T, "last.bias": params["b4"]}
        for i in range(len(self.hidden)):
            named[f"hidden.{i}.linear.weight"] = params[f"w{i + 1}"].T
            named[f"hidden.{i}.linear.bias"] = params[f"b{i + 1}"]
            named[f"hidden.{i}.scale.weight"] = params["scale"][:, i]
        self.load_state_dict(named)


def plain_training(
    chain: StepConditionedChain, points: Tensor, updates: int, generator: torch.Generator, rate: float = 1e-2
) -> PlainNetwork:
    """Train one seed on points (n, 2), the plain way."""
    network = PlainNetwork(chain.steps)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    alpha_bar = chain.alpha_bar.float()
    for _ in range(updates):
        x0 = points[torch.randint(len(points), (BATCH,), generator=generator)]
        t = torch.randint(1, chain.steps + 1, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        level = alpha_bar[t - 1][:, None]
        predicted = network(level.sqrt() * x0 + (1 - level).sqrt() * noise, t)
        loss = nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network


class PlainValue(nn.Module):
    """The baseline, told the step."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([ScaledLinear(*size, steps) for size in ((2, width), (width, width))])
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.hidden:
            x = nn.functional.relu(layer(x, t))
        return self.last(x)


def plain_critic(width: int) -> nn.Module:
    sizes, layers = (2, width, width), []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


class PlainEpoch:
    """SFT-PG (B) as the released script trains it, epoch by epoch."""

    def __init__(self, chain: StepConditionedChain, params: Params, points: Tensor, batch: int, width: int) -> None:
        self.chain, self.points, self.batch = chain, points, batch
        self.network, self.critic, self.value = PlainNetwork(chain.steps), plain_critic(width), PlainValue(STEPS, width)
        self.network.load(params)
        self.generator = torch.Generator().manual_seed(STREAM.child("plain epoch").integer())
        self.tune = torch.optim.Adam(self.network.parameters(), lr=RATE)
        self.fit = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.critic, self.value)]

    def mean(self, x: Tensor, t: Tensor) -> Tensor:
        beta, level = self.chain.beta.float()[t - 1][:, None], self.chain.alpha_bar.float()[t - 1][:, None]
        return (x - beta / (1 - level).sqrt() * self.network(x, t)) / (1 - beta).sqrt()

    def roll(self) -> list[Tensor]:
        """Return x_T, ..., x_0, with their graph."""
        x = torch.randn(self.batch, 2, generator=self.generator)
        states = [x]
        for step in range(self.chain.steps, 0, -1):
            t = torch.tensor([step])
            noise = torch.randn(self.batch, 2, generator=self.generator)
            x = self.mean(x, t) + self.chain.beta.float()[t - 1][:, None].sqrt() * noise
            states.append(x)
        return states

    def critic_step(self, states: list[Tensor], data: Tensor) -> None:
        for optimizer in self.fit:
            optimizer.zero_grad()
        scores = self.critic(torch.cat([data, states[-1].detach()]))
        (scores[: len(data)].mean() - scores[len(data) :].mean()).backward()
        loss = torch.zeros(())
        for i, x in enumerate(states[:-1]):
            t = torch.tensor([self.chain.steps - i])
            loss = loss + nn.functional.mse_loss(self.value(x, t), self.critic(states[-1])) / self.chain.steps
        loss.backward()
        for optimizer in self.fit:
            optimizer.step()

    def generator_step(self, rolls: list[list[Tensor]]) -> None:
        steps = self.chain.steps
        x = torch.cat([torch.cat(states[:-1]) for states in rolls]).detach()
        after = torch.cat([torch.cat(states[1:]) for states in rolls]).detach()
        final = torch.cat([states[-1].repeat(steps, 1) for states in rolls]).detach()
        t = torch.arange(steps, 0, -1).repeat_interleave(self.batch).repeat(len(rolls))
        picks = torch.randperm(len(x), generator=self.generator)[: self.batch]
        std = self.chain.beta.float()[t[picks] - 1][:, None].sqrt()
        log_prob = torch.distributions.Normal(self.mean(x[picks], t[picks]), std).log_prob(after[picks]).sum(1)
        advantage = (self.critic(final[picks]) - self.value(x[picks], t[picks])).detach()[:, 0]
        self.tune.zero_grad()
        (advantage * log_prob).mean().backward()
        self.tune.step()

    def __call__(self) -> None:
        rolls, order = [], torch.randperm(len(self.points), generator=self.generator)
        for picks in order.split(self.batch)[: len(order) // self.batch]:
            rolls.append(self.roll())
            self.critic_step(rolls[-1], self.points[picks])
            if len(rolls) == CRITIC_STEPS:
                self.generator_step(rolls)
                rolls = []


def our_epochs(chain: StepConditionedChain, params: Params, points: Tensor, batch: int, width: int) -> ShortcutTrainer:
    """Return the library's run of the same; an epoch is `len(points) // batch // CRITIC_STEPS` updates."""
    source = torch.Generator().manual_seed(STREAM.child("adversary").integer())
    critic, value = MLPCritic(2, (width, width)), MLPValue(2, chain.steps, (width, width))
    adversary = Adversary(critic, critic.initial(source), value, value.initial(source))
    method = ShortcutFineTuning("policy", "baseline", CRITIC_STEPS, 1, 1 / chain.steps, batches="pairs")
    settings = Settings(10**6, batch, RATE)
    stream = STREAM.child("updates")
    return ShortcutTrainer(
        chain,
        params,
        points,
        adversary,
        method,
        settings,
        lambda update: torch.Generator().manual_seed(stream.child(update).integer()),
    )


def fine_tuning(batch: int, width: int, turns: int, share: int = 1) -> Row:
    """Seconds an epoch, of the plain way and of ours; with share > 1 of one part of the data only."""
    chain = StepConditionedChain.of(schedule(STEPS))
    stream = STREAM.child("fine-tuning")
    points = training_set("swiss_roll", stream)[: 10_000 // share]
    (params,) = fit(chain, points[None], [stream], 200, BATCH)
    plain, ours = PlainEpoch(chain, params, points, batch, width), our_epochs(chain, params, points, batch, width)
    updates = len(points) // batch // CRITIC_STEPS
    works = {"plain": plain, "ours": lambda: ours.run(updates)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            spent = share * seconds(work)
            if turn:  # the first turn warms up
                times[name].append(spent)
    one, other = (statistics.median(times[name]) for name in works)
    return {"batch": batch, "width": width, "plain, s": one, "ours, s": other, "plain / ours": one / other}


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def pretraining(steps: int, updates: int, turns: int) -> Row:
    """Milliseconds an update and seed at T = steps, of the plain loop, of one seed, and of several seeds at once."""
    chain = StepConditionedChain.of(schedule(steps))
    streams = [STREAM.child(seed) for seed in range(SEEDS)]
    points = torch.stack([training_set("swiss_roll", stream) for stream in streams])
    generator = torch.Generator().manual_seed(STREAM.child("plain").integer())
    # Work, and the updates of a single seed in it.
    works: dict[str, tuple[Callable[[], object], int]] = {
        "plain": (lambda: plain_training(chain, points[0], updates, generator), updates),
        "one seed": (lambda: fit(chain, points[:1], streams[:1], updates, BATCH), updates),
        "batched": (lambda: fit(chain, points, streams, updates, BATCH), updates * SEEDS),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, (work, count) in works.items():
            spent = 1e3 * seconds(work) / count
            if turn:  # the first turn warms up
                times[name].append(spent)
    plain, one, batched = (statistics.median(times[name]) for name in works)
    return {
        "T": float(steps),
        "plain loop, ms": plain,
        "one seed, ms": one,
        f"{SEEDS} seeds at once, ms a seed": batched,
        "one seed / plain": one / plain,
        f"{SEEDS} seeds at once / one by one": batched / one,
    }


def shown(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*[f"{value:.0f}" if value == int(value) else f"{value:.3g}" for value in row.values()])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of SFT-PG's toy experiments.")
    parser.add_argument("--quick", action="store_true", help="T = 10 only, short turns: some seconds")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    console = Console()
    rows: list[Row] = []
    with console.status("") as status:
        for steps in (10,) if quick else (10, 100, 1000):
            status.update(f"pre-training, T = {steps}")
            rows.append(pretraining(steps, 64 if quick else 320, 3 if quick else 7))
        status.update("fine-tuning")
        sizes = ((64, 128), (128, 256))
        epochs = [fine_tuning(*size, 3 if quick else 5, share=10 if quick else 1) for size in sizes]
    console.print(shown(rows, f"Pre-training: an update of batch {BATCH}, width {WIDTH}"))
    console.print(shown(epochs, f"Fine-tuning by SFT-PG (B), T = {STEPS}: an epoch of 10 000 points"))
    machine = (
        f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "quick": quick, "pretraining": rows, "fine-tuning": epochs}
    (OUT / "shortcut.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{machine}\nwritten to {OUT}/shortcut.json", highlight=False)


if __name__ == "__main__":
    main()
