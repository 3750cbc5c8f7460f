"""What holds for every test: no network for Hugging Face, few threads, a home and a Ray of its own, without a token."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_tools import Hub
    from torch import Tensor

_HOME = Path.home()
# Before anything reads the environment. What is dear to make stays in the user's own home: bases, wheels, operators.
os.environ.setdefault("OPPU_HOME", str(_HOME / ".cache" / "oppu-ray"))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_HOME / ".cache" / "torch_extensions"))
os.environ.setdefault("XDG_CONFIG_HOME", str(_HOME / ".config"))  # pip's own settings: its index, its certificates
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",  # a second thread that spins for work takes the core that the first one needs
    RAY_AUTH_MODE="disabled",  # else `ray.init` writes a token into the home
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)
_own_home = tempfile.TemporaryDirectory(prefix="oppu-test-home-")
os.environ["HOME"] = os.environ["RAY_TMPDIR"] = _own_home.name  # where Ray looks for a cluster that is there already


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seed", type=int, default=0, help="which faults the storms of the chaos tests draw")


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Normal numbers of any shape, the same in every run."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=draw)


@pytest.fixture(params=["C++", "PyTorch"])
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once with the C++, once as where none can be built."""
    from oppu_ray import native

    if request.param == "PyTorch":
        monkeypatch.setattr(native, "functions", dict)
    else:
        assert native.functions(), "tests need g++"
    return str(request.param)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub: the cache of its client, which is offline in every test."""
    from hub_tools import Hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return Hub(tmp_path / "hub")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Path]:
    """A Ray of two CPUs on this machine, for one test file, and the folder of its logs; its workers find `oppu_ray`."""
    import ray

    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    with tempfile.TemporaryDirectory(prefix="oppu-ray-", dir="/tmp") as folder:  # a socket's path must be short
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 * 2**20,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
            _temp_dir=folder,
        )
        yield Path(folder)
        ray.shutdown()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server of this session's own."""
    from vault_tools import postgres_server

    with postgres_server() as url:
        yield url
