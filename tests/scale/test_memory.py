"""Counted memory against counts by hand, on CPU and on meta, and against what the process really takes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from algorithms import estimators as named
from algorithms.chain import Params
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from scale import memory
from scale.memory import LiveBytes, Peak, as_on_real_devices, fixed_and_per_sample, measured_peak, meta_copy, predict

MIB = 2**20
devices = pytest.mark.parametrize("device", ["cpu", "meta"])

# What a process takes depends on the heap that earlier tests left in it: these run in one of their own.
fresh = pytest.mark.skipif("VERIFINE_FRESH_PROCESS" not in os.environ, reason="run by the last test of this file")


def leaf(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, dtype=torch.float64, device=device, requires_grad=True)


# --- counts by hand ------------------------------------------------------------------------------------------------


@devices
def test_one_product_and_its_backward_pass(device: str) -> None:
    x = leaf(3, 5, device=device)
    with LiveBytes() as count:
        y = x.exp()
        assert (count.current, count.peak) == (120, 120)
        value = y.sum()
        assert count.current == 128
        value.backward()  # 8 for the gradient of `value`, 120 for the gradient of x, which becomes its .grad
        assert (count.current, count.peak) == (120 + 8 + 120, 120 + 8 + 8 + 120)
        x.grad = None
        assert count.current == 128
    del y, value
    assert (count.current, count.peak) == (0, 256)


@devices
def test_what_only_autograd_holds_counts_until_it_is_used(device: str) -> None:
    x = leaf(3, 5, device=device)
    with LiveBytes() as count:
        value = x.exp().exp().sum()  # both results are saved and nobody else holds them
        assert count.current == 120 + 120 + 8
        value.backward()
        x.grad = None
        assert count.current == 8
    # Inside exp's backward: its result and the gradients after and before it, beside the other exp's result or, when
    # it has been used and given back, nothing. `value` and its gradient last as long as the backward pass.
    assert count.peak == 120 + 120 + 120 + 8 + 8


@devices
def test_temporaries_without_a_graph_die_at_once(device: str) -> None:
    x = leaf(3, 5, device=device)
    with torch.no_grad(), LiveBytes() as count:
        x.exp().exp().exp().exp()
    assert (count.current, count.peak) == (0, 240)


@devices
def test_views_of_one_piece_of_memory_count_once(device: str) -> None:
    with LiveBytes() as count:
        x = torch.zeros(4, 8, dtype=torch.float64, device=device)
        views = [x.T, x[1:3], x.view(-1), x.detach(), x.expand(7, 4, 8), x.chunk(2)]
        assert count.current == 256
        del x
        assert count.current == 256  # the views keep all of it
        del views[:5]
        assert count.current == 256
        views.clear()
        assert count.current == 0


@devices
def test_what_was_there_before_is_not_counted_nor_are_its_views_nor_what_is_written_into_it(device: str) -> None:
    x = torch.zeros(4, 8, device=device)
    out = torch.zeros(4, 8, device=device)
    with LiveBytes() as count:
        kept = [x.view(-1), x[0], x.add_(1), torch.add(x, x, out=out)]
    assert (len(kept), count.current, count.peak) == (4, 0, 0)


@devices
def test_what_is_handed_in_counts_from_the_start_and_while_it_lives(device: str) -> None:
    x = torch.zeros(4, 8, device=device)
    with LiveBytes(held=[x, x[0], x.T]) as count:
        assert (count.current, count.peak) == (128, 128)
        y = x + 1
        assert count.current == 256
        del x
        assert count.current == 128
    del y
    assert count.current == 0


def test_tensors_made_from_numbers_and_memory_that_grows_are_counted() -> None:
    with LiveBytes() as count:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert count.current == 12
        x.resize_(10)
        assert count.current == 40
        parts = torch.ones(6).split(2), torch.ones(5).sort()  # tuples: 24 shared; 20 for values, 40 for indices
        assert count.current == 40 + 24 + 20 + 40
    del x, parts
    assert count.current == 0


@devices
def test_two_layers(device: str) -> None:
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1)).to(device)
    x = torch.ones(5, 3, device=device)

    def step() -> None:
        net(x).sum().backward()

    hidden, out, scalar = 4 * 5 * 7, 4 * 5, 4
    first, second = 4 * (3 * 7 + 7), 4 * (7 + 1)
    both = 2 * scalar  # the value and its gradient
    forward = 2 * hidden + out + scalar
    in_tanh = 3 * hidden + second + both  # its result and the gradients after and before it
    at_the_end = hidden + second + first + both
    assert predict(step) == max(forward, in_tanh, at_the_end) == in_tanh
    with LiveBytes() as again:
        step()
    assert again.current == 0  # the gradients were there before, and are added to in place
    for p in net.parameters():
        p.grad = None
    with LiveBytes() as count:
        step()
    assert count.current == first + second


@devices
def test_functional_call_under_torch_func(device: str) -> None:
    net = nn.Linear(3, 7).to(device)
    params = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.ones(5, 3, device=device)

    def loss(p: Params, x: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (x,)).square().sum()

    with LiveBytes() as count:
        grads = torch.func.grad(loss)(params, x)
        assert count.current == 4 * (3 * 7 + 7)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
        assert count.current == 6 * 4 * (3 * 7 + 7)
        del grads, each
    assert count.current == 0
    assert count.peak >= 6 * 4 * (3 * 7 + 7)


def blocks(depth: int, width: int, device: str) -> list[nn.Sequential]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).to(device) for _ in range(depth)]


@devices
def test_checkpoints_lower_the_peak_to_one_blocks_activations(device: str) -> None:
    rows, width = 512, 8  # activations, not parameters, are what counts
    unit = 4 * rows * width

    def peak(depth: int, checkpointed: bool) -> int:
        net = blocks(depth, width, device)
        x = torch.ones(rows, width, device=device, requires_grad=True)

        def step() -> None:
            y = x
            for block in net:
                y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
            y.sum().backward()

        return predict(step)

    plain = [peak(depth, False) for depth in (4, 8)]
    lower = [peak(depth, True) for depth in (4, 8)]
    assert lower[0] < plain[0]
    assert plain[1] - plain[0] == pytest.approx(4 * 2 * unit, rel=0.1)  # tanh's result and the block's input
    assert lower[1] - lower[0] == pytest.approx(4 * unit, rel=0.1)  # the block's input


# --- meta ----------------------------------------------------------------------------------------------------------


def test_meta_copy_has_the_shapes_and_settings_and_shares_what_was_shared() -> None:
    net: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight  # tied
    net[0].bias.requires_grad_(False)
    net[0].plain = torch.ones(9)  # neither parameter nor buffer
    net.eval()
    copied: Any = meta_copy(net)
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in copied.named_parameters()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in net.named_parameters()
    }
    assert all(p.is_meta for p in [*copied.parameters(), *copied.buffers(), copied[0].plain])
    assert not any(p.is_meta for p in [*net.parameters(), *net.buffers(), net[0].plain])
    assert copied[2].weight is copied[0].weight
    assert not copied.training
    assert copied(torch.ones(2, 3, device="meta")).shape == (2, 3)


def test_meta_copy_allocates_nothing() -> None:
    net = nn.Linear(4096, 4096)
    with LiveBytes() as count:
        copied = meta_copy(net)
    assert all(p.is_meta for p in copied.parameters())
    assert count.peak == sum(p.nbytes for p in net.parameters())  # as counted: the copy's, which have no memory
    with measured_peak() as real:
        meta_copy(net)
    assert real.bytes < 16 * MIB  # of 64


def test_meta_copy_of_tensors_and_of_dictionaries() -> None:
    w = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    copied = meta_copy({"a": w, "b": w})
    assert copied["a"] is copied["b"]
    for tensor in (copied["a"], meta_copy(w)):
        assert (tensor.is_meta, tensor.shape, tensor.dtype, tensor.requires_grad) == (True, (2, 3), torch.float16, True)


def attention(device: str, **options: Any) -> Callable[[], None]:
    def step() -> None:
        q, k, v = (torch.ones(2, 3, 64, 8, device=device, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, **options).sum().backward()

    return step


def test_attention_counts_the_same_on_meta_as_on_a_real_device() -> None:
    with LiveBytes() as composed:
        attention("meta")()
    mask = torch.zeros(64, 64)
    assert predict(attention("meta")) == predict(attention("cpu"))
    assert predict(attention("meta", is_causal=True)) == predict(attention("cpu", is_causal=True))
    assert predict(attention("meta", attn_mask=mask.to("meta"))) == predict(attention("cpu", attn_mask=mask))
    assert predict(attention("meta", attn_mask=mask.bool().to("meta"))) == predict(
        attention("cpu", attn_mask=mask.bool())
    )
    # What meta does by itself, and what dropout asks for anywhere, holds the matrix of weights: (2, 3, 64, 64) floats.
    assert composed.peak > predict(attention("meta")) + 2 * 3 * 64 * 64 * 4
    with sdpa_kernel(SDPBackend.MATH):
        assert predict(attention("meta")) == composed.peak
    assert predict(attention("meta", dropout_p=0.5)) > predict(attention("meta")) + 2 * 3 * 64 * 64 * 4


def test_attention_is_torchs_own_again_afterwards_and_real_tensors_never_know() -> None:
    before = F.scaled_dot_product_attention
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = before(q, q, q)

    def fail() -> None:
        with as_on_real_devices():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), expected, rtol=0, atol=0)
            assert F.scaled_dot_product_attention is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert F.scaled_dot_product_attention is before


def test_values_on_meta_are_answered_only_if_asked_for() -> None:
    x = torch.ones(3, device="meta")
    with as_on_real_devices(reads=True):
        assert bool((x != 0).all()) is True
        assert bool(torch.zeros(())) is False  # a real tensor's own
    with as_on_real_devices(reads=2.5):
        assert x.sum().item() == 2.5
    with pytest.raises(RuntimeError), as_on_real_devices():
        bool((x != 0).all())


SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
STABLE_DIFFUSION = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def build(device: str, config: dict[str, Any] = SMALL) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, on import
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from peft import LoraConfig
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(**config)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


def gradient(unet: Any, batch: int, size: int = 16) -> Callable[[], None]:
    device, width = next(unet.parameters()).device, unet.config.cross_attention_dim

    def step() -> None:
        x = torch.zeros(batch, 4, size, size, device=device)
        t = torch.zeros(batch, device=device, dtype=torch.long)
        text = torch.zeros(batch, 77, width, device=device)
        unet(x, t, text).sample.square().sum().backward()
        for p in unet.parameters():
            p.grad = None

    return step


def test_a_small_unet_counts_the_same_on_meta_as_on_cpu_and_checkpoints_need_less() -> None:
    real = build("cpu")
    for unet in (meta_copy(real), build("meta")):
        for batch, size in ((1, 16), (3, 8)):
            assert predict(gradient(unet, batch, size)) == predict(gradient(real, batch, size))
    shapes = meta_copy(real)
    plain = predict(gradient(shapes, 2))
    for unet in (shapes, real):
        unet.enable_gradient_checkpointing()
        unet.train()
    assert predict(gradient(shapes, 2)) == predict(gradient(real, 2)) < 0.7 * plain


def test_the_unet_of_stable_diffusion_is_counted_without_being_there() -> None:
    unet = build("meta", STABLE_DIFFUSION)
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 797_184
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964 + 797_184
    with measured_peak() as real:
        plain = predict(gradient(unet, 1, 32))
    assert real.bytes < 100 * MIB  # the network alone would take 3.4 GB
    assert 300 * MIB < plain < 500 * MIB  # measured on the real one: benchmarks/unet.py
    unet.enable_gradient_checkpointing()
    unet.train()
    assert predict(gradient(unet, 1, 32)) < 0.4 * plain


def test_a_line_through_two_batches_predicts_a_third() -> None:
    unet = build("meta")

    def peak(batch: int) -> int:
        return predict(gradient(unet, batch), held=unet.parameters())

    fixed, per_sample = fixed_and_per_sample(peak)
    assert fixed + 11 * per_sample == pytest.approx(peak(11), rel=1e-3)
    assert fixed == pytest.approx(sum(p.nbytes for p in unet.parameters()), rel=0.1)
    with pytest.raises(ValueError, match=r"^batches must be two numbers 1 <= few < many, got \(4, 4\)$"):
        fixed_and_per_sample(peak, (4, 4))


# --- the sweep -----------------------------------------------------------------------------------------------------

SAMPLES, DIMENSIONS, HIDDEN = 32, 16, 256


@dataclass(frozen=True)
class Layers:
    """x + a layer of tanh, with the same parameters at every step."""

    steps: int
    shape: tuple[int, ...] = (DIMENSIONS,)

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        return x + torch.tanh(x @ params["in"]) @ params["out"] / self.steps

    def std(self, t: int) -> float:
        return 0.1


@dataclass(frozen=True)
class Square:
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return -x0.square().sum(1)


def swept(steps: int, make: Callable[[int], Estimator] = named.first_order, device: str = "cpu") -> int:
    chain = Layers(steps)
    params = {
        "in": torch.ones(DIMENSIONS, HIDDEN, dtype=torch.float64, device=device, requires_grad=True),
        "out": torch.ones(HIDDEN, DIMENSIONS, dtype=torch.float64, device=device, requires_grad=True),
    }
    estimator = make(steps)
    noise = estimator.draw(chain, params, SAMPLES, torch.Generator().manual_seed(0))
    return predict(lambda: estimator.accumulate(chain, params, Objective(Square()), noise), reads=True)


def through_one_graph(steps: int) -> int:
    """The planted mistake: one graph through all steps."""
    chain = Layers(steps)
    params = {"in": leaf(DIMENSIONS, HIDDEN), "out": leaf(HIDDEN, DIMENSIONS)}
    noise = torch.zeros(SAMPLES, DIMENSIONS, dtype=torch.float64)

    def step() -> None:
        x = noise
        for t in range(steps, 0, -1):
            x = chain.mean(params, x, t, None) + chain.std(t) * noise
        Square()(x, None).mean().backward()

    return predict(step)


def per_step(peak: Callable[[int], int]) -> list[float]:
    lengths = (5, 10, 20, 40)
    peaks = [peak(steps) for steps in lengths]
    return [(b - a) / (n - m) for a, b, m, n in zip(peaks, peaks[1:], lengths, lengths[1:], strict=False)]


def test_the_sweep_grows_with_the_chain_by_the_latents_only() -> None:
    latent, number = 8 * SAMPLES * DIMENSIONS, 8 * SAMPLES
    # Beside each step's latents three numbers per sample: its running cost, the sum of the costs so far, its credit.
    small = 3 * number
    matrix = [8 * (m + n + 2) + 1 for m, n in ((5, 10), (10, 20), (20, 40))]  # T (T + 2) doubles and T truth values
    assert per_step(swept) == [latent + small + each for each in matrix]
    assert small < 0.2 * latent
    activations = 8 * SAMPLES * HIDDEN
    assert min(per_step(through_one_graph)) >= activations > 10 * latent


@pytest.mark.parametrize("make", [named.first_order, named.policy_gradient, lambda T: named.half_order(T, 2)])
def test_the_sweep_counts_the_same_on_meta(make: Callable[[int], Estimator]) -> None:
    assert swept(6, make, "meta") == swept(6, make)


# --- against the process -------------------------------------------------------------------------------------------


def large_step() -> Callable[[], None]:
    """A gradient of 170 MB, in blocks of 34 MB, which glibc never keeps whatever ran in this process before."""
    weight = torch.full((2, 2112), 0.5, requires_grad=True)
    x = torch.ones(4096, 2112)

    def step() -> None:
        y = torch.tanh(torch.tanh(x * weight[0]) * weight[1])
        y.square().sum().backward()
        weight.grad = None

    return step


ways: list[Callable[[], AbstractContextManager[Peak]]] = [
    measured_peak,
    memory._high_water_mark,
    memory._sampled,
]


@fresh
@pytest.mark.skipif(not (memory.PROC / "statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("way", ways)
def test_count_agrees_with_the_growth_of_the_process(way: Callable[[], AbstractContextManager[Peak]]) -> None:
    step = large_step()
    step()  # the first call loads code and makes the kernels' own buffers
    counted = predict(step)
    assert counted > 100 * MIB
    memory._tidy_heap(direct=False)
    with way() as peak:
        step()
    if "Vm" in peak.how:
        assert peak.bytes == pytest.approx(counted, rel=0.1)
    else:  # a thread that looks now and then may miss the top, but sees most of it
        assert 0.4 * counted < peak.bytes < 1.1 * counted


@fresh
@pytest.mark.skipif(not (memory.PROC / "statm").exists(), reason="reads Linux's /proc")
def test_direct_takes_smaller_blocks_from_the_system_and_gives_them_back() -> None:
    with measured_peak() as peak:
        for _ in range(20):  # 20 MB each; a heap that keeps them has them already when the next context begins
            block = torch.ones(5 * MIB)
            del block
    with measured_peak() as again:
        block = torch.ones(5 * MIB)
    memory.ordinary_heap()
    assert peak.bytes == pytest.approx(20 * MIB, rel=0.1)
    assert again.bytes == pytest.approx(block.nbytes, rel=0.1)


@fresh
@pytest.mark.skipif(not (memory.PROC / "statm").exists(), reason="reads Linux's /proc")
def test_a_peak_before_is_not_taken_for_this_one() -> None:
    large = torch.ones(48 * MIB)
    assert large.sum() > 0
    del large
    with measured_peak() as peak:
        small = torch.ones(16 * MIB)
    assert small.sum() > 0
    assert peak.bytes == pytest.approx(64 * MIB, rel=0.15)


@fresh
def test_where_proc_cannot_be_written_a_thread_looks_and_where_there_is_none_the_largest_ever_must_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def refuse() -> None:
        raise PermissionError

    with measured_peak() as peak:
        pass
    if (memory.PROC / "statm").exists():
        monkeypatch.setattr(memory, "_reset_high_water_mark", refuse)
        with measured_peak() as peak:
            pass
        assert peak.how.startswith("resident set, sampled")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    with measured_peak() as peak:
        block = torch.ones(400 * MIB // 4)
    assert "ru_maxrss" in peak.how
    assert peak.bytes >= 0
    assert block.nbytes == 400 * MIB


def test_a_device_that_cannot_be_measured_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"^device must be cpu or cuda to be measured, got 'meta'$"),
        measured_peak("meta"),
    ):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_count_agrees_with_the_allocator_on_cuda() -> None:
    net = nn.Sequential(*blocks(4, 512, "cuda"))
    x = torch.ones(4096, 512, device="cuda")

    def step() -> None:
        net(x).sum().backward()
        for p in net.parameters():
            p.grad = None

    step()
    with measured_peak("cuda") as peak:
        step()
    assert predict(step) == pytest.approx(peak.bytes, rel=0.05)


@pytest.mark.skipif(not (memory.PROC / "statm").exists(), reason="reads Linux's /proc")
def test_what_the_process_takes_in_a_process_of_its_own() -> None:
    here = {"VERIFINE_FRESH_PROCESS": "1", **os.environ}
    ask = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    names = "growth_of_the_process or takes_smaller_blocks or a_peak_before or where_proc_cannot"
    done = subprocess.run([*ask, "-k", names], env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout
