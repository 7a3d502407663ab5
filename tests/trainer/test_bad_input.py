"""What `SLASTrainer` refuses, and the check before the first update."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from slas_trl import SLASTrainer
from tests.tiny_pipelines import sd3_pipeline, sd_pipeline
from tests.trainer.tiny_trainers import PROMPTS, lora, redness, same, tiny_config, tiny_trainer, trained_weights


def blueness(prompts, images, **columns):
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


def test_too_few_prompts(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat"]})
    with pytest.raises(ValueError, match="A rollout needs 2 prompts .* 8 / num_generations 4.* but there are 1"):
        SLASTrainer(sd3_pipeline(), redness, tiny_config(tmp_path), train_dataset=data)


def test_a_data_set_without_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has no column 'prompt'; its columns are \['text'\]"):
        SLASTrainer(
            sd3_pipeline(), redness, tiny_config(tmp_path), train_dataset=Dataset.from_dict({"text": ["a"] * 4})
        )


def test_dropout_in_the_adapter(tmp_path):
    with pytest.raises(ValueError, match="lora_dropout is 0.05.*set it to 0"):
        SLASTrainer(
            sd3_pipeline(), redness, tiny_config(tmp_path), train_dataset=PROMPTS, peft_config=lora(lora_dropout=0.05)
        )


def test_dropout_in_the_denoiser(tmp_path):
    pipe = sd_pipeline()
    pipe.unet.up_blocks[0].resnets[0].dropout.p = 0.1
    with pytest.raises(ValueError, match="unet has dropout in 1 place"):
        tiny_trainer(tmp_path, "sd", model=pipe)


def test_an_adapter_of_no_layers_in_particular_is_of_the_attention(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(r=4))
    names = {name.split(".lora_")[0].split("attn.")[1] for name in trained_weights(trainer)}
    assert names == {"to_q", "to_k", "to_v", "to_out.0"}


def test_a_reward_that_goes_to_another_folder(tmp_path, monkeypatch, capsys):
    def wandering(prompts, images, **columns):
        os.chdir(tmp_path / "elsewhere")
        return redness(prompts, images)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = tiny_trainer("run", reward_funcs=wandering, save_strategy="steps", save_steps=1, disable_tqdm=False)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not list(Path("../elsewhere").iterdir())
    assert {"metrics.jsonl", "README.md", "checkpoint-2"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "rollout, 32 denoiser passes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 0},
        {"num_train_epochs": 0},
        {"num_train_epochs": -1},
        {"report_to": "dvclive"},
        {"report_to": ["tensorboard", "nonsense"]},
        {"model_init_kwargs": "[1]"},
        {"pipeline_kwargs": "strength"},
        {"torch_compile_mode": "nonsense"},
    ],
    ids=str,
)
def test_settings_that_cannot_be(tmp_path, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny_config(tmp_path, **changes)


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(TypeError, match="peft_config must be a peft.LoraConfig, but it is a dict"):
        SLASTrainer(sd3_pipeline(), redness, tiny_config(tmp_path), train_dataset=PROMPTS, peft_config={"r": 4})


def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(TypeError, match="Expected a diffusers pipeline, but got a SD3Transformer2DModel"):
        SLASTrainer(sd3_pipeline().transformer, redness, tiny_config(tmp_path), train_dataset=PROMPTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_weights_in_half_precision_would_hardly_move(tmp_path, dtype):
    with pytest.raises(ValueError, match="trained in torch.b?float16.*float32 and set bf16=True"):
        tiny_trainer(tmp_path, model=sd3_pipeline().to(dtype), full=True)
    tiny_trainer(tmp_path, model=sd3_pipeline().to(dtype))  # an adapter is in float32


def test_a_reward_that_cannot_be_called_with_the_columns(tmp_path):
    def taste(prompts, images):
        return [0.5] * len(images)

    with pytest.raises(TypeError, match=r"Reward 'taste' cannot be called.*\*\*columns"):
        tiny_trainer(tmp_path, reward_funcs=taste)


def test_weights_for_other_rewards(tmp_path):
    with pytest.raises(ValueError, match=r"reward_weights has 3 entries for 2 rewards \(redness, blueness\)"):
        tiny_trainer(tmp_path, reward_funcs=[redness, blueness], reward_weights=[1.0, 1.0, 1.0])


def test_a_noisy_denoiser(tmp_path):
    """The ratio of every trained step is checked before the first update."""
    pipe = sd3_pipeline()
    calls = []

    def noisy(module, args, output):
        calls.append(torch.is_grad_enabled())
        return (output[0] + 1e-3 * torch.randn(output[0].shape),)

    pipe.transformer.register_forward_hook(noisy)
    trainer = tiny_trainer(tmp_path, model=pipe)
    before = trained_weights(trainer)
    with pytest.raises(
        ValueError, match=r"ratio of step [012] should be 1, but it is off by \d.*clip range 0.0001.*causes"
    ):
        trainer.train()
    assert calls.count(True) == 3 and same(before, trained_weights(trainer))  # all three steps, and no update


def test_a_denoiser_that_is_noisy_at_one_step_only(tmp_path):
    pipe, generator = sd3_pipeline(), torch.Generator()

    def noisy(module, args, kwargs, output):
        late = kwargs["timestep"][0] < 800
        return (output[0] + 1e-2 * torch.randn(output[0].shape, generator=generator),) if late else output

    pipe.transformer.register_forward_hook(noisy, with_kwargs=True)
    with pytest.raises(ValueError, match="ratio of step 2 should be 1"):
        tiny_trainer(tmp_path, model=pipe).train()


def test_a_later_rollout_without_scores_is_reported(tmp_path, caplog):
    calls = []

    def tired(prompts, images, **columns):
        calls.append(1)
        return redness(prompts, images) if len(calls) == 1 else [None] * len(images)

    with caplog.at_level("WARNING"):
        tiny_trainer(tmp_path, reward_funcs=tired, max_steps=2).train()
    assert "after update 1 got a score" in caplog.text
