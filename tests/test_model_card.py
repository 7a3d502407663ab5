import ast
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from slas_trl import hub
from slas_trl.markdown import one_line, shown
from slas_trl.model_card import render
from slas_trl.quick_start import quick_start
from slas_trl.rewards.blind_spots import BLIND_SPOTS, MEASURES
from slas_trl.run_facts import Base, Evaluation, Metric, Reward, RunFacts, Sample, Scheduler
from slas_trl.shapes import load_shapes_pipeline
from slas_trl.trainer.lora import ADAPTER_NAME, add_adapter, save_weights
from tests.render_card import split_card, to_html, to_page
from tests.tiny_pipelines import flux_pipeline


FLUX = Base(
    "FluxPipeline",
    hub_id="black-forest-labs/FLUX.1-dev",
    dtype="bfloat16",
    license="other",
    license_name="flux-1-dev-non-commercial-license",
    license_link="LICENSE.md",
)


def facts(**changes) -> RunFacts:
    """Of a finished run on FLUX, with everything that there can be."""
    hostile = changes.pop("hostile", False)
    text = HOSTILE if hostile else dict.fromkeys(HOSTILE, "word")
    run = RunFacts(
        text["name"],
        FLUX,
        adapter=True,
        denoisers={"transformer": "FluxTransformer2DModel"},
        call={"num_inference_steps": 28, "guidance_scale": 3.5},
        rewards=[
            Reward("hpsv2", 1.0, BLIND_SPOTS["hpsv2"], MEASURES["hpsv2"]),
            Reward(text["reward"], 0.5),
            Reward(text["held out"], 0.0, text["blind to"], text["measures"]),
        ],
        settings={"gamma": 0.5, "epsilon": 1e-4, "learning_rate": 1e-5, "beta": 0.0, "scale_rewards": text["setting"]},
        step=300,
        max_steps=300,
        dataset=text["dataset"],
        train_prompts=5000,
        started_from=text["started from"],
        evaluation=Evaluation(
            how=text["how"],
            columns=["reward", text["column"]],
            rows=[["hpsv2", "0.31 ± 0.01"], [text["cell"], text["cell"]]],
            metrics=[
                Metric("hpsv2", 0.31, 0.30, 0.32, 16, 0.28),
                Metric(text["reward"], 0.5, float("nan"), float("inf"), 16),
                Metric("no score", float("nan")),
            ],
        ),
        samples=[
            Sample(text["prompt"], "samples/0 after.png", "samples/0 before.png", seed=7),
            Sample("a cat", "samples/1-after.png"),
        ],
        sheets=["samples/comparison.png"],
        curves="training.png",
        calibration="calibration.png",
        reading=text["reading"],
        hacking=[text["warning"]],
        ema_decay=0.9,
        versions={"diffusers": "0.42.1", text["package"]: text["version"]},
        tags=["hf_jobs", "lora", text["tag"]],
    )
    return replace(run, **changes)


MARKUP = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> </details></code></pre> [a](javascript:b) ![c](d) # e "
    "*f* __g__ ~~h~~ `i` ``` | j | <!-- k --> &lt; &amp; <Gallery /> {{ 7*7 }} {% raw %} $l$ \\(m\\) \\| @n "
    "https://evil.example www.evil.example _o_ snake_case [p]: q"
)
HOSTILE = {
    "name": f"1e-4 {MARKUP} #",
    "reward": f"--- {MARKUP}",
    "held out": "a\\|b|c\\",
    "blind to": f"`{MARKUP}",
    "measures": f"| {MARKUP} |",
    "setting": MARKUP,
    "dataset": f"``{MARKUP}``",
    "started from": MARKUP,
    "how": f"1. {MARKUP}",
    "column": MARKUP,
    "cell": MARKUP,
    "prompt": f"---\nlicense: mit\n---\n\"{MARKUP}' ```\n```\x00\x1b\ud83d \N{RIGHT-TO-LEFT OVERRIDE}\N{ROCKET}日本",
    "reading": f"- {MARKUP}",
    "warning": f"\n\n# {MARKUP}\n\n---\n\n\x00",
    "package": MARKUP,
    "version": MARKUP,
    "tag": f"a: b # {MARKUP}",
}


