"""The trained weights: new adapters, adapters that are trained further, whole denoisers, averages, two denoisers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback

from slas_trl.trainer.adapters import ADAPTER_NAME, REFERENCE_NAME
from slas_trl.trainer.trained_model import MovingAverage
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES

from .tiny_trainers import (
    ATTENTION,
    DENOISERS,
    HELD_OUT,
    SAVED,
    column,
    logged,
    lora,
    picture,
    publish,
    same,
    tiny_trainer,
    trained,
    trained_weights,
)
from .zoo_trainers import zoo_trainer


ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SECOND_ADAPTER_FILE = "pytorch_lora_weights_transformer_2.safetensors"


def adapters_of(trainer) -> set[str]:
    """The names of the adapters that are trained."""
    return {name.split(".")[-2] for name in trained_weights(trainer)}


def test_a_saved_denoiser_loads_into_the_plain_pipeline(tmp_path):
    trainer = trained(tmp_path, "sd", full=True, **SAVED)
    plain = PIPELINES["sd"][0]()
    before, ours = picture(plain, "sd"), picture(trainer.pipe, "sd")
    plain.unet = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint-2" / "unet")
    assert same(plain.unet.state_dict(), trainer.model.state_dict())
    # What a file is mapped to in memory is aligned otherwise, which some kernels round otherwise for.
    torch.testing.assert_close(picture(plain, "sd"), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(before, ours, rtol=0, atol=1e-4)


def with_theirs(family: str = "sd3"):
    """A pipeline in which an adapter of somebody else has an effect."""
    pipe = PIPELINES[family][0]()
    denoiser = pipe.components[DENOISERS[family]]
    torch.manual_seed(5)
    denoiser.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=ATTENTION[:3], init_lora_weights=False), adapter_name="theirs"
    )
    denoiser.set_adapters(["theirs"], [0.7])
    return pipe


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_new_adapter_is_trained_on_top_of_one_that_was_loaded(tmp_path, family):
    plain, theirs = picture(PIPELINES[family][0](), family), picture(with_theirs(family), family)
    assert not torch.equal(plain, theirs)
    trainer = tiny_trainer(tmp_path, family, model=with_theirs(family), beta=0.1, max_steps=3)
    assert torch.equal(picture(trainer.pipe, family), theirs)  # a new adapter changes nothing at first
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".theirs." in name}
    trainer.train()
    assert len(before) > 4
    assert same(before, {name: p for name, p in trainer.model.named_parameters() if name in before})
    first, *_, last = column(tmp_path, "kl")
    assert first == 0.0 < last  # to the model with theirs, not to the one without
    assert not torch.equal(picture(trainer.pipe, family), theirs)
    # What is saved is ours alone, and goes on top of theirs.
    trainer.save_model()
    fresh = with_theirs(family)
    fresh.load_lora_weights(tmp_path, adapter_name="ours")
    fresh.set_adapters(["theirs", "ours"], [0.7, 1.0])
    torch.testing.assert_close(picture(fresh, family), picture(trainer.pipe, family), rtol=0, atol=1e-5)


def test_an_adapter_that_was_switched_off_stays_off(tmp_path):
    pipe = with_theirs()
    pipe.transformer.add_adapter(lora(init_lora_weights=False))  # peft calls it "default"
    pipe.transformer.disable_adapters()
    plain = picture(PIPELINES["sd3"][0](), "sd3")
    trainer = tiny_trainer(tmp_path, model=pipe)
    assert torch.equal(picture(trainer.pipe, "sd3"), plain) and adapters_of(trainer) == {ADAPTER_NAME}
    trainer.train()
    assert not torch.equal(picture(trainer.pipe, "sd3"), plain)


# alpha is not r, and not all layers are alike
UNLIKE = {"use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of adapters as earlier runs have left them, by family."""
    return {
        family: publish(
            PIPELINES[family][0](), [name], tmp_path_factory.mktemp(family), **({} if family == "sd" else UNLIKE)
        )
        for family, name in DENOISERS.items()
    }


def loaded(published, family: str = "sd3"):
    pipe = PIPELINES[family][0]()
    pipe.load_lora_weights(published[family])
    return pipe


def continuing(folder, published, family: str = "sd3", **changes):
    return tiny_trainer(folder, family, model=loaded(published, family), peft_config=None, **changes)


