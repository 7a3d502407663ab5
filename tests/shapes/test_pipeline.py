import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline

from slas_trl import shapes
from slas_trl.shapes import load_shapes_pipeline, shapes_prompts, world
from slas_trl.shapes.pipeline import ShapesPipeline
from slas_trl.shapes.verifier import verify


@pytest.fixture(scope="module")
def pipe() -> ShapesPipeline:
    return load_shapes_pipeline()


def seeds(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_prompt_is_enough(pipe):
    (image,) = pipe("a red circle").images
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert (pipe.num_timesteps, pipe.guidance_scale) == (10, 1.0)
    call = {"num_inference_steps": 3, "num_images_per_prompt": 2, "guidance_scale": 2.0}
    assert len(pipe(["a circle", "two squares"], **call).images) == 4
    assert (pipe.num_timesteps, pipe.guidance_scale) == (3, 2.0)


def test_is_stable_diffusion_3_without_t5_tokens(pipe):
    sequence, _, pooled, _ = pipe.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)
    assert sequence.shape == (1, 16, 96)  # of the two CLIPs
    assert pooled.shape == (1, 96)
    plain = StableDiffusion3Pipeline(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 0}
    expected = pixels(plain(["a red circle"], **call, generator=seeds(1)).images)
    for given in ({}, {"max_sequence_length": 77}):  # whatever is asked for: there is no T5
        made = pixels(pipe(["a red circle"], **given, generator=seeds(1)).images)
        np.testing.assert_array_equal(made, expected)


def test_draws_what_is_asked(pipe):
    prompts = list(shapes_prompts("test")["prompt"])
    images = pipe(prompts, generator=seeds(len(prompts))).images
    right = np.array([verdict.graded for verdict in verify(prompts, images)])
    others = [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]
    other = np.array([verdict.graded for verdict in verify(others, images)])
    assert right.mean() > other.mean() + 0.15


def test_every_prompt_is_read_to_its_end(pipe, caplog):
    # Stable Diffusion 3 warns of what it cuts off.
    pipe.encode_prompt(list(world.all_captions()), None, None, do_classifier_free_guidance=False)
    assert not caplog.records


def test_ready_to_use(pipe):
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(modules) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for module in modules.values():
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    half = load_shapes_pipeline(torch_dtype=torch.bfloat16, device="cpu")
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


def test_loads_silently_and_offline(pipe, monkeypatch, capfd, caplog, recwarn):
    def no_network(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", no_network)
    load_shapes_pipeline()("a red circle")
    assert not caplog.records
    assert not [str(warning.message) for warning in recwarn]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("library", [diffusers.utils.logging, transformers.utils.logging], ids=lambda m: m.__name__)
def test_settings_of_the_libraries_are_put_back(pipe, library):
    before = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_info()
    library.enable_progress_bar()
    load_shapes_pipeline()
    assert library.get_verbosity() == library.INFO and library.is_progress_bar_enabled()
    library.set_verbosity(before[0])
    if not before[1]:
        library.disable_progress_bar()


def test_a_saved_pipeline_loads_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = ShapesPipeline.from_pretrained(tmp_path)
    expected = pixels(pipe("a red circle", generator=seeds(1)).images)
    np.testing.assert_array_equal(pixels(again("a red circle", generator=seeds(1)).images), expected)


def test_missing_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="pretrain_shapes"):
        load_shapes_pipeline()


def test_prompts():
    for split in world.SPLITS:
        rows = shapes_prompts(split)
        assert rows.column_names == ["prompt", "category"] and set(rows["category"]) == set(world.CATEGORIES)
        assert {row["prompt"] for row in rows} <= {caption.text for caption in world.captions_of(split)}
        assert all(world.parse_caption(row["prompt"]).category == row["category"] for row in rows)
    with pytest.raises(ValueError, match="validation"):
        shapes_prompts("validation")


def test_the_world_is_light():
    # In a process of its own, as this one has imported everything.
    code = """
import sys
from slas_trl.shapes import shapes_prompts, verifier, world
from slas_trl import rewards
assert not {"torch", "diffusers", "transformers", "datasets"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="load_pipeline"):
        shapes.load_pipeline  # noqa: B018
