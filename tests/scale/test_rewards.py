"""The decoded reward's checks, the registry, and the scores without weights against computation by hand."""

import io
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from scale.reward import DecodedReward
from scale.rewards import BUILDERS, make_scorer
from tests.scale.test_rewards_pairing import PROMPTS, check_pairing, example_images

PLAIN = ["brightness", "redness", "symmetry", "jpeg_compressibility", "jpeg_incompressibility"]


def scorer_of(name, tmp_path, **options) -> Any:
    return make_scorer(name, options, tmp_path, "cpu")


def score(name, tmp_path, images, prompts=("",), **options):
    return scorer_of(name, tmp_path, **options)(images, list(prompts) * (len(images) // len(prompts)))


# Scores without weights


def test_values_by_hand(tmp_path):
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0] = torch.tensor([[1.0, 0.5], [0.0, 0.5]])  # red, mean 1/2
    image[0, 1] = torch.tensor([[0.4, 0.0], [0.0, 0.0]])  # green, mean 1/10
    image[0, 2] = torch.tensor([[0.0, 0.0], [0.2, 1.0]])  # blue, mean 3/10
    assert score("brightness", tmp_path, image).item() == pytest.approx((0.5 + 0.1 + 0.3) / 3)
    assert score("redness", tmp_path, image).item() == pytest.approx(0.5 - (0.1 + 0.3) / 2)
    gaps = [0.5, 0.5, 0.4, 0.0, 0.0, 0.8]  # left to right, of the six rows; each counts twice among twelve pixels
    assert score("symmetry", tmp_path, image).item() == pytest.approx(-2 * sum(g * g for g in gaps) / 12)


def test_symmetry_is_left_to_right(tmp_path):
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(1, 1, 2, 2)
    assert score("symmetry", tmp_path, rows).item() == 0
    assert score("symmetry", tmp_path, rows.mT).item() == -1


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_size_is_that_of_the_written_file(tmp_path, channels):
    images = example_images(channels)
    kilobytes = []
    for image in images:
        pixels = [[[round(255 * float(image[c, i, j])) for c in range(channels)] for j in range(20)] for i in range(20)]
        raw = bytes(v for row in pixels for pixel in row for v in pixel)
        file = io.BytesIO()
        Image.frombytes("L" if channels == 1 else "RGB", (20, 20), raw).save(file, "JPEG", quality=95)
        kilobytes.append(len(file.getvalue()) / 1000)
    assert score("jpeg_incompressibility", tmp_path, images).tolist() == pytest.approx(kilobytes)
    assert score("jpeg_compressibility", tmp_path, images).tolist() == pytest.approx([-k for k in kilobytes])


@pytest.mark.parametrize("name", ["brightness", "redness", "symmetry"])
def test_gradients_are_those_of_finite_differences(tmp_path, name):
    images = example_images(side=4, n=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: score(name, tmp_path, x), (images,))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_scores_are_each_images_own(tmp_path, name):
    images = example_images() ** torch.tensor([0.25, 0.5, 2, 8])[:, None, None, None]
    images = torch.stack([images[0], images[1], images[2] * torch.tensor([1.0, 0.5, 0.1])[:, None, None], images[3]])
    check_pairing(scorer_of(name, tmp_path), images, PROMPTS, reads=False)


def test_channels_are_checked(tmp_path):
    with pytest.raises(ValueError, match="3 channels for the reward 'redness', got 1"):
        score("redness", tmp_path, example_images(1))
    with pytest.raises(ValueError, match="1 or 3 channels to be JPEGs, got 4"):
        score("jpeg_compressibility", tmp_path, example_images(4))


# A user's function


def own_score(images, prompts):
    return images.flatten(1).mean(1) * torch.tensor([float(len(p)) for p in prompts]).to(images)


def own_list(images, prompts):
    return [float(len(p)) for p in prompts]


def own_nonsense(images, prompts):
    return "high"


NOT_A_FUNCTION = 3


def test_custom_function(tmp_path):
    scorer = scorer_of("custom", tmp_path, function=f"{__name__}:own_score", differentiable=True)
    assert scorer.differentiable
    check_pairing(scorer, example_images(), PROMPTS, reads=True)
    lengths = scorer_of("custom", tmp_path, function=f"{__name__}:own_list")
    assert not lengths.differentiable
    assert lengths(example_images(), PROMPTS).tolist() == [5, 7, 6, 16]
    assert lengths(example_images().double(), PROMPTS).dtype == torch.float64
    with pytest.raises(ValueError, match=r"own_nonsense' must return numbers, got str"):
        scorer_of("custom", tmp_path, function=f"{__name__}:own_nonsense")(example_images(), PROMPTS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("math:no_such_function", "module 'math' has no 'no_such_function'"),
        ("math", "must be 'module:function', got 'math'"),
        (f"{__name__}:NOT_A_FUNCTION", "must be callable, got int"),
    ],
)
def test_custom_function_that_is_not_there(tmp_path, function, message):
    with pytest.raises(ValueError, match=message):
        scorer_of("custom", tmp_path, function=function)


