"""What a run puts on the Hub, read back from a server that speaks its protocol, by plain diffusers."""

import copy
import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as HFImage
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from slas_trl.run_facts import Scheduler
from slas_trl.trainer.card_facts import scheduler_of
from tests.local_hub import REPO
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES

from .tiny_trainers import PROMPTS, lora, same, tiny_trainer, trained, trained_weights
from .zoo_trainers import zoo_trainer


PUSHED = {"push_to_hub": True, "hub_model_id": REPO}


def one() -> tuple[list[int], list[torch.Generator], int]:
    """Row, seed and size of a call that draws one picture."""
    return [0], [torch.Generator().manual_seed(0)], 1


ADAPTER = "pytorch_lora_weights.safetensors"


def drawn(pipe, family: str) -> bytes:
    call = {**FAMILIES[family].arguments(PROMPTS["prompt"][:2]), "num_inference_steps": 4}
    return np.asarray(pipe(**call)[0]).tobytes()


def python_in(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


# Loading


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "qwen-image"])
def test_the_adapter_gives_the_trained_images(tmp_path, server, online, family):
    """With lora_alpha that is not the rank."""
    trainer = zoo_trainer(FAMILIES[family], tmp_path, **PUSHED, learning_rate=1e-2)
    trainer.train()
    trainer.push_to_hub()
    fresh = FAMILIES[family].build()
    before = drawn(fresh, family)
    fresh.load_lora_weights(REPO)
    assert drawn(fresh, family) == drawn(trainer.pipe, family) != before


