import ast
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from huggingface_hub import ModelCard

from slas_trl.publishing.card import edited_card, render, write_card
from slas_trl.publishing.escaping import one_line, shown
from slas_trl.publishing.facts import Base, Place, RewardOnCard, RunFacts, Sample

from .render_card import split_card, to_html
from .tiny_facts import FLUX, HOSTILE, facts


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


def page_of(run: RunFacts) -> Page:
    return Page(to_html(split_card(render(run))[1]))


def metadata_of(run: RunFacts) -> dict:
    return split_card(render(run))[0]


def prompt_in(code: str) -> str:
    [prompt] = [node.value for node in ast.walk(ast.parse(code)) if getattr(node, "arg", None) == "prompt"]
    return ast.literal_eval(prompt)


class TestOtherPeoplesText:
    def test_adds_nothing_to_the_page(self):
        assert page_of(facts(hostile=True)).elements == page_of(facts()).elements

    def test_reads_as_it_was_written(self):
        page = page_of(facts(hostile=True))
        for name in HOSTILE.keys() - {"prompt", "tag"}:
            assert one_line(HOSTILE[name]) in page.text, name
        assert prompt_in(page.blocks.split("@article")[0]) == HOSTILE["prompt"]

    def test_is_in_the_metadata_as_it_was_written(self):
        card = render(facts(hostile=True))
        metadata, _ = split_card(card)
        assert metadata["widget"][0]["text"] == shown(HOSTILE["prompt"])
        assert metadata["tags"][-1] == one_line(HOSTILE["tag"])
        assert metadata["model-index"][0]["name"] == one_line(HOSTILE["name"])
        assert metadata["license"] == "other" == ModelCard(card).data.to_dict()["license"]
        card.encode("utf-8")

    @pytest.mark.parametrize("link", ["javascript:alert(1)", "https://x.example/a) [b](c\n<script>", "//evil.example"])
    def test_a_license_link_is_a_link(self, link):
        elements = page_of(facts(base=replace(FLUX, license_link=link))).elements
        links = [dict(attrs)["href"] for tag, attrs in elements if tag == "a"]
        assert all(href.startswith(("https://huggingface.co/", "https://x.example/")) for href in links if ":" in href)
        assert "script" not in {tag for tag, _ in elements}


class TestMetadata:
    def test_is_what_the_hub_reads(self):
        card = render(facts(dataset="org/prompts", dataset_on_hub=True))
        data: Any = ModelCard(card).data
        assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
        assert (data.base_model, data.to_dict()["base_model_relation"]) == (FLUX.hub_id, "adapter")
        assert data.datasets == ["org/prompts"]
        tags = ["slas", "slas-trl", "trl", "lora", "reinforcement-learning", "text-to-image", "diffusers", "hf_jobs"]
        assert data.tags == [*tags, "word"]
        assert data.license_name == "flux-1-dev-non-commercial-license"
        assert data.license_link == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
        first, second = data.eval_results
        assert (first.metric_type, first.metric_value) == ("hpsv2", 0.31)
        assert first.metric_args == {"confidence_interval_95": [0.3, 0.32], "prompts": 16, "before_training": 0.28}
        assert second.metric_args == {"prompts": 16} and ".nan" not in card and "!!python" not in card

    def test_other_kinds(self):
        whole = metadata_of(facts(adapter=False))
        assert whole["base_model_relation"] == "finetune" and "lora" not in whole["tags"][:7]
        assert metadata_of(facts(picture_arguments=["image"]))["pipeline_tag"] == "image-to-image"
        bare = RunFacts("x", Base("FluxPipeline"), True, {"transformer": "FluxTransformer2DModel"})
        assert metadata_of(bare).keys() == {"library_name", "pipeline_tag", "tags"}

    def test_the_gallery_has_prompts(self):
        gallery = {entry["text"]: entry["output"]["url"] for entry in metadata_of(facts())["widget"]}
        drawn = {"word": "samples/0 after.png", "Before training: word": "samples/0 before.png"}
        assert gallery == drawn | {"a cat": "samples/1-after.png"}

    @pytest.mark.parametrize(
        ("prompts_are", "base", "expected"),
        [
            ("training", FLUX, ("org/x", "training prompts of org/x", "train")),
            ("held-out", FLUX, ("prompts", "held-out prompts of org/x", "test")),
            ("evaluation", FLUX, ("prompts", "evaluation prompts", "test")),
            ("held-out", Base("ShapesPipeline", embedded=True), ("prompts", "held-out prompts of shapes", "test")),
        ],
    )
    def test_says_which_prompts(self, prompts_are, base, expected):
        scores = replace(facts().evaluation, prompts_are=prompts_are)  # type: ignore[type-var]
        run = facts(evaluation=scores, dataset="org/x", dataset_on_hub=True, base=base)
        dataset = metadata_of(run)["model-index"][0]["results"][0]["dataset"]
        assert tuple(dataset[key] for key in ("type", "name", "split")) == expected