# The digit, with a classifier that is known by hand: logit k is k times the mean pixel


class _MeanTimesK(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.arange(10.0))

    def forward(self, images):
        assert images.shape[1:] == (1, 8, 8)
        return images.flatten(1).mean(1, keepdim=True) * self.k


@pytest.fixture
def digit_scorer(tmp_path, monkeypatch):
    module = types.ModuleType("scale.digit_classifier")
    module.digit_classifier = lambda cache: _MeanTimesK()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "scale.digit_classifier", module)
    return scorer_of("digit", tmp_path)


@pytest.mark.parametrize("side", [8, 24])
def test_digit_is_the_log_probability_of_the_prompts_digit(digit_scorer, side):
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    images = levels[:, None, None, None].expand(4, 3, side, side)
    expected = torch.stack(
        [torch.log_softmax(m * torch.arange(10.0), 0)[d] for m, d in zip(levels, [3, 7, 0, 9], strict=True)]
    )
    torch.testing.assert_close(digit_scorer(images, ["3", "the digit 7", "0", "The digit 9"]), expected)


def test_digit_is_each_images_own_and_has_a_gradient(digit_scorer):
    images = example_images(1, 8).requires_grad_()
    check_pairing(digit_scorer, images, ["1", "the digit 2", "5", "9"], reads=True)
    (gradient,) = torch.autograd.grad(digit_scorer(images, ["1", "2", "5", "9"]).sum(), images)
    assert gradient.flatten(1).abs().sum(1).min() > 0


@pytest.mark.parametrize("prompt", ["ten", "12", "", "a digit 7"])
def test_digit_prompts_are_checked(digit_scorer, prompt):
    with pytest.raises(ValueError, match="prompt must be a digit"):
        digit_scorer(example_images(1, 8, 1), [prompt])


def test_digit_uses_the_projects_classifier(tmp_path, monkeypatch):
    from scale import digit_classifier

    monkeypatch.setattr(digit_classifier, "_trained", digit_classifier._initial)  # training is tested elsewhere
    images, prompts = example_images(1, 8), ["1", "2", "5", "9"]
    scorer = scorer_of("digit", tmp_path)
    logits = digit_classifier.digit_classifier(tmp_path)(images)
    expected = torch.log_softmax(logits, 1)[torch.arange(4), torch.tensor([1, 2, 5, 9])]
    torch.testing.assert_close(scorer(images, prompts), expected)
    check_pairing(scorer, images, prompts, reads=True, rtol=1e-4)


# The registry


def test_unknown_names_and_options_name_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'pickscor' is unknown; did you mean 'pickscore'"):
        make_scorer("pickscor", {}, tmp_path, "cpu")
    with pytest.raises(ValueError, match="'clip' has no option 'tokeniser'; did you mean 'tokenizer'"):
        make_scorer("clip", {"tokeniser": "x"}, tmp_path, "cpu")
    with pytest.raises(ValueError, match="'brightness' has no option 'cache'; it has none"):
        make_scorer("brightness", {"cache": "x"}, tmp_path, "cpu")
    with pytest.raises(ValueError, match="'custom' needs the option 'function'"):
        make_scorer("custom", {}, tmp_path, "cpu")


def test_every_builder_can_be_imported_without_transformers():
    code = (
        "import sys, importlib\n"
        "for heavy in ('transformers', 'diffusers', 'sklearn', 'PIL'): sys.modules[heavy] = None\n"
        "from scale.rewards import BUILDERS, _builder\n"
        "print(len([_builder(name) for name in BUILDERS]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(BUILDERS))


# The decoded reward


def halved(x0, places=None):
    return 0.5 * x0 + 0.5


class _Callable:
    name = "mine"

    def __init__(self, function, differentiable):
        self.function, self.differentiable = function, differentiable

    def __call__(self, images, prompts):
        return self.function(images, prompts)


def reward(differentiable=True, decode=halved):
    return DecodedReward(decode, _Callable(own_score, differentiable), ("a", "bcd"))


def latents(dtype=torch.float64):
    return torch.linspace(-0.9, 0.9, 3 * 12, dtype=dtype).reshape(3, 3, 2, 2)


def test_each_sample_gets_its_own_prompt_and_x0s_dtype():
    x0, places = latents(), torch.tensor([1, 0, 1])
    expected = (0.5 * x0 + 0.5).flatten(1).mean(1) * torch.tensor([3.0, 1.0, 3.0])
    torch.testing.assert_close(reward()(x0, places), expected.double())
    single = DecodedReward(lambda x, places: halved(x).float(), _Callable(own_score, True), ("abcd",))
    assert single(x0, None).dtype == torch.float64
    torch.testing.assert_close(single(x0, None), single(x0, torch.zeros(3, dtype=torch.int32)))


def test_the_decoder_is_told_each_samples_prompt():
    """As a decoder that denoises once more with the prompt needs it."""
    dimmer = DecodedReward(
        lambda x, places: halved(x) / (1 + places[:, None, None, None]), _Callable(own_score, True), ("a", "b")
    )
    places = torch.tensor([1, 0, 1])
    expected = halved(latents()).flatten(1).mean(1) / torch.tensor([2, 1, 2])
    torch.testing.assert_close(dimmer(latents(), places), expected)
    told = []
    DecodedReward(lambda x, places: told.append(places) or halved(x), _Callable(own_score, True), ("a",))(
        latents(), None
    )
    assert told == [None]


def test_gradient_reaches_x0_through_the_decoder():
    x0 = latents().requires_grad_()
    places = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda x: reward()(x, places), (x0,))


