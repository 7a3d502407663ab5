"""`slas-trl train` in several processes: which are started, what they are given, and what is said when one fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import is_deepspeed_available
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from slas_trl.cli.launch import CONFIGS, _report, find_config, launch, split_options
from slas_trl.cli.main import main
from slas_trl.scripts.arguments import parse
from tests.cli.tiny_run import SMALL


ROOT = Path(__file__).parents[2]
PROBE = "tests.cli.probe"
PROBE_COMMAND = (
    "import sys; from slas_trl.cli.launch import launch, split_options; "
    f"sys.exit(launch({PROBE!r}, *split_options(sys.argv[1:])))"
)


@pytest.fixture
def environ(monkeypatch):
    """What processes that are started find the package and these tests by; the signal handlers are put back."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("SLAS_TRL_DEBUG", "0")
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in handled]
    yield
    for number, handler in zip(handled, before, strict=True):
        signal.signal(number, handler)


def probed(folder: Path) -> dict[str, dict[str, Any]]:
    """What the processes found, by rank."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def wait_for(folder: Path, pattern: str) -> None:
    """Until both processes have left such a file."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < 2:
        assert time.monotonic() < deadline, pattern
        time.sleep(0.05)


class TestOptions:
    def test_are_split_off(self):
        argv = "--config x.yaml --num_processes=2 --gamma -1 --accelerate_config fsdp2 --use_cpu"
        options, rest = split_options(argv.split())
        assert options == {"num_processes": "2", "accelerate_config": "fsdp2"}
        assert rest == ["--config", "x.yaml", "--gamma", "-1", "--use_cpu"]

    @pytest.mark.parametrize(
        ("argv", "named"),
        [
            (["--num_processes", "two"], "--num_processes"),
            (["--accelerate_config", "fsdp3"], "fsdp2, multi_gpu, multi_node, single_gpu, zero2"),
            (["--accelerate_config", __file__], "no valid YAML"),
            (["--accelerate_config", str(ROOT / ".pre-commit-config.yaml")], "distributed_type"),
            (["--accelerate_config", "single_gpu", "--num_processes", "2"], "distributed_type"),
            (["--num_processes", "0"], "num_processes"),
            (["--num_processes", "3", "--num_machines", "2"], "num_processes (3)"),
            (["--accelerate_config", "multi_node", "--main_process_ip", "10.0.0.1"], "--machine_rank"),
            (["--accelerate_config", "multi_node", "--machine_rank", "1"], "--main_process_ip"),
            (["--accelerate_config=multi_node", "--main_process_ip=a", "--machine_rank=2"], "--machine_rank"),
        ],
    )
    def test_that_do_not_fit_are_refused_before_anything_starts(self, argv, named):
        with pytest.raises(ValueError, match=re.escape(named)):
            launch(PROBE, *split_options(argv))

    def test_are_for_the_command_line(self, tmp_path):
        (tmp_path / "run.yaml").write_text("num_processes: 2\n")
        with pytest.raises(ValueError, match="num_processes goes on the command line"):
            parse(["--config", str(tmp_path / "run.yaml")])


def test_configs_are_in_accelerates_own_format():
    for path in CONFIGS.glob("*.yaml"):
        config = load_config_from_file(str(path))
        # The training configuration decides; one that forces bf16 would not run on the CPU.
        assert config.mixed_precision is None and not config.use_cpu
    assert find_config("fsdp2") == CONFIGS / "fsdp2.yaml" and find_config(__file__) == Path(__file__)


