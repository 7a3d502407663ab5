"""Facts of a finished run on FLUX, with everything that there can be, in harmless words or hostile ones."""

from dataclasses import replace

from slas_trl.publishing.facts import Base, Evaluation, Metric, Place, RewardOnCard, RunFacts, Sample


LICENSE = {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": "LICENSE.md"}
FLUX = Base("FluxPipeline", hub_id="black-forest-labs/FLUX.1-dev", dtype="bfloat16", **LICENSE)
MARKUP = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> </details></code></pre> [a](javascript:b) ![c](d) # e "
    "*f* __g__ ~~h~~ `i` ``` | j | <!-- k --> &lt; &amp; <Gallery /> {{ 7*7 }} {% raw %} $l$ \\(m\\) \\| @n "
    "https://evil.example www.evil.example _o_ snake_case [p]: q"
)
HOSTILE = {
    **dict.fromkeys(("setting", "started from", "column", "cell", "package", "version"), MARKUP),
    **dict.fromkeys(("meaning", "dataset"), f"``{MARKUP}``"),
    "name": f"1e-4 {MARKUP} #",
    "reward": f"--- {MARKUP}",
    "held out": "a\\|b|c\\",
    "blind to": f"`{MARKUP}",
    "measures": f"| {MARKUP} |",
    "how": f"1. {MARKUP}",
    "prompt": f"---\nlicense: mit\n---\n\"{MARKUP}' ```\n```\x00\x1b\ud83d \N{RIGHT-TO-LEFT OVERRIDE}\N{ROCKET}日本",
    "reading": f"- {MARKUP}",
    "tag": f"a: b # {MARKUP}",
}


def facts(hostile: bool = False, **changes) -> RunFacts:
    text = HOSTILE if hostile else dict.fromkeys(HOSTILE, "word")
    run = RunFacts(
        text["name"],
        FLUX,
        adapter=True,
        denoisers={"transformer": "FluxTransformer2DModel"},
        call={"num_inference_steps": 28, "guidance_scale": 3.5},
        rewards=[
            RewardOnCard("hpsv2", 1.0, "what is small", "what people prefer"),
            RewardOnCard(text["reward"], 0.5),
            RewardOnCard(text["held out"], 0.0, text["blind to"], text["measures"]),
        ],
        settings=[["gamma", 0.5, "shapes"], ["learning_rate", 1e-5, ""], ["a", text["setting"], text["meaning"]]],
        step=300,
        max_steps=300,
        dataset=text["dataset"],
        train_prompts=5000,
        started_from=text["started from"],
        evaluation=Evaluation(
            how=text["how"],
            rows=[["reward", text["column"]], ["hpsv2", "0.31 ± 0.01"], [text["cell"], text["cell"]]],
            metrics=[
                Metric("hpsv2", 0.31, 0.01, 16, 0.28),
                Metric(text["reward"], 0.5, float("nan"), 16),
                Metric("no score", float("nan")),
            ],
        ),
        samples=[
            Sample(text["prompt"], "samples/0 after.png", "samples/0 before.png", seed=7),
            Sample("a cat", "samples/1-after.png"),
        ],
        sheet="samples/comparison.png",
        curves="training.png",
        calibration="calibration.png",
        reading=text["reading"],
        ema_decay=0.9,
        versions={"diffusers": "0.42.1", text["package"]: text["version"]},
        tags=["hf_jobs", "lora", text["tag"]],
        place=Place("user/repo", on_hub=True),
        written=0.0,
    )
    return replace(run, **changes)
