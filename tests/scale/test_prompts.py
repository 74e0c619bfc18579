"""What the network is told at which step, counted independently and as the network itself sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.chain import rollout
from algorithms.estimators import policy_gradient
from scale.prompts import Prompts
from scale.stable_diffusion import embed
from tests.scale.conftest import Make

KNOWN = ["coarse", "middle", "fine", "plain"]


def test_texts_are_looked_up() -> None:
    prompts = Prompts.of(["plain", ("coarse", "fine"), ["fine"]], KNOWN)
    assert prompts.texts == ("plain", "fine", "fine")
    assert prompts.rows == ((3,), (0, 2), (2,))
    assert len(prompts) == 3


@pytest.mark.parametrize(
    ("steps", "texts", "told"),
    [
        (6, 1, "aaaaaa"),
        (6, 2, "aaabbb"),
        (6, 3, "aabbcc"),
        (3, 3, "abc"),
        (5, 2, "aaabb"),
        (7, 3, "aaabbcc"),
        (4, 3, "aabc"),
    ],
)
def test_equal_parts_of_the_chain_from_coarse_to_fine(steps: int, texts: int, told: str) -> None:
    prompts = Prompts.of([tuple("abc"[:texts]), ("c",)], list("abc"))
    condition = prompts.condition(torch.tensor([0, 1, 0]), steps)
    assert condition.steps.shape == (steps, 3)
    # In the order of sampling, t = T first.
    assert "".join("abc"[i] for i in condition.steps[:, 0].flip(0).tolist()) == told
    assert torch.equal(condition.steps[:, 2], condition.steps[:, 0])
    assert condition.steps[:, 1].tolist() == [2] * steps
    assert condition.reward is not None
    assert condition.reward.tolist() == [0, 1, 0]


def test_parts_differ_by_one_step_at_most() -> None:
    for steps in range(1, 13):
        for texts in range(1, steps + 1):
            known = [str(i) for i in range(texts)]
            told = Prompts.of([known], known).condition(torch.tensor([0]), steps).steps[:, 0].flip(0).tolist()
            counts = [told.count(i) for i in range(texts)]
            assert told == sorted(told)
            assert max(counts) - min(counts) <= 1
            assert min(counts) >= 1


def test_bad_prompts() -> None:
    with pytest.raises(ValueError, match="^prompts must hold at least one, got none$"):
        Prompts.of([], KNOWN)
    with pytest.raises(ValueError, match="^prompts must have at least one text each, number 2 has none$"):
        Prompts.of(["plain", ()], KNOWN)
    with pytest.raises(ValueError, match="^prompt 'fin' is not one of those that the model knows: coarse, middle"):
        Prompts.of([("coarse", "fin")], KNOWN)
    prompts = Prompts.of(["plain", KNOWN[:3]], KNOWN)
    with pytest.raises(ValueError, match=r"^prompts may have at most one text per step \(2\), got one with 3$"):
        prompts.condition(torch.tensor([0]), 2)


def what_it_was_told(task: Any, condition: Any, n: int) -> list[Tensor]:
    """Return what the network's own forward got in each call of a roll-out, t = T first."""
    seen: list[Tensor] = []
    hook = task.chain.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[task.chain.told]), with_kwargs=True
    )
    noise = policy_gradient(task.chain.steps).draw(task.chain, task.params, n, task.generator("noise"))
    rollout(task.chain, task.params, noise, condition)
    hook.remove()
    return seen


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_network_is_told_the_text_of_its_step(make: Make, guidance: float) -> None:
    prompts = [["a thing", "the digit"], "a digit"]
    task = make(prompts={"train": prompts}, sampler={"steps": 3, "guidance": guidance})
    seen = what_it_was_told(task, task.condition(3), 3)
    texts = {text: embed(task.parts["pipeline"], [text])[0] for text in ("a thing", "the digit", "a digit", "")}
    expected = [
        ["a thing", "a digit", "a thing"],
        ["a thing", "a digit", "a thing"],
        ["the digit", "a digit", "the digit"],
    ]
    assert len(seen) == 3
    for found, wanted in zip(seen, expected, strict=True):
        all_of_it = wanted if guidance == 1 else [""] * 3 + wanted
        # A text's states do not depend on those beside it, but for the last bit.
        assert torch.allclose(found, torch.stack([texts[text] for text in all_of_it]), atol=1e-6)


def test_pixels_are_told_labels(make: Make) -> None:
    task = make("pixel", prompts={"train": [["1", "0"], "3"]}, sampler={"steps": 2, "guidance": 2.0})
    seen = what_it_was_told(task, task.condition(2), 2)
    assert [s.tolist() for s in seen] == [[4, 4, 1, 3], [4, 4, 0, 3]]


@pytest.mark.parametrize(("kind", "empty"), [("tiny", 2), ("pixel", 4)])
def test_a_network_may_be_told_nothing(make: Make, kind: str, empty: int) -> None:
    given = make(kind).config.prompts.train
    task = make(kind, prompts={"train": list(given), "conditional": False})
    condition = task.condition(2)
    assert condition.steps.tolist() == [[empty] * 2] * 3
    assert condition.reward.tolist() == [0, 1]
    seen = what_it_was_told(task, condition, 2)
    if kind == "pixel":
        assert [s.tolist() for s in seen] == [[4, 4]] * 3
    else:
        nothing = embed(task.parts["pipeline"], [""])[0]
        assert all(torch.allclose(s, nothing.expand_as(s), atol=1e-6) for s in seen)


def test_prompts_of_batches_follow_one_another_and_held_out_ones_are_apart(make: Make) -> None:
    task = make(prompts={"train": ["the digit", "a thing", "a digit"], "held_out": ["thing", "digit"]})
    assert task.training == 3
    assert task.condition(4).reward.tolist() == [0, 1, 2, 0]
    assert task.condition(4, start=4).reward.tolist() == [1, 2, 0, 1]
    assert task.condition(3, held_out=True).reward.tolist() == [3, 4, 3]
    assert [task.prompts.texts[i] for i in (3, 4)] == ["thing", "digit"]
    assert make().condition(3, held_out=True).reward.tolist() == [0, 1, 0]