def test_two_denoisers_and_a_moving_average(tmp_path, server, online):
    family = FAMILIES["wan2.2"]
    trainer = zoo_trainer(
        family, tmp_path, **PUSHED, num_inference_steps=4, use_ema=True, max_steps=2, learning_rate=1e-2
    )
    trainer.train()
    trainer.push_to_hub()
    expected = trainer.draw(PROMPTS, [0], [torch.Generator().manual_seed(0)], 1)[0]  # by the moving average
    fresh = family.build()
    # The card's own lines, for one who has the base model.
    code = python_in(server.files(REPO)["README.md"].decode())
    exec(code[code.index("pipe.load_lora_weights") : code.index("pipe.to(")], {"pipe": fresh})
    call = {**family.call, "num_inference_steps": 4, "output_type": "pil"}
    (frames,) = fresh(prompt=[PROMPTS[0]["prompt"]], generator=[torch.Generator().manual_seed(0)], **call).frames
    assert frames[0].tobytes() == expected.tobytes()
    assert {name for name in server.files(REPO) if name.endswith("safetensors")} == {
        ADAPTER,
        "pytorch_lora_weights_transformer_2.safetensors",
    }


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_bfloat16_pipeline_is_judged_by_the_adapter_as_it_is_loaded(tmp_path, family):
    """It is trained and saved in float32, and rounded by diffusers when it is loaded."""
    family = FAMILIES[family]
    trainer = zoo_trainer(family, tmp_path, pipe=family.build().to(torch.bfloat16), learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    fresh = family.build().to(torch.bfloat16)
    fresh.load_lora_weights(tmp_path)
    weights = trained_weights(trainer)

    def picture(pipe) -> bytes:
        call = {**trainer.calls.arguments, "prompt": [PROMPTS[0]["prompt"]]}
        return pipe(**call, generator=[torch.Generator().manual_seed(0)])[0][0].tobytes()

    drawn = trainer.draw(PROMPTS, [0], [torch.Generator().manual_seed(0)], 1)[0].tobytes()
    assert drawn == picture(fresh) != picture(trainer.pipe)  # which is in float32 still
    assert same(weights, trained_weights(trainer))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    trainer.train()  # goes on with the same parameters
    assert not same(weights, trained_weights(trainer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drawn_is_without_the_mixed_precision_of_training(tmp_path, dtype):
    pipe = PIPELINES["sd"][0]().to(dtype)
    before = tiny_trainer(tmp_path / "before", "sd", model=copy.deepcopy(pipe)).draw(PROMPTS, *one())[0].tobytes()
    trainer = trained(tmp_path / "run", "sd", model=pipe, bf16=True, max_steps=1, learning_rate=0.0)
    forward = trainer.pipe.unet.forward
    assert trainer.draw(PROMPTS, *one())[0].tobytes() == before
    assert trainer.pipe.unet.forward == forward != trainer.pipe.unet._original_forward


def test_parts_of_different_types_keep_the_mixed_precision_that_they_need(tmp_path):
    family = FAMILIES["qwen-image"]
    pipe = family.build()
    pipe.text_encoder.to(torch.bfloat16)
    trainer = zoo_trainer(family, tmp_path, pipe=pipe, bf16=True)
    trainer.train()
    assert len(trainer.draw(PROMPTS, [0, 1], [torch.Generator().manual_seed(i) for i in range(2)], 2)) == 2


def test_before_is_not_what_was_resumed(tmp_path, server, online):
    settings = {**PUSHED, "full": True, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, max_steps=1, **settings)
    trainer = tiny_trainer(tmp_path, max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=True)
    trainer.push_to_hub()
    pictures = {name for name in server.files(REPO) if name.startswith("samples/")}
    assert pictures == {"samples/comparison.png", *(f"samples/{i}_after.png" for i in range(1, 5))}


def test_a_picture_that_is_no_longer_there(tmp_path, server, online, caplog):
    """When a model is saved it is told, and ends no run."""
    family = FAMILIES["kontext"]
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path in paths:
        Image.new("RGB", (16, 16), (40, 90, 200)).save(path)
    data = Dataset.from_dict({"prompt": PROMPTS["prompt"][:4], "image": paths})
    trainer = zoo_trainer(family, tmp_path / "run", train_dataset=data, **PUSHED)
    trainer.train()
    trainer.draw = lambda *args: [Image.new("RGB", (16, 16))] * 4
    (tmp_path / "0.png").unlink()
    trainer.save_model()
    assert "The column 'image' of row 0 holds no image" in caplog.text


class TestTheSchedulerOfThePipeline:
    @pytest.fixture
    def base(self, tmp_path):
        PIPELINES["sd3"][0]().save_pretrained(tmp_path / "base", safe_serialization=True)
        index = json.loads((tmp_path / "base" / "model_index.json").read_text())
        left_out = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        return DiffusionPipeline.from_pretrained(tmp_path / "base", **left_out), tmp_path / "base", index

    def test_somebodys_own(self, base):
        class Mine(FlowMatchEulerDiscreteScheduler):
            def __init__(self, table):
                super().__init__()

        pipe, folder, index = base
        assert scheduler_of(pipe, {}) is None
        pipe.scheduler = Mine([1])
        assert scheduler_of(pipe, {}) == Scheduler("Mine")
        index["scheduler"] = ["mine", "Mine"]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert scheduler_of(pipe, {}) is None

    @pytest.mark.parametrize("text", ["{", "{}", '{"scheduler": ["diffusers", "Nothing"]}'])
    def test_nobody_can_tell(self, base, text):
        pipe, folder, _ = base
        (folder / "model_index.json").write_text(text)
        assert scheduler_of(pipe, {}) is None

    def test_asks_no_hub(self, base, server, online):
        pipe, _, _ = base
        pipe.register_to_config(_name_or_path="user/base")
        assert scheduler_of(pipe, {"revision": "x"}) is None
        assert not [request for request in server.requests() if "user/base" in request["path"]]


def test_a_pipeline_without_methods_for_adapters(tmp_path, server, online):
    family = FAMILIES["ovis-image"]
    trainer = zoo_trainer(family, tmp_path, **PUSHED, learning_rate=1e-2)
    trainer.train()
    trainer.push_to_hub()
    fresh = family.build()
    before = drawn(fresh, "ovis-image")
    code = python_in(server.files(REPO)["README.md"].decode())
    exec(code[code.index("pipe.transformer.load_lora_adapter") : code.index("pipe.to(")], {"pipe": fresh})
    assert drawn(fresh, "ovis-image") == drawn(trainer.pipe, "ovis-image") != before


def test_a_pipeline_that_edits(tmp_path, server, online, monkeypatch):
    """Its gallery has the pictures of the data set edited; its quick start edits the first of them, as pasted."""
    family = FAMILIES["kontext"]
    base = tmp_path / "base"
    family.build().save_pretrained(base)
    pictures = []
    for i in range(4):
        image, exif = Image.new("RGB", (16, 16), (40 * i, 90, 200)), Image.Exif()
        exif[0x010E] = "taken at home"
        image.save(tmp_path / f"{i}.png", exif=exif, icc_profile=b"at home")
        pictures.append(str(tmp_path / f"{i}.png"))
    data = Dataset.from_dict({"prompt": PROMPTS["prompt"][:4], "image": pictures}).cast_column("image", HFImage())
    pipe = DiffusionPipeline.from_pretrained(base)
    trainer = zoo_trainer(family, tmp_path / "run", pipe=pipe, train_dataset=data, **PUSHED, learning_rate=1e-2)
    trainer.train()
    trainer.push_to_hub()
    files = server.files(REPO)
    card = files["README.md"].decode()
    assert "samples/4_before.png" in files and "pipeline_tag: image-to-image" in card
    assert [name for name in files if "input" in name] == ["samples/1_input.png"]
    with Image.open(io.BytesIO(files["samples/1_input.png"])) as pushed:
        assert not pushed.info
    with Image.open(tmp_path / "run" / "samples" / "1_input.png") as pushed, Image.open(pictures[0]) as given:
        assert pushed.tobytes() == given.tobytes()
    monkeypatch.chdir(tmp_path)
    exec(python_in(card).replace('"path/to/base"', '"base"'), {})
    expected = trainer.draw(data, [0], [torch.Generator().manual_seed(0)], 1)[0]
    with Image.open("edited.png") as edited:
        assert edited.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler], ids=["its class", "another class"])
def test_a_scheduler_that_is_not_the_models_is_in_the_quick_start(tmp_path, server, online, monkeypatch, kind):
    base = tmp_path / "base"
    PIPELINES["sd"][0]().save_pretrained(base)
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    trainer = trained(tmp_path / "run", "sd", model=pipe, **PUSHED, max_steps=1)
    trainer.push_to_hub()
    code = python_in(server.files(REPO)["README.md"].decode())
    assert f"pipe.scheduler = {kind.__name__}.from_config(" in code and 'timestep_spacing="trailing"' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"path/to/base"', '"base"'), {})
    expected = trainer.draw(PROMPTS, [0], [torch.Generator().manual_seed(0)], 1)[0]
    with Image.open("image.png") as image:
        assert image.tobytes() == expected.tobytes()


def test_all_weights_are_a_folder_of_the_denoiser(tmp_path, server, online, monkeypatch):
    base = tmp_path / "secret-place" / "base"
    PIPELINES["flux"][0]().save_pretrained(base)
    model, model_before = (DiffusionPipeline.from_pretrained(base) for _ in range(2))
    trainer = trained(tmp_path / "run", "flux", model=model, full=True, **PUSHED, learning_rate=1e-2)
    trainer.push_to_hub()
    files = server.files(REPO)
    names = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    assert [name for name in files if name.startswith("transformer")] == names and ADAPTER not in files
    assert not any(b"secret-place" in content for content in files.values())
    code = python_in(files["README.md"].decode()).replace('"path/to/base"', repr(str(base)))
    found = {}
    monkeypatch.chdir(tmp_path)
    exec(code, found)
    # Where weights lie in memory, read from a file or not, is seen in the last bits.
    here, there = (np.frombuffer(drawn(pipe, "flux"), np.float32) for pipe in (trainer.pipe, found["pipe"]))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-6)
    assert drawn(model_before, "flux") != drawn(trainer.pipe, "flux")
    # The pictures before training were drawn then: there is no adapter to leave out.
    with Image.open(tmp_path / "run" / "samples" / "1_before.png") as shown:
        before = model_before(**trainer.calls.call(PROMPTS, [0], [torch.Generator().manual_seed(0)])).images[0]
        np.testing.assert_array_equal(np.asarray(shown)[::10, ::10], np.asarray(before))
    card = ModelCard(files["README.md"].decode())
    assert "lora" not in card.data.tags and card.data.library_name == "diffusers"


