"""A diffusers U-Net under the Gaussian steps of a scheduler, as a `Chain`.

A condition is a row of the chain's table: what the network is told is looked up there, so that conditions of a whole
chain (`StepConditions`, one row per step and sample) are integers and cost nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from algorithms.chain import Params
from scale.sampler import GaussianSteps


@dataclass(frozen=True, eq=False)
class NetworkChain:
    """The chain of a conditional network, functional in those of its parameters that are trained.

    The network's own floating-point type is used inside of it only: latents, means and densities keep the latents'.

    Attributes:
        network: a diffusers `UNet2DConditionModel` or `UNet2DModel`, in eval mode.
        sampler: its Gaussian steps.
        shape: shape of one latent.
        told: name of the network's argument that is told the condition.
        table: (rows, ...), what each condition stands for.
        guidance: classifier-free guidance: output = unconditional + guidance (conditional - unconditional). With 1
            only the conditional output is computed.
        unconditional: the table's row for "no condition", needed with guidance other than 1.

    Raises:
        ValueError: if guidance is not 1 and there is no row for "no condition".
    """

    network: nn.Module
    sampler: GaussianSteps
    shape: tuple[int, ...]
    told: str
    table: Tensor
    guidance: float = 1.0
    unconditional: int | None = None

    def __post_init__(self) -> None:
        if self.guidance != 1 and self.unconditional is None:
            raise ValueError(f"guidance must be 1 for a network that knows no empty condition, got {self.guidance:g}")

    @property
    def steps(self) -> int:
        return self.sampler.steps

    def initial(self, noise: Tensor) -> Tensor:
        return self.sampler.initial(noise)

    def std(self, t: int) -> float:
        return self.sampler.std(t)

    def renoise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Noise x_0 (n, *shape) to where the last step starts, as the forward process does."""
        return self.sampler.renoise(x0, noise)

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        """Return the mean of x_{t-1} given x_t = x (n, *shape) and rows of the table (n,)."""
        seen = self.sampler.network_input(x, t)
        return self.sampler.mean(x, self.output(params, seen, self.sampler.timesteps[t - 1], condition), t)

    def predict(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        """Return the noise in x_t = x (n, *shape) that the output stands for, after guidance, (n, *shape)."""
        seen = self.sampler.network_input(x, t)
        return self.sampler.noise(x, self.output(params, seen, self.sampler.timesteps[t - 1], condition), t)

    def denoised(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return x_0-hat of x_t = x and the noise in it, all (n, *shape), before the sampler clips it."""
        return self.sampler.denoised(x, epsilon, t)

    def step(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return the mean of x_{t-1} given x_t = x and the noise in it, all (n, *shape)."""
        return self.sampler.step(x, epsilon, t)

    def noise_level(self, t: int) -> float:
        """Return the standard deviation of the noise in x_t."""
        return self.sampler.noise_level(t)

    def finish(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        """Make the noise-free last step that was frozen out of the chain, with the network as it was given."""
        if not self.sampler.frozen_last or self.sampler.finish_timestep is None:
            return x0
        seen = self.sampler.finish_input(x0)
        return self.sampler.finish(x0, self.output({}, seen, self.sampler.finish_timestep, condition))

    def output(self, params: Params, seen: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        """Return the network's output after guidance, (n, *shape), in the dtype of `seen`.

        Raises:
            ValueError: if there is no condition.
        """
        if condition is None:
            raise ValueError(f"condition must be a row of the chain's table for each sample, got none ({self.told})")
        given = self.table[condition]
        if self.guidance == 1:
            return self._call(params, seen, timestep, given)
        empty = self.table[self.unconditional].expand_as(given)
        both = self._call(params, torch.cat([seen, seen]), timestep, torch.cat([empty, given]))
        without, with_it = both.chunk(2)
        return without + self.guidance * (with_it - without)

    def _call(self, params: Params, x: Tensor, timestep: Tensor, given: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        if given.is_floating_point():
            given = given.to(dtype)
        if dtype.itemsize < 4:  # what is trained is float32 all the same, and enters in the type of its place
            own = dict(self.network.named_parameters())
            params = {name: p.to(own[name].dtype) for name, p in params.items()}
        with _derivatives(x, params):
            # Whether parameters are tied to others is asked of the network once: at every call it takes milliseconds.
            output = functional_call(
                self.network,
                params,
                (x.to(dtype), timestep.to(x.device)),
                {self.told: given, "return_dict": False},
                tie_weights=has_ties(self.network),
            )
        return output[0].to(x.dtype)


def has_ties(network: nn.Module) -> bool:
    """Return whether one tensor stands under two names. Tensors that are tied later are not seen."""
    if network not in _TIES:
        tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
        _TIES[network] = len({id(tensor) for _, tensor in tensors}) < len(tensors)
    return _TIES[network]


_TIES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def _derivatives(x: Tensor, params: Params) -> Generator[None]:
    """Choose kernels that have the derivatives asked for.

    The fused attentions have neither forward-mode derivatives nor batching rules; the plain one has both. The
    forward-mode derivative of a group norm is there for contiguous tangents only.
    """
    inside: Any = torch._C  # torch.func offers no public way to ask
    wrapped = inside._functorch.is_functorch_wrapped_tensor
    if not (wrapped(x) or any(wrapped(p) for p in params.values())):
        yield
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), _ContiguousGroupNorms():
        yield


class _ContiguousGroupNorms(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.group_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])  # the tangent, too
        return func(*args, **(kwargs or {}))


def checkpoint_blocks(network: Any) -> None:
    """Let a diffusers network keep the inputs of its blocks only, and compute the rest again in the backward pass.

    torch's checkpoint alone is wrong here: its second computation would find the module's own parameters in place of
    those that `functional_call` had put there for the first.
    """

    def block(module: nn.Module, *arguments: Any) -> Any:
        # torch.func's reverse-mode derivatives forbid the hooks that a checkpoint is made of.
        inside: Any = torch._C  # no public way to ask
        if not inside._autograd._saved_tensors_hooks_is_enabled():
            return module(*arguments)
        held: dict[str, Tensor] = dict(module.named_parameters())
        return checkpoint(lambda *a: functional_call(module, held, a), *arguments, use_reentrant=False)

    network.enable_gradient_checkpointing(block)
