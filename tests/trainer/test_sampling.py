"""Windows of stochastic steps, by rollout."""

import numpy as np
import pytest

from slas_trl.trainer import SLASConfig
from slas_trl.trainer.sampling import window_of

from .tiny_trainers import Watched, tiny_trainer


def windows(rollouts: int, **settings) -> list[range | None]:
    args = SLASConfig(use_cpu=True, num_inference_steps=6, **settings)
    return [window_of(args, i, np.random.default_rng(i)) for i in range(rollouts)]


def test_all_steps_a_fixed_window_and_one_at_random_in_the_first_half():
    assert windows(1) == [None]
    assert windows(3, sde_window_size=2, sde_window_start=1) == [range(1, 3)] * 3
    found = windows(60, sde_window_size=2)
    assert {window.start for window in found} == {0, 1, 2, 3} and {len(window) for window in found} == {2}


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"sde_window_slide_every": 1}, [0, 1, 2, 3, 0, 1]),  # the last of six steps is not trained
        ({"sde_window_slide_every": 2}, [0, 0, 1, 1, 2, 2]),
        ({"sde_window_slide_every": 1, "sde_window_start": 2}, [2, 3, 2, 3, 2, 3]),
        ({"sde_window_slide_every": 1, "train_final_step": True}, [0, 1, 2, 3, 4, 0]),
    ],
)
def test_a_sliding_window(settings, starts):
    assert [window.start for window in windows(6, sde_window_size=2, **settings)] == starts


def test_only_the_window_of_each_rollout_is_stochastic_and_trained(tmp_path):
    trainer = tiny_trainer(
        tmp_path, cls=Watched, num_inference_steps=6, sde_window_size=2, sde_window_slide_every=1, max_steps=4
    )
    trainer.train()
    for i, rollout in enumerate(trainer.rollouts[::2]):  # two chunks each
        assert rollout.trainable_steps == (i, i + 1)
        assert [step.std > 0 for step in rollout.steps] == [j in (i, i + 1) for j in range(6)]
        assert {inputs["step"] for inputs in trainer.micro_steps if inputs["rollout"] is rollout} == {i, i + 1}
