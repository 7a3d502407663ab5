"""Rewards: what may be one, what it is given and when, and what is said when it returns something else."""

import asyncio
import functools
import math
import re
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.trainer.scoring import RewardScorer, Scoring


PROMPTS = ["a cat", "a cat", "two dogs"]
IMAGES = [Image.new("RGB", (2, 2), (level, 0, 0)) for level in (0, 100, 200)]
NAN = math.nan


def red(prompts, images, **columns):
    return [image.getpixel((0, 0))[0] / 100 for image in images]


def length(prompts, images, **columns):
    return [len(prompt) for prompt in prompts]


def score(*rewards, **columns) -> torch.Tensor:
    return RewardScorer(list(rewards)).score(PROMPTS, IMAGES, columns)


def score_chunks(*rewards, sizes: tuple[int, ...] = (1, 3), **settings):
    """The scores of chunks of the first images, and the error if there is one."""
    with Scoring(RewardScorer(list(rewards)), **settings) as scoring:
        for size in sizes:
            scoring.add(PROMPTS[:size], IMAGES[:size], {"number": list(range(size))})
        scores, error = scoring.result()
        assert scoring.failed == bool(error) or "components" in str(error)
    return scores, error


def returning(values):
    def strange(prompts, images, **columns):
        return values

    return strange


def test_rewards_that_cannot_be_told_apart_are_refused(tmp_path):
    slashed, silent = returning([0.0]), tmp_path / "mine.py"
    slashed.__name__ = "a/b"
    silent.write_text("class Silent:\n    pass\n")
    for rewards, error, named in (
        ([red, length, functools.partial(red, scale=2)], ValueError, "'red'"),
        (slashed, ValueError, "'a/b'"),
        ([], ValueError, "at least one"),
        (f"{silent}:Silent", TypeError, "Silent"),
    ):
        with pytest.raises(error, match=named):
            RewardScorer(rewards)


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        (lambda prompts, images: [], r"\*\*columns"),
        (lambda: lambda prompts, images, **columns: [], r"\*\*columns"),  # a factory
        (functools.partial(lambda prompts, images, scale: [], scale=2.0), "completions"),
        (lambda images, **columns: [], None),
        (lambda prompts, images, completions, category: [], None),
    ],
)
def test_a_signature_that_does_not_fit_is_told_before_anything_is_sampled(reward, named):
    scorer, data = RewardScorer(reward), Dataset.from_dict({"prompt": ["a cat"], "category": ["animals"]})
    if named is None:
        scorer.check(data)
    else:
        with pytest.raises(TypeError, match=named):
            scorer.check(data)


def test_a_reward_gets_prompts_images_and_columns():
    seen = {}

    def reward(prompts, images, completions, number, **columns):
        assert not (torch.ones(1, requires_grad=True) * 2).requires_grad  # no gradients are kept
        seen.update(prompts=prompts, images=images, completions=completions, number=number, **columns)
        return [0.0] * len(images)

    score(reward, number=[1, 1, 2], tag=["x", "x", "y"])
    assert seen["prompts"] == PROMPTS and seen["images"] == IMAGES and seen["completions"] == IMAGES
    assert seen["number"] == [1, 1, 2] and seen["tag"] == ["x", "x", "y"]


@pytest.mark.parametrize("concurrent", [True, False])
def test_each_reward_scores_one_chunk_after_the_other(concurrent):
    seen = []

    def reward(prompts, images, number, **columns):
        seen.append((prompts, number))
        return number

    scores, error = score_chunks(reward, red, concurrent=concurrent)
    assert seen == [(PROMPTS[:1], [0]), (PROMPTS, [0, 1, 2])] and error is None
    assert scores.rewards.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
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


def test_pictures_that_are_missing_are_not_shown_to_rewards():
    seen = []

    def reward(prompts, images, letter, **columns):
        seen.append((prompts, letter))
        return {"reward": red(prompts, images), "twice": [2.0] * len(images)}

    with Scoring(RewardScorer(reward)) as scoring:
        scoring.add(PROMPTS, [IMAGES[0], None, IMAGES[2]], {"letter": ["a", "b", "c"]})
        scoring.add(PROMPTS, [None] * 3, {"letter": ["a", "b", "c"]})
        scores, error = scoring.result()
    assert error is None and seen == [([PROMPTS[0], PROMPTS[2]], ["a", "c"])]
    np.testing.assert_equal(scores.rewards[:, 0].tolist(), [0.0, NAN, 2.0, NAN, NAN, NAN])
    assert scores.components["reward/twice"].isnan().tolist() == [False, True, False, True, True, True]