class Page(HTMLParser):
    """Elements with their attributes, and the text of the page, code in blocks aside."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list = []
        self.text, self.blocks, self.in_block = "", "", False
        self.feed(page)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, attrs))
        self.in_block = self.in_block or tag == "pre"

    def handle_endtag(self, tag):
        self.elements.append((f"/{tag}", []))
        self.in_block = self.in_block and tag != "pre"

    def handle_comment(self, data):
        self.elements.append(("comment", data))

    def handle_data(self, data):
        if self.in_block:
            self.blocks += data
        else:
            self.text += data


def page_of(run: RunFacts, **kwargs) -> Page:
    return Page(to_html(split_card(render(run, "user/repo", **kwargs))[1]))


def metadata_of(run: RunFacts) -> dict:
    return split_card(render(run, "user/repo"))[0]


class TestOtherPeoplesText:
    def test_adds_nothing_to_the_page(self):
        files = [(MARKUP, MARKUP)]
        hostile, harmless = page_of(facts(hostile=True), files=files), page_of(facts(), files=[("word", "word")])
        assert hostile.elements == harmless.elements

    def test_reads_as_it_was_written(self):
        page = page_of(facts(hostile=True), files=[(MARKUP, "what")])
        for name in HOSTILE.keys() - {"prompt", "tag"}:
            assert one_line(HOSTILE[name]) in page.text, name

    def test_is_in_the_metadata_as_it_was_written(self):
        card = render(facts(hostile=True), "user/repo")
        metadata, _ = split_card(card)
        assert metadata["widget"][0]["text"] == shown(HOSTILE["prompt"])
        assert metadata["tags"][-1] == one_line(HOSTILE["tag"])
        assert metadata["model-index"][0]["name"] == one_line(HOSTILE["name"])
        assert metadata["license"] == "other"
        assert ModelCard(card).data.to_dict()["license"] == "other"
        card.encode("utf-8")

    def test_is_the_prompt_of_the_quick_start(self):
        page = page_of(facts(hostile=True))
        assert prompt_in(page.blocks.split("@article")[0]) == HOSTILE["prompt"]

    def test_a_long_prompt_is_cut_between_lines_of_code(self):
        prompt = "a very  long\nprompt " * 500
        run = facts(samples=[Sample(prompt, "a.png")])
        assert metadata_of(run)["widget"][0]["text"] == prompt
        code = quick_start(run, "user/repo")
        assert prompt_in(code) == prompt
        assert max(map(len, code.splitlines())) <= 100

    @pytest.mark.parametrize("link", ["javascript:alert(1)", "https://x.example/a) [b](c\n<script>", "//evil.example"])
    def test_a_licence_link_is_a_link(self, link):
        run = facts(base=replace(FLUX, license_link=link))
        links = [dict(attrs)["href"] for tag, attrs in page_of(run).elements if tag == "a"]
        assert all(href.startswith(("https://huggingface.co/", "https://x.example/")) for href in links if ":" in href)
        assert "script" not in {tag for tag, _ in page_of(run).elements}


def prompt_in(code: str) -> str:
    [call] = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and names_pipe(node)]
    return ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == "prompt"))


def names_pipe(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "pipe"


class TestMetadata:
    def test_is_what_the_hub_reads(self):
        data: Any = ModelCard(render(facts(dataset="org/prompts", dataset_on_hub=True), "user/repo")).data
        assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
        assert (data.base_model, data.to_dict()["base_model_relation"]) == (FLUX.hub_id, "adapter")
        assert data.datasets == ["org/prompts"]
        assert data.tags == [
            *("slas", "slas-trl", "trl", "lora", "reinforcement-learning", "text-to-image", "diffusers"),
            *("hf_jobs", "word"),
        ]
        assert data.license_name == "flux-1-dev-non-commercial-license"
        assert data.license_link == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
        assert "instance_prompt" not in data.to_dict()

    def test_whole_denoisers_are_a_finetune(self):
        metadata = metadata_of(facts(adapter=False))
        assert metadata["base_model_relation"] == "finetune" and "lora" not in metadata["tags"][:7]

    def test_pipelines_that_edit(self):
        metadata = metadata_of(facts(picture_arguments=["image"]))
        assert metadata["pipeline_tag"] == "image-to-image" and "image-to-image" in metadata["tags"]

    def test_what_is_not_known_is_left_out(self):
        bare = RunFacts("x", Base("FluxPipeline"), True, {"transformer": "FluxTransformer2DModel"})
        assert metadata_of(bare).keys() == {"library_name", "pipeline_tag", "tags"}
        local = facts(base=replace(FLUX, hub_id=None, name="mine"), dataset="prompts.txt")
        assert not {"base_model", "base_model_relation", "datasets", "license_link"} & metadata_of(local).keys()

    def test_the_gallery_has_prompts(self):
        gallery = [(entry["text"], entry["output"]["url"]) for entry in metadata_of(facts())["widget"]]
        assert gallery == [
            ("word", "samples/0 after.png"),
            ("Before training: word", "samples/0 before.png"),
            ("a cat", "samples/1-after.png"),
        ]
        assert to_page(render(facts(), "user/repo")).count("<figure>") == 3

    def test_scores_have_their_intervals(self):
        card = render(facts(), "user/repo")
        data: Any = ModelCard(card).data
        first, second = data.eval_results
        assert (first.metric_type, first.metric_value) == ("hpsv2", 0.31)
        assert first.metric_args == {"confidence_interval_95": [0.3, 0.32], "prompts": 16, "before_training": 0.28}
        assert second.metric_args == {"prompts": 16}
        assert ".nan" not in card and ".inf" not in card

    @pytest.mark.parametrize(
        ("prompts_are", "expected"),
        [
            ("training", {"type": "org/prompts", "name": "training prompts of org/prompts", "split": "train"}),
            ("held-out", {"type": "prompts", "name": "held-out prompts of org/prompts", "split": "test"}),
            ("evaluation", {"type": "prompts", "name": "evaluation prompts", "split": "test"}),
        ],
    )
    def test_says_which_prompts(self, prompts_are, expected):
        scores = replace(facts().evaluation, prompts_are=prompts_are)  # type: ignore[type-var]
        metadata = metadata_of(facts(evaluation=scores, dataset="org/prompts", dataset_on_hub=True))
        assert metadata["model-index"][0]["results"][0]["dataset"] == expected

    def test_the_embedded_pipeline_is_judged_by_prompts_of_shapes(self):
        scores = replace(facts().evaluation, prompts_are="held-out")  # type: ignore[type-var]
        changed = facts(evaluation=scores, dataset="two.txt", base=Base("ShapesPipeline", embedded=True))
        assert metadata_of(changed)["model-index"][0]["results"][0]["dataset"]["name"] == "held-out prompts of shapes"
        assert "spread over the list of held-out prompts of shapes" in page_of(changed).text

    def test_the_same_facts_give_the_same_card(self):
        again = RunFacts.from_dict(json.loads(json.dumps(facts(hostile=True).to_dict())))
        assert render(again, "user/repo") == render(facts(hostile=True), "user/repo")
        assert again.evaluation.metrics[0] == facts().evaluation.metrics[0]  # type: ignore[union-attr]


class TestText:
    def text(self, **changes) -> str:
        return page_of(facts(**changes)).text

    def test_says_what_it_is_and_what_for(self):
        text = self.text()
        assert "A LoRA adapter for black-forest-labs/FLUX.1-dev" in text
        assert f"reinforcement learning for hpsv2 ({MEASURES['hpsv2']}) and word." in text
        assert "Super-Linear Advantage Shaping (SLAS)" in text and "on 5000 prompts of word" in text
        assert "switched off (γ = 0)" in self.text(settings={"gamma": 0})
        assert "A fine-tune of" in self.text(adapter=False)

    def test_a_run_under_way_says_so(self):
        assert "300 of 300" not in self.text()
        assert "This is not the end of the run: 20 of 300 updates" in self.text(step=20)

    def test_rewards_and_what_they_are_blind_to(self):
        _, text = split_card(render(facts(), "user/repo"))
        assert f"| `hpsv2`<br>{MEASURES['hpsv2']} | 1 | {BLIND_SPOTS['hpsv2']} |" in text
        assert "| `word` | 0.5 | unknown: its author has not said |" in text
        assert "| `word`<br>word | held out | word |" in text
        assert f"What `hpsv2` is blind to: {BLIND_SPOTS['hpsv2']}." in text

    def test_hacking_is_never_denied(self):
        assert "Warning during training: word" in self.text()
        quiet = self.text(hacking=[])
        assert "no warning of reward hacking during training, with word held out. That is no proof" in quiet
        alone = self.text(hacking=[], rewards=[Reward("hpsv2", 1.0)])
        assert "Whether the reward was hacked, nobody can tell" in alone and "no warning" not in alone

    def test_training_prompts_show_no_generalisation(self):
        scores = facts().evaluation
        assert scores is not None
        assert "it was trained on: the figures say nothing of" in self.text(
            evaluation=replace(scores, prompts_are="training")
        )

    def test_what_is_not_kept_is_not_denied(self):
        text = self.text(evaluation=None, hacking=None)
        assert text.count("No scores are kept of these weights.") == 2
        assert "word was held out, but too few evaluations are kept of these weights to warn of reward hacking" in text

    def test_settings_are_explained_and_short(self):
        settings = {"gamma": 0.1 + 0.2, "learning_rate": 1e-5, "new": [1, None]}
        meanings = {"gamma": "shapes advantages", "learning_rate": "of AdamW"}
        _, text = split_card(render(facts(settings=settings, meanings=meanings), "x"))
        assert "- `gamma` **0.3**: shapes advantages" in text and "- `learning_rate` **1e-5**: of AdamW" in text
        assert "- `new` **1, none**\n" in text

    def test_the_licence_is_said_or_said_to_be_unknown(self):
        assert "flux-1-dev-non-commercial-license: that of the base model" in self.text()
        assert "Licence Unknown. That of the base model was not found" in self.text(base=Base("FluxPipeline"))

    def test_shows_the_pictures_there_are(self):
        run = facts()
        shown_ones = [dict(attrs)["src"] for tag, attrs in page_of(run).elements if tag == "img"]
        assert shown_ones == ["samples/comparison.png", "training.png", "calibration.png"]
        assert run.pictures == [
            *("samples/0 before.png", "samples/0 after.png", "samples/1-after.png"),
            *("samples/comparison.png", "training.png", "calibration.png"),
        ]
        bare = replace(run, samples=[], sheets=[], curves=None, calibration=None)
        assert bare.pictures == [] and not {"img", "gallery"} & {tag for tag, _ in page_of(bare).elements}

    def test_pictures_are_compared_where_there_are_some_before(self):
        both = split_card(render(facts(), "x"))[1]
        assert "## Before and after\n" in both and "[![Pictures of the same prompts before and after training]" in both
        after = split_card(render(facts(samples=[Sample("a cat", "after.png")]), "x"))[1]
        assert "## Pictures\n\nThey were made after training.\n" in after and "[![Pictures after training]" in after
        assert "before and after" not in after.lower()

    def test_a_reader_edits_a_picture_of_their_own(self):
        words = "It draws the first of the pictures after training below"
        assert words in self.text() and words not in self.text(picture_arguments=["image"])

    def test_the_rest(self):
        page = page_of(facts(), files=[("README.md", "this card")])
        for words in ("README.md: this card", "went on from the adapter word", "of decay 0.9", "diffusers 0.42.1"):
            assert words in page.text
        for citation in ("Super-Linear Advantage Shaping", "vonwerra2020trl", "von-platen-etal-2022-diffusers"):
            assert citation in page.blocks
        assert "None" not in page.text and "papers/" not in page.text


class TestPictures:
    def test_that_are_not_pushed_are_not_shown(self):
        edited = Sample("a", "a.png", "b.png", inputs={"image": ["i.png", "j.png"]})
        run = facts(samples=[edited, Sample("c", "c.png")])
        assert run.pictures[:5] == ["i.png", "j.png", "b.png", "a.png", "c.png"]
        run.keep_pictures({"a.png", "b.png", "j.png"})
        assert run.samples == [Sample("a", "a.png", "b.png")] and run.sheets == []

    def test_of_an_earlier_push_are_replaced(self):
        old = ["samples/1_before.png", "samples/4_after.jpg", "samples/1_input.png", "samples/1_input_2.jpg"]
        assert all(re.fullmatch(hub.OLD_PICTURES, name) for name in [*old, "samples/comparison.jpg", "training.png"])
        assert not any(re.fullmatch(hub.OLD_PICTURES, name) for name in ("samples/mine.png", "photo.png"))


class TestQuickStart:
    def test_flux(self):
        assert quick_start(facts(call={}), "user/repo", revision="v2") == (
            "import torch\n"
            "from diffusers import FluxPipeline\n\n"
            "pipe = FluxPipeline.from_pretrained("
            '"black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)\n'
            "pipe.load_lora_weights(\n"
            '    "user/repo",\n'
            '    revision="v2",\n'
            '    weight_name="pytorch_lora_weights.safetensors",\n'
            ")\n"
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n\n'
            "image = pipe(\n"
            '    prompt="word",\n'
            "    generator=torch.Generator().manual_seed(7),\n"
            ").images[0]\n"
            'image.save("image.png")'
        )

    @pytest.mark.parametrize(
        ("changes", "lines"),
        [
            (
                {"denoisers": {"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"},
                 "output": "frames", "call": {"num_frames": 1}},
                ['pipe.load_lora_weights("x")', 'output_type="pil"', "num_frames=1", ").frames[0][0]",
                 'weight_name="pytorch_lora_weights_transformer_2.safetensors"', "load_into_transformer_2=True"],
            ),
            (
                {"denoisers": {"unet": "UNet2DConditionModel"}, "loads_lora": False},
                ['pipe.unet.load_lora_adapter("x", prefix=None, use_safetensors=True)'],
            ),
            (
                {"adapter": False},
                ["from diffusers import FluxPipeline, FluxTransformer2DModel", 'subfolder="transformer"'],
            ),
            (
                {"base": replace(FLUX, pipeline="FluxImg2ImgPipeline"), "picture_arguments": ["image"]},
                ["from diffusers.utils import load_image", "pipe = FluxImg2ImgPipeline.from_pretrained(",
                 '    image=load_image("image.png"),  # your own picture\n',
                 'image.save("edited.png")'],
            ),
            (
                {"picture_arguments": ["image", "control_image"],
                 "samples": [Sample("a", "a.png", inputs={"image": ["samples/1.png", "samples/2.png"]})]},
                ['    image=[load_image("x/samples/1.png"), load_image("x/samples/2.png")],\n',
                 '    control_image=load_image("control_image.png"),  # your own picture\n'],
            ),
            (
                {"scheduler": Scheduler("FlowMatchHeunDiscreteScheduler", {"shift": 2.0})},
                ["from diffusers import FlowMatchHeunDiscreteScheduler, FluxPipeline\n",
                 "FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config, shift=2.0)\n"],
            ),
            (
                {"scheduler": Scheduler("MyScheduler")},
                ["# Trained with a scheduler of its own, MyScheduler; put it in the place of pipe.scheduler."],
            ),
            (
                {"base": replace(FLUX, pipeline="MyPipeline")},
                ["pipe = DiffusionPipeline.from_pretrained("],
            ),
            (
                {"output": "image", "call": {"sigmas": [1], "size": (1, 2)}},
                [").image[0]\n", "    sigmas=[1],\n", "    size=[1, 2],\n"],
            ),
            (
                {"base": Base("FluxPipeline", name="mine", init_kwargs={"variant": "fp16"}), "samples": [],
                 "prompt": "y"},
                ["# The FluxPipeline that was trained, which is not on the Hub:",
                 'pipe = FluxPipeline.from_pretrained("path/to/mine", variant="fp16")', 'prompt="y"',
                 "manual_seed(0)"],
            ),
        ],
        ids=["two denoisers", "no load_lora_weights", "whole", "editing", "pictures",
             "scheduler", "own scheduler", "own class", "other output", "local base"],
    )  # fmt: skip
    def test_other_pipelines(self, changes, lines):
        code = quick_start(facts(**changes), "x")
        ast.parse(code)
        for line in lines:
            assert line in code

    @pytest.mark.parametrize("folder", ["runs/x", "."])
    def test_of_an_edited_card_loads_from_its_new_place(self, tmp_path, folder):
        sample = Sample("a", "a.png", inputs={"image": "samples/1_input.png"})
        run = facts(picture_arguments=["image"], samples=[sample])
        card = render(run, folder, files=[("samples/", "pictures")])
        hub.write_card(tmp_path, run, card, folder, None)
        (tmp_path / "README.md").write_text(card + "My own words.")
        edited = hub.read_card(tmp_path).edited
        assert edited is not None
        assert ("# From the folder of this card:" in card) == (folder == ".")
        there = [("samples/", "pictures"), ("notes.txt", "not of this run")]
        text = edited("user/repo", None, there)
        assert text == render(run, "user/repo", files=there, on_hub=True) + "My own words."
        hub.write_card(tmp_path, run, text, "user/repo", None)
        (tmp_path / "README.md").write_text(text + "More.")
        again = hub.read_card(tmp_path).edited
        assert again is not None
        assert again("user/other", None, there).startswith(render(run, "user/other", files=there, on_hub=True))

    def test_of_an_edited_card_leaves_the_editors_own_lines(self, tmp_path):
        sample = Sample("a", "a.png", inputs={"image": "samples/1_input.png"})
        run = facts(picture_arguments=["image"], samples=[sample])
        card = render(run, "runs/x", "trial")
        hub.write_card(tmp_path, run, card, "runs/x", None)
        own = card.replace("import load_image\n", "import load_image, make_image_grid\n")
        (tmp_path / "README.md").write_text(own + 'load_image("runs/x/mask.png")')
        edited = hub.read_card(tmp_path).edited
        assert edited is not None
        text = edited("user/repo", "trial", [])
        assert text.endswith('load_image("runs/x/mask.png")')
        assert "import load_image, make_image_grid\nfrom huggingface_hub import hf_hub_download\n" in text
        assert 'hf_hub_download("user/repo", filename="samples/1_input.png", revision="trial")' in text
        assert 'hf_hub_download("user/repo", filename="samples/1_input.png", revision="trial")' in render(
            run, "user/repo", "trial", on_hub=True
        )

    @pytest.mark.parametrize("kind", ["embedded", "adapter", "whole"])
    def test_makes_the_picture(self, tmp_path, monkeypatch, kind):
        monkeypatch.chdir(tmp_path)
        pipe: Any = load_shapes_pipeline() if kind == "embedded" else flux_pipeline()
        base = Base("ShapesPipeline", embedded=True) if kind == "embedded" else Base("x", hub_id="base")
        if kind != "embedded":
            pipe.save_pretrained("base")
        if kind != "whole":
            add_adapter(pipe.transformer, LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
        torch.manual_seed(0)
        for name, weight in pipe.transformer.named_parameters():
            if ADAPTER_NAME in name or kind == "whole":
                weight.data += 0.1 * torch.randn_like(weight)
        save_weights(pipe, ["transformer"], tmp_path / "run", adapter=kind != "whole")
        call = {"num_inference_steps": 2, "height": 16, "width": 16}
        run = facts(
            base=base,
            adapter=kind != "whole",
            denoisers={"transformer": type(pipe.transformer).__name__},
            samples=[Sample("a circle", "after.png", seed=5)],
            call=call,
        )
        expected = pipe(prompt="a circle", generator=torch.Generator().manual_seed(5), **call).images[0]
        _, text = split_card(render(run, "run"))
        [code] = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
        names: dict = {}
        exec(code, names)
        assert isinstance(names["pipe"], DiffusionPipeline)
        with Image.open(Path("image.png")) as picture:
            assert picture.tobytes() == names["image"].tobytes() == expected.tobytes()
