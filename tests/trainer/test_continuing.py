"""Training that goes on from an adapter which was published, and what its reference policy is."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from slas_trl.quick_start import ADAPTER_FILE
from slas_trl.trainer import lora as adapters
from slas_trl.trainer.lora import ADAPTER_NAME, REFERENCE_NAME
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES

from .test_lora import picture
from .tiny_trainers import PROMPTS, lora, same, tiny_trainer, trained_weights
from .zoo_trainers import zoo_trainer


def publish(pipe, names: list[str], folder: Path, seed: int = 5, **changes) -> Path:
    """An adapter as an earlier run has left it."""
    torch.manual_seed(seed)
    for name in names:
        adapters.add_adapter(pipe.components[name], lora(init_lora_weights=False, **changes))
    adapters.save_weights(pipe, names, folder, adapter=True)
    return folder


# alpha is not r, and not all layers are alike
UNLIKE = {"use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folders = {}
    for family, name in (("sd", "unet"), ("sd3", "transformer"), ("flux", "transformer")):
        changes = {} if family == "sd" else UNLIKE
        folders[family] = publish(PIPELINES[family][0](), [name], tmp_path_factory.mktemp(family), **changes)
    return folders


def loaded(published, family: str = "sd3"):
    pipe = PIPELINES[family][0]()
    pipe.load_lora_weights(published[family])
    return pipe


def continuing(folder, published, family: str = "sd3", **changes):
    return tiny_trainer(folder, family, model=loaded(published, family), peft_config=None, **changes)


def kl(trainer) -> list[float]:
    return [log["kl"] for log in trainer.state.log_history if "kl" in log]


def metadata(folder: Path) -> dict:
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        [text] = [value for key, value in file.metadata().items() if key != "format"]
    found = {key.split(".")[-1]: value for key, value in json.loads(text).items()}
    del found["init_lora_weights"]  # how it once began
    return found | {"target_modules": sorted(found["target_modules"])}


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_adapter_is_trained_on_and_stays_one(tmp_path, family, published):
    theirs = picture(loaded(published, family), family)
    assert not torch.equal(theirs, picture(PIPELINES[family][0](), family))
    trainer = continuing(tmp_path, published, family, beta=0.1, max_steps=3)
    assert torch.equal(picture(trainer.pipe, family), theirs)
    weights, denoiser = trained_weights(trainer), trainer.pipe.components[trainer.denoiser_names[0]]
    assert {name.split(".")[-2] for name in weights} == {ADAPTER_NAME}
    copies = {name: p.detach().clone() for name, p in denoiser.named_parameters() if REFERENCE_NAME in name}
    assert len(copies) == len(weights) > 4
    trainer.train()
    assert not any(torch.equal(weights[name], after) for name, after in trained_weights(trainer).items())
    assert all(torch.equal(p, copies[name]) for name, p in denoiser.named_parameters() if name in copies)
    assert kl(trainer)[0] == 0.0 and kl(trainer)[-1] > 0.0
    # What is saved replaces theirs.
    trainer.save_model()
    assert load_file(tmp_path / ADAPTER_FILE).keys() == load_file(published[family] / ADAPTER_FILE).keys()
    assert metadata(tmp_path) == metadata(published[family])
    fresh = PIPELINES[family][0]()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(picture(fresh, family), picture(trainer.pipe, family))


def test_the_reference_may_be_the_base(tmp_path, published):
    trainer = continuing(tmp_path, published, beta=0.1, kl_reference="base")
    trainer.train()
    assert kl(trainer)[0] > 0.0
    assert list(trainer.pipe.transformer.peft_config) == [ADAPTER_NAME]


def test_there_is_no_copy_without_a_reference(tmp_path, published):
    trainer = continuing(tmp_path, published)
    assert list(trainer.pipe.transformer.peft_config) == [ADAPTER_NAME]


def test_the_references_are_what_they_are_called(tmp_path, published):
    """By hand: the step's mean with the adapter as it came, and without it."""
    trainer = continuing(tmp_path, published, beta=0.1)
    replayer, transformer = trainer.replayer, trainer.pipe.transformer
    rollout = replayer.sample(**trainer.calls.call(PROMPTS, [0, 1], [torch.Generator() for _ in range(2)]))
    with torch.no_grad():
        came = replayer.replay(rollout, 1).mean
        transformer.disable_adapters()
        base = replayer.replay(rollout, 1).mean
        transformer.enable_adapters()
        for parameter in transformer.parameters():
            parameter += 0.5 * parameter.requires_grad
        assert not torch.equal(replayer.replay(rollout, 1).mean, came)
    assert torch.equal(replayer.reference(rollout, 1, None, ADAPTER_NAME, REFERENCE_NAME).mean, came)
    assert torch.equal(replayer.reference(rollout, 1, None, ADAPTER_NAME).mean, base)


def test_adapters_are_in_float32_on_a_narrow_model(tmp_path, published):
    pipe = PIPELINES["sd3"][0]().to(torch.bfloat16)
    pipe.load_lora_weights(published["sd3"])
    trainer = tiny_trainer(tmp_path, model=pipe, peft_config=None, beta=0.1, bf16=True)
    saved = load_file(published["sd3"] / ADAPTER_FILE)
    for key, weight in trained_weights(trainer).items():
        loaded_by_diffusers = saved[f"transformer.{key.replace(f'.{ADAPTER_NAME}', '')}"].bfloat16()
        assert weight.dtype == torch.float32 and torch.equal(weight, loaded_by_diffusers.float())
    trainer.train()
    assert kl(trainer)[0] == 0.0


