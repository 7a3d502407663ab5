"""Pipelines and adapters from folders, files and repositories, and what their cards say."""

from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline

from slas_trl.loading import base_model_of, load_adapter, load_pipeline, load_with_adapter
from slas_trl.run_files import ADAPTER
from slas_trl.shapes.pipeline import ShapesPipeline, load_shapes_pipeline
from tests.local_hub import HubServer
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES, sd_pipeline
from tests.trainer.tiny_trainers import picture, publish


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


class TestPipelines:
    def test_the_embedded_one(self, tmp_path):
        pipe = load_pipeline("shapes", {"dtype": "bfloat16"})
        assert isinstance(pipe, ShapesPipeline) and pipe.dtype == torch.bfloat16
        load_shapes_pipeline().save_pretrained(tmp_path)
        assert isinstance(load_pipeline(str(tmp_path), {"dtype": "float32"}), ShapesPipeline)

    def test_types_by_name(self, tmp_path):
        sd_pipeline().save_pretrained(tmp_path)
        pipe: Any = load_pipeline(str(tmp_path), {"torch_dtype": {"unet": "bfloat16", "default": "float32"}})
        assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
        with pytest.raises(ValueError, match="dtype must be one of"):
            load_pipeline(str(tmp_path), {"dtype": "float8"})

    def test_a_repository(self, tmp_path, hub):
        sd_pipeline().save_pretrained(tmp_path)
        huggingface_hub.create_repo("user/sd")
        huggingface_hub.upload_folder(repo_id="user/sd", folder_path=tmp_path)
        assert isinstance(load_pipeline("user/sd"), StableDiffusionPipeline)

    def test_a_single_file_is_loaded_by_the_class_that_its_base_model_names(self, tmp_path, monkeypatch):
        sd_pipeline().save_pretrained(tmp_path / "base")
        (tmp_path / "all.safetensors").write_bytes(b"")
        monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", classmethod(lambda *given, **kw: (given, kw)))
        options = {"config": str(tmp_path / "base"), "dtype": "float32"}
        (kind, file), given = load_pipeline(str(tmp_path / "all.safetensors"), options)
        assert kind is StableDiffusionPipeline and file == str(tmp_path / "all.safetensors")
        assert given == {"config": str(tmp_path / "base"), "dtype": torch.float32}

    @pytest.mark.parametrize(
        ("file", "text", "what"),
        [
            ("model_index.json", None, "model_index.json"),
            ("model_index.json", "{}", "_class_name"),
            ("model_index.json", '{"_class_name": "NoSuchPipeline"}', "NoSuchPipeline"),
            ("unet/diffusion_pytorch_model.safetensors", "cut", "."),
            ("vae/config.json", "{", "config.json"),
            ("unet/config.json", None, "unet"),
        ],
    )
    def test_a_damaged_folder(self, tmp_path, file, text, what):
        sd_pipeline().save_pretrained(tmp_path)
        (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path}' .* pipeline: .*{what}"):
            load_pipeline(str(tmp_path))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is there")
    def test_arguments_that_cannot_be_used_do_not_show_their_values(self, tmp_path):
        sd_pipeline().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="device_map, token") as error:
            load_pipeline(str(tmp_path), {"device_map": "cuda", "token": "hf_secret"})
        assert "hf_secret" not in str(error.value)


class TestAdapters:
    @pytest.mark.parametrize("where", ["folder", "hub"])
    @pytest.mark.parametrize("name", ["sd3.5-slg", "bria", "wan2.2"])
    def test_every_denoiser_gets_its_own(self, name, where, tmp_path, hub):
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

    def test_a_file_of_any_name(self, tmp_path):
        trained = PIPELINES["sd3"][0]()
        file = (publish(trained, ["transformer"], tmp_path) / ADAPTER).rename(tmp_path / "mine.safetensors")
        for source in (file, tmp_path):
            pipe = PIPELINES["sd3"][0]()
            load_adapter(pipe, str(source))
            assert torch.equal(picture(pipe, "sd3"), picture(trained, "sd3"))
            assert base_model_of(str(source)) is None
        (tmp_path / "another.safetensors").write_bytes(file.read_bytes())
        with pytest.raises(FileNotFoundError, match="there are 2"):
            load_adapter(pipe, str(tmp_path))

    def test_a_private_branch(self, tmp_path, hub, monkeypatch):
        """And there a file of another name."""
        trained = PIPELINES["sd3"][0]()
        publish(trained, ["transformer"], tmp_path)
        (tmp_path / ADAPTER).rename(tmp_path / "other.safetensors")
        source = huggingface_hub.create_repo("user/branched", private=True).repo_id
        huggingface_hub.create_branch(source, branch="trial")
        huggingface_hub.upload_folder(repo_id=source, folder_path=tmp_path, revision="trial")
        pipe = PIPELINES["sd3"][0]()
        with pytest.raises(FileNotFoundError, match=f"{source} holds no adapter"):
            load_adapter(pipe, source)
        with pytest.raises(ValueError, match="404"):
            load_adapter(pipe, f"{source}@nowhere")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(ValueError, match="none that this token may read"):
            load_adapter(pipe, f"{source}@trial")
        load_adapter(pipe, f"{source}@trial", token="hf_good")
        assert same(pipe.transformer, trained.transformer)

    def test_what_does_not_fit(self, tmp_path):
        def changed(**config: int) -> Any:
            pipe = PIPELINES["sd3"][0]()
            torch.manual_seed(0)
            pipe.transformer = SD3Transformer2DModel.from_config({**pipe.transformer.config, **config})
            return pipe

        publish(changed(num_layers=3), ["transformer"], tmp_path / "deeper")
        with pytest.raises(ValueError, match="changes 4 layers that transformer does not have.*transformer_blocks.2"):
            load_adapter(PIPELINES["sd3"][0](), str(tmp_path / "deeper"))
        publish(PIPELINES["sd"][0](), ["unet"], tmp_path / "sd")
        with pytest.raises(ValueError, match="sd holds no weights that fit"):
            load_adapter(PIPELINES["sd3"][0](), str(tmp_path / "sd"))
        wider = changed(num_attention_heads=4, caption_projection_dim=32)
        publish(wider, ["transformer"], tmp_path / "wider")
        with pytest.raises(ValueError, match="could not load the adapter .*wider into a StableDiffusion3Pipeline"):
            load_adapter(PIPELINES["sd3"][0](), str(tmp_path / "wider"))
        with pytest.raises(ValueError, match="diffusers has no adapters for HunyuanDiT2DModel"):
            load_adapter(FAMILIES["hunyuan-dit"].build(), str(tmp_path / "wider"))

    def test_what_is_not_there(self, tmp_path, hub):
        pipe = PIPELINES["sd3"][0]()
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="empty holds no adapter"):
            load_adapter(pipe, str(tmp_path / "empty"))
        for find in (base_model_of, lambda source: load_adapter(pipe, source)):
            for typo in ("user/nothing", "runs/mine/here"):
                with pytest.raises(ValueError, match=f"no folder '{typo}' here"):
                    find(typo)
        assert not hasattr(pipe.transformer, "peft_config")
        hub.stop()
        with pytest.raises(ValueError, match="no folder 'user/else' here, and the Hub failed"):
            base_model_of("user/else")
        hub.start()


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
def test_the_base_model_that_a_card_names(tmp_path, card, base):
    (tmp_path / "README.md").write_text(card)
    assert base_model_of(str(tmp_path)) == base
    if base is not None:
        with pytest.raises(ValueError, match="add --model_name_or_path someone/base"):
            load_with_adapter(None, str(tmp_path))
