import json

import pytest
from diffusers import DiffusionPipeline

from slas_trl.publishing.facts import Sample, base_of, is_hub_id, output_of, plain, read_facts
from tests.tiny_pipelines import PIPELINES

from .tiny_facts import facts


def test_are_read_as_they_were_written(tmp_path):
    facts(hostile=True).write(tmp_path)
    assert repr(read_facts(tmp_path)) == repr(facts(hostile=True))  # NaN equals nothing


def test_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_card.json"):
        read_facts(tmp_path)
    for text in ("{", '{"name": "x"}', "[]"):
        (tmp_path / "model_card.json").write_text(text)
        with pytest.raises(ValueError, match="model_card.json"):
            read_facts(tmp_path)


def test_pictures_that_are_not_pushed_are_not_shown():
    edited = Sample("a", "a.png", "b.png", inputs={"image": ["i.png", "j.png"]})
    run = facts(samples=[edited, Sample("c", "c.png")])
    assert run.pictures[:5] == ["i.png", "j.png", "b.png", "a.png", "c.png"]
    run.keep_pictures({"a.png", "b.png", "j.png", "c.png", "training.png"})
    assert run.pictures == ["c.png", "training.png"]


def test_where_a_model_is_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs = {"variant": "fp16", "cache_dir": "/home/x", "token": "hf_x", "vae": None}

    def base(origin, embedded="shapes"):
        pipe = PIPELINES["flux"][0]()
        pipe.register_to_config(_name_or_path=str(origin))
        return base_of(pipe, "bfloat16", kwargs, tmp_path / embedded)

    (cached := tmp_path / "models--org--base" / "snapshots" / "x").mkdir(parents=True)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert base("org/base").hub_id == base(cached).hub_id == "org/base"
    mine = base(tmp_path / "models" / "mine")
    assert (mine.hub_id, mine.name, mine.folder) == (None, "mine", "models/mine")
    assert (mine.pipeline, mine.init_kwargs) == ("FluxPipeline", {"variant": "fp16", "vae": None})
    assert base(tmp_path / "models", "models").embedded and base("/gone/away/x").hub_id is None
    assert str(tmp_path) not in json.dumps(vars(mine))


def test_parts():
    assert is_hub_id("user/name") and not is_hub_id("a/b/c")
    assert plain({"a": (1, 2), "b": object(), "c": "x", "d": [None]}) == {"a": [1, 2], "c": "x", "d": [None]}
    assert output_of(PIPELINES["flux"][0]()) == "images" and output_of(DiffusionPipeline()) == "images"