def test_one_after_the_other(tmp_path, published):
    """A trained pipeline, copy and all, is given to another trainer."""
    first = continuing(tmp_path / "first", published, beta=0.1)
    first.train()
    after = trained_weights(first)
    second = tiny_trainer(tmp_path / "second", model=first.pipe, peft_config=None, beta=0.1)
    assert same(trained_weights(second), after)
    second.train()
    assert kl(second)[0] == 0.0 and not same(trained_weights(second), after)


def test_an_inactive_adapter_stays_so(tmp_path, published):
    pipe = loaded(published)
    pipe.transformer.add_adapter(lora(init_lora_weights=False), adapter_name="other")
    pipe.set_adapters("default_0")
    expected = picture(pipe, "sd3")
    trainer = tiny_trainer(tmp_path, model=pipe, peft_config=None, beta=0.1)
    assert torch.equal(picture(trainer.pipe, "sd3"), expected)
    assert {name.split(".")[-2] for name in trained_weights(trainer)} == {ADAPTER_NAME}
    trainer.train()
    assert sorted(trainer.pipe.transformer.peft_config) == [REFERENCE_NAME, "other", ADAPTER_NAME]


# Resuming


def test_resuming_is_exact_and_from_the_same_adapter(tmp_path, published):
    settings = {"beta": 0.1, "use_ema": True, "gradient_accumulation_steps": 3, "max_steps": 4}
    whole = continuing(tmp_path / "whole", published, **settings, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    assert not any(REFERENCE_NAME in key for key in load_file(Path(checkpoint) / ADAPTER_FILE))
    resumed = continuing(tmp_path / "resumed", published, **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(trained_weights(resumed), trained_weights(whole))
    assert kl(resumed)[-1] == kl(whole)[-1] > 0.0

    other = {"sd3": publish(PIPELINES["sd3"][0](), ["transformer"], tmp_path / "other", seed=6, **UNLIKE)}
    with pytest.raises(ValueError, match="other settings.*continued "):
        continuing(tmp_path / "resumed", other, **settings).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="kl_reference initial -> base"):
        base = continuing(tmp_path / "resumed", published, **settings, kl_reference="base")
        base.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="continued "):
        new = tiny_trainer(tmp_path / "resumed", peft_config=lora(**UNLIKE), **settings)
        new.train(resume_from_checkpoint=checkpoint)


# What is refused


def of_two(pipe):
    pipe.transformer.add_adapter(lora(), adapter_name="second")
    pipe.set_adapters(["default_0", "second"])


def switched_off(pipe):
    pipe.disable_lora()


def weighted(pipe):
    pipe.set_adapters("default_0", 0.7)


def in_the_text_encoder_too(pipe):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipe.text_encoder)


def fused(pipe):
    pipe.fuse_lora()


def of_another_kind(pipe):
    pipe.unload_lora_weights()
    pipe.transformer.add_adapter(LoHaConfig(r=2, target_modules=["to_q"]))


def with_dropout(pipe):
    pipe.unload_lora_weights()
    pipe.transformer.add_adapter(lora(lora_dropout=0.1))


def with_biases(pipe):
    pipe.unload_lora_weights()
    pipe.transformer.add_adapter(lora(bias="all"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_two, r"transformer has several active adapters, \['default_0', 'second'\].*pipe.set_adapters"),
        (switched_off, r"no active one of \['default_0'\].*pipe.enable_lora"),
        (weighted, "has the weight 0.7.*pass a peft_config"),
        (in_the_text_encoder_too, "also changes text_encoder, which is not trained.*Pass a peft_config"),
        (fused, "is fused into the denoiser"),
        (of_another_kind, "by its LoHaConfig, has more or other weights than LoRA matrices"),
        (with_dropout, r"dropout in 8 place\(s\).*lora_dropout too"),
        (with_biases, "has more or other weights than LoRA matrices"),
    ],
)
def test_what_cannot_be_gone_on_from(tmp_path, published, change, message):
    pipe = loaded(published)
    change(pipe)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=pipe, peft_config=None)


# Two denoisers


def test_both_experts_are_trained_on(tmp_path):
    family = FAMILIES["wan2.2"]
    folder = publish(family.build(), ["transformer", "transformer_2"], tmp_path / "published")
    pipe = family.build()
    pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match="and transformer_2 none.*load_into_transformer_2=True"):
        zoo_trainer(family, tmp_path, pipe=pipe, peft_config=None)
    pipe = family.build()
    pipe.load_lora_weights(folder)
    second = "pytorch_lora_weights_transformer_2.safetensors"
    pipe.load_lora_weights(folder, weight_name=second, load_into_transformer_2=True)
    trainer = zoo_trainer(family, tmp_path, pipe=pipe, peft_config=None, num_inference_steps=4, beta=0.1, max_steps=2)
    for name, file in (("transformer", ADAPTER_FILE), ("transformer_2", second)):
        saved, weights = load_file(folder / file), trained_weights(trainer)
        ours = {key: weight for key, weight in weights.items() if key.startswith(f"{name}.")}
        assert len(ours) == len(saved)
        for key, weight in ours.items():
            bare = key.removeprefix(f"{name}.").replace(f".{ADAPTER_NAME}", "")
            assert torch.equal(weight, saved[f"transformer.{bare}"])
    trainer.train()
    assert kl(trainer)[0] == 0.0 and kl(trainer)[-1] > 0.0
