"""One update of the trainer on every text-to-image family of the zoo."""

import pytest
import torch
from peft import LoraConfig
from PIL.Image import Image

from slas_trl.trainer import SLASConfig, SLASTrainer
from slas_trl.trainer.lora import takes_adapter
from tests.policy.zoo.all import FAMILIES
from tests.policy.zoo.checks import attention_weights

from .tiny_trainers import PROMPTS, logged, redness, same, trained_weights


def adapter_for(denoiser: torch.nn.Module) -> LoraConfig | None:
    """LoRA on the attention layers; none where diffusers has no adapters for the denoiser."""
    if not takes_adapter(denoiser):
        return None
    targets = [name.removesuffix(".weight") for name in attention_weights(denoiser)]
    linear = [name for name in targets if isinstance(denoiser.get_submodule(name), torch.nn.Linear)]
    return LoraConfig(r=2, lora_alpha=4, target_modules=linear)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.task == "text-to-image"])
def test_one_update(name, tmp_path):
    family = FAMILIES[name]
    pipe = family.build()
    denoiser = pipe.components["unet" if "unet" in pipe.components else "transformer"]
    drawn = []

    def reward(prompts, images, **columns):
        drawn.extend(zip(prompts, images, strict=True))
        return redness(prompts, images)

    call = dict(family.call)
    own = {key: call.pop(key) for key in ("height", "width", "guidance_scale") if key in call}
    trainer = SLASTrainer(
        pipe,
        reward,
        SLASConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            steps_per_generation=2,  # two groups of two images
            num_inference_steps=3,
            pipeline_kwargs=call,
            max_steps=1,
            learning_rate=1e-3,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **own,
        ),
        train_dataset=PROMPTS,
        peft_config=adapter_for(denoiser),
    )
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 1 and not same(trained_weights(trainer), before)
    assert len(drawn) == 4 and {prompt for prompt, _ in drawn} <= set(PROMPTS["prompt"])
    assert all(isinstance(image, Image) and image.mode == "RGB" for _, image in drawn)
    (line,) = logged(tmp_path)
    assert line["ratio/max_deviation"] == 0.0 and line["grad_norm"] > 0
