"""What every score must do: image i goes with prompt i, and the company in a batch does not matter."""

import pytest
import torch
from torch import Tensor

from scale.rewards.plain import PlainScore

PROMPTS = ["a cat", "the dog", "7 cats", "a cat on the dog"]


def example_images(channels: int = 3, side: int = 20, n: int = 4) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(5))


def check_pairing(scorer, images: Tensor, prompts: list[str], reads: bool, rtol: float = 1e-5) -> None:
    """Fail unless scores are each image's own; `reads` says whether prompts matter.

    Each image is also scored alone with its prompt, the batch permuted, and all images are given every prompt, so that
    neither a score of all images against one prompt nor one of the batch as a whole can pass.
    """
    images = images.detach()
    scores = scorer(images, prompts)
    assert scores.shape == (len(images),)
    assert len({round(s, 7) for s in scores.tolist()}) == len(images), "the examples must tell the images apart"
    alone = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(alone, scores, rtol=rtol, atol=rtol * float(scores.std()))
    order = torch.tensor([2, 0, 3, 1])
    permuted = scorer(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(permuted, scores[order], rtol=rtol, atol=rtol * float(scores.std()))
    swapped = scorer(images, [*prompts[1:], prompts[0]])
    moved = (swapped - scores).abs() > 100 * rtol * scores.std()
    assert bool(moved.all() if reads else not moved.any()), (
        "a prompt must move its image's score, and only if it is read"
    )


class _ReadsLengths:
    """A right score: mean pixel times length of the prompt."""

    name, differentiable = "lengths", True

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1) * torch.tensor([float(len(p)) for p in prompts])


class _FirstPrompt(_ReadsLengths):
    """Planted mistake of two released codes: all images against prompt 0."""

    def __call__(self, images, prompts):
        return super().__call__(images, [prompts[0]] * len(images))


class _BatchMean(_ReadsLengths):
    """Planted mistake: each score is moved by the mean of its batch."""

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        return scores - scores.mean()


class _Reversed(_ReadsLengths):
    """Planted mistake: prompts in the wrong order."""

    def __call__(self, images, prompts):
        return super().__call__(images, prompts[::-1])


def test_a_right_score_passes():
    check_pairing(_ReadsLengths(), example_images(), PROMPTS, reads=True)
    check_pairing(PlainScore("p", lambda x: x.flatten(1).mean(1), True), example_images(), PROMPTS, reads=False)


@pytest.mark.parametrize("mistake", [_FirstPrompt, _BatchMean, _Reversed])
def test_planted_mistakes_are_caught(mistake):
    with pytest.raises(AssertionError):
        check_pairing(mistake(), example_images(), PROMPTS, reads=True)


def test_prompts_that_are_not_read_are_caught():
    with pytest.raises(AssertionError, match="must move"):
        check_pairing(PlainScore("p", lambda x: x.flatten(1).mean(1), True), example_images(), PROMPTS, reads=True)
