"""The memory of one gradient: counted tensor by tensor on any device, predicted on `meta`, and measured for comparison.

    unet = meta_copy(unet)                                        # shapes only: nothing is allocated
    peak = predict(lambda: unet(x, t, text).sample.sum().backward())

A count is of the tensors that the step's operations return: scratch space inside a kernel, an allocator's rounding and
fragmentation, and libraries' own memory are not in it. How far that is from the truth is what `measured_peak` tells.
On a CPU the scratch space is oneDNN's, whose convolutions copy weights and inputs into another layout for every call,
113 MiB for the largest weight of Stable Diffusion's U-Net. It shows where the tensors are few, and passes unseen below
a peak that they make elsewhere: a gradient at latents of 32 x 32 took 2 % more than predicted (413 MiB), with
checkpoints in the U-Net 41 % (117 MiB), then with a batch of four 1 % (461 MiB); at 16 x 16 up to five times.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# --- counting ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the memory that tensors created inside hold and have not given back.

    with LiveBytes() as count:
        loss(x).backward()
    print(count.peak)

    Views share their memory and count once. Memory that an operation only finds (parameters, inputs) is not counted,
    but what `held` lists is, from the start and for as long as it lives. What autograd saves counts while it is saved;
    so do the temporaries of the backward pass and what a checkpoint computes again. The count goes on falling after the
    context is left, as tensors die. Only tensors with a storage are understood: no sparse or nested ones. Memory that
    torch takes over from NumPy counts too, and is the one exception to "created inside".

    Args:
        held: see above.
        device: count on devices of this type only ("cuda", "meta"), by default on all together.

    Attributes:
        current: bytes held now.
        peak: the largest `current` so far.
    """

    def __init__(self, held: Iterable[Tensor] = (), device: str | None = None) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._device = device
        # Storages by the identity of their Python object, which torch keeps for as long as the storage lives; the
        # address of the data would not do, it is 0 on meta.
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found: set[int] = set()
        if func is not torch.ops.aten.lift_fresh.default:  # torch.tensor(...): its argument is what has been created
            found = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        self._count(_tensors(result), apart=found)
        return result

    def _count(self, tensors: Iterable[Tensor], apart: set[int] | frozenset[int] = frozenset()) -> None:
        """Take in the tensors' storages, but those in `apart` only if they are known, and then for their new size."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self._sizes:
                if key in apart or self._device not in (None, storage.device.type):
                    continue
                self._storages[key] = weakref.ref(storage, partial(self._release, key))
            size = storage.nbytes()
            self.current += size - self._sizes.get(key, 0)
            self._sizes[key] = size
        self.peak = max(self.peak, self.current)

    def _release(self, key: int, _: object) -> None:
        del self._storages[key]
        self.current -= self._sizes.pop(key)


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, Mapping):
        yield from _tensors(tuple(tree.values()))


# --- predicting ----------------------------------------------------------------------------------------------------

Held = TypeVar("Held", Tensor, nn.Module, dict[str, Tensor])


def meta_copy(held: Held) -> Held:
    """Return a copy on the meta device, shapes without numbers; nothing of the original's size is allocated.

    Tensors that a module holds twice (tied weights) are one tensor in the copy too. A module that has not been built
    yet needs no copy: build it inside `with torch.device("meta")`.
    """
    if isinstance(held, Tensor):
        return _on_meta(held)
    if isinstance(held, nn.Module):
        attributes = (_tensors(vars(module)) for module in held.modules())  # buffers and parameters lie in them too
        tensors = {id(tensor): tensor for each in attributes for tensor in each}
    else:
        tensors = {id(tensor): tensor for tensor in held.values()}
    # A deep copy looks up in its memo what has been copied already: so it never gets to the tensors themselves.
    return copy.deepcopy(held, {key: _on_meta(tensor) for key, tensor in tensors.items()})


def _on_meta(tensor: Tensor) -> Any:
    empty = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)


@contextmanager
def as_on_real_devices(reads: bool | float | None = None) -> Generator[None]:
    """Make meta tensors take the ways that tensors of real devices take; others are not touched.

    Attention: on meta, torch composes `scaled_dot_product_attention` of its parts and with it the matrix of all
    weights, which the fused kernels of real devices never hold. Here it goes to the fused kernel for CPUs, which keeps
    the output and one number per query, as CUDA's do; not with dropout, grouped queries, a mask that wants a gradient,
    or where `sdpa_kernel` forbids it: these are composed on real devices too, or may be. The function is exchanged in
    torch.nn.functional for the time being, because a TorchFunctionMode is off during backward, where checkpoints
    compute again.

    Values: a meta tensor has none to read. With `reads` given, `bool(x)` and `x.item()` answer it; without, they raise
    as ever. The sweep of first order asks `bool` whether all weights are different from zero: True is right for it.
    """
    F.scaled_dot_product_attention = _attention
    try:
        with nullcontext() if reads is None else _Reads(reads):
            yield
    finally:
        F.scaled_dot_product_attention = _torch_attention


class _Reads(TorchFunctionMode):
    def __init__(self, answer: bool | float) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item) and args[0].is_meta:
            return bool(self.answer) if func is Tensor.__bool__ else self.answer
        return func(*args, **(kwargs or {}))


_torch_attention = F.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    learned = attn_mask is not None and attn_mask.requires_grad
    switched_off = not torch.backends.cuda.flash_sdp_enabled()  # by torch.nn.attention.sdpa_kernel; holds on CPU too
    if not query.is_meta or query.dim() != 4 or dropout_p or enable_gqa or learned or switched_off:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def predict(
    step: Callable[[], object],
    held: Iterable[Tensor] = (),
    device: str | None = None,
    reads: bool | float | None = None,
) -> int:
    """Return the peak bytes of `step()`, counted by `LiveBytes`; on meta tensors this is a prediction, and free.

    Args:
        held: counted from the start, for instance the parameters.
        device: count on devices of this type only.
        reads: what reading a value of a meta tensor answers, see `as_on_real_devices`.
    """
    count = LiveBytes(held, device)
    with as_on_real_devices(reads), count:
        step()
    return count.peak


def fixed_and_per_sample(peak: Callable[[int], int], batches: tuple[int, int] = (2, 4)) -> tuple[int, int]:
    """Return the bytes that the batch does not change, and the bytes of each further sample: a line through two peaks.

    A peak is the largest of several moments' bytes, each a line in the batch; so beyond the larger of the two batches
    the line can only be too low, and is exact where the same moment stays the largest.

    Raises:
        ValueError: unless 1 <= batches[0] < batches[1].
    """
    few, many = batches
    if not 1 <= few < many:
        raise ValueError(f"batches must be two numbers 1 <= few < many, got {batches}")
    low, high = peak(few), peak(many)
    per_sample = math.ceil((high - low) / (many - few))
    return high - many * per_sample, per_sample


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """Growth of memory, filled in when the context is left: `bytes`, and `how` they were measured."""

    bytes: int = 0
    how: str = ""


@contextmanager
def measured_peak(device: torch.device | str = "cpu", direct: bool = True) -> Generator[Peak]:
    """Measure by how much the memory in use grows, at its peak, beyond what is in use on entry.

    CUDA: torch's allocator, `max_memory_allocated`; the bytes of tensors and kernels' workspaces that go through it.

    CPU: the resident set of the process, so everything the step touches in any thread. On Linux the kernel's high-water
    mark is reset through /proc/self/clear_refs; where that may not be written, a thread looks every millisecond and may
    miss a short peak; elsewhere the growth of `ru_maxrss`, which is right only if the process was never larger before.

    glibc keeps freed blocks of up to 32 MiB in its heap, where they may be used again unseen or be left over as holes:
    the same step's growth then varies from run to run, up to more than twice what its tensors take. With `direct` it is
    told to take blocks of 256 KiB and more from the system and to give them back at once, until `ordinary_heap` is
    called. That is exact, and slower; so measure first and time afterwards: large blocks that were freed before leave
    holes in the heap for good. Without `direct`, what the heap keeps is given back on entry, and no more.

    Raises:
        ValueError: if the device is neither CPU nor CUDA.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda to be measured, got {str(device)!r}")
    gc.collect()
    if kind == "cuda":
        with _cuda_peak(torch.device(device)) as peak:
            yield peak
        return
    _tidy_heap(direct)
    with _resident_peak() as peak:
        yield peak


