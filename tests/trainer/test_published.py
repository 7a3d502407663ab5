"""Adapters to begin from: folders, files and repositories, and what their cards say."""

from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel

from slas_trl.quick_start import ADAPTER_FILE
from slas_trl.trainer.lora import carries_adapter
from slas_trl.trainer.published import base_model_of, load_adapter
from tests.local_hub import HubServer
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES

from .test_continuing import publish
from .test_lora import picture


CARD = "---\nbase_model: {}\ntags: [lora]\n---\n\n# Ours\n"


def weights(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of its one adapter, whatever that is called."""
    named = [(name.split("."), p) for name, p in denoiser.named_parameters() if ".lora_" in name]
    return {".".join([*parts[:-2], parts[-1]]): p for parts, p in named}


def same(denoiser: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = weights(denoiser), weights(other)
    return len(a) > 4 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server, server.in_process():
        yield server


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("name", ["sd3.5-slg", "bria", "wan2.2"])
def test_every_denoiser_gets_its_own(name, where, tmp_path, hub):
    """A pipeline with methods for adapters, one without, and one with two denoisers."""
    family = FAMILIES[name]
    trained, names = family.build(), ["transformer", "transformer_2"] if name == "wan2.2" else ["transformer"]
    publish(trained, names, tmp_path)
    (tmp_path / "README.md").write_text(CARD.format("someone/base"))
    source = str(tmp_path)
    if where == "hub":
        source = huggingface_hub.create_repo(f"user/{name}").repo_id
        huggingface_hub.upload_folder(repo_id=source, folder_path=tmp_path)
    pipe = family.build()
    load_adapter(pipe, source)
    assert all(same(pipe.components[name], trained.components[name]) for name in names)
    if len(names) == 2:
        assert not same(pipe.transformer, pipe.transformer_2)
    assert base_model_of(source) == "someone/base"


def test_a_file_of_any_name(tmp_path):
    trained = PIPELINES["sd3"][0]()
    file = publish(trained, ["transformer"], tmp_path) / "pytorch_lora_weights.safetensors"
    file = file.rename(tmp_path / "mine.safetensors")
    for source in (file, tmp_path):
        pipe = PIPELINES["sd3"][0]()
        load_adapter(pipe, str(source))
        assert torch.equal(picture(pipe, "sd3"), picture(trained, "sd3"))
        assert base_model_of(str(source)) is None


@pytest.mark.parametrize(
    ("card", "base"),
    [
        (CARD.format("someone/base"), "someone/base"),
        (CARD.format("[someone/base]"), "someone/base"),
        (CARD.format("[a/b, c/d]"), None),
        ("---\ntags: [lora]\n---\n", None),
        ("No metadata at all.", None),
        ("---\nbase_model: [a\n---\n", None),
    ],
)
def test_what_a_card_names(tmp_path, card, base):
    (tmp_path / "README.md").write_text(card)
    assert base_model_of(str(tmp_path)) == base


def deeper() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel.from_config({**PIPELINES["sd3"][0]().transformer.config, "num_layers": 3})


def test_what_does_not_fit(tmp_path):
    trained = PIPELINES["sd3"][0]()
    trained.transformer = deeper()
    publish(trained, ["transformer"], tmp_path / "deeper")
    with pytest.raises(ValueError, match="changes 4 layers that transformer does not have.*transformer_blocks.2"):
        load_adapter(PIPELINES["sd3"][0](), str(tmp_path / "deeper"))
    publish(PIPELINES["sd"][0](), ["unet"], tmp_path / "sd")
    with pytest.raises(ValueError, match="sd holds no weights that fit this pipeline"):
        load_adapter(PIPELINES["sd3"][0](), str(tmp_path / "sd"))
    wider = PIPELINES["sd3"][0]()
    torch.manual_seed(0)
    size = {"num_attention_heads": 4, "caption_projection_dim": 32}
    wider.transformer = SD3Transformer2DModel.from_config({**wider.transformer.config, **size})
    publish(wider, ["transformer"], tmp_path / "wider")
    with pytest.raises(ValueError, match="could not load the adapter .*wider into a StableDiffusion3Pipeline"):
        load_adapter(PIPELINES["sd3"][0](), str(tmp_path / "wider"))
    with pytest.raises(ValueError, match="diffusers has no adapters for HunyuanDiT2DModel"):
        load_adapter(FAMILIES["hunyuan-dit"].build(), str(tmp_path / "wider"))


def test_a_branch_and_a_token(tmp_path, hub, monkeypatch):
    trained = PIPELINES["sd3"][0]()
    publish(trained, ["transformer"], tmp_path)
    source = huggingface_hub.create_repo("user/branched", private=True).repo_id
    huggingface_hub.create_branch(source, branch="trial")
    huggingface_hub.upload_folder(repo_id=source, folder_path=tmp_path, revision="trial")
    pipe = PIPELINES["sd3"][0]()
    with pytest.raises(ValueError, match=f"could not load the adapter {source}"):
        load_adapter(pipe, source)
    with pytest.raises(ValueError, match="404"):
        load_adapter(pipe, f"{source}@nowhere")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="none that this token may read"):
        load_adapter(pipe, f"{source}@trial")
    load_adapter(pipe, f"{source}@trial", token="hf_good")
    assert same(pipe.transformer, trained.transformer)
    for name in ("sd3.5-slg", "bria"):  # with methods for adapters, and without
        family = FAMILIES[name]
        trained = family.build()
        publish(trained, ["transformer"], tmp_path / name)
        (tmp_path / name / ADAPTER_FILE).rename(tmp_path / name / "other.safetensors")
        huggingface_hub.create_branch(source, branch=name, token="hf_good")
        upload = {"repo_id": source, "folder_path": tmp_path / name, "revision": name, "token": "hf_good"}
        huggingface_hub.upload_folder(**upload, delete_patterns="*.safetensors")
        pipe = family.build()
        load_adapter(pipe, f"{source}@{name}", token="hf_good")
        assert same(pipe.transformer, trained.transformer)


def test_a_typo(tmp_path, hub):
    pipe = PIPELINES["sd3"][0]()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no adapter: there is no .safetensors file in it"):
        load_adapter(pipe, str(tmp_path / "empty"))
    for find in (base_model_of, lambda source: load_adapter(pipe, source)):
        for typo in ("user/nothing", "runs/mine/here"):
            with pytest.raises(
                ValueError, match=f"no folder '{typo}' here, and no repository of that name on the Hub"
            ):
                find(typo)
    huggingface_hub.create_repo("user/empty")
    with pytest.raises(ValueError, match="could not load the adapter user/empty"):
        load_adapter(pipe, "user/empty")
    assert not carries_adapter(pipe.transformer)
    hub.stop()
    with pytest.raises(ValueError, match="no folder 'user/else' here, and it could not be had from the Hub"):
        base_model_of("user/else")
    hub.start()
