"""The files of `cluster/` without a cluster: each against the schema of what reads it, and the metrics for real."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from programs import skip_without
from pydantic import ValidationError
from vault_tools import empty_postgres

from oppu_ray import __version__
from oppu_ray.cli import STAGES
from oppu_ray.config import load_config
from oppu_ray.configs import find_config
from oppu_ray.registry import Registry
from oppu_ray.telemetry import SERVING_METRICS, TRAINING_METRICS

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
METRICS = TRAINING_METRICS | SERVING_METRICS
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
TAG = f"{__version__}-ray{PINS['ray']}"
IMAGE_ROOT = "/home/ray/oppu-ray"  # where the image has this checkout
BOARD = json.loads((CLUSTER / "grafana" / "oppu.json").read_text())
RULES = CLUSTER / "prometheus" / "rules.yaml"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


# --- The cluster launcher


@pytest.mark.parametrize("name", ["local.yaml", "aws.yaml"])
def test_a_launcher_file_fits_rays_schema(name: str) -> None:
    import ray.autoscaler

    config = read(name)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 2}, schema)


@pytest.mark.parametrize("name", ["local.yaml", "aws.yaml"])
def test_a_launched_cluster_asks_for_the_token_and_hides_its_dashboard(name: str) -> None:
    config = read(name)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    everywhere = "-e RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
    assert len(starts) == 2 and all(everywhere or "RAY_AUTH_MODE=token" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in starts[0] and all("--metrics-export-port=8080" in one for one in starts)


def test_aws_nodes_run_the_image_of_their_device() -> None:
    config = read("aws.yaml")
    types = config["available_node_types"]
    assert config["docker"]["image"].endswith(f":{TAG}-cpu")
    assert types["gpu"]["docker"]["worker_image"].endswith(f":{TAG}-gpu")
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}


# --- Kubernetes


CLUSTERS: dict[str, Callable[[Any], Any]] = {
    "raycluster.yaml": lambda spec: spec,
    "rayjob.yaml": lambda spec: spec["rayClusterSpec"],
    "rayservice.yaml": lambda spec: spec["rayClusterConfig"],
}
KINDS = {
    "raycluster.yaml": ("ray.io/v1", "RayCluster"),
    "rayjob.yaml": ("ray.io/v1", "RayJob"),
    "rayservice.yaml": ("ray.io/v1", "RayService"),
    "storage.yaml": ("v1", "PersistentVolumeClaim"),
    "networkpolicy.yaml": ("networking.k8s.io/v1", "NetworkPolicy"),
    "podmonitor.yaml": ("monitoring.coreos.com/v1", "PodMonitor"),
}


def groups(spec: dict[str, Any]) -> dict[str, Any]:
    """Head and worker groups by name."""
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def test_every_manifest_is_of_its_kind() -> None:
    found = {path.name: read(f"kuberay/{path.name}") for path in (CLUSTER / "kuberay").iterdir()}
    assert {name: (one["apiVersion"], one["kind"]) for name, one in found.items()} == KINDS
    assert all(one["metadata"]["name"].startswith("oppu") for one in found.values())


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_ray_cluster_on_kubernetes_is_closed_bounded_and_of_our_version(name: str) -> None:
    spec = CLUSTERS[name](read(f"kuberay/{name}")["spec"])
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "oppu-ray-token"}
    assert spec["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert set(groups(spec)) == {"head", "cpu", "gpu"} and spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for role, group in groups(spec).items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        ports = {port["containerPort"] for port in container["ports"]}
        assert container["image"].endswith(f":{TAG}-{'gpu' if role == 'gpu' else 'cpu'}")
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not pod["automountServiceAccountToken"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (role == "gpu")
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert ports >= ({6379, 8265, 8080} if role == "head" else {8080})
        assert role == "head" or (8000 in ports) == (name == "rayservice.yaml")
        mounted = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == mounted == {"data"}
        claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
        assert claim == read("kuberay/storage.yaml")["metadata"]["name"]


def test_the_network_policy_refuses_all_but_what_it_lists() -> None:
    spec = read("kuberay/networkpolicy.yaml")["spec"]
    assert spec["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    rules = [(rule, rule.get("from") or rule.get("to")) for rule in spec["ingress"] + spec["egress"]]
    open_to_all = [peers for rule, peers in rules if not peers or any("ipBlock" in peer for peer in peers)]
    any_port = [peers for rule, peers in rules if not rule.get("ports")]
    assert not open_to_all and any_port == [[{"podSelector": spec["podSelector"]}]] * 2  # Ray's pods among themselves
    entries = {port["port"] for rule in spec["ingress"] for port in rule.get("ports", ())}
    assert entries == {8265, 8000, 8080}


def test_the_job_runs_a_command_of_this_repository_on_a_config_of_it() -> None:
    spec = read("kuberay/rayjob.yaml")["spec"]
    program, command, path, *overrides = shlex.split(spec["entrypoint"])
    assert program == "oppu" and command in STAGES
    config = load_config(find_config(path), overrides)
    cpus = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    num_cpus = cpus["replicas"] * int(cpus["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.workers.num_workers * config.workers.cpus_per_worker + spec["entrypointNumCpus"] <= num_cpus
    assert config.run_dir.startswith("/data/") and config.vault.registry_url == "postgresql://"


def test_serve_configs_fit_serves_schema_and_import_our_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    configs = []
    on_kubernetes = yaml.safe_load(read("kuberay/rayservice.yaml")["spec"]["serveConfigV2"])
    for values in (on_kubernetes, *(yaml.safe_load(path.read_text()) for path in ROOT.glob("serve/*.yaml"))):
        schema = ServeDeploySchema.model_validate(values)
        (application,) = schema.applications
        assert application.import_path == "serve.app:build_app" and application.route_prefix == "/"
        configs.append(load_config(find_config(application.args["config"]), application.args.get("overrides", [])))
    assert configs[0].vault.registry_url == "postgresql://"
    assert configs[0].serve.min_replicas == configs[0].serve.max_replicas == 2
    assert on_kubernetes["http_options"] == {"host": "0.0.0.0", "port": 8000, "request_timeout_s": 120}


def test_a_registry_url_without_a_host_takes_what_the_pods_secret_says(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HOST", postgres_url.split("host=")[1]), ("USER", "oppu"), ("DATABASE", "postgres")):
        monkeypatch.setenv(f"PG{name}", value)
    empty_postgres(postgres_url)
    registry = Registry("postgresql://", b"key")
    registry.add_users(["0" * 64])
    assert Registry(postgres_url, b"key").has_user("0" * 64)


# --- The image and DeepSpeed


def test_the_image_has_our_versions_and_what_it_needs_and_is_not_root() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={PINS['ray']}\n" in text and f"torch=={PINS['torch']}\n" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:100" and TAG in text
    assert f"WORKDIR {IMAGE_ROOT}\n" in text and f"PYTHONPATH={IMAGE_ROOT}\n" in text
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*" and {"!oppu_ray", "!jobs", "!serve", "!constraints.txt"} <= set(ignore)
    assert all((ROOT / name[1:]).exists() for name in ignore[1:] if name != "!serve")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_file_is_what_deepspeed_takes(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = json.loads((CLUSTER / "deepspeed" / f"zero{stage}.json").read_text())
    config = DeepSpeedConfig(values)
    assert config.zero_optimization_stage == stage and not config.bfloat16_config.enabled
    assert "auto" not in json.dumps(values)
    if stage == 3:
        assert config.zero_config.param_persistence_threshold == 0  # else a small base would not be shared out at all
    with pytest.raises(ValidationError):
        DeepSpeedZeroConfig(**values["zero_optimization"], stage3_typo=1)


# --- Metrics, alerts and the dashboard


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every panel's queries with Grafana's variables filled in, by title and number."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "30s").replace("$run", ".*")
        for panel in panels()
        for target in panel["targets"]
    }


def named(text: str) -> set[str]:
    """The metrics of ours that a query names."""
    found = re.findall(r"ray_(oppu_\w+)", text)
    return {re.sub(r"_bucket$", "", name) for name in found}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    assert named(" ".join(queries().values())) == set(METRICS)
    assert named(RULES.read_text()) <= set(METRICS)
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert BOARD["uid"] == "oppu-ray" and len(numbers) == len(set(numbers))
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())


def test_metrics_say_nothing_of_users() -> None:
    tags = {tag for metric in METRICS.values() for tag in metric.tags}
    assert tags == {"run", "worker", "replica", "route", "status", "kind"}
    assert all(bool(metric.boundaries) == (metric.kind == "histogram") for metric in METRICS.values())
    assert all(name.endswith("_total") == (metric.kind == "counter") for name, metric in METRICS.items())


@pytest.fixture(scope="module")
def promtool() -> str:
    """Where Prometheus is installed, its `promtool`."""
    if not shutil.which("prometheus"):
        skip_without("Prometheus")
    return shutil.which("promtool") or "promtool"


def test_an_alert_on_scraping_names_the_job_of_every_scraper() -> None:
    (job,) = set(re.findall(r'job="(\w+)"', RULES.read_text()))
    (config,) = read("prometheus/prometheus.yml")["scrape_configs"]
    (endpoint,) = read("kuberay/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert job == config["job_name"] and {"targetLabel": "job", "replacement": job} in endpoint["relabelings"]


def test_prometheus_takes_the_rules(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HEALTHY = {
    "ray_oppu_users_left{run='r'}": "100-1x60",
    "ray_oppu_users_done_total{run='r',worker='0'}": "0+1x60",
    "ray_oppu_computed_tokens_total{run='r',worker='0'}": "0+9000x60",
    "ray_oppu_recoveries_total{run='r',worker='0'}": "2+0x60",
    "ray_oppu_commit_seconds_bucket{run='r',worker='0',le='0.1'}": "0+1x60",
    "ray_oppu_commit_seconds_bucket{run='r',worker='0',le='+Inf'}": "0+1x60",
    "ray_oppu_requests_total{replica='a',route='/v1',status='200'}": "0+100x60",
    "ray_oppu_queue_length{replica='a'}": "3+0x60",
    "ray_oppu_first_token_seconds_bucket{replica='a',le='0.1'}": "0+1x60",
    "ray_oppu_first_token_seconds_bucket{replica='a',le='+Inf'}": "0+1x60",
    "ray_oppu_evictions_total{replica='a'}": "0+5x60",
    "up{job='ray',instance='n'}": "1+0x60",
}
SICK = {
    "ray_oppu_users_left{run='r'}": "100+0x60",
    "ray_oppu_users_failed_total{run='r',worker='0'}": "5+0x60",
    "ray_oppu_computed_tokens_total{run='r',worker='0'}": "9000+0x60",
    "ray_oppu_recoveries_total{run='r',worker='1'}": "_x50 3+0x10",
    "ray_oppu_commit_seconds_bucket{run='r',worker='0',le='5'}": "0+0x60",
    "ray_oppu_commit_seconds_bucket{run='r',worker='0',le='10'}": "0+1x60",
    "ray_oppu_commit_seconds_bucket{run='r',worker='0',le='+Inf'}": "0+1x60",
    "ray_oppu_requests_total{replica='a',route='/v1',status='200'}": "0+100x60",
    "ray_oppu_requests_total{replica='a',route='/v1',status='500'}": "0+5x60",
    "ray_oppu_queue_length{replica='a'}": "40+0x60",
    "ray_oppu_first_token_seconds_bucket{replica='a',le='5'}": "0+0x60",
    "ray_oppu_first_token_seconds_bucket{replica='a',le='10'}": "0+1x60",
    "ray_oppu_first_token_seconds_bucket{replica='a',le='+Inf'}": "0+1x60",
    "ray_oppu_evictions_total{replica='a'}": "0+90x60",
    "up{job='ray',instance='n'}": "0+0x60",
}


def test_alerts_are_silent_in_health_and_fire_in_trouble(promtool: str, tmp_path: Path) -> None:
    alerts = [rule["alert"] for group in read("prometheus/rules.yaml")["groups"] for rule in group["rules"]]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": "count by (alertname) (ALERTS{alertstate='firing'})",
                    "eval_time": "55m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing],
                }
            ],
        }
        for series, firing in ((HEALTHY, []), (SICK, alerts))
    ]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Emitter:
    """As an actor: exports every metric of the table, each call one more value of every series."""

    def __init__(self) -> None:
        from ray.util import metrics

        self.metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            more = {"boundaries": list(metric.boundaries)} if metric.boundaries else {}
            made = getattr(metrics, metric.kind.capitalize())(name, metric.description, tag_keys=metric.tags, **more)
            self.metrics[name] = made

    def emit(self) -> None:
        for name, metric in METRICS.items():
            verb = {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind]
            for status in ("200", "500"):
                values = dict.fromkeys(metric.tags, "1") | ({"status": status} if "status" in metric.tags else {})
                getattr(self.metrics[name], verb)(0.5, values)


@pytest.fixture(scope="module")
def scraped(promtool: str) -> Iterator[Callable[[str], list[Any]]]:
    """A Prometheus with our config, but a scrape each second, on a Ray that exports all metrics: runs a query."""
    import ray

    with tempfile.TemporaryDirectory(prefix="oppu-ray-", dir="/tmp") as folder, socket.socket() as free:
        ray.init(
            num_cpus=1,
            include_dashboard=True,  # it writes which nodes there are to scrape
            dashboard_port=0,
            log_to_driver=False,
            object_store_memory=80 * 2**20,
            runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}},
            _temp_dir=folder,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        emitter: Any = ray.remote(Emitter).remote()  # type: ignore[call-overload]
        config = (CLUSTER / "prometheus" / "prometheus.yml").read_text()
        config = config.replace(": 10s", ": 1s").replace("/tmp/ray/", f"{folder}/").replace("rules.yaml", str(RULES))
        (Path(folder) / "prometheus.yml").write_text(config)
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        server = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def query(expression: str) -> list[Any]:
            ray.get(emitter.emit.remote())
            arguments = urllib.parse.urlencode({"query": expression})
            try:
                with urllib.request.urlopen(f"http://{address}/api/v1/query?{arguments}", timeout=10) as response:
                    return list(json.load(response)["data"]["result"])
            except urllib.error.URLError:
                return []  # it has not started yet

        yield query
        server.terminate()
        server.wait()
        ray.shutdown()


def test_every_query_of_every_panel_returns_data(scraped: Callable[[str], list[Any]]) -> None:
    left, deadline = queries(), time.monotonic() + 120
    while left and time.monotonic() < deadline:
        left = {name: text for name, text in left.items() if not finite(scraped(text))}
    assert not left


def finite(result: list[Any]) -> bool:
    """Whether a query returned series, each with a number (a rate without two samples, or 0 / 0, is none)."""
    return bool(result) and all(sample["value"][1] not in ("NaN", "+Inf") for sample in result)


def test_no_scraped_series_of_ours_is_missing_from_the_table(scraped: Callable[[str], list[Any]]) -> None:
    suffixes = re.compile(r"_(bucket|count|sum)$")
    found = {suffixes.sub("", sample["metric"]["__name__"]) for sample in scraped('{__name__=~"ray_oppu.*"}')}
    assert found == {f"ray_{name}" for name in METRICS}