def ordinary_heap() -> None:
    """Let glibc keep freed blocks again, after `measured_peak` told it not to: what follows runs at its usual speed.

    The thresholds get the largest values that glibc gives them by itself once large blocks have been freed.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, 32 * KIB * KIB)
    _glibc("mallopt", M_TRIM_THRESHOLD, 64 * KIB * KIB)


@contextmanager
def _cuda_peak(device: torch.device) -> Generator[Peak]:
    peak = Peak(how="torch.cuda.max_memory_allocated")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        yield peak
    finally:
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before


PROC = Path("/proc/self")
KIB = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them


def _resident_peak() -> AbstractContextManager[Peak]:
    if not (PROC / "statm").exists():
        return _largest_ever()
    try:
        _reset_high_water_mark()
    except OSError:
        return _sampled()
    return _high_water_mark()


@contextmanager
def _high_water_mark() -> Generator[Peak]:
    peak = Peak(how="high-water mark of the resident set (VmHWM)")
    _reset_high_water_mark()
    before = _status("VmHWM")
    try:
        yield peak
    finally:
        peak.bytes = _status("VmHWM") - before


@contextmanager
def _sampled(seconds: float = 0.001) -> Generator[Peak]:
    peak = Peak(how="resident set, sampled every millisecond")
    before, left = _status("VmRSS"), threading.Event()

    def watch() -> None:
        while True:
            peak.bytes = max(peak.bytes, _status("VmRSS") - before)
            if left.wait(seconds):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        left.set()
        thread.join()


@contextmanager
def _largest_ever() -> Generator[Peak]:
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else KIB
    peak = Peak(how="growth of the largest resident set so far (ru_maxrss)")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield peak
    finally:
        peak.bytes = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _reset_high_water_mark() -> None:
    (PROC / "clear_refs").write_text("5")


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in (PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return KIB * int(value.split()[0])
    raise OSError(f"/proc/self/status has no field {field}")


def _tidy_heap(direct: bool) -> None:
    """Give free memory back to the system, and with `direct` keep none from now on, where the C library is glibc."""
    if direct:
        _glibc("mallopt", M_MMAP_THRESHOLD, 256 * KIB)
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):  # another C library: the measurement is as good as it is without
        return