def test_a_black_box_gives_no_graph():
    x0 = latents().requires_grad_()
    blind = reward(differentiable=False)
    assert not blind.differentiable
    assert reward().differentiable
    assert not blind(x0, torch.tensor([1, 0, 1])).requires_grad
    torch.testing.assert_close(blind(x0, torch.tensor([1, 0, 1])), reward()(x0, torch.tensor([1, 0, 1])).detach())
    seen = []
    DecodedReward(halved, _Callable(lambda x, p: seen.append(x.requires_grad) or x.sum((1, 2, 3)), False), ("",))(
        x0, None
    )
    assert seen == [False]


def test_a_gradient_that_is_declared_but_missing_raises():
    cut = DecodedReward(halved, _Callable(lambda x, p: x.detach().sum((1, 2, 3)), True), ("",))
    with pytest.raises(ValueError, match="'mine' is declared differentiable, but its scores have no gradient"):
        cut(latents().requires_grad_(), None)
    assert cut(latents(), None).shape == (3,)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, "which of 2 prompts is each sample's, got None"),
        (torch.tensor([0, 2, 1]), r"in \[0, 2\), got 2 at sample 1"),
        (torch.tensor([0, 1, -1]), r"in \[0, 2\), got -1 at sample 2"),
        (torch.tensor([0, 1]), r"shape \(3,\), one place per sample, got \(2,\)"),
        (torch.tensor([[0], [1], [0]]), r"got \(3, 1\)"),
        (torch.tensor([0.0, 1.0, 0.0]), "integers, places of prompts, got torch.float32"),
        (torch.tensor([True, False, True]), "got torch.bool"),
    ],
)
def test_conditions_are_checked(condition, message):
    with pytest.raises(ValueError, match=message):
        reward()(latents(), condition)


def spoilt(value):
    def decode(x0, places):
        images = halved(x0).clone()
        images[1, 2, 0, 1] = value
        return images

    return decode


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (spoilt(1.01), "finite and in .*, got 1.01 in sample 1"),
        (spoilt(-0.5), "got -0.5 in sample 1"),
        (spoilt(float("nan")), "got nan in sample 1"),
        (spoilt(float("inf")), "got inf in sample 1"),
        (lambda x, places: halved(x)[:2], r"shape \(3, channels, height, width\), got \(2, 3, 2, 2\)"),
        (lambda x, places: halved(x).flatten(2), r"got \(3, 3, 4\)"),
        (lambda x, places: (255 * halved(x)).to(torch.uint8), "floating point in .*, got torch.uint8"),
        (lambda x, places: x, r"got -0\.\d+ in sample 0"),  # range not converted
    ],
)
def test_images_are_checked(decode, message, differentiable):
    with pytest.raises(ValueError, match=message):
        reward(decode=decode, differentiable=differentiable)(latents(), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([1.0, float("nan"), float("inf")]), "'mine' must be finite, got nan at sample 1, 'a'"),
        (torch.tensor([1.0, 2.0, float("-inf")]), "got -inf at sample 2, 'bcd'"),
        (torch.tensor([1.0, 2.0]), r"'mine' must return a tensor of shape \(3,\), one score per image, got \(2,\)"),
        (torch.ones(3, 1), r"got \(3, 1\)"),
        (torch.tensor(1.0), r"got \(\)"),
        ([1.0, 2.0, 3.0], "got list"),
    ],
)
def test_scores_are_checked(scores, message):
    blind = DecodedReward(halved, _Callable(lambda x, p: scores, False), ("a", "bcd"))
    with pytest.raises(ValueError, match=message):
        blind(latents(), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("prompts", [(), "a text"])
def test_prompts_are_checked(prompts):
    with pytest.raises(ValueError, match="prompts must be a tuple of at least one text"):
        DecodedReward(halved, _Callable(own_score, True), prompts)
