"""A head with a token on this machine, and the whole line as its job: exit codes, one job per run, same adapters."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from line_tools import adapters, oppu, run_dir, tagging_user, write_config, write_users
from service import is_loopback, listening
from tiny import tiny_base

from oppu_ray.config import BaseConfig, Config, DataConfig, load_config, located, located_overrides

ROOT = Path(__file__).resolve().parents[1]
CANARY = "xyzzyplugh"
Oppu = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a whole run in this process."""
    folder = tmp_path_factory.mktemp("inline")
    users = [tagging_user(i, canary=CANARY) for i in range(3)] + [tagging_user(8, role="base")]
    arms = {"arms": ["task", "oppu"], "num_bootstrap": 50, "max_new_tokens": 2}
    base = tiny_base(folder / "base")
    config = write_config(folder, base, write_users(folder / "users.jsonl", users), evaluate=arms)
    oppu("run", config)
    return config


@pytest.fixture(scope="module")
def outside() -> Iterator[Oppu]:
    """`oppu ...` in a process, home and Ray of its own, in the checkout; a head that it started is stopped."""
    with tempfile.TemporaryDirectory(prefix="oppu-", dir="/tmp") as home:  # a socket's path must be short
        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as server:
                ports.append(server.getsockname()[1])
        own = {"HOME": home, "OPPU_HOME": f"{home}/oppu", "RAY_TMPDIR": home, "PYTHONPATH": str(ROOT)}
        own |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
        kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}

        def call(*arguments: str) -> subprocess.CompletedProcess[str]:
            if arguments == ("cluster", "start"):
                arguments = (*arguments, f"--port={ports[0]}", f"--dashboard-port={ports[1]}")
            command = [sys.executable, "-c", "import sys; from oppu_ray.cli import main; sys.exit(main())", *arguments]
            return subprocess.run(command, cwd=ROOT, env=kept | own, capture_output=True, text=True)

        call.home, call.url = Path(home), own["RAY_API_SERVER_ADDRESS"]  # type: ignore[attr-defined]
        yield call
        call("cluster", "stop")