def test_an_async_reward_is_awaited_in_a_notebook_too():
    async def slow(prompts, images, **columns):
        return red(prompts, images)

    async def cell():  # a loop is running already
        return score(slow)

    assert torch.equal(score(slow), score(red)) and torch.equal(asyncio.run(cell()), score(red))


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
        scores, error = score_chunks(reward, other, sizes=(3, 3))
        assert error is None and scores.rewards[:3].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert len(loops) == 1


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1.0, 0],
        (0.5, True, False),
        np.array([0.5, 1.0, 0.0], dtype=np.float32),
        [np.float32(0.5), np.float64(1.0), np.int64(0)],
        torch.tensor([0.5, 1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_numbers_of_many_kinds(values):
    scores = score(returning(values))
    assert scores.dtype == torch.float64 and scores.tolist() == [[0.5], [1.0], [0.0]]


@pytest.mark.parametrize(
    ("values", "rewards"),
    [
        ([1.0, None, NAN], [1.0, NAN, NAN]),
        ({"color": [1.0, 2.0, None], "count": [0.5, 0, 1]}, [1.5, 2.0, NAN]),
        ({"reward": [1, 2, 3], "strict": torch.tensor([0.0, 1.0, 1.0])}, [1.0, 2.0, 3.0]),
        ({"strict": [0.0, 1.0, 1.0], "reward": [None, 2, 3]}, [NAN, 2.0, 3.0]),
    ],
    ids=["missing", "sum", "reward", "order"],
)
def test_missing_scores_and_named_components(values, rewards):
    scores, _ = score_chunks(returning(values), sizes=(3,))
    np.testing.assert_equal(scores.rewards[:, 0].tolist(), rewards)
    names = values if isinstance(values, dict) else {}
    assert list(scores.components) == [f"strange/{name}" for name in names if name != "reward"]
    assert all(values.shape == (3,) for values in scores.components.values())


@pytest.mark.parametrize("other", ["color", "reward"])
def test_components_have_to_be_the_same_in_every_chunk(other):
    """Without "reward" it is their sum that is trained on."""

    def uneven(prompts, images, **columns):
        return {"shape": [1.0] * len(images), **({other: [0.5] * len(images)} if len(images) == 3 else {})}

    _, error = score_chunks(uneven, red)
    assert isinstance(error, ValueError)
    assert all(name in str(error) for name in ("'uneven'", "['shape']", str(sorted([other, "shape"]))))


def test_a_chunk_without_any_score_may_be_without_components():
    def away_for_one(prompts, images, **columns):
        return [None] if len(images) == 1 else {"shape": [1.0] * len(images)}

    scores, error = score_chunks(away_for_one)
    assert error is None
    for values in (scores.rewards[:, 0], scores.components["away_for_one/shape"]):
        np.testing.assert_equal(values.tolist(), [NAN, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.5, 1.0], ValueError, "strange' returned 2 values for 3 images"),
        ({"reward": [1.0, 2.0, 3.0], "color": [1.0]}, ValueError, "strange/color' returned 1 values for 3 images"),
        ({}, ValueError, "strange' .*empty"),
        (0.5, TypeError, "strange' returned a float"),
        (None, TypeError, "strange' returned a NoneType"),
        (([0.0, 1.0, 2.0], {}), TypeError, "strange' returned a tuple of 2"),  # as in TRL and ddpo-pytorch
        ([0.5, "good", 1.0], TypeError, r"strange' returned 'good' \(str\) for image 1, prompt 'a cat'"),
        ([0.5, math.inf, 1.0], ValueError, "strange' returned inf for image 1, prompt 'a cat'"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_and_the_reward_named(values, error, message):
    with pytest.raises(error, match=message):
        score(red, returning(values))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "kind", [RewardUnavailableError, ImportError, SystemExit, asyncio.CancelledError, KeyboardInterrupt]
)
def test_whatever_a_reward_raises_is_an_error_of_that_reward_which_is_not_called_again(kind, is_async):
    """No image is to blame where a server or a package is missing; which one is, a reward knows best."""
    calls = []

    def broken(prompts, images, **columns):
        calls.append(len(images))
        raise kind("no more")

    async def broken_later(prompts, images, **columns):
        broken(prompts, images)

    async def works(prompts, images, **columns):
        return red(prompts, images)

    _, error = score_chunks(broken_later if is_async else broken)
    said = f"Reward 'broken(_later)?' (cannot be used: no more|raised .*{kind.__name__})"
    assert isinstance(error, ValueError) and re.match(said, str(error))
    assert is_async or isinstance(error.__cause__, kind)
    assert calls == [1]
    assert score(works).shape == (3, 1)  # the next one is awaited


def test_an_image_that_cannot_be_used_has_no_score_and_no_components():
    with Scoring(RewardScorer(returning({"reward": [1.0] * 3, "shape": [2.0] * 3}))) as scoring:
        scoring.add(PROMPTS, IMAGES, {})
        scores = scoring.gather(usable=torch.tensor([True, False, True]))
    assert scores.rewards[:, 0].isnan().tolist() == [False, True, False]
    assert scores.components["strange/shape"].isnan().tolist() == [False, True, False]
