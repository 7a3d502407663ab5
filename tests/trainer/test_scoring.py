"""What may be a reward, what it is given, and what is said when it returns something else."""

import asyncio
import functools
import math
import re
import threading
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.trainer.scoring import RewardScorer, Scoring, reward_resolution, typical_group_std


PROMPTS = ["a cat", "a cat", "two dogs"]
IMAGES = [Image.new("RGB", (2, 2), (level, 0, 0)) for level in (0, 100, 200)]


def red(prompts, images, **columns):
    return [image.getpixel((0, 0))[0] / 100 for image in images]


def length(prompts, images, **columns):
    return [len(prompt) for prompt in prompts]


def score(*rewards, **columns) -> torch.Tensor:
    return RewardScorer(list(rewards)).score(PROMPTS, IMAGES, columns)


def returning(values):
    def strange(prompts, images, **columns):
        return values

    return strange


# Which rewards


@pytest.mark.parametrize("rewards", [red, [red], (red,)])
def test_one_reward_or_several(rewards):
    scorer = RewardScorer(rewards)
    assert scorer.names == ["red"]
    assert scorer.score(PROMPTS, IMAGES, {}).tolist() == [[0.0], [1.0], [2.0]]


def test_columns_of_the_result_are_the_rewards():
    assert score(red, length).tolist() == [[0.0, 5.0], [1.0, 5.0], [2.0, 8.0]]


def test_two_equal_names_are_refused():
    with pytest.raises(ValueError, match="Two rewards have the name 'red'"):
        RewardScorer([red, length, functools.partial(red, scale=2)])


def test_a_slash_in_a_name_is_refused():
    def reward(prompts, images, **columns):
        return [0.0] * len(images)

    reward.__name__ = "a/b"
    with pytest.raises(ValueError, match="'a/b' has a slash"):
        RewardScorer(reward)


def test_no_reward_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        RewardScorer([])


# What it is given


def test_a_reward_gets_prompts_images_and_columns():
    seen = {}

    def reward(prompts, images, completions, number, **columns):
        seen.update(prompts=prompts, images=images, completions=completions, number=number, **columns)
        return [0.0] * len(images)

    score(reward, number=[1, 1, 2], tag=["x", "x", "y"])
    assert seen["prompts"] == PROMPTS and seen["images"] == IMAGES and seen["completions"] == IMAGES
    assert seen["number"] == [1, 1, 2] and seen["tag"] == ["x", "x", "y"]


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_reward_that_changes_images_changes_only_its_own(concurrent):
    ready = threading.Event()

    def careless(prompts, images, pictures, **columns):
        for image in [*images, *pictures, *[each["inner"][0] for each in columns["nested"]]]:
            image.paste((255, 0, 0), (0, 0, 2, 2))
        ready.set()
        return red(prompts, images)

    def slow(prompts, images, pictures, nested, **columns):
        ready.wait(20)
        return [
            a + b + c
            for a, b, c in zip(
                red(prompts, images),
                red(prompts, pictures),
                red(prompts, [n["inner"][0] for n in nested]),
                strict=True,
            )
        ]

    images = [image.copy() for image in IMAGES]
    columns = {"pictures": [i.copy() for i in IMAGES], "nested": [{"inner": [i.copy()]} for i in IMAGES]}
    with Scoring(RewardScorer([careless, slow]), concurrent=concurrent) as scoring:
        scoring.add(PROMPTS, images, columns)
        assert scoring.result()[0].rewards.T.tolist() == [[2.55] * 3, [0.0, 3.0, 6.0]]
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 100, 200]


# When it is called


@pytest.mark.parametrize("concurrent", [True, False])
def test_each_reward_scores_one_chunk_after_the_other(concurrent):
    seen = []

    def reward(prompts, images, number, **columns):
        seen.append((prompts, number))
        return number

    with Scoring(RewardScorer([reward, red]), concurrent=concurrent) as scoring:
        scoring.add(PROMPTS, IMAGES, {"number": [1, 2, 3]})
        scoring.add(PROMPTS[:1], IMAGES[:1], {"number": [4]})
        scores, errors = scoring.result()
    assert seen == [(PROMPTS, [1, 2, 3]), (PROMPTS[:1], [4])] and not errors
    assert scores.rewards.tolist() == [[1.0, 0.0], [2.0, 1.0], [3.0, 2.0], [4.0, 0.0]]
    assert len(scores.seconds) == 2 and min(scores.seconds) > 0


