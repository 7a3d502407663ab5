"""The model card of a run: what it made, how to use it, how well it does, and what not to trust."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slas_trl.markdown import as_code, as_paragraph, as_text, one_line, shown, table, to_yaml
from slas_trl.quick_start import quick_start
from slas_trl.run_facts import Base, Evaluation, Reward, RunFacts


CARD_FILE = "README.md"
TEMPLATES = Path(__file__).parent / "templates"
HUB = "https://huggingface.co"


def render(
    facts: RunFacts,
    location: str,
    revision: str | None = None,
    files: Sequence[tuple[str, str]] = (),
    on_hub: bool = False,
) -> str:
    """
    The card as Markdown, with its metadata in YAML.

    Args:
        facts ([`RunFacts`]): what to say.
        location (`str`): folder or Hub id from which the quick start loads the result.
        revision (`str`, *optional*): branch of the repository, where it is not the main one.
        files (`Sequence[tuple[str, str]]`): what is in the repository: path, and what it is in a few words.
        on_hub (`bool`): whether `location` is a Hub id.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The template has nothing to escape: all of these are Markdown already.
    text = environment.get_template("model_card.md").render(
        title=as_text(facts.name),
        facts=facts,
        base=_base(facts.base),
        method=_method(facts),
        rewarded=_rewarded(facts),
        data=_data(facts),
        quick_start=quick_start(facts, location, revision, on_hub),
        compared=any(sample.before for sample in facts.samples),
        sheets=[_path(path) for path in facts.sheets],
        curves=facts.curves and _path(facts.curves),
        calibration=facts.calibration and _path(facts.calibration),
        evaluation=_evaluation(facts.evaluation) if facts.evaluation else "",
        rewards=_reward_table(facts.rewards),
        doubts=_doubts(facts),
        settings=[
            f"{as_code(name)} **{_setting(value)}**{(what := facts.meanings.get(name, '')) and as_text(f': {what}')}"
            for name, value in facts.settings.items()
        ],
        started_from=facts.started_from and as_code(facts.started_from),
        files=file_lines(files),
        license=_license(facts.base),
        versions=[f"{as_text(name)} {as_text(version)}" for name, version in facts.versions.items()],
    )
    return f"---\n{to_yaml(_metadata(facts).to_dict())}---\n\n{text}"


def file_lines(files: Sequence[tuple[str, str]]) -> list[str]:
    """Of the card's list."""
    return [f"{as_code(path)}: {as_text(what)}" for path, what in files]


def _metadata(facts: RunFacts) -> ModelCardData:
    base = facts.base
    task = "image-to-image" if facts.picture_arguments else "text-to-image"
    tags = ["slas", "slas-trl", "trl", *(["lora"] if facts.adapter else [])]
    tags += ["reinforcement-learning", task, "diffusers", *facts.tags]
    results = _eval_results(facts, task)
    widget = []
    for sample in facts.samples:
        widget += [{"text": shown(sample.prompt), "output": {"url": shown(sample.after)}}]
        if sample.before:
            widget += [{"text": f"Before training: {shown(sample.prompt)}", "output": {"url": shown(sample.before)}}]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base.hub_id,
        base_model_relation=base.hub_id and ("adapter" if facts.adapter else "finetune"),
        license=base.license,
        license_name=base.license_name and one_line(base.license_name),
        license_link=_license_link(base),
        tags=[one_line(tag) for tag in tags],
        datasets=[facts.dataset] if facts.dataset and facts.dataset_on_hub else None,
        **({"model_name": one_line(facts.name), "eval_results": results} if results else {}),
        widget=widget or None,
    )


def _eval_results(facts: RunFacts, task: str) -> list[EvalResult]:
    scores = facts.evaluation
    if scores is None:
        return []
    # The evaluation's prompts may be of another data set than those of training.
    trained_on = scores.prompts_are == "training"
    data = one_line(facts.dataset) if facts.dataset and scores.prompts_are != "evaluation" else None
    data = "shapes" if facts.of_shapes else data
    return [
        EvalResult(
            task_type=task,
            task_name=task.title().replace("To", "to"),
            dataset_type=data if data and trained_on and facts.dataset_on_hub else "prompts",
            dataset_name=f"{scores.prompts_are} prompts of {data}" if data else f"{scores.prompts_are} prompts",
            dataset_split="train" if trained_on else "test",
            metric_type=one_line(metric.name),
            metric_name=f"{one_line(metric.name)}, mean over prompts",
            metric_value=metric.value,
            metric_args=_finite(
                {
                    "confidence_interval_95": [metric.low, metric.high],
                    "prompts": metric.prompts,
                    "before_training": metric.before,
                }
            ),
        )
        for metric in scores.metrics
        if _finite({"value": metric.value})
    ]


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """Those that are numbers, or lists of them: the Hub takes no NaN."""
    return {
        name: value
        for name, value in numbers.items()
        if all(item is not None and math.isfinite(item) for item in (value if isinstance(value, list) else [value]))
    }


def _license_link(base: Base) -> str | None:
    """An address. The file that a card names without one is in its own repository."""
    link = base.license_link
    if not link or link.startswith(("https://", "http://")):
        return link and quote(link, safe=":/?#=&%~+")
    file = link.removeprefix("./").lstrip("/")
    return f"{HUB}/{quote(base.hub_id)}/blob/main/{quote(file)}" if base.hub_id else None