class TestPage:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({}, "A LoRA adapter for black-forest-labs/FLUX.1-dev, made by reinforcement learning for hpsv2 (what"),
            ({}, "likely, on 5000 prompts of word. Super-Linear Advantage Shaping (SLAS) is"),
            ({"settings": [["gamma", 0, ""]]}, "switched off (γ = 0)"),
            ({"adapter": False}, "A fine-tune of"),
            ({"base": Base("FluxPipeline", name="mine")}, "mine (a FluxPipeline that is not on the Hub)"),
            ({"base": Base("FluxPipeline")}, "License Unknown. That of the base model was not found"),
            ({"step": 20}, "This is not the end of the run: 20 of 300 updates"),
            ({"rewards": [RewardOnCard("hpsv2", 1.0)]}, "Whether the reward was hacked, nobody can tell"),
            ({"reading": None}, "word was held out, but too little is kept"),
            ({"evaluation": None}, "No scores are kept of these weights."),
            ({"other_adapters": ["a", "b", "c"]}, "on top of other adapters (a, b and c)"),
            ({}, "of decay 0.9. gamma 0.5: shapes learning_rate 1e-5 a word: word License"),
        ],
    )
    def test_says(self, changes, words):
        assert words in page_of(facts(**changes)).text

    def test_tables(self):
        _, text = split_card(render(facts()))
        assert "| `hpsv2`<br>what people prefer | 1 | what is small |" in text
        assert "| `word` | 0.5 | unknown: its author has not said |\n| `word`<br>word | held out | word |\n" in text
        assert "| reward | word |\n| --- | --- |\n| hpsv2 | 0.31 ±\N{NO-BREAK SPACE}0.01 |\n" in text
        text = text.split("## Citation")[0]
        assert "None" not in text and "\n\n\n" not in text

    def test_shows_the_pictures_there_are(self):
        shown_ones = [dict(attrs)["src"] for tag, attrs in page_of(facts()).elements if tag == "img"]
        assert shown_ones == ["samples/comparison.png", "training.png", "calibration.png"]
        after = split_card(render(facts(samples=[Sample("a cat", "after.png")])))[1]
        assert "## Pictures\n\nThey were made after training.\n" in after and "before and after" not in after.lower()
        bare = page_of(facts(samples=[], sheet=None, curves=None, calibration=None))
        assert not {"img", "gallery"} & {tag for tag, _ in bare.elements}


def test_a_card_is_edited_if_its_facts_do_not_render_it(tmp_path):
    run = facts(place=Place("runs/x"))
    assert edited_card(tmp_path, run) is None
    write_card(tmp_path, run)
    assert edited_card(tmp_path, run) is None
    text = (tmp_path / "README.md").read_text() + "My own words."
    (tmp_path / "README.md").write_text(text)
    assert edited_card(tmp_path, run) == text
