"""The model card of a run: metadata for the Hub, and a page, whose prose is in `templates/model_card.md`."""

import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..run_files import CARD
from .escaping import Markdown, as_code, as_paragraph, as_text, one_line, shown
from .facts import Base, Metric, Place, RunFacts
from .quick_start import quick_start


TEMPLATES = Path(__file__).parents[1] / "templates"
HUB = "https://huggingface.co"


def render(facts: RunFacts, place: Place | None = None) -> str:
    """The card as Markdown, with its metadata in YAML; its code loads from `place`."""
    # What is inserted reads as it was written, unless a filter made Markdown of it.
    style: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), finalize=as_text, **style)
    environment.filters |= {
        "code": as_code,
        "paragraph": as_paragraph,
        "setting": _setting,
        "path": lambda text: Markdown(quote(shown(text))),
        "and": _listed,
        "row": _row,
        "rule": lambda cells: _row(["---"] * len(cells)),
    }
    text = environment.get_template("model_card.md").render(
        facts=facts,
        hub=Markdown(HUB),
        quick_start=Markdown(quick_start(facts, place or facts.place)),
        license_link=Markdown(_license_link(facts.base) or ""),
        settings={name: value for name, value, _ in facts.settings},
        prompts=max([m.prompts or 0 for m in facts.evaluation.metrics], default=0) if facts.evaluation else 0,
    )
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}"


def write_card(folder: Path, facts: RunFacts) -> None:
    facts.write(folder)
    (folder / CARD).write_text(render(facts), encoding="utf-8")


def edited_card(folder: Path, facts: RunFacts) -> str | None:
    """The card in `folder`, if it is not as it was rendered from its facts."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    return None if text is None or text == render(facts) else text


def _metadata(facts: RunFacts) -> ModelCardData:
    base = facts.base
    task = "image-to-image" if facts.picture_arguments else "text-to-image"
    tags = ["slas", "slas-trl", "trl", *(["lora"] if facts.adapter else [])]
    tags += ["reinforcement-learning", task, "diffusers", *facts.tags]
    results = _eval_results(facts, task)
    widget = []
    for sample in facts.samples:
        for picture, head in ((sample.after, ""), (sample.before, "Before training: ")):
            widget += [{"text": head + shown(sample.prompt), "output": {"url": shown(picture)}}] if picture else []
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
            metric_args=_numbers(metric),
        )
        for metric in scores.metrics
        if math.isfinite(metric.value)
    ]


def _numbers(metric: Metric) -> dict[str, Any]:
    """The numbers beside the mean: the Hub takes no NaN."""
    known = {"prompts": metric.prompts, "before_training": metric.before}
    numbers: dict[str, Any] = {name: n for name, n in known.items() if n is not None and math.isfinite(n)}
    half = metric.half_width
    if half is not None and math.isfinite(half):
        numbers["confidence_interval_95"] = [metric.value - half, metric.value + half]
    return numbers


def _license_link(base: Base) -> str | None:
    """An address. The file that a card names without one is in its own repository."""
    link = base.license_link
    if not link or link.startswith(("https://", "http://")):
        return link and quote(link, safe=":/?#=&%~+")
    file = link.removeprefix("./").lstrip("/")
    return f"{HUB}/{quote(base.hub_id)}/blob/main/{quote(file)}" if base.hub_id else None


# Filters of the template


def _setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.6g}".replace("e-0", "e-")
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return str(value)


def _listed(parts: list[Markdown]) -> Markdown:
    """Markdown as `a, b and c`."""
    return Markdown(" and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])))


def _row(cells: list[str]) -> Markdown:
    """A line of a table. On a narrow page, 0.51 ± 0.02 breaks before the sign rather than on both sides of it."""
    return Markdown(f"| {' | '.join(map(as_text, cells))} |".replace("± ", "±\N{NO-BREAK SPACE}"))