def metadata(folder: Path) -> dict:
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        [text] = [value for key, value in file.metadata().items() if key != "format"]
    found = {key.split(".")[-1]: value for key, value in json.loads(text).items()}
    del found["init_lora_weights"]  # how it once began
    return found | {"target_modules": sorted(found["target_modules"])}


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_adapter_is_trained_further_and_stays_one(tmp_path, family, published):
    theirs = picture(loaded(published, family), family)
    assert not torch.equal(theirs, picture(PIPELINES[family][0](), family))
    trainer = continuing(tmp_path, published, family, beta=0.1, max_steps=3)
    assert torch.equal(picture(trainer.pipe, family), theirs)
    weights, denoiser = trained_weights(trainer), trainer.pipe.components[DENOISERS[family]]
    assert adapters_of(trainer) == {ADAPTER_NAME}
    copies = {name: p.detach().clone() for name, p in denoiser.named_parameters() if REFERENCE_NAME in name}
    assert len(copies) == len(weights) > 4
    trainer.train()
    assert not any(torch.equal(weights[name], after) for name, after in trained_weights(trainer).items())
    assert same(copies, {name: p for name, p in denoiser.named_parameters() if name in copies})
    first, *_, last = column(tmp_path, "kl")
    assert first == 0.0 < last
    # What is saved replaces theirs.
    trainer.save_model()
    assert load_file(tmp_path / ADAPTER_FILE).keys() == load_file(published[family] / ADAPTER_FILE).keys()
    assert metadata(tmp_path) == metadata(published[family])
    fresh = PIPELINES[family][0]()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(picture(fresh, family), picture(trainer.pipe, family))


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "kl_reference": "base"}], ids=["no reference", "the base"])
def test_there_is_no_copy_without_need(tmp_path, published, settings):
    trainer = continuing(tmp_path, published, **settings)
    assert list(trainer.pipe.transformer.peft_config) == [ADAPTER_NAME]
    trainer.train()
    assert all(line.get("kl", 1) > 0.0 for line in logged(tmp_path))


def test_adapters_are_in_float32_on_a_narrow_model(tmp_path, published):
    pipe = PIPELINES["sd3"][0]().to(torch.bfloat16)
    pipe.load_lora_weights(published["sd3"])
    trainer = tiny_trainer(tmp_path, model=pipe, peft_config=None, beta=0.1, bf16=True)
    saved = load_file(published["sd3"] / ADAPTER_FILE)
    for key, weight in trained_weights(trainer).items():
        loaded_by_diffusers = saved[f"transformer.{key.replace(f'.{ADAPTER_NAME}', '')}"].bfloat16()
        assert weight.dtype == torch.float32 and torch.equal(weight, loaded_by_diffusers.float())
    trainer.train()
    assert column(tmp_path, "kl")[0] == 0.0


def test_a_trained_pipeline_is_trained_further(tmp_path, published):
    """Copy and all; an adapter that is there beside it, inactive, stays so."""
    pipe = loaded(published)
    pipe.transformer.add_adapter(lora(init_lora_weights=False), adapter_name="other")
    pipe.set_adapters("default_0")
    expected = picture(pipe, "sd3")
    first = tiny_trainer(tmp_path / "first", model=pipe, peft_config=None, beta=0.1)
    assert torch.equal(picture(pipe, "sd3"), expected) and adapters_of(first) == {ADAPTER_NAME}
    first.train()
    after = trained_weights(first)
    second = tiny_trainer(tmp_path / "second", model=first.pipe, peft_config=None, beta=0.1)
    assert same(trained_weights(second), after)
    second.train()
    assert column(tmp_path / "second", "kl")[0] == 0.0 and not same(trained_weights(second), after)
    assert sorted(pipe.transformer.peft_config) == [REFERENCE_NAME, "other", ADAPTER_NAME]


def test_resuming_is_exact_and_from_the_same_adapter(tmp_path, published):
    settings = {"beta": 0.1, "use_ema": True, "gradient_accumulation_steps": 3, "max_steps": 4}
    whole = continuing(tmp_path / "whole", published, **settings, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    assert not any(REFERENCE_NAME in key for key in load_file(Path(checkpoint) / ADAPTER_FILE))
    second = continuing(tmp_path / "resumed", published, **settings)
    second.train(resume_from_checkpoint=checkpoint)
    assert same(trained_weights(second), trained_weights(whole))
    kl = column(tmp_path / "whole", "kl")
    assert column(tmp_path / "resumed", "kl") == kl and kl[-1] > 0.0

    other = {"sd3": publish(PIPELINES["sd3"][0](), ["transformer"], tmp_path / "other", seed=6, **UNLIKE)}
    for trainer, named in (
        (continuing(tmp_path / "resumed", other, **settings), "continued"),
        (continuing(tmp_path / "resumed", published, **settings, kl_reference="base"), "kl_reference"),
        (tiny_trainer(tmp_path / "resumed", peft_config=lora(**UNLIKE), **settings), "continued"),
    ):
        with pytest.raises(ValueError, match=f"other settings.*{named} "):
            trainer.train(resume_from_checkpoint=checkpoint)


def add_another(pipe):
    pipe.transformer.add_adapter(lora(), adapter_name="second")
    pipe.set_adapters(["default_0", "second"])


def add_to_text_encoder(pipe):
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), pipe.text_encoder)


