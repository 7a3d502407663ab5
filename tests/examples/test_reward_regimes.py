"""`examples/reward_regimes.py`: spoilt rewards, and how well advantages made of them point at the truth."""

import numpy as np
import pytest
from PIL import Image

from examples import reward_regimes as regimes
from examples.shapes_pictures import draw
from slas_trl.shapes import world


@pytest.fixture(scope="module")
def pictures() -> tuple[list[str], list[Image.Image]]:
    """Eight true pictures of each of sixteen prompts."""
    captions = [caption for caption in world.captions_of("train")[:16] for _ in range(8)]
    pixels = draw(captions, np.random.default_rng(0))
    images = [Image.fromarray((255 * each).round().astype(np.uint8)) for each in pixels]
    return [caption.text for caption in captions], images


def test_noise_is_the_same_for_the_same_picture(pictures):
    prompts, images = pictures
    noise = regimes._noise(prompts, images, 2.0)
    assert (noise == regimes._noise(prompts, [image.copy() for image in images], 2.0)).all()
    assert len(set(noise)) == len(noise) and noise.std() == pytest.approx(2.0, rel=0.2)


def test_half_of_the_prompts_are_unresolved_and_gaps_differ_between_prompts(pictures):
    halves, gaps = (
        np.array(regime(*pictures, std=0.0)).reshape(16, 8)
        for regime in (regimes.unresolved_half, regimes.narrow_gaps)
    )
    assert (halves == halves[:, :1]).all() and (gaps == gaps[:, :1]).all()  # these pictures are all right
    assert 3 <= halves[:, 0].sum() <= 13 and set(halves[:, 0]) == {0.0, 1.0}
    assert 1 / 30 <= 30 * gaps.min() < 0.3 and 0.5 < 30 * gaps.max() <= 1


def test_a_success_is_right_and_large(pictures):
    prompts, images = pictures
    scores, area = (np.array(f(prompts, images)) for f in (regimes.rare_success, regimes.shapes_coloured_area))
    assert 0 < scores.sum() < len(scores) and ((scores == 1) == (area > regimes.LARGE)).all()
    assert sum(regimes.rare_success([prompts[-1]] * 8, images[:8])) == 0  # pictures of another prompt


def test_alignment_by_hand():
    truth = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    assert regimes.alignment(truth, truth, scale_rewards="batch", gamma=0.0)[0] == pytest.approx(1.0)
    # Shaped: (-1, 0, 1) stays what it is.
    assert regimes.alignment(truth, truth, scale_rewards="batch", gamma=1.0)[0] == pytest.approx(1.0)
    # With a second group of noise, the std of the group makes it as large as the signal: cos 45°.
    reward = truth + np.array([[0, 0, 0], [-0.01, 0, 0.01]])
    assert regimes.alignment(reward, truth, scale_rewards="group", gamma=0.0)[0] == pytest.approx(np.sqrt(0.5))
    assert regimes.alignment(reward, truth, scale_rewards="batch", gamma=0.0)[0] > 0.9999
    noise = (np.random.default_rng(seed).normal(size=(50, 8)) for seed in (0, 1))
    mean, low, high = regimes.alignment(*noise, gamma=0.0)
    assert low < mean < high and low < 0 < high