def test_without_a_cluster_or_with_a_wrong_config_nothing_is_submitted(outside: Oppu, inline: Path) -> None:
    for arguments, message in (
        ((str(inline), "sead=1"), "unknown key 'sead'"),
        ((str(inline),), "no cluster at http://127.0.0.1:"),
    ):
        done = outside("submit", "train", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert "no head" in outside("cluster", "stop").stdout


def test_the_whole_line_as_a_job(outside: Oppu, inline: Path, tmp_path: Path) -> None:
    started = outside("cluster", "start")
    assert started.returncode == 0, started.stderr
    token = outside.home / ".ray" / "auth_token"  # type: ignore[attr-defined]
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(outside.url + "/api/jobs/")  # type: ignore[attr-defined]
    assert outside("cluster", "start").stdout == started.stdout  # it is there already

    config = tmp_path / "config.yaml"
    config.write_text(inline.read_text().replace(str(run_dir(inline)), str(tmp_path / "run")))
    early = outside("submit", "train", str(config))
    assert early.returncode == 2 and "run `prepare` with this config first" in early.stdout

    first = outside("submit", "run", str(config), "workers.num_workers=1", "--no-wait")
    assert first.returncode == 0 and first.stdout.startswith("job oppu-run-")
    second = outside("submit", "run", str(config), "workers.num_workers=1")  # follows the first
    assert second.returncode == 0 and second.stdout.startswith(first.stdout), second.stdout + second.stderr
    assert "3 users trained and committed, 0 failed" in second.stdout and CANARY not in second.stdout
    assert adapters(config) == adapters(inline)
    evaluated = [json.loads((run_dir(one) / "evaluate" / "result.json").read_text()) for one in (config, inline)]
    assert evaluated[0]["arms"] == evaluated[1]["arms"]
    places = listening(json.loads((outside.home / "oppu" / "cluster.json").read_text())["pid"])  # type: ignore[attr-defined]
    assert sum(map(len, places.values())) > 8 and all(is_loopback(place) for some in places.values() for place in some)

    assert outside("cluster", "stop").stdout == "stopped\n"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(outside.url + "/api/gcs_healthz")  # type: ignore[attr-defined]


def test_the_ray_that_a_run_starts_for_itself_listens_on_loopback() -> None:
    code = "import json, os; from oppu_ray.pool import connect; from service import listening; connect(); "
    code += "print(json.dumps(listening(os.getpid())))"
    with tempfile.TemporaryDirectory(prefix="oppu-", dir="/tmp") as home:
        own = {"HOME": home, "RAY_TMPDIR": home, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = json.loads(done.stdout.splitlines()[-1])
    assert sum(map(len, places.values())) > 6 and all(is_loopback(place) for some in places.values() for place in some)


def test_relative_paths_start_where_the_job_was_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(run_dir="runs/a", data=DataConfig(path="users.jsonl", outputs_path="/there/outputs.json"))
    monkeypatch.chdir(tmp_path)
    assert located(config).run_dir == f"{tmp_path}/runs/a"
    monkeypatch.setenv("OPPU_ROOT", "/shared")
    there = located(config)
    assert (there.run_dir, there.data.path) == ("/shared/runs/a", "/shared/users.jsonl")
    assert there.data.outputs_path == "/there/outputs.json" and located(Config()).data.path == ""
    copy = tmp_path / "_ray_pkg_0123"
    copy.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.delenv("OPPU_ROOT")
    with pytest.raises(ValueError, match="run_dir is 'runs/a', and a job's own folder is a temporary copy"):
        located(config)


def test_every_path_of_a_config_starts_at_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("models/tiny", "data/reviews", "embedders/mine", "writers/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "zero.json").touch()
    text = """
        base: {name: models/tiny, deepspeed: zero.json}
        data: {hf_name: "data/reviews:en"}
        workers: {num_workers: 1}
        memory: {embedder: embedders/mine, profile: writers/mine}
        vault: {registry_url: "sqlite:///users.db"}
    """
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "run.yaml")
    there = located(config)
    assert (there.base.name, there.base.deepspeed) == (f"{tmp_path}/models/tiny", f"{tmp_path}/zero.json")
    assert there.data.hf_name == f"{tmp_path}/data/reviews:en"
    assert there.vault.registry_url == f"sqlite:///{tmp_path}/users.db"
    assert (there.memory.embedder, there.memory.profile) == (f"{tmp_path}/embedders/mine", f"{tmp_path}/writers/mine")
    overrides = located_overrides(config)
    monkeypatch.chdir("/")  # as a job, in a folder of its own, sees it
    assert located(load_config(tmp_path / "run.yaml", overrides)) == there and located(there) == there


def test_a_name_that_is_no_folder_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template").mkdir()
    config = Config(base=BaseConfig(name="org/model"), data=DataConfig(hf_name="org/reviews:en"))
    there = located(config)
    assert (there.base, there.memory, there.data.hf_name) == (config.base, config.memory, "org/reviews:en")
    assert located(Config(base=BaseConfig(name="./model"))).base.name == f"{tmp_path}/model"


def test_what_a_job_uploads_holds_no_data(inline: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    shutil.copy(ROOT / ".gitignore", tmp_path)
    shutil.copy(ROOT / ".rayignore", tmp_path)
    shutil.copytree(run_dir(inline), tmp_path / "anywhere")
    shutil.copytree(run_dir(inline), tmp_path / "runs" / "one")
    excluded = get_excludes_from_ignore_files(tmp_path, include_gitignore=True)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and not any(is_out(path) for is_out in excluded)]
    assert not [path for path in left if CANARY.encode() in path.read_bytes() or path.suffix == ".safetensors"]
