"""The files of a run: JSON lines, and writing in one step."""

import math

import pytest

from slas_trl.run_files import ADAPTER, adapter_file, read_lines, read_steps, write_lines, write_text


def test_lines_are_written_and_read(tmp_path):
    records = [{"step": 1, "prompt": "ein Löwe\u2028 und"}, {"step": 2, "reward": math.nan}]
    write_lines(tmp_path / "lines.jsonl", records)
    first, second = read_lines(tmp_path / "lines.jsonl")
    assert first == records[0] and math.isnan(second["reward"])
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


def test_half_a_line_of_a_killed_run_is_passed_over(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert read_lines(tmp_path / "lines.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
    lines = [{"step": 2, "reward": 0.1, "kl": 1.0}, {"step": 1, "reward": 0.2}, {"step": 2, "reward": 0.3}]
    write_lines(tmp_path / "lines.jsonl", lines)
    assert read_steps(tmp_path / "lines.jsonl") == [{"step": 1, "reward": 0.2}, {"step": 2, "reward": 0.3, "kl": 1.0}]


def test_a_run_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    def records():
        yield {"step": 1}
        raise KeyboardInterrupt

    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt):
        write_lines(tmp_path / "file", records())
    assert (tmp_path / "file").read_text() == "old"
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_adapters_of_several_denoisers():
    names = ["transformer", "transformer_2"]
    assert adapter_file("transformer", names) == ADAPTER
    assert adapter_file("transformer_2", names) == "pytorch_lora_weights_transformer_2.safetensors"
