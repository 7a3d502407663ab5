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


def probe(folder: Path, *argv: str) -> int:
    """Run the probe in two processes, and return the exit status."""
    options, _ = split_options([*argv, "--num_processes", "2"])
    return launch(PROBE, options, [str(folder), *split_options(argv)[1]])


def wait_for(folder: Path, pattern: str) -> None:
    """Until both processes have left such a file."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < 2:
        assert time.monotonic() < deadline, pattern
        time.sleep(0.05)


class TestOptions:
    def test_are_split_off(self):
        argv = [
            "--config",
            "x.yaml",
            "--num_processes=2",
            "--gamma",
            "-1",
            "--accelerate_config",
            "fsdp2",
            "--use_cpu",
        ]
        options, rest = split_options(argv)
        assert options == {"num_processes": "2", "accelerate_config": "fsdp2"}
        assert rest == ["--config", "x.yaml", "--gamma", "-1", "--use_cpu"]

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--num_processes"], "--num_processes"),
            (["--accelerate_config", "--gamma", "0"], "--accelerate_config"),
            (["--num_processes", "two"], "--num_processes.*'two'"),
            (["--accelerate_config", "fsdp3"], "fsdp2, multi_gpu, multi_node, single_gpu, zero2"),
            (["--accelerate_config", __file__], "no valid YAML"),
            (["--accelerate_config", str(ROOT / ".pre-commit-config.yaml")], "distributed_type"),
            (["--accelerate_config", "single_gpu", "--num_processes", "2"], "single_gpu is for one process"),
            (["--num_processes", "0"], "num_processes"),
            (["--num_processes", "3", "--num_machines", "2"], r"num_processes \(3\).*num_machines \(2\)"),
            (["--accelerate_config", "multi_node", "--main_process_ip", "10.0.0.1"], "needs --machine_rank"),
            (["--accelerate_config", "multi_node", "--machine_rank", "1"], "needs --main_process_ip"),
            (["--accelerate_config=multi_node", "--main_process_ip=a", "--machine_rank=2"], r"machine_rank \(2\)"),
        ],
    )
    def test_that_do_not_fit_are_refused_before_anything_starts(self, capsys, argv, message):
        assert main(["train", *argv]) == 2
        printed = capsys.readouterr().err
        assert re.search(message, printed), printed
        assert printed.count("error:") == 1 and "Traceback" not in printed

    def test_help_is_printed_once(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--num_processes", "2", "--help"])
        assert "--accelerate_config" in capsys.readouterr().out

    def test_are_for_the_command_line(self, capsys, tmp_path):
        (tmp_path / "run.yaml").write_text("num_processes: 2\n")
        assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
        assert "num_processes goes on the command line" in capsys.readouterr().err


class TestConfigs:
    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_are_accelerates_own_format(self, path):
        config = load_config_from_file(str(path))
        # The training configuration decides; one that forces bf16 would not run on the CPU.
        assert config.mixed_precision is None
        assert not config.use_cpu

    def test_a_file_of_ones_own_is_taken(self, tmp_path):
        mine = tmp_path / "mine.yaml"
        mine.write_text("distributed_type: MULTI_GPU\n")
        assert find_config(str(mine)) == mine
        assert find_config("fsdp2") == CONFIGS / "fsdp2.yaml"


@pytest.mark.distributed
class TestProcesses:
    def test_two_of_them_on_the_cpu(self, environ, tmp_path):
        assert probe(tmp_path, "--gamma", "0") == 0
        found = probed(tmp_path)
        assert set(found) == {"0", "1"}
        for rank, each in found.items():
            assert each["argv"] == [str(tmp_path), "--gamma", "0"]
            assert (each["environ"]["WORLD_SIZE"], each["environ"]["LOCAL_RANK"]) == ("2", rank)
            assert "ACCELERATE_USE_FSDP" not in each["environ"]
        assert "ACCELERATE_USE_CPU" not in os.environ  # theirs alone

    def test_fsdp2_reaches_each(self, environ, tmp_path):
        assert probe(tmp_path, "--accelerate_config", "fsdp2") == 0
        found = probed(tmp_path)
        assert set(found) == {"0", "1"}
        wanted = {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_ACTIVATION_CHECKPOINTING": "false",
            "FSDP_OFFLOAD_PARAMS": "false",
            "ACCELERATE_MIXED_PRECISION": "no",
        }
        for each in found.values():
            assert {name: each["environ"].get(name) for name in wanted} == wanted

    def test_one_on_each_gpu_that_is_named(self, environ, tmp_path):
        options, rest = split_options(["--gpu_ids", "2,3", str(tmp_path)])
        assert launch(PROBE, options, rest) == 0
        assert {each["environ"]["CUDA_VISIBLE_DEVICES"] for each in probed(tmp_path).values()} == {"2,3"}
        assert len(probed(tmp_path)) == 2

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

    def test_two_machines(self, environ, tmp_path):
        """Both are this one; all that sets them apart is their rank."""
        argv = ["--accelerate_config", "multi_node", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        argv += ["--main_process_port", str(29500 + os.getpid() % 1000)]
        other = subprocess.Popen([sys.executable, "-c", PROBE_COMMAND, *argv, "--machine_rank", "1", str(tmp_path)])
        options, rest = split_options([*argv, "--machine_rank", "0", str(tmp_path)])
        assert launch(PROBE, options, rest) == 0
        assert other.wait(timeout=120) == 0
        found = probed(tmp_path)
        assert set(found) == {"0", "1"}
        for each in found.values():
            environ = each["environ"]
            assert (environ["WORLD_SIZE"], environ["LOCAL_RANK"], environ["FSDP_VERSION"]) == ("2", "0", "2")


@pytest.mark.distributed
class TestFailure:
    def test_bad_input_is_told_once(self, environ, tmp_path, capfd):
        assert probe(tmp_path, "all-bad-input") == 2
        printed = capfd.readouterr().err
        assert printed.count("no such thing") == 1 and "slas-trl probe: error: no such thing" in printed
        assert "Traceback" not in printed

    def test_debug_shows_where(self, environ, tmp_path, capfd, monkeypatch):
        monkeypatch.setenv("SLAS_TRL_DEBUG", "1")
        assert probe(tmp_path, "all-bad-input") == 2
        printed = capfd.readouterr().err
        assert printed.count("Traceback") == 1 and "probe.py" in printed

    def test_a_bug_in_one_ends_all(self, environ, tmp_path, capfd):
        start = time.monotonic()
        assert probe(tmp_path, "one-bug") == 1
        assert time.monotonic() - start < 30  # the other would wait for longer
        printed = capfd.readouterr().err
        assert printed.count("Traceback") == 1
        assert "slas-trl probe: error: a bug in one of them (process 1)" in printed

    def test_a_killed_process_is_named(self, environ, tmp_path, capfd):
        assert probe(tmp_path, "one-killed") == 128 + signal.SIGKILL
        assert "error: process 1 was killed by SIGKILL." in capfd.readouterr().err

    @pytest.mark.parametrize(
        ("codes", "status", "message"),
        [
            ({0: 1, 1: 2}, 2, "error: error 1 (process 1)\n(SLAS"),  # bad input, and a connection lost for it
            ({0: 1, 1: -signal.SIGKILL}, 137, "error: process 1 was killed by SIGKILL"),  # and for this
            ({0: -signal.SIGTERM, 1: 7}, 7, "error: process 1 ended with status 7"),
            ({0: -signal.SIGTERM}, 143, "error: process 0 was killed by SIGTERM"),
            ({0: 143, 1: -signal.SIGTERM}, 143, "ended by SIGTERM"),  # which the launcher passed on
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
class TestTraining:
    @staticmethod
    def slas_trl(*argv: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "slas_trl.cli.main", *argv], capture_output=True, text=True, timeout=600
        )

    def test_of_two_processes_leaves_one_run(self, environ, tmp_path):
        argv = ["--max_steps", "1", "--num_generations", "4", "--per_device_train_batch_size", "4"]
        argv += ["--steps_per_generation", "2", "--num_inference_steps", "4", "--report_prompts", "0"]
        argv += ["--log_completions", "false", "--use_cpu", "--num_processes", "2"]
        argv += ["--output_dir", str(tmp_path / "run")]
        done = self.slas_trl("train", *argv)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Done. Look at") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
        # Each process leaves the state of its random generators.
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {
            p.name for p in (tmp_path / "run" / "checkpoint-1").iterdir()
        }

    def test_sigterm_to_one_of_them_stops_all_with_a_checkpoint(self, environ, tmp_path):
        (tmp_path / "own.py").write_text(
            "import os, signal\nlast = []\ndef own(prompts, images, **columns):\n    last.append(1)\n"
            "    if os.environ['RANK'] == '1' and len(last) == 3:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return list(range(len(images)))\n"
        )
        argv = ["--max_steps", "10000", "--num_generations", "4", "--per_device_train_batch_size", "4"]
        argv += ["--steps_per_generation", "1", "--num_inference_steps", "3", "--report_prompts", "0"]
        argv += ["--log_completions", "false", "--use_cpu", "--num_processes", "2", "--save_strategy", "no"]
        argv += ["--reward_funcs", f"{tmp_path / 'own.py'}:own", "--output_dir", str(tmp_path / "run")]
        done = self.slas_trl("train", *argv)
        assert done.returncode == 143, done.stderr[-3000:]
        assert done.stderr.endswith("slas-trl train: ended by SIGTERM.\n") and "Traceback" not in done.stderr
        assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