def test_rewards_score_while_others_do_and_the_next_chunk_is_made():
    """Each waits for the other, and both for what comes after they were asked."""
    here, there, later = threading.Event(), threading.Event(), threading.Event()

    def first(prompts, images, **columns):
        here.set()
        return [float(there.wait(20) and later.wait(20))] * len(images)

    def second(prompts, images, **columns):
        there.set()
        return [float(here.wait(20) and later.wait(20))] * len(images)

    with Scoring(RewardScorer([first, second])) as scoring:
        scoring.add(PROMPTS, IMAGES, {})
        later.set()
        assert scoring.result()[0].rewards.tolist() == [[1.0, 1.0]] * 3


def test_what_has_not_begun_is_dropped_when_sampling_fails():
    calls, leave = [], threading.Event()

    def slow(prompts, images, **columns):
        calls.append(len(images))
        leave.wait(20)
        return [0.0] * len(images)

    with pytest.raises(RuntimeError, match="no memory"), Scoring(RewardScorer(slow)) as scoring:
        scoring.add(PROMPTS, IMAGES, {})
        scoring.add(PROMPTS, IMAGES, {})
        while not calls:
            time.sleep(0.001)
        raise RuntimeError("no memory")
    leave.set()
    time.sleep(0.05)
    assert calls == [3]


def test_the_errors_of_all_rewards_are_told_and_the_others_have_scores():
    def picky(prompts, images, **columns):
        return [0.0] if len(images) == 3 else [1.0]

    with Scoring(RewardScorer([picky, red])) as scoring:
        scoring.add(PROMPTS[:1], IMAGES[:1], {})
        scoring.add(PROMPTS, IMAGES, {})
        scores, errors = scoring.result()
        assert scoring.failed
    assert scores.rewards[:, 1].tolist() == [0.0, 0.0, 1.0, 2.0]
    assert list(errors) == ["picky"] and "returned 1 values for 3 images" in str(errors["picky"])


@pytest.mark.parametrize("kind", [SystemExit, OverflowError, asyncio.CancelledError, KeyboardInterrupt])
def test_whatever_a_reward_raises_is_an_error_of_that_reward(kind):
    def broken(prompts, images, **columns):
        raise kind("no more")

    with pytest.raises(ValueError, match=f"Reward 'broken' raised {kind.__name__}: no more"):
        score(broken)
    with pytest.raises(ValueError, match="Reward 'strange' raised OverflowError"):
        score(returning([10**400, 0, 0]))


def test_a_reward_that_failed_is_not_called_again():
    calls = []

    def broken(prompts, images, **columns):
        calls.append(len(images))
        raise ImportError("no such package")

    with Scoring(RewardScorer(broken)) as scoring:
        scoring.add(PROMPTS, IMAGES, {})
        scoring.add(PROMPTS, IMAGES, {})
        assert "cannot be used: no such package" in str(scoring.result()[1]["broken"])
    assert calls == [3]


def test_no_gradients_are_kept():
    weight = torch.ones(1, requires_grad=True)

    def reward(prompts, images, **columns):
        assert not (weight * 2).requires_grad
        return [1.0] * len(images)

    assert score(reward).tolist() == [[1.0]] * 3


@pytest.mark.parametrize("kind", [RewardUnavailableError, ImportError, FileNotFoundError])
def test_a_reward_that_is_away_is_not_asked_image_by_image(kind):
    calls = []

    def away(prompts, images, **columns):
        calls.append(len(images))
        raise kind("nobody answers at http://127.0.0.1:1")

    with pytest.raises(ValueError, match="Reward 'away' cannot be used: nobody answers"):
        score(away)
    assert calls == [3]


# What it returns


@pytest.mark.parametrize(
    ("values", "rewards"),
    [
        ({"colour": [1.0, 2.0, None], "count": [0.5, 0, 1]}, [1.5, 2.0, None]),
        ({"reward": [1, 2, 3], "strict": torch.tensor([0.0, 1.0, 1.0])}, [1.0, 2.0, 3.0]),
        ({"strict": [0.0, 1.0, 1.0], "reward": [None, 2, 3]}, [None, 2.0, 3.0]),
    ],
    ids=["sum", "reward", "order"],
)
def test_named_components(values, rewards):
    with Scoring(RewardScorer(returning(values))) as scoring:
        scoring.add(PROMPTS, IMAGES, {})
        scores, _ = scoring.result()
    assert [None if math.isnan(value) else value for [value] in scores.rewards.tolist()] == rewards
    assert list(scores.components) == [f"strange/{name}" for name in values if name != "reward"]
    for name, values in scores.components.items():
        assert values.shape == (3,) and name.startswith("strange/")


