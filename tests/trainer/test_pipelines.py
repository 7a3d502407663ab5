"""One update of the trainer on every text-to-image family of the zoo."""

import pytest
from PIL.Image import Image

from tests.policy.zoo.all import FAMILIES

from .tiny_trainers import PROMPTS, logged, redness, same, trained_weights
from .zoo_trainers import zoo_trainer


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.task == "text-to-image"])
def test_one_update(name, tmp_path):
    drawn = []

    def reward(prompts, images, **columns):
        drawn.extend(zip(prompts, images, strict=True))
        return redness(prompts, images)

    trainer = zoo_trainer(FAMILIES[name], tmp_path, reward)
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 1 and not same(trained_weights(trainer), before)
    assert len(drawn) == 4 and {prompt for prompt, _ in drawn} <= set(PROMPTS["prompt"])
    assert all(isinstance(image, Image) and image.mode == "RGB" for _, image in drawn)
    (line,) = logged(tmp_path)
    assert line["ratio/max_deviation"] == 0.0 and line["grad_norm"] > 0
