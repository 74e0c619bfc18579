"""Critics and baselines of shortcut fine-tuning (SFT-PG, Fan and Lee 2023): functions of parameters, and penalties.

A critic f scores samples; the distance of the generator's law p to the data's law q is the supremum over critics of

    g(p, f, q) = E_p f(x_0) - E_q f(x_0)                                                  (SFT-PG, eqs. 7 and 8),

so the critic ascends g, and the generator descends it: its reward is -f. Networks are functional: parameters are dicts
of tensors that are passed in, so that several seeds can be stacked and mapped over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from algorithms.chain import Chain, Condition, Params, at_step


class Critic(Protocol):
    """A scalar function of samples: (n, *shape) -> (n,), differentiable; samples must not influence each other."""

    def __call__(self, params: Params, x: Tensor) -> Tensor: ...


class Value(Protocol):
    """A scalar function of states at steps: (k, n, *shape), with `steps` (k,) integers in 1..T -> (k, n)."""

    def __call__(self, params: Params, x: Tensor, steps: Tensor) -> Tensor: ...


def evaluate(critic: Critic, params: Params, x: Tensor) -> Tensor:
    """Return the critic's scores (n,) of samples x (n, *shape).

    Raises:
        ValueError: if it does not give one number per sample; (n, 1) would silently broadcast to (n, n) later.
    """
    score = critic(params, x)
    if score.shape != x.shape[:1]:
        raise ValueError(f"critic must give one number per sample, shape ({len(x)},), got {tuple(score.shape)}")
    return score


@dataclass(frozen=True)
class MLPCritic:
    """A multi-layer perceptron with ReLUs; three layers of 128 in SFT-PG's toy experiments (appendix D).

    Raises:
        ValueError: if the dimension or a width is < 1.
    """

    dimension: int
    hidden: tuple[int, ...] = (128, 128)

    def __post_init__(self) -> None:
        _check_widths(self.dimension, self.hidden)

    def initial(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Draw parameters, uniform in +-1 / sqrt(inputs) as torch.nn.Linear's are."""
        return _linear_layers((self.dimension, *self.hidden, 1), generator, dtype)

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        h = x.flatten(1)
        for i in range(len(self.hidden)):
            h = torch.relu_(linear(h, params[f"weight{i}"], params[f"bias{i}"]))
        last = len(self.hidden)
        return linear(h, params[f"weight{last}"], params[f"bias{last}"]).squeeze(1)

    def forward(self, params: Params, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the scores (n,) and what `backward` needs."""
        kept, last = [x.flatten(1)], len(self.hidden)
        for i in range(last):
            kept.append(torch.relu_(linear(kept[-1], params[f"weight{i}"], params[f"bias{i}"])))
        return linear(kept[-1], params[f"weight{last}"], params[f"bias{last}"]).squeeze(1), kept

    def backward(self, params: Params, kept: list[Tensor], slope: Tensor, out: Params) -> None:
        """Write the gradient of the sum of slope (n,) * scores to `out`."""
        slope = _last_backward(params, kept[-1], slope, out, len(self.hidden))
        for i in reversed(range(len(self.hidden))):
            slope = _linear_backward(params, kept[i], _through_relu(slope, kept[i + 1]), out, i)


@dataclass(frozen=True)
class MLPValue:
    """The baseline V_t(x_t): a perceptron with ReLUs, whose hidden layers have a gain of their own at every step.

    Gains start at one; the released code of SFT-PG draws them uniformly from [0, 1).

    Raises:
        ValueError: if the dimension, a width or the number of steps is < 1.
    """

    dimension: int
    steps: int
    hidden: tuple[int, ...] = (128, 128)

    def __post_init__(self) -> None:
        _check_widths(self.dimension, self.hidden)
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")

    def initial(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Draw parameters, as `MLPCritic` does."""
        params = _linear_layers((self.dimension, *self.hidden, 1), generator, dtype)
        options = {"dtype": dtype, "device": generator.device}
        gains = {f"gain{i}": torch.ones(self.steps, width, **options) for i, width in enumerate(self.hidden)}
        return params | gains

    def __call__(self, params: Params, x: Tensor, steps: Tensor) -> Tensor:
        h, last = x.flatten(2), len(self.hidden)
        for i in range(last):
            weight, bias = params[f"weight{i}"], params[f"bias{i}"]
            gain = params[f"gain{i}"][steps - 1][:, None]  # (k, 1, width)
            if h.shape[2] < h.shape[1]:  # each step has fewer weights than hidden numbers: scale the weights
                h = torch.relu_(torch.baddbmm(gain * bias, h, gain * weight.T))
            else:
                h = torch.relu_(gain * linear(h, weight, bias))
        return linear(h, params[f"weight{last}"], params[f"bias{last}"]).squeeze(2)

    def forward(self, params: Params, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the values (T, n) of states (T, n, *shape) at all steps, and what `backward` needs."""
        kept, last = [x.flatten(2)], len(self.hidden)
        for i in range(last):
            h, weight, bias, gain = kept[-1], params[f"weight{i}"], params[f"bias{i}"], params[f"gain{i}"][:, None]
            if h.shape[2] < h.shape[1]:  # as above
                before = gain * weight.T
                after = torch.baddbmm(gain * bias, h, before)
            else:
                before = linear(h, weight, bias)
                after = gain * before
            kept += [before, torch.relu_(after)]
        return linear(kept[-1], params[f"weight{last}"], params[f"bias{last}"]).squeeze(2), kept

    def backward(self, params: Params, kept: list[Tensor], slope: Tensor, out: Params) -> None:
        """Write the gradient of the sum of slope (T, n) * values to `out`."""
        slope = _last_backward(params, kept[-1].flatten(0, 1), slope.flatten(), out, len(self.hidden))
        for i in reversed(range(len(self.hidden))):
            h, before, after = kept[2 * i : 2 * i + 3]
            weight, bias, gain = params[f"weight{i}"], params[f"bias{i}"], params[f"gain{i}"]
            slope = _through_relu(slope, after.flatten(0, 1)).view_as(after)
            if h.shape[2] < h.shape[1]:
                of_weight, of_bias = torch.bmm(h.transpose(1, 2), slope), slope.sum(1)
                out[f"weight{i}"].copy_((of_weight * gain[:, None]).sum(0).T)
                torch.sum(of_bias * gain, 0, out=out[f"bias{i}"])
                torch.add((of_weight * weight.T).sum(1), of_bias * bias, out=out[f"gain{i}"])
                if i:
                    slope = torch.bmm(slope, before.transpose(1, 2)).flatten(0, 1)
            else:
                torch.sum(before.mul_(slope), 1, out=out[f"gain{i}"])
                slope = _linear_backward(params, h.flatten(0, 1), slope.mul_(gain[:, None]).flatten(0, 1), out, i)


@dataclass(frozen=True)
class KernelCritic:
    """The witness of the MMD with kernel k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)), which no training approximates.

    Its "parameters" are samples: "generated" (m, *shape) and "data" (m', *shape), and

        f(x) = mean of k(x, generated) - mean of k(x, data).

    It is the best critic of the unit ball of the kernel's Hilbert space times the MMD: for fixed f the gradient of
    E_p f is that of MMD^2 / 2. Its mean over p is unbiased only if "generated" is independent of the samples that are
    scored: the pair (x, x) adds k = 1.

    Raises:
        ValueError: if the bandwidth is not positive and finite.
    """

    bandwidth: float

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, got {self.bandwidth}")

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return self._kernel(x, params["generated"]).mean(1) - self._kernel(x, params["data"]).mean(1)

    def distance(self, generated: Tensor, data: Tensor) -> Tensor:
        """Return the unbiased estimate of MMD^2, (), from (m, *shape) and (m', *shape); it may be negative.

        Raises:
            ValueError: if there are fewer than two samples of either.
        """
        if min(len(generated), len(data)) < 2:
            raise ValueError(f"MMD needs >= 2 samples of each, got {len(generated)} and {len(data)}")
        return self._within(generated) + self._within(data) - 2 * self._kernel(generated, data).mean()

    def _within(self, x: Tensor) -> Tensor:
        """Return the mean kernel of pairs of different samples."""
        return (self._kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = x.flatten(1), y.flatten(1)
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return torch.exp(-0.5 * squares.clamp(min=0) / self.bandwidth**2)


@dataclass(frozen=True, eq=False)
class CriticReward:
    """The generator's reward -f(x_0), for a critic whose parameters are held fixed."""

    critic: Critic
    params: Params
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return -evaluate(self.critic, self.params, x0)


@dataclass(frozen=True, eq=False)
class ValueBaseline:
    """The baseline -V_k(x_k) of the return -f(x_0) (SFT-PG, eq. 21).

    It leaves the mean of the gradient alone if V was fitted on other roll-outs than it is used on.
    """

    value: Value
    params: Params

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            return -self.value(self.params, x[None], torch.tensor([k], device=x.device))[0]


def gradient_penalty(score: Callable[[Tensor], Tensor], generated: Tensor, data: Tensor, weight: Tensor) -> Tensor:
    """Return R_GP, (): the mean of (|grad score| - 1)^2 at weight * generated + (1 - weight) * data (SFT-PG, eq. 23).

    Args:
        score: (n, *shape) -> (n,); samples must not influence each other.
        generated, data: (n, *shape).
        weight: (n,), uniform in [0, 1].
    """
    share = weight.reshape(-1, *[1] * (data.dim() - 1))
    between = (share * generated + (1 - share) * data).detach().requires_grad_()
    (grad,) = torch.autograd.grad(score(between).sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(grad.flatten(1), dim=1) - 1).square().mean()


def baseline_penalty(values: Tensor, score: Tensor, again: Tensor | None = None) -> Tensor:
    """Return R_B, (): the mean over samples of the sum over steps of the baseline's squared error.

    With one score per roll-out it is E sum_t (V_t(x_t) - f(x_0))^2, what SFT-PG's released code computes (as a mean
    over t). Eq. 22 has E sum_t (V_t(x_t) - E[f(x_0) | x_t])^2, which is less by E sum_t Var(f(x_0) | x_t): the part
    that no V removes, and the only one that limits f. Its unbiased estimate is the product of the errors against
    two scores that are independent given x_t.

    Args:
        values: (T, n), V_t(x_t).
        score: (n,), f(x_0).
        again: (T, n), f at second ends of the roll-outs from x_t (`continuations`), for eq. 22; None for the code's.
    """
    error = values - score
    return (error * (error if again is None else values - again)).sum(0).mean()


def baseline_gradients(
    critic: MLPCritic,
    params: Params,
    value: MLPValue,
    value_params: Params,
    latents: Tensor,
    data: Tensor,
    strength: float,
    out: tuple[Params, Params],
) -> tuple[Tensor, Tensor]:
    """Write the gradients of strength * R_B - g, R_B with one score per roll-out, to `out`; return g and R_B, ().

    The same as autograd's, by hand, in half the time: networks this small cost their book-keeping.

    Args:
        latents: (T + 1, n, *shape), `latents[t]` is x_t.
        data: (n, *shape).
        out: tensors shaped as the critic's and the baseline's parameters, and contiguous.
    """
    with torch.no_grad():
        scores, kept = critic.forward(params, torch.cat([latents[0], data]))
        values, kept_values = value.forward(value_params, latents[1:])
        of_generated, of_data = scores.split(len(data))
        error = values - of_generated
        pull = error * (2 * strength / len(data))
        slope = torch.cat([-1 / len(data) - pull.sum(0), of_data.new_full(of_data.shape, 1 / len(data))])
        critic.backward(params, kept, slope, out[0])
        value.backward(value_params, kept_values, pull, out[1])
        return of_generated.mean() - of_data.mean(), (error * error).sum(0).mean()


def continuations(
    chain: Chain, params: Params, latents: Tensor, generator: torch.Generator, condition: Condition = None
) -> Tensor:
    """Run on from every x_t of n roll-outs with fresh noise: ends (T, n, *shape), row t - 1 from x_t.

    Args:
        latents: (T + 1, n, *shape), `latents[t]` is x_t.
    """
    n, shape = latents.shape[1], latents.shape[2:]
    moving = latents[:0].flatten(0, 1)
    with torch.no_grad():
        for t in range(chain.steps, 0, -1):
            moving = torch.cat([latents[t], moving])  # those that start later come first: row t - 1 ends up there
            own = at_step(condition, t)
            told = None if own is None else own.repeat(len(moving) // n, *[1] * (own.dim() - 1))
            eps = torch.randn(moving.shape, generator=generator, dtype=moving.dtype, device=generator.device)
            moving = chain.mean(params, moving, t, told) + chain.std(t) * eps.to(moving.device)
    return moving.reshape(chain.steps, n, *shape)


def spectrally_normalised(params: Params) -> Params:
    """Divide every weight by its largest singular value, filters flattened to (outputs, rest); vectors are left alone.

    A perceptron of such linear layers and activations of slope at most one is 1-Lipschitz. (A flattened convolution's
    norm bounds the layer's only up to a factor of its filter size.) The norm is exact, where Miyato et al. (2018)
    keep a running estimate.
    """
    return {name: p if p.dim() < 2 else p / torch.linalg.matrix_norm(p.flatten(1), 2) for name, p in params.items()}


def _last_backward(params: Params, h: Tensor, slope: Tensor, out: Params, i: int) -> Tensor:
    """Write the gradient of the last layer, with one output; return that of its inputs h (m, width)."""
    column = slope[:, None]
    out[f"weight{i}"].copy_(torch.mm(column.T, h))
    torch.sum(column, 0, out=out[f"bias{i}"])
    return column * params[f"weight{i}"]


def _linear_backward(params: Params, h: Tensor, slope: Tensor, out: Params, i: int) -> Tensor:
    """Write the gradient of layer i, whose outputs have the gradient slope (m, width); return that of its inputs h.

    Nobody asks for the first layer's.
    """
    torch.mm(slope.T, h, out=out[f"weight{i}"])
    torch.sum(slope, 0, out=out[f"bias{i}"])
    return torch.mm(slope, params[f"weight{i}"]) if i else slope


def _through_relu(slope: Tensor, after: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(slope, after, 0)


def _linear_layers(widths: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Params:
    return dict(itertools.chain.from_iterable(_layer(i, widths, generator, dtype) for i in range(len(widths) - 1)))


def _layer(
    i: int, widths: Sequence[int], generator: torch.Generator, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    inputs, outputs = widths[i], widths[i + 1]
    for name, shape in ((f"weight{i}", (outputs, inputs)), (f"bias{i}", (outputs,))):
        uniform = torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)
        yield name, (2 * uniform - 1) / math.sqrt(inputs)


def _check_widths(dimension: int, hidden: tuple[int, ...]) -> None:
    if dimension < 1:
        raise ValueError(f"dimension must be >= 1, got {dimension}")
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden must be widths >= 1, got {hidden}")
