"""LAION's aesthetic predictor: a CLIP and a head as they are published, small and with random weights."""

import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slas_trl.rewards import Aesthetic
from slas_trl.rewards.resolve import resolve_reward
from tests.rewards.tiny_clips import save_transformers_clip
from tests.rewards.tiny_models import deep, head_shapes, pictures, random_weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with CLIP and the head, CLIP itself, and the head's tensors."""
    folder = tmp_path_factory.mktemp("aesthetic")
    clip = CLIPModel.from_pretrained(save_transformers_clip(folder)).requires_grad_(False)
    head = random_weights(head_shapes(16))
    torch.save(head, folder / "aesthetic-model.pth")
    return folder, clip, head


def expected_scores(folder, clip, head, images):
    """Step by step, in float64 after CLIP: with nothing between them, five linear layers are one."""
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    scores = []
    for image in images:
        pixels = processor(image.convert("RGB"), return_tensors="pt", input_data_format="channels_last")
        features = clip.get_image_features(**pixels).pooler_output[0].double()
        features = features / (features**2).sum() ** 0.5
        for i in (0, 2, 4, 6, 7):
            features = head[f"layers.{i}.weight"].double() @ features + head[f"layers.{i}.bias"].double()
        scores.append(features.item())
    return scores


def test_features_of_clip_and_a_linear_head(published, tmp_path):
    folder, clip, head = published
    images = pictures()
    expected = expected_scores(folder, clip, head, images)
    assert len({round(score, 5) for score in expected}) == len(images)  # they differ, so that this test says something

    reward = Aesthetic(str(folder), str(folder), batch_size=4)
    scores = reward(["a cat"] * len(images), images)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert all(type(score) is float for score in scores)
    assert reward([f"{i} dogs" for i in range(len(images))], images, completions=images) == scores  # no prompt is read
    half = Aesthetic(str(folder), str(folder), dtype="bfloat16")([""] * len(images), images)
    assert half != scores and half == pytest.approx(scores, abs=0.01)
    assert reward([""], [deep(images[1])]) == reward([""], [images[1].convert("L")])
    assert reward([], []) == []
    torch.save(head, file := tmp_path / "sac+logos+ava1-l14-linearMSE.pth")  # a head in a file of its own
    by_name = resolve_reward(f"aesthetic:model={folder},head={file}")
    assert by_name([""], images[:1]) == reward([""], images[:1]) and by_name.__name__ == "aesthetic"


def test_what_is_not_there_and_what_does_not_fit(published, tmp_path):
    folder, _, head = published
    for model, place in ((folder, tmp_path), (folder, tmp_path / "head.pth"), (tmp_path, folder)):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*Check the path"):
            Aesthetic(str(model), str(place))([""], [Image.new("RGB", (8, 8))])
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    torch.save({**head, "layers.8.weight": torch.ones(1, 1)}, tmp_path / "long.pth")
    for name, message in (("long.pth", r"five linear layers.*8\.weight"), ("other.pth", "five linear layers")):
        with pytest.raises(ValueError, match=message):
            Aesthetic(str(folder), str(tmp_path / name))([""], [Image.new("RGB", (8, 8))])
