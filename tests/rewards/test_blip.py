"""ImageReward against the code of its own package where that is installed, and against its recorded scores."""

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import pytest
import torch
import transformers
from PIL import Image
from transformers import BertTokenizer

from slas_trl.rewards import ImageReward
from slas_trl.rewards.blip import to_pixels
from slas_trl.rewards.resolve import resolve_reward
from tests.rewards.tiny_models import PUBLISHED, deep, image_reward_weights, pictures, save_bert_tokenizer


PROMPTS = ["a cat", "A cat sits, on THE mat!", "", "abcdefghij " * 9, "two dogs", "a cat"]  # one is too long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageReward.pt and BERT's tokenizer, small."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(image_reward_weights(), folder / "ImageReward.pt")
    save_bert_tokenizer(folder)
    return folder


def score(folder, prompts=PROMPTS, images=None, **options):
    return ImageReward(str(folder), str(folder), **options)(prompts, images or pictures())


@pytest.fixture
def original(monkeypatch):
    """
    `ImageReward.ImageReward` of the package image-reward, which is from 2023: with stand-ins for what transformers had
    then, and without what else it imports (CLIP, fairscale, its trainer).
    """
    if (spec := importlib.util.find_spec("ImageReward")) is None:
        pytest.skip("needs image-reward (pip install --no-deps image-reward)")
    pytest.importorskip("timm")
    (root,) = spec.submodule_search_locations

    def package(name, *path):
        module = ModuleType(name)
        module.__path__ = list(path)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    package("ImageReward", root)
    package("ImageReward.models", f"{root}/models")
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        package(name)
    package("fairscale.nn.checkpoint.checkpoint_activations").checkpoint_wrapper = None  # not called
    now = transformers.modeling_utils
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        monkeypatch.setattr(now, name, getattr(transformers.pytorch_utils, name, None), raising=False)
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():  # of timm's moved modules; and this package changes the filters of its user
        warnings.simplefilter("ignore")
        med = importlib.import_module("ImageReward.models.BLIP.med")
        module = importlib.import_module("ImageReward.ImageReward")
    base = med.BertPreTrainedModel
    base.init_weights = lambda self: self.apply(self._init_weights)
    base.get_head_mask = lambda self, head_mask, layers: [None] * layers
    base.invert_attention_mask = lambda self, mask: (
        (1 - mask[:, None, None].to(self.dtype)) * torch.finfo(self.dtype).min
    )
    yield module
    transformers.logging.set_verbosity(verbosity)
    for name in [name for name in sys.modules if name.startswith("ImageReward.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.undo()


def original_scorer(original, folder, monkeypatch, weights):
    """Its model with these weights, of whatever size they are, and its own tokens and preprocessing."""
    blip_pretrain = sys.modules["ImageReward.models.BLIP.blip_pretrain"]
    monkeypatch.setattr(blip_pretrain, "init_tokenizer", lambda: BertTokenizer(vocab=str(folder / "vocab.txt")))
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    vision, _, _, patch = weights[f"{eye}.patch_embed.proj.weight"].shape
    vocabulary, text = weights[f"{reader}.embeddings.word_embeddings.weight"].shape
    if vision != 1024:
        Vision = sys.modules["ImageReward.models.BLIP.vit"].VisionTransformer
        small = Vision(img_size=224, patch_size=patch, embed_dim=vision, depth=2, num_heads=vision // 64)
        monkeypatch.setattr(blip_pretrain, "create_vit", lambda *args: (small, vision))
        head = original.MLP
        monkeypatch.setattr(original, "MLP", lambda width: head(text))
    settings = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=text,
        intermediate_size=4 * text,
        num_attention_heads=text // 64,
        num_hidden_layers=2 if vision != 1024 else 12,
        max_position_embeddings=len(weights[f"{reader}.embeddings.position_embeddings.weight"]),
        add_cross_attention=True,
        encoder_width=vision,
    )
    settings.to_json_file(folder / "med_config.json")
    scorer = original.ImageReward(folder / "med_config.json")
    scorer.load_state_dict(weights)  # strictly: these are the names and shapes of the published file
    return scorer.eval()


@pytest.mark.rewards
def test_scores_are_those_of_its_own_package(folder, original, monkeypatch):
    scorer = original_scorer(original, folder, monkeypatch, image_reward_weights())
    images = pictures()
    with torch.no_grad():
        expected = [scorer.score(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
    assert score(folder) == pytest.approx(expected, abs=1e-6)
    for image in images:
        assert torch.equal(to_pixels(image, 224), scorer.preprocess(image))


@pytest.mark.slow
@pytest.mark.rewards
def test_full_size_scores_are_those_of_its_own_package(tmp_path, original, monkeypatch):
    save_bert_tokenizer(tmp_path)
    weights = image_reward_weights(PUBLISHED)
    assert sum(tensor.nbytes for tensor in weights.values()) == pytest.approx(1.79e9, rel=0.005)  # as it is published
    scorer = original_scorer(original, tmp_path, monkeypatch, weights)
    torch.save(weights, tmp_path / "ImageReward.pt")
    del weights
    images, prompts = pictures()[1:3], PROMPTS[1:3]
    with torch.no_grad():
        expected = [scorer.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    del scorer
    assert score(tmp_path, prompts, images) == pytest.approx(expected, abs=1e-6)


def test_scores_are_those_recorded(folder):
    # By image-reward 1.5 for the same weights, prompts and pictures, on one kind of CPU; others differ by 3e-6.
    recorded = [1.6481716633, 1.4566916227, 1.4621160030, 1.4243829250, 1.4919533730, 1.6412967443]
    assert score(folder) == pytest.approx(recorded, abs=1e-5)


@pytest.mark.rewards
def test_preprocessing_is_that_of_its_own_package():
    transforms = pytest.importorskip("torchvision.transforms")
    steps = [
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
    for image in pictures([(w, h) for w in (224, 225, 227, 511, 1024) for h in (224, 226, 230, 337, 95)]):
        assert torch.equal(to_pixels(image, 224), transforms.Compose(steps)(image)), image.size


def test_prompt_and_picture_both_count(folder):
    images = pictures()[:2]
    cat, dog = score(folder, ["a cat"] * 2, images), score(folder, ["a dog"] * 2, images)
    assert len({round(value, 4) for value in cat + dog}) == 4
    assert score(folder, ["A CAT"] * 2, images) == cat  # the tokenizer is of lower case
    grays = [deep(images[1]), images[1].convert("L").convert("RGBA")]
    assert score(folder, ["a cat"] * 2, grays) == score(folder, ["a cat"] * 2, [images[1].convert("L")] * 2)

    reward = resolve_reward(f"image_reward:model={folder / 'ImageReward.pt'},tokenizer={folder},batch_size=2")
    scores = reward(PROMPTS, pictures(), completions=pictures(), category=["colors"] * 6)
    assert scores == score(folder, batch_size=2) == pytest.approx(score(folder), abs=1e-5)
    assert reward.__name__ == "image_reward" and reward([], []) == [] and type(scores[0]) is float
    half = score(folder, dtype="bfloat16")
    assert half != scores and half == pytest.approx(scores, abs=0.1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", None, r"layers\.1\.self_attn\.qkv"),
        ("blip.visual_encoder.patch_embed.proj.weight", None, "does not fit ImageReward"),
        ("blip.visual_encoder.extra", torch.ones(1), "extra"),
        ("mlp.layers.7.weight", torch.ones(1, 8), "size mismatch"),
    ],
)
def test_what_does_not_fit_is_not_used(folder, tmp_path, name, value, message):
    weights = image_reward_weights()
    weights = {**weights, name: value} if value is not None else {k: v for k, v in weights.items() if k != name}
    torch.save(weights, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=message):
        ImageReward(str(tmp_path / "broken.pt"), str(folder))(["a cat"], [Image.new("RGB", (8, 8))])
