"""LAION's aesthetic predictor: a CLIP and a head as they are published, small and with random weights."""

import pickle

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPTextModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slas_trl import rewards
from slas_trl.rewards import Aesthetic
from slas_trl.rewards.by_name import resolve_reward
from tests.rewards.tiny_models import deep, head_shapes, pictures, random_weights, save_clip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with CLIP and the head, CLIP itself, and the head's tensors."""
    folder = tmp_path_factory.mktemp("aesthetic")
    clip = save_clip(folder, width=48)
    head = random_weights(head_shapes(48))
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


def test_features_of_clip_and_a_linear_head(published):
    folder, clip, head = published
    images = pictures()
    expected = expected_scores(folder, clip, head, images)
    assert len({round(score, 5) for score in expected}) == len(images)  # they differ, so that this test says something

    reward = Aesthetic(str(folder), str(folder), batch_size=4)
    scores = reward(["a cat"] * len(images), images)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert all(type(score) is float for score in scores)
    assert reward([f"{i} dogs" for i in range(len(images))], images, completions=images) == scores  # no prompt is read
    assert Aesthetic(str(folder), str(folder), batch_size=1)([""] * len(images), images) == pytest.approx(
        scores, abs=1e-6
    )
    assert reward([], []) == []


def test_a_head_in_a_file_of_its_own(published, tmp_path):
    folder, _, head = published
    torch.save(head, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    images = pictures()[:2]
    reward = resolve_reward(f"aesthetic:model={folder},head={tmp_path / 'sac+logos+ava1-l14-linearMSE.pth'}")
    assert reward(["", ""], images) == Aesthetic(str(folder), str(folder))(["", ""], images)
    assert reward.__name__ == "aesthetic"
    assert rewards.aesthetic == Aesthetic()  # and not the file of that name


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_of_image(published, mode):
    folder, *_ = published
    image = pictures()[1].convert(mode)
    reward = Aesthetic(str(folder), str(folder))
    assert reward([""], [image]) == reward([""], [image.convert("RGB")])
    assert reward([""], [deep(image)]) == reward([""], [image.convert("L")])


def test_bfloat16_is_near(published):
    folder, *_ = published
    images = pictures()
    full, half = (
        Aesthetic(str(folder), str(folder), dtype=d)([""] * len(images), images) for d in ("float32", "bfloat16")
    )
    assert half != full
    assert half == pytest.approx(full, abs=0.01)


def test_it_does_not_download_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        rewards.aesthetic(["a cat"], [Image.new("RGB", (8, 8))])
    # Both at once: what is missing, the command, and the folder to copy.
    assert "the file aesthetic-model.pth of https://huggingface.co/trl-lib/ddpo-aesthetic-predictor" in str(
        error.value
    )
    assert "hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth" in str(error.value)
    assert '"aesthetic:head=PATH"' in str(error.value)
    assert "https://huggingface.co/openai/clip-vit-large-patch14" in str(error.value)
    assert "models--openai--clip-vit-large-patch14" in str(error.value)
    assert '"aesthetic:model=PATH"' in str(error.value)


def test_a_wrong_path(published, tmp_path):
    folder, *_ = published
    image = Image.new("RGB", (8, 8))
    with pytest.raises(FileNotFoundError, match="aesthetic-model.pth, which is not in the folder"):
        Aesthetic(str(folder), str(tmp_path))([""], [image])
    with pytest.raises(FileNotFoundError, match="no file or folder that can be used"):
        Aesthetic(str(folder), str(tmp_path / "head.pth"))([""], [image])
    with pytest.raises(FileNotFoundError, match=f"the files of {tmp_path}, which is no file or folder"):
        Aesthetic(str(tmp_path), str(folder))([""], [image])


def test_what_does_not_fit_is_not_used(published, tmp_path):
    folder, clip, head = published
    image = Image.new("RGB", (8, 8))

    torch.save(random_weights(head_shapes(64)), tmp_path / "wide.pth")  # for another CLIP
    with pytest.raises(ValueError, match=r"wide\.pth, as head of .*size mismatch for 0\.weight"):
        Aesthetic(str(folder), str(tmp_path / "wide.pth"))([""], [image])

    torch.save({**head, "layers.8.weight": torch.ones(1, 1)}, tmp_path / "long.pth")
    with pytest.raises(ValueError, match=r"five linear layers.*8\.weight"):
        Aesthetic(str(folder), str(tmp_path / "long.pth"))([""], [image])

    # Half of a CLIP: the other half would be random.
    CLIPTextModelWithProjection(CLIPConfig.from_pretrained(folder).text_config).save_pretrained(tmp_path)
    clip.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a CLIP that aesthetic can use: it has no weights for"):
        Aesthetic(str(tmp_path), str(folder))([""], [image])

    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        Aesthetic(str(folder), str(folder))(["", ""], [image])


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this was run')",))


def test_a_file_is_not_run(published, tmp_path):
    folder, *_ = published
    (tmp_path / "head.pth").write_bytes(pickle.dumps({"layers.0.weight": Harmful()}, protocol=2))
    torch.save({"layers.0.weight": Harmful()}, tmp_path / "zipped.pth")
    for name in ("head.pth", "zipped.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be loaded as weights"):
            Aesthetic(str(folder), str(tmp_path / name))([""], [Image.new("RGB", (8, 8))])
