"""Pictures that show nothing of the policy are found, whatever the pipeline makes of them."""

import math

import numpy as np
import pytest
import torch

from slas_trl.policy import PipelineReplayer, call_pipeline
from tests.tiny_pipelines import PIPELINES, nan_in, sd3_pipeline, sd_pipeline, with_safety_checker


def call_of(family: str) -> dict:
    return {"prompt": ["a dot", "a box"], "num_inference_steps": 2, **PIPELINES[family][1]}


def test_a_decoder_that_overflows_is_named_with_its_type():
    pipe = sd3_pipeline()
    nan_in(pipe.vae, 1)
    broken = pipe.vae.decode
    output, problems = call_pipeline(pipe, call_of("sd3"))
    assert problems[0] is None and "vae in torch.float32" in problems[1] and "NaN or infinity" in problems[1]
    assert not np.asarray(output[0][1]).any()  # what Pillow makes of it
    assert pipe.vae.decode is broken
    rollout = PipelineReplayer(pipe).sample(**call_of("sd3"))
    assert [problem is None for problem in rollout.problems] == [True, False]


def test_nothing_is_changed_where_nothing_is_wrong():
    plain, watched = ([torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2))
    pipe = sd3_pipeline()
    pictures = pipe(**call_of("sd3"), generator=plain).images
    output, problems = call_pipeline(pipe, {**call_of("sd3"), "generator": watched})
    assert problems == [None, None] and "decode" not in vars(pipe.vae)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, output[0], strict=True))


def test_decoding_one_by_one_is_understood_and_in_tiles_taken_for_all():
    pipe = sd3_pipeline()
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: (torch.cat([decode(one[None])[0] for one in z]),)
    assert call_pipeline(pipe, call_of("sd3"))[1] == [None, None]

    class Tiled(type(pipe)):
        def __call__(self, *args, **kwargs):
            latents = torch.full((1, 4, 8, 8), math.nan)
            for _ in range(3):  # more calls than images
                self.vae.decode(latents)
            return super().__call__(*args, **kwargs)

    del pipe.vae.decode
    pipe.__class__ = Tiled
    assert all(problem is not None for problem in call_pipeline(pipe, call_of("sd3"))[1])


@pytest.mark.parametrize(("threshold", "flagged"), [(-2.0, True), (2.0, False)])
def test_a_safety_checkers_black_pictures(threshold, flagged):
    pipe = with_safety_checker(sd_pipeline(), threshold)
    output, problems = call_pipeline(pipe, call_of("sd"))
    assert [problem is not None and "safety_checker=None" in problem for problem in problems] == [flagged] * 2
    assert all(np.asarray(picture).any() != flagged for picture in output[0])
