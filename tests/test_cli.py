"""The command line: exit codes, errors a reader can act on, and the jobs that call the same functions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from line_tools import chat_user, oppu, run_dir, write_config, write_users

from oppu_ray import cli
from oppu_ray.cli import STAGES, main
from oppu_ray.config import from_dict, load_config
from oppu_ray.configs import find_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run that can be prepared; its base does not exist."""
    users = write_users(tmp_path / "users.jsonl", [chat_user(i) for i in range(2)])
    return write_config(tmp_path, tmp_path / "no-base", users, "chat_reply")


def test_a_stage_prints_the_config_as_resolved_and_writes_its_result(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = oppu("prepare", config, "seed=3", "personal.learning_rate=1e-4")
    resolved, _, summary = capsys.readouterr().out.partition("\n\n")
    assert from_dict(yaml.safe_load(resolved)) == load_config(config, ["seed=3", "personal.learning_rate=1e-4"])
    assert (
        summary
        == "2 target users (4 items to learn from, 4 later ones to answer), 0 base users (0 items), 0 rejected\n"
    )
    assert result["config"]["seed"] == 3 and result["config"]["personal"]["learning_rate"] == 1e-4


def test_bad_input_is_exit_code_2_and_one_line_that_names_the_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("sead: 1")
    for arguments, message in (
        (
            ["train", str(tmp_path / "bad.yaml")],
            f"oppu: config {tmp_path}/bad.yaml: sead: unknown key; expected one of run_dir",
        ),
        (["train", str(tmp_path / "none.yaml")], f"oppu: config {tmp_path}/none.yaml: cannot read the config: "),
        (["train", str(config)], f"oppu: {run_dir(config)}/prepare/index.json does not exist: run `prepare`"),
        (["prepare", str(config), "seed"], "oppu: override 'seed': expected dotted.key=value"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1


def test_an_unknown_subcommand_or_none_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and all(stage in error for stage in STAGES)


def test_a_wrong_config_does_not_wait_for_torch(config: Path) -> None:
    code = "import sys; from oppu_ray.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "run", str(config), "sead=1"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"sead: unknown key" in done.stderr


def test_the_doctor_looks_at_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPPU_HOME", str(tmp_path / "home"))
    code = main(["doctor"])
    output = capsys.readouterr().out
    assert f"{tmp_path}/home" in output and "C++ compiler" in output
    assert code == (0 if output.rstrip().endswith("all ok") else 1)
    monkeypatch.setenv("OPPU_HOME", "/proc/nowhere")
    assert main(["doctor"]) == 1 and "export OPPU_HOME=" in capsys.readouterr().out


def test_the_demo_is_the_whole_line_on_the_demo_config(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(cli, "run_stage", lambda *arguments: called.append(arguments) or 0)
    assert main(["demo", "seed=1"]) == 0
    demo = find_config("demo")
    assert called == [("run", demo, ["seed=1"])] and load_config(demo).run_dir == "runs/demo"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "run"])
def test_every_stage_is_a_job(stage: str) -> None:
    assert (ROOT / "jobs" / f"{stage}.py").is_file()


def test_a_job_does_what_the_subcommand_does(config: Path) -> None:
    def job(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.prepare", str(config), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = job("seed=5")
    assert done.returncode == 0, done.stderr
    result = json.loads((run_dir(config) / "prepare" / "result.json").read_text())
    assert (result["command"], result["config"]["seed"], result["num_target_users"]) == ("prepare", 5, 2)
    failed = job("sead=5")
    assert failed.returncode == 2 and "sead: unknown key" in failed.stderr


def test_a_config_is_an_installed_ones_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = find_config("demo")
    assert load_config(demo).run_dir == "runs/demo" and find_config("tune", kind="suites").parent.parent == demo.parent
    assert find_config("run.yaml", tmp_path) == tmp_path / "run.yaml" and find_config("/a/run") == Path("/a/run")
    with pytest.raises(ValueError, match=r"config 'own': expected a YAML file or the name of an installed one \(aan_"):
        find_config("own")
    Path("own").write_text("seed: 1")
    assert load_config(find_config("own")).seed == 1
    assert [find_config(path) for path in ("demo.yml", "../demo")] == [Path("demo.yml"), Path("../demo")]
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        find_config("demmo")