def replace_by(config):
    def replace(pipe):
        pipe.unload_lora_weights()
        pipe.transformer.add_adapter(config)

    return replace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_another, r"\['default_0', 'second'\].*set_adapters"),
        (lambda pipe: pipe.disable_lora(), r"\[\] of \['default_0'\] active"),
        (lambda pipe: pipe.set_adapters("default_0", 0.7), "weight 0.7"),
        (add_to_text_encoder, "text_encoder"),
        (lambda pipe: pipe.fuse_lora(), "fused"),
        (replace_by(LoHaConfig(r=2, target_modules=["to_q"])), "more or other weights"),
        (replace_by(lora(lora_dropout=0.1)), "lora_dropout"),
        (replace_by(lora(bias="all")), "more or other weights"),
    ],
    ids=["two", "off", "weighted", "text encoder", "fused", "another kind", "dropout", "biases"],
)
def test_adapters_that_cannot_be_trained_further(tmp_path, published, change, message):
    pipe = loaded(published)
    change(pipe)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=pipe, peft_config=None)
    if message == "fused":
        with pytest.raises(ValueError, match=message):  # nor can another one be trained on top of it
            tiny_trainer(tmp_path, model=pipe)


def test_the_average_is_evaluated_and_saved_and_the_weights_are_trained(tmp_path):
    class Remember(TrainerCallback):
        steps = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.steps.append([p.detach().clone() for p in model.parameters()])

    plain = trained(tmp_path / "plain", "sd", full=True, max_steps=3)
    settings = {"full": True, "max_steps": 3, "eval_dataset": HELD_OUT}
    settings |= {"use_ema": True, "ema_decay": 0.6, "callbacks": [Remember()]}
    trainer = tiny_trainer(tmp_path / "ema", "sd", **settings)
    average = list(trained_weights(trainer).values())
    trainer.train()
    assert same(trained_weights(plain), trained_weights(trainer))  # it does not take part in training
    for weights in Remember.steps:
        average = [0.6 * a + 0.4 * w for a, w in zip(average, weights, strict=True)]

    trainer.save_model(str(tmp_path / "saved"))
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet")
    for ours, by_hand in zip(saved.parameters(), average, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)

    assert trainer.evaluate()["eval_reward"] != plain.evaluate(HELD_OUT)["eval_reward"]
    assert same(trained_weights(plain), trained_weights(trainer))  # the weights are back


def test_both_experts_are_trained_and_saved(tmp_path):
    """And trained further, from what was saved."""
    family, names = FAMILIES["wan2.2"], ["transformer", "transformer_2"]
    settings = {"num_inference_steps": 4, "beta": 0.1, "max_steps": 3, **SAVED}
    trainer = zoo_trainer(family, tmp_path / "run", **settings)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    for name in names:
        ours = [key for key in after if key.startswith(f"{name}.")]
        assert ours and any(not torch.equal(before[key], after[key]) for key in ours), name
    assert [line["ratio/max_deviation"] for line in logged(tmp_path / "run")] == [0.0] * 3

    def frames(pipe):
        call = {**family.call, "num_inference_steps": 4, "output_type": "pt"}
        return pipe(prompt=["a cat"], generator=[torch.Generator().manual_seed(0)], **call).frames

    folder, pipe = tmp_path / "run" / "checkpoint-3", family.build()
    pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match="transformer_2 carries no adapter"):
        zoo_trainer(family, tmp_path, pipe=pipe, peft_config=None)
    pipe = family.build()
    pipe.load_lora_weights(folder)
    pipe.load_lora_weights(folder, weight_name=SECOND_ADAPTER_FILE, load_into_transformer_2=True)
    assert torch.equal(frames(pipe), frames(trainer.pipe)) and not torch.equal(frames(pipe), frames(family.build()))
    second = zoo_trainer(family, tmp_path / "further", pipe=pipe, peft_config=None, **settings)
    assert same(trained_weights(second), after)
    second.train()
    first, *_, last = column(tmp_path / "further", "kl")
    assert first == 0.0 < last

    again = zoo_trainer(family, tmp_path / "resumed", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(trained_weights(again), after)


def test_the_weights_are_put_back_after_an_error_too():
    weight = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage(torch.nn.ParameterList([weight]), decay=0.5)
    with average.applied():  # there is none before training
        assert weight.tolist() == [0.0] * 3
    average.on_train_begin(None, None, None)
    with torch.no_grad():
        weight.fill_(4.0)
    average.on_step_end(None, None, None)
    with pytest.raises(KeyError), average.applied():
        assert weight.tolist() == [2.0] * 3
        raise KeyError
    assert weight.tolist() == [4.0] * 3