@pytest.mark.distributed
class TestProcesses:
    def test_one_on_each_gpu_that_is_named(self, environ, tmp_path):
        assert launch(PROBE, *split_options(["--gpu_ids", "2,3", str(tmp_path), "--gamma", "0"])) == 0
        found = probed(tmp_path)
        assert set(found) == {"0", "1"}
        for rank, each in found.items():
            assert each["argv"] == [str(tmp_path), "--gamma", "0"]
            assert (each["environ"]["WORLD_SIZE"], each["environ"]["LOCAL_RANK"]) == ("2", rank)
            assert each["environ"]["CUDA_VISIBLE_DEVICES"] == "2,3" and "ACCELERATE_USE_FSDP" not in each["environ"]
        assert "ACCELERATE_USE_CPU" not in os.environ  # theirs alone

    @pytest.mark.skipif(is_deepspeed_available(), reason="DeepSpeed is here")
    def test_zero2_says_what_to_install(self, environ, capsys):
        assert main(["train", "--accelerate_config", "zero2", "--num_processes", "2"]) == 2
        assert "pip3 install deepspeed" in capsys.readouterr().err

    def test_one_replaces_the_launcher(self, environ, tmp_path):
        command = [sys.executable, "-c", PROBE_COMMAND, "--accelerate_config", "single_gpu", "--gpu_ids", "3"]
        started = subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        assert started.wait(timeout=120) == 0, started.stderr and started.stderr.read()
        (found,) = probed(tmp_path).values()
        assert found["environ"]["CUDA_VISIBLE_DEVICES"] == "3"
        assert "WORLD_SIZE" not in found["environ"]

    def test_fsdp2_on_two_machines(self, environ, tmp_path):
        """Both are this one; all that sets them apart is their rank."""
        argv = ["--accelerate_config", "multi_node", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        argv += ["--main_process_port", str(29500 + os.getpid() % 1000)]
        other = subprocess.Popen([sys.executable, "-c", PROBE_COMMAND, *argv, "--machine_rank", "1", str(tmp_path)])
        assert launch(PROBE, *split_options([*argv, "--machine_rank", "0", str(tmp_path)])) == 0
        assert other.wait(timeout=120) == 0
        found = probed(tmp_path)
        assert set(found) == {"0", "1"}
        wanted = {
            *("WORLD_SIZE=2", "LOCAL_RANK=0", "ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2"),
            *("FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE=FULL_STATE_DICT"),
            *("FSDP_CPU_RAM_EFFICIENT_LOADING=false", "ACCELERATE_MIXED_PRECISION=no"),
        }
        for each in found.values():
            assert wanted <= {f"{name}={value}" for name, value in each["environ"].items()}


@pytest.mark.distributed
class TestFailure:
    def test_bad_input_is_told_once(self, environ, tmp_path, capfd):
        assert launch(PROBE, {"num_processes": "2"}, [str(tmp_path), "all-bad-input"]) == 2
        printed = capfd.readouterr().err
        assert printed.count("no such thing") == 1 and "slas-trl probe: error: no such thing" in printed
        assert "Traceback" not in printed

    def test_a_bug_in_one_ends_all(self, environ, tmp_path, capfd):
        start = time.monotonic()
        assert launch(PROBE, {"num_processes": "2"}, [str(tmp_path), "one-bug"]) == 1
        assert time.monotonic() - start < 30  # the other would wait for longer
        printed = capfd.readouterr().err
        assert printed.count("Traceback") == 1 and "probe.py" in printed
        assert "slas-trl probe: error: a bug in one of them (process 1)" in printed

    @pytest.mark.parametrize(
        ("codes", "status", "message"),
        [
            ({0: 1, 1: 2}, 2, "error: error 1 (process 1)\n(SLAS"),  # bad input, and a connection lost for it
            ({0: 1, 1: -signal.SIGKILL}, 137, "error: process 1 was killed by SIGKILL"),  # and for this
            ({0: -signal.SIGTERM, 1: 7}, 7, "error: process 1 ended with status 7"),
            ({0: 143, 1: -signal.SIGTERM}, 143, "ended by SIGTERM"),  # which the launcher passed on
            ({0: -signal.SIGABRT, 1: 1}, 134, "error: process 0 was killed by SIGABRT"),
            ({0: -signal.SIGABRT, 1: 143}, 143, "ended by SIGTERM"),  # at a connection that the other one closed
        ],
    )
    def test_the_cause_is_told_and_not_what_follows(self, tmp_path, capsys, codes, status, message):
        failures = {}
        for rank, code in codes.items():
            error = {"message": f"ValueError: error {rank}", "extraInfo": {"py_callstack": "", "timestamp": "1"}}
            if code in (1, 2):
                (tmp_path / f"{rank}.json").write_text(json.dumps({"message": error}))
            failures[rank] = ProcessFailure(rank, 1, code, str(tmp_path / f"{rank}.json"))
        assert _report("train", failures) == status
        printed = capsys.readouterr().err
        assert message in printed and printed.count("slas-trl train: ") == 1

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_ctrl_c_lets_them_finish_and_a_second_one_does_not(self, environ, tmp_path, stubborn):
        argv = ["--num_processes", "2", str(tmp_path), "wait", *(["stubborn"] if stubborn else [])]
        launcher = subprocess.Popen([sys.executable, "-c", PROBE_COMMAND, *argv], stderr=subprocess.PIPE, text=True)
        wait_for(tmp_path, "*.json")
        launcher.send_signal(signal.SIGINT)
        wait_for(tmp_path, "*.saving")
        if stubborn:
            launcher.send_signal(signal.SIGINT)
        _, printed = launcher.communicate(timeout=30)
        assert printed.strip().endswith("KeyboardInterrupt")  # which `slas-trl` turns into a message and status 130
        assert "death signal" not in printed
        assert len(list(tmp_path.glob("*.saved"))) == (0 if stubborn else 2)


@pytest.mark.distributed
def test_sigterm_to_one_of_two_stops_both_with_a_checkpoint_of_one_run(environ, tmp_path):
    (tmp_path / "own.py").write_text(
        "import os, signal\nlast = []\ndef own(prompts, images, **columns):\n    last.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(last) == 4:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return list(range(len(images)))\n"
    )
    argv = [*SMALL, "--max_steps", "10000", "--report_prompts", "0", "--save_strategy", "no", "--use_cpu"]
    argv += ["--log_completions", "false", "--num_processes", "2", "--reward_funcs", "own.py:own"]
    argv += ["--output_dir", "run"]
    command = [sys.executable, "-m", "slas_trl.cli.main", "train", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 143, done.stderr[-3000:]
    assert done.stdout.count("Training the embedded pipeline") == 1
    assert done.stderr.endswith("slas-trl train: ended by SIGTERM.\n") and "Traceback" not in done.stderr
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    # Each process leaves the state of its random generators.
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
