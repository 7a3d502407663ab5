"""
Training on text that is read from pictures: the embedded pipeline learns in the test to draw one of two words, and
then, from the reader's score alone, the one that its prompt asks for.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont

from slas_trl.rewards.quoted_text import OCR
from slas_trl.shapes import ShapesPipeline, load_shapes_pipeline
from slas_trl.trainer import SLASTrainer
from tests.trainer.tiny_trainers import logged, tiny_config


pytestmark = pytest.mark.rewards
pytest.importorskip("rapidocr")
pytest.importorskip("rapidfuzz")

PROMPTS = [f'{whose} "CAT"' for whose in ("a", "my", "the", "his")]
REWARD = "ocr:min_side=128"
STEPS = 6


def drawn(word: str) -> torch.Tensor:
    image = Image.new("RGB", (32, 32), (20, 20, 20))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(image).text((16, 16), word, fill=(235, 235, 60), font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def latents_of(pipe: ShapesPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """What the decoder turns into `pictures`; its encoder has never seen letters."""
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    latents = ((pipe.vae.encode(pictures).latents - shift) * scale).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.05)
    for _ in range(120):
        loss = (pipe.vae.decode(latents / scale + shift).sample - pictures).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return latents.detach()


def draws_words(steps: int, cats: float) -> dict[str, torch.Tensor]:
    """Weights of a denoiser that draws CAT with the probability `cats`, else DOG, after `steps` of flow matching."""
    generator = torch.Generator().manual_seed(0)
    pipe = load_shapes_pipeline()
    words = latents_of(pipe, torch.stack([drawn("CAT"), drawn("DOG")]))
    texts, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
    denoiser = pipe.transformer.requires_grad_(True)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(steps):
        which = (torch.rand(16, generator=generator) >= cats).long()
        prompt = torch.randint(len(PROMPTS), (16,), generator=generator)
        noise = torch.randn(16, *words.shape[1:], generator=generator)
        sigma = torch.rand(16, 1, 1, 1, generator=generator)
        velocity = denoiser(
            (1 - sigma) * words[which] + sigma * noise,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=texts[prompt],
            pooled_projections=pooled[prompt],
        ).sample
        loss = (velocity - (noise - words[which])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return {name: weight.detach().clone() for name, weight in denoiser.state_dict().items()}


def trainer_of(weights: dict[str, torch.Tensor], output_dir, **changes) -> SLASTrainer:
    pipe = load_shapes_pipeline()
    pipe.transformer.load_state_dict(weights)
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "height": 32,
        "width": 32,
        "pipeline_kwargs": {},
        "learning_rate": 1e-4,
        "logging_steps": 1,
    }
    config = tiny_config(output_dir, **{**settings, **changes})
    return SLASTrainer(pipe, REWARD, config, train_dataset=Dataset.from_dict({"prompt": PROMPTS}))


@pytest.mark.slow
def test_the_policy_learns_to_write_what_is_quoted(tmp_path):
    reader = OCR(min_side=128)
    prompts = PROMPTS * 32

    def score(pipe: ShapesPipeline) -> float:
        images = pipe(prompts, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1)).images
        return float(np.mean(reader(prompts, images)))

    trainer = trainer_of(
        draws_words(250, cats=0.25),
        tmp_path,
        per_device_train_batch_size=64,
        num_generations=16,
        steps_per_generation=1,
        max_steps=20,
        noise_level=0.4,
        lr_scheduler_type="constant",
    )
    before = score(trainer.pipe)
    trainer.train()
    after = score(trainer.pipe)
    assert all(0 < line["rewards/ocr/mean"] < 1 and line["rewards/ocr/std"] > 0 for line in logged(tmp_path))
    assert after > before + 0.1, f"{before:.3f} -> {after:.3f}"  # standard errors of 0.04