@pytest.mark.parametrize("other", ["colour", "reward"])
def test_components_have_to_be_the_same_in_every_chunk(other):
    """Without "reward" it is their sum that is trained on."""

    def uneven(prompts, images, **columns):
        return {"shape": [1.0] * len(images), **({other: [0.5] * len(images)} if len(images) == 3 else {})}

    with Scoring(RewardScorer([uneven, red])) as scoring:
        scoring.add(PROMPTS[:1], IMAGES[:1], {})
        scoring.add(PROMPTS, IMAGES, {})
        scores, errors = scoring.result()
    assert scores.rewards[:, 1].tolist() == [0.0, 0.0, 1.0, 2.0]
    names = sorted([other, "shape"])
    with pytest.raises(ValueError, match="'uneven' returned the components") as error:
        raise errors["uneven"]
    assert f"['shape'] for some images, and {names} for others" in str(error.value)


def test_a_chunk_without_any_score_may_be_without_components():
    def away_for_one(prompts, images, **columns):
        return [None] if len(images) == 1 else {"shape": [1.0] * len(images)}

    with Scoring(RewardScorer(away_for_one)) as scoring:
        scoring.add(PROMPTS[:1], IMAGES[:1], {})
        scoring.add(PROMPTS, IMAGES, {})
        scores, errors = scoring.result()
    assert not errors and scores.rewards.nan_to_num(-1)[:, 0].tolist() == [-1.0, 1.0, 1.0, 1.0]
    assert scores.components["away_for_one/shape"].nan_to_num(-1).tolist() == [-1.0, 1.0, 1.0, 1.0]


def test_a_component_is_checked_and_named():
    with pytest.raises(ValueError, match="Reward 'strange/colour' returned 1 values for 3 images"):
        score(returning({"reward": [1.0, 2.0, 3.0], "colour": [1.0]}))


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1.0, 2.0],
        (0.5, 1, 2),
        np.array([0.5, 1.0, 2.0], dtype=np.float32),
        [np.float32(0.5), np.float64(1.0), np.int64(2)],
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_numbers_of_many_kinds(values):
    scores = score(returning(values))
    assert scores.dtype == torch.float64 and scores.tolist() == [[0.5], [1.0], [2.0]]


def test_verdicts_are_numbers():
    assert score(returning([True, False, True])).tolist() == [[1.0], [0.0], [1.0]]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_none_and_nan_are_no_score(missing):
    scores = score(returning([1.0, missing, 2.0]), red)
    assert scores.isnan().tolist() == [[False, False], [True, False], [False, False]]


def test_an_async_reward_is_awaited():
    async def slow(prompts, images, **columns):
        return red(prompts, images)

    assert torch.equal(score(slow), score(red))


def test_an_async_reward_is_awaited_in_a_notebook_too():
    async def slow(prompts, images, **columns):
        return red(prompts, images)

    async def cell():  # a loop is running already
        return score(slow)

    assert torch.equal(asyncio.run(cell()), score(red))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.5, 1.0], ValueError, "returned 2 values for 3 images"),
        ([0.5] * 4, ValueError, "returned 4 values for 3 images"),
        ([], ValueError, "returned 0 values for 3 images"),
        (0.5, TypeError, "returned a float; expected a list of 3 numbers"),
        (torch.tensor(0.5), TypeError, "returned a float; expected a list of 3 numbers"),
        (None, TypeError, "returned a NoneType; expected a list of 3 numbers"),
        ("good", TypeError, "returned a str; expected a list of 3 numbers"),
        ({}, ValueError, "returned an empty dictionary"),
        ([0.5, "good", 1.0], TypeError, r"returned 'good' \(str\) for image 1, prompt 'a cat'"),
        ([0.5, 1.0, "0.5"], TypeError, r"returned '0.5' \(str\) for image 2, prompt 'two dogs'"),
        (torch.ones(3, 1), TypeError, r"returned \[1.0\] \(list\) for image 0"),
        ([0.5, math.inf, 1.0], ValueError, "returned inf for image 1, prompt 'a cat'"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_and_the_reward_named(values, error, message):
    with pytest.raises(error, match=f"Reward 'strange' {message}"):
        score(red, returning(values))


def test_a_reward_that_raises_is_named():
    def picky(prompts, images, **columns):
        if any("dogs" in prompt for prompt in prompts):
            raise KeyError("no dogs")
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match="Reward 'picky' raised KeyError: 'no dogs' on 3 images") as error:
        score(picky)
    assert isinstance(error.value.__cause__, KeyError)


def test_an_async_reward_may_keep_a_client_from_chunk_to_chunk():
    """A lock belongs to the event loop that it was first waited for in, as a client's connections do."""
    lock, loops = asyncio.Lock(), set()

    async def reward(prompts, images, **columns):
        loops.add(asyncio.get_running_loop())
        async with lock:
            await asyncio.sleep(0.01)
            assert not torch.is_grad_enabled()
            return red(prompts, images)

    async def other(prompts, images, **columns):
        return await reward(prompts, images)

    for _ in range(2):
        with Scoring(RewardScorer([reward, other])) as scoring:
            scoring.add(PROMPTS, IMAGES, {})
            scoring.add(PROMPTS, IMAGES, {})
            scores, errors = scoring.result()
        assert not errors and scores.rewards[:3].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert len(loops) == 1


