"""PickScore: its authors' formula, in transformers."""

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slas_trl.rewards import PickScore, pick_score
from slas_trl.rewards.resolve import resolve_reward
from tests.rewards.tiny_clips import picture, save_transformers_clip
from tests.tiny_pipelines import clip_tokenizer


PROMPTS = ["a red dot", "a red dot", "two blue boxes", "a text of more than sixteen tokens"]
IMAGES = [picture(32, 32), picture(90, 41, mode="L"), picture(17, 200, mode="RGBA"), picture(50, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A model without preprocessing, as PickScore_v1 is used, and a folder with preprocessing alone."""
    model = save_transformers_clip(tmp_path_factory.mktemp("pick_score") / "model")
    trained = CLIPModel.from_pretrained(model)
    trained.logit_scale.data.fill_(4.6052)
    trained.save_pretrained(model)
    processor = tmp_path_factory.mktemp("processor")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (model / name).rename(processor / name)
    return str(model), str(processor)


def test_defaults():
    assert resolve_reward("pick_score") == pick_score and pick_score.__name__ == "pick_score"
    assert pick_score.model == "yuvalkirstain/PickScore_v1"
    assert pick_score.processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_score_of_the_authors(folders, batch_size):
    model = CLIPModel.from_pretrained(folders[0]).eval()
    images = CLIPImageProcessorPil.from_pretrained(folders[1])
    processor = CLIPProcessor(images, clip_tokenizer())
    expected = []
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        inputs = processor(
            images=image.convert("RGB"),
            text=prompt,
            padding=True,
            truncation=True,
            max_length=16,
            return_tensors="pt",
            input_data_format="channels_last",
        )
        with torch.no_grad():
            out = model(**inputs)
        expected.append(out.logits_per_image.item())  # exp(logit_scale) times the cosine
    scores = PickScore(*folders, batch_size=batch_size)(PROMPTS, IMAGES)
    # To 1e-6 of the cosine: the scale is 100.
    assert [score / 100 for score in scores] == pytest.approx([score / 100 for score in expected], abs=1e-6)
    assert max(scores) - min(scores) > 3
    assert all(isinstance(score, float) for score in scores)
    by_name = resolve_reward(f"pick_score:model={folders[0]},processor={folders[1]},batch_size={batch_size}")
    assert by_name(PROMPTS, IMAGES) == scores


def test_numbers_that_differ(folders):
    with pytest.raises(ValueError, match="4 prompts and 1 images"):
        PickScore(*folders)(PROMPTS, IMAGES[:1])
    assert PickScore(*folders)([], []) == []


def test_a_folder_without_preprocessing(folders):
    with pytest.raises((FileNotFoundError, ValueError), match=folders[0]):
        PickScore(folders[0], folders[0])(PROMPTS, IMAGES)