def _license(base: Base) -> str:
    if base.license is None:
        return (
            "**Unknown.** That of the base model was not found when this card was written. Find it before you use or "
            "share this model: what is made from a model is bound by its licence."
        )
    name = as_code(base.license_name or base.license)
    link = _license_link(base)
    terms = f"[{name}]({link})" if link else name
    where = "comes with the package `slas-trl`" if base.embedded else "says so in its own card"
    return f"{terms}: that of the base model, which {where}. Read it before you use or share this model."


def _base(base: Base) -> str:
    if base.embedded:
        return "the small text-to-image pipeline that comes with the package `slas-trl`, and draws plain shapes"
    if base.hub_id:
        return f"[{as_text(base.hub_id)}]({HUB}/{quote(base.hub_id)})"
    return f"{as_code(base.name) if base.name else 'a pipeline'} (a {as_text(base.pipeline)} that is not on the Hub)"


def _method(facts: RunFacts) -> str:
    if facts.settings.get("gamma") == 0 and facts.settings.get("gamma_schedule", "constant") == "constant":
        return (
            "Super-Linear Advantage Shaping (SLAS), by which large differences in score count for more, was switched "
            "off (γ = 0)."
        )
    return (
        "What sets Super-Linear Advantage Shaping (SLAS) apart is how much a picture counts: large differences in "
        "score count for more than their size, and small ones, which may be noise, for less."
    )


def _rewarded(facts: RunFacts) -> str:
    trained = [reward for reward in facts.rewards if reward.weight]
    names = [f"{as_code(r.name)} ({as_text(r.measures)})" if r.measures else as_code(r.name) for r in trained]
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])


def _data(facts: RunFacts) -> str:
    count = f"{facts.train_prompts} prompts" if facts.train_prompts else "prompts"
    if not facts.dataset:
        return count
    if facts.dataset_on_hub:
        return f"{count} of [{as_text(facts.dataset)}]({HUB}/datasets/{quote(facts.dataset)})"
    return f"{count} of {as_code(facts.dataset)}"


def _evaluation(scores: Evaluation) -> str:
    # On a narrow page, 0.51 ± 0.02 breaks before the sign rather than on both sides of it.
    rows = [[as_text(cell).replace("± ", "±\N{NO-BREAK SPACE}") for cell in row] for row in scores.rows]
    note = {
        "training": "**These are the prompts that it was trained on:** the figures say nothing of other prompts.",
        "held-out": "It was not trained on these prompts.",
    }.get(scores.prompts_are, "")
    return "\n\n".join(
        [f"{as_paragraph(scores.how)} {note}".strip(), table([as_text(c) for c in scores.columns], rows)]
    )


def _reward_table(rewards: Sequence[Reward]) -> str:
    rows = [
        [
            _explained(reward.name, reward.measures),
            f"{reward.weight:g}" if reward.weight else "held out",
            as_text(reward.blind_to) if reward.blind_to else "unknown: its author has not said",
        ]
        for reward in rewards
    ]
    return table(["reward", "weight", "blind to"], rows)


def _doubts(facts: RunFacts) -> list[str]:
    """What not to trust, one point each, the gravest first."""
    points = [f"Warning during training: {as_text(warning)}" for warning in facts.hacking or []]
    if facts.beside:
        points.append(
            f"It was trained on top of other adapters ({', '.join(map(as_code, facts.beside))}), which are not in "
            "this repository. Without them its pictures are not those shown here."
        )
    if facts.reading:
        points.append(
            "What the rewards say together, by the calibration panel (changes since the start of the training, in "
            f"standard deviations between pictures): {as_text(facts.reading)}"
        )
    held_out = [as_code(reward.name) for reward in facts.rewards if not reward.weight]
    if not held_out:
        points.append(
            "Whether the reward was hacked, nobody can tell: no other reward was watched that was not trained on."
        )
    elif facts.hacking is None:
        points.append(
            f"{', '.join(held_out)} was held out, but too few evaluations are kept of these weights to warn of reward "
            "hacking."
        )
    elif not facts.hacking:
        points.append(
            f"There was no warning of reward hacking during training, with {', '.join(held_out)} held out. That is no "
            "proof that there was none."
        )
    for reward in facts.rewards:
        if reward.weight:
            spot = as_text(reward.blind_to) if reward.blind_to else "unknown, for its author has not said"
            points.append(f"What {as_code(reward.name)} is blind to: {spot}. Training may have made that worse.")
    points.append(
        "The reward that was trained on rises in any training that works. That alone does not make better pictures: "
        "look at them, and at the rewards that were held out."
    )
    counts = [metric.prompts for metric in facts.evaluation.metrics if metric.prompts] if facts.evaluation else []
    if counts:
        points.append(
            f"The figures come from {max(counts)} prompts, and from one training with one seed. Prompts of another "
            "kind, or another training, may give others; the intervals do not cover that."
        )
    if facts.evaluation is None:
        points.append("No scores are kept of these weights.")
    return points


def _explained(name: str, meaning: str | None) -> str:
    """For one cell: a column of its own would leave none of them room on a phone."""
    return f"{as_code(name)}<br>{as_text(meaning)}" if meaning else as_code(name)


def _setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.6g}".replace("e-0", "e-")
    if isinstance(value, list | tuple):
        return ", ".join(_setting(item) for item in value)
    return as_text(str(value))


def _path(path: str) -> str:
    """A picture's address in Markdown."""
    return quote(shown(path))