def test_an_async_reward_that_raises_is_named_too():
    async def picky(prompts, images, **columns):
        raise OSError("server away")

    with pytest.raises(ValueError, match="Reward 'picky' raised OSError: server away on 3 images, .* 'a cat'"):
        score(picky)


# What cannot be called, or returns something else


class Silent:
    pass


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda prompts, images: [0.0] * len(images), ["completions", r"\*\*columns"]),
        (lambda images, **columns: [0.0] * len(images), []),
        (lambda: lambda prompts, images, **columns: [0.0], [r"\*\*columns"]),  # a factory
        (functools.partial(lambda prompts, images, scale: [0.0], scale=2.0), ["completions"]),
        (Silent, ["is a class; pass an instance"]),
        (lambda prompts, images, completions, category: [0.0], []),
    ],
)
def test_a_signature_that_does_not_fit_is_told_before_anything_is_sampled(reward, words):
    scorer, data = RewardScorer(reward), Dataset.from_dict({"prompt": ["a cat"], "category": ["animals"]})
    if not words:
        return scorer.check(data)
    with pytest.raises(TypeError) as error:
        scorer.check(data)
    assert all(re.search(word, str(error.value)) for word in words)


def test_an_object_that_cannot_be_called_is_refused_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Silent:\n    pass\n")
    for reward in (Silent(), f"{file}:Silent"):
        with pytest.raises(TypeError, match="Silent"):
            RewardScorer(reward)


@pytest.mark.parametrize(
    ("returned", "size"),
    [
        (([0.0, 1.0, 2.0], {}), "tuple of 2"),  # as in TRL and ddpo-pytorch
        ((torch.zeros(3), {"extra": 1}), "tuple of 2"),
        ((torch.zeros(3), torch.zeros(3)), "tuple of 2"),
        (0.5, "float"),
    ],
)
def test_scores_and_something_else(returned, size):
    with pytest.raises(TypeError, match=f"returned a {size}; expected a list of 3 numbers"):
        score(lambda prompts, images, **columns: returned)


def test_pictures_that_are_missing_are_not_shown_to_rewards():
    seen = []

    def reward(prompts, images, letter, **columns):
        seen.append((prompts, letter))
        return {"reward": red(prompts, images), "twice": [2.0] * len(images)}

    with Scoring(RewardScorer(reward)) as scoring:
        scoring.add(PROMPTS, [IMAGES[0], None, IMAGES[2]], {"letter": ["a", "b", "c"]})
        scoring.add(PROMPTS, [None] * 3, {"letter": ["a", "b", "c"]})
        scores, errors = scoring.result()
    assert not errors and seen == [([PROMPTS[0], PROMPTS[2]], ["a", "c"])]
    nan = math.nan
    expected = torch.tensor([[0.0], [nan], [2.0], [nan], [nan], [nan]], dtype=torch.float64)
    torch.testing.assert_close(scores.rewards, expected, equal_nan=True)
    assert scores.components["reward/twice"].isnan().tolist() == [False, True, False, True, True, True]


# Its resolution


@pytest.mark.parametrize(
    ("rewards", "resolution"),
    [
        ([3.0, 4.0, 2.0, 4.0], 1.0),  # Likert
        ([0.25, 0.5, 0.75, 0.25], 0.25),
        ([1.0, 0.0, 1.0, 1.0], 2.0**-10),  # a verdict: its gap is no rounding
        ([0.3, 0.3, 0.3], 0.0),
        ([math.nan, 1.0, math.nan], 0.0),
        (torch.tensor([0.2501, 0.2502, 0.2601]).half().tolist(), 2.0**-12),  # HPSv2 in half precision
        (torch.tensor([0.2501, 0.2601, 0.2701]).bfloat16().tolist(), 2.0**-9 * 5),
    ],
)
def test_the_resolution_of_a_reward(rewards, resolution):
    assert reward_resolution(torch.tensor(rewards, dtype=torch.float64)) == pytest.approx(resolution, rel=1e-6)


def test_float32_resolves_more_than_half_precision():
    rewards = 0.3 + 1e-3 * torch.rand(512, generator=torch.Generator().manual_seed(0))
    assert reward_resolution(rewards) < 1e-7 < 1e-4 < reward_resolution(rewards.half())


def test_the_spread_within_groups():
    rewards = torch.tensor([0.0, 2.0, 5.0, 5.0, 0.0, 4.0, math.nan, 3.0, math.nan, math.nan, 0.0, 6.0])
    assert typical_group_std(rewards, 2) == 2.0  # of 1, 2 and 3; groups without a difference do not count
    assert typical_group_std(torch.ones(4), 2) == 0.0
