"""The files of a run's folder: their names, JSON lines, and writing without half a file."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


CARD = "README.md"
FACTS = "model_card.json"  # what the card is written from; beside every set of weights
METRICS = "metrics.jsonl"  # a line for each log
ROLLOUTS = "calibration.jsonl"  # a line for each rollout: stds and advantages of its groups
EVALUATION = "evaluation.json"  # scores before and after training
SAMPLES = "samples"  # folder of pictures
CURVES, CALIBRATION = "training.png", "calibration.png"
ADAPTER = "pytorch_lora_weights.safetensors"
STATE = "slas_state.json"  # of a checkpoint: its place in the rollout, its settings, sizes and checksums of its files
TRAINER_STATE = "trainer_state.json"  # of a checkpoint, the Trainer's
# Folders of checkpoints on their way in and out. Neither we nor transformers take them for checkpoints, and names that
# begin so are not uploaded to the Hub.
WRITING, REMOVED = "_writing-", "_removed-"


def adapter_file(name: str, names: list[str]) -> str:
    """
    The file of denoiser `name`'s adapter, among all denoisers `names`. A second denoiser's lies beside the first's
    under a name that `pipe.load_lora_weights` does not take for it, as it would take one in a subfolder.
    """
    return ADAPTER if name == names[0] else ADAPTER.replace(".", f"_{name}.")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; half a line, which a killed run has left, is passed over."""
    records = []
    for text in path.read_text(encoding="utf-8").split("\n"):  # some prompts hold other ends of lines
        with suppress(json.JSONDecodeError):
            records.append(json.loads(text))
    return records


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """
    A record for each "step" of a file of JSON lines, in order. A run that was killed and resumed has logged some steps
    twice: the last value of each key counts.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in read_lines(Path(path)):
        records.setdefault(line["step"], {}).update(line)
    return [records[step] for step in sorted(records)]


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Replace the file by these JSON lines, in one step."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Replace the file in one step: a run that is killed leaves the old one or the new one."""
    writing = path.with_name(f"_{path.name}")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)