# The card


def test_the_card_names_the_base_model_and_its_license(tmp_path, server, online, monkeypatch):
    base = tmp_path / "base"
    PIPELINES["sd3"][0]().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\nx")
    api = HfApi(token="hf_good")
    api.create_repo("org/base", exist_ok=True)
    api.upload_folder(repo_id="org/base", folder_path=base)
    left_out = {"text_encoder_3": None, "tokenizer_3": None}
    trainer = trained(tmp_path / "run", model="org/base", **PUSHED, max_steps=1, model_init_kwargs=left_out)
    trainer.push_to_hub(dataset_name="org/prompts", tags=["mine"])
    text = server.files(REPO)["README.md"].decode()
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert (data["license"], data["license_name"]) == ("other", "mine")
    assert data["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE.md"
    assert data["datasets"] == ["org/prompts"] and "mine" in data["tags"]
    assert "`optim` **adamw_torch" in text and "scheduler" not in python_in(text)
    assert (tmp_path / "run" / "README.md").read_text() == text  # the same here and there
    # The quick start, as pasted: base and adapter both come from the server.
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(python_in(text), found)
    with Image.open("image.png") as image, Image.open(tmp_path / "run" / data["widget"][0]["output"]["url"]) as shown:
        assert (np.asarray(image)[::10, ::10] == np.asarray(shown.resize((16, 16), 0))[::10, ::10]).all()
    assert [entry["output"]["url"] in server.files(REPO) for entry in data["widget"]] == [True] * 8


def test_evaluations_are_in_the_metadata_with_their_intervals(tmp_path):
    trainer = trained(tmp_path, eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.save_model()
    trainer.create_model_card()
    [result] = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["model-index"][0]["results"]
    [metric] = result["metrics"]
    scores = trainer._sample_and_score(PROMPTS).rewards.view(6, 4).mean(1)  # by hand: six prompts, four pictures each
    half = 2.5706 * scores.std().item() / 6**0.5  # Student's t with five degrees of freedom
    low, high = metric["args"]["confidence_interval_95"]
    assert metric["type"] == "redness" and metric["value"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert ((high - low) / 2, (high + low) / 2) == pytest.approx((half, metric["value"]), rel=1e-4)
    assert metric["args"]["prompts"] == 6 and metric["args"]["before_training"] != metric["value"]


def test_hacking_is_told(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=PROMPTS, eval_reward_funcs=[greenness], hacking_patience=2)
    for step, value in enumerate([0.1, 0.2, 0.3]):
        log = {"step": step, "eval_reward": value, "eval_rewards/greenness/mean": 1 - value}
        trainer.state.log_history.append(log)
    trainer.create_model_card()
    assert "rose in 2 evaluations in a row (0.1 to 0.3)" in (tmp_path / "README.md").read_text()
    trainer.state.log_history[-1]["eval_rewards/greenness/mean"] = 0.95
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "no warning of reward hacking" in text and "`greenness`" in text


def greenness(prompts, images, **columns):
    return [float(np.asarray(image)[..., 1].mean()) / 255 for image in images]


def test_an_adapter_that_has_to_be_there_too_is_told(tmp_path):
    pipe = PIPELINES["sd3"][0]()
    pipe.transformer.add_adapter(lora(init_lora_weights=False), adapter_name="theirs")
    trainer = tiny_trainer(tmp_path, model=pipe)
    trainer.create_model_card()
    assert "`theirs`" in (tmp_path / "README.md").read_text()
