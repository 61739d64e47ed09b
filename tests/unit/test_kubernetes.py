"""The files of deploy/kubernetes are valid, and agree with compose, the proxy, the image and the settings.

No cluster is started. Kubernetes' own schemas check the built-in kinds. Schemas of custom kinds come with their
operators; here, small models with the fields that we use check the form only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field

from service.http.server import STRAGGLER_SECONDS
from service.metrics import Metrics
from service.settings import Settings
from tests.paths import ROOT
from tests.programs import tool
from tests.waiting import PATIENCE_S

FOLDER = ROOT / "deploy" / "kubernetes"
HAPROXY = ROOT / "deploy" / "haproxy"
OVERLAYS = ["cpu", "gpu", "tensorrt", "keda"]
ON_GPUS = {"gpu", "tensorrt"}

Objects = dict[tuple[str, str], dict[str, Any]]


def render(overlay: str) -> Objects:
    """Return the objects of an overlay by kind and name, as `kubectl apply -k` would send them."""
    kubectl = Path(sys.executable).with_name("kubectl")
    text = subprocess.run(
        [kubectl, "kustomize", FOLDER / "overlays" / overlay],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout
    objects = list(yaml.safe_load_all(text))
    found = {(item["kind"], item["metadata"]["name"].partition("-config-")[0]): item for item in objects}
    assert len(found) == len(objects)
    return found


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def objects(overlay: str) -> Objects:
    return render(overlay)


@pytest.fixture(scope="module")
def keda() -> Objects:
    return render("keda")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    gpu = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))["services"]["api"]
    return services | {"gpu": gpu}


@pytest.fixture(scope="module")
def haproxy() -> str:
    return (HAPROXY / "haproxy.cfg").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


def seconds(text: str) -> int:
    """Read a time as written for HAProxy and compose: 60s, 15m."""
    match = re.fullmatch(r"(\d+)(s|m)", text)
    assert match is not None, text
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, pattern
    return match[1]


def pod(objects: Objects, name: str) -> dict[str, Any]:
    template: dict[str, Any] = objects["Deployment", name]["spec"]["template"]
    return template


def container(objects: Objects, name: str) -> dict[str, Any]:
    (only,) = pod(objects, name)["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def variables(objects: Objects, name: str) -> dict[str, str]:
    """Return a container's environment in the namespace of the files, with references replaced."""
    values: dict[str, str] = {}
    for item in container(objects, name)["env"]:
        value = item.get("value", "iddpm")
        values[item["name"]] = re.sub(r"\$\((\w+)\)", lambda reference: values[reference[1]], value)
    return values


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Form):
    name: str
    namespace: str
    labels: dict[str, str] = {}


class MatchLabels(Form):
    match_labels: dict[str, str] = Field(alias="matchLabels")


class SecretKey(Form):
    name: str
    key: str


class Authorization(Form):
    credentials: SecretKey


class Endpoint(Form):
    port: str
    path: str
    interval: str = Field(pattern=r"^\d+s$")
    scrape_timeout: str = Field(alias="scrapeTimeout", pattern=r"^\d+s$")
    params: dict[str, list[str]] = {}
    authorization: Authorization | None = None


class MonitorSpec(Form):
    selector: MatchLabels
    endpoints: list[Endpoint]


class ServiceMonitor(Form):
    api_version: Literal["monitoring.coreos.com/v1"] = Field(alias="apiVersion")
    kind: Literal["ServiceMonitor"]
    metadata: Metadata
    spec: MonitorSpec


class Target(Form):
    name: str


class Query(Form):
    server_address: str = Field(alias="serverAddress", pattern="^http://")
    threshold: str  # every value of a trigger's metadata is text
    query: str


class Trigger(Form):
    type: Literal["prometheus"]
    metric_type: Literal["Value", "AverageValue"] = Field(alias="metricType")
    metadata: Query


class ScaledSpec(Form):
    scale_target_ref: Target = Field(alias="scaleTargetRef")
    polling_interval: int = Field(alias="pollingInterval")
    min_replica_count: int = Field(alias="minReplicaCount")
    max_replica_count: int = Field(alias="maxReplicaCount")
    advanced: dict[Literal["horizontalPodAutoscalerConfig"], dict[Literal["behavior"], dict[str, Any]]]
    triggers: list[Trigger]


class ScaledObject(Form):
    api_version: Literal["keda.sh/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledSpec


def autoscaler(scaled: ScaledObject) -> dict[str, Any]:
    """Return the HorizontalPodAutoscaler that KEDA makes of an object, without its metrics."""
    spec = scaled.spec
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": f"keda-hpa-{scaled.metadata.name}"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec.scale_target_ref.name},
            "minReplicas": spec.min_replica_count,
            "maxReplicas": spec.max_replica_count,
            **spec.advanced["horizontalPodAutoscalerConfig"],
        },
    }


def test_every_object_has_the_form_of_its_kind(objects: Objects) -> None:
    for (kind, _), item in objects.items():
        match kind:
            case "ServiceMonitor":
                ServiceMonitor.model_validate(item)
            case "ScaledObject":
                hpa = autoscaler(ScaledObject.model_validate(item))
                kubernetes_validate.validate(hpa, kubernetes_validate.latest_version(), strict=True)
            case _:
                kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
        assert item["metadata"]["namespace"] == "iddpm"


def test_the_validator_refuses_an_unknown_field(objects: Objects) -> None:
    wrong = json.loads(json.dumps(objects["Deployment", "api"]))
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_selectors_and_port_names_refer_to_something(objects: Objects) -> None:
    labels = {name: pod(objects, name)["metadata"]["labels"] for name in ("api", "proxy")}
    ports = {name: {p["name"]: p["containerPort"] for p in container(objects, name)["ports"]} for name in labels}
    for name, pod_labels in labels.items():
        service = objects["Service", name]
        assert service["spec"]["selector"].items() <= pod_labels.items()
        assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == ports[name]
        for kind in ("Deployment", "PodDisruptionBudget"):
            assert objects[kind, name]["spec"]["selector"]["matchLabels"].items() <= pod_labels.items()
        policy = objects["NetworkPolicy", name]["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= pod_labels.items()
        assert {p["port"] for rule in policy["ingress"] for p in rule["ports"]} == set(ports[name].values())
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            action = container(objects, name).get(probe, {})
            target = action.get("httpGet") or action.get("tcpSocket") or {"port": "http"}
            assert target["port"] in ports[name]
        if monitor := objects.get(("ServiceMonitor", name)):
            selected = monitor["spec"]["selector"]["matchLabels"].items()
            assert selected <= service["metadata"]["labels"].items()
            assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= set(ports[name])


def test_only_the_proxy_and_prometheus_reach_a_replica(objects: Objects) -> None:
    (rule,) = objects["NetworkPolicy", "api"]["spec"]["ingress"]
    assert rule["from"] == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "proxy"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]
    assert objects["NetworkPolicy", "api"]["spec"].get("egress", []) == []
    assert objects["NetworkPolicy", "api"]["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_ports_are_those_of_the_image_and_the_proxy(objects: Objects, haproxy: str, dockerfile: str) -> None:
    (api,) = container(objects, "api")["ports"]
    assert f"EXPOSE {api['containerPort']}" in dockerfile
    assert f'"--port", "{api["containerPort"]}"' in dockerfile
    assert f'"${{API_HOST-api}}:{api["containerPort"]}" resolvers' in haproxy
    for port in container(objects, "proxy")["ports"]:
        assert f"bind :{port['containerPort']}\n" in haproxy


def test_a_stop_outlasts_the_drain(objects: Objects, compose: dict[str, Any], haproxy: str) -> None:
    longest = seconds(found(r"^\s*timeout server\s+(\S+)", haproxy))
    lower = {
        "api": max(longest + STRAGGLER_SECONDS, seconds(compose["api"]["stop_grace_period"])),
        "proxy": max(seconds(found(r"hard-stop-after (\S+)", haproxy)), seconds(compose["proxy"]["stop_grace_period"])),
    }
    for name, drain in lower.items():
        before = container(objects, name)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert before > 0
        assert pod(objects, name)["spec"]["terminationGracePeriodSeconds"] >= before + drain


def test_probes_ask_what_the_health_checks_of_the_image_and_of_compose_ask(
    objects: Objects, overlay: str, compose: dict[str, Any], dockerfile: str, haproxy: str
) -> None:
    api = container(objects, "api")
    ready = found(r"'GET', '(\S+)'", compose["api"]["healthcheck"]["test"][-1])
    alive = found(r"'GET', '(\S+)'", dockerfile)
    assert f"http-check send meth GET uri {ready} " in haproxy
    assert api["startupProbe"]["httpGet"]["path"] == api["readinessProbe"]["httpGet"]["path"] == ready
    assert api["livenessProbe"]["httpGet"]["path"] == alive
    assert f"--interval={api['livenessProbe']['periodSeconds']}s" in dockerfile
    start = compose["gpu" if overlay in ON_GPUS else "api"]["healthcheck"]["start_period"]
    probe = api["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == seconds(start)
    assert objects["Deployment", "api"]["spec"].get("progressDeadlineSeconds", 600) > seconds(start)


def test_images_are_those_of_compose(objects: Objects, overlay: str, compose: dict[str, Any]) -> None:
    image, _, tag = container(objects, "api")["image"].partition(":")
    assert image == compose["gpu" if overlay in ON_GPUS else "api"]["image"]
    assert tag == found(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert container(objects, "proxy")["image"] == compose["proxy"]["image"]


def test_the_service_accepts_its_settings(objects: Objects, overlay: str, compose: dict[str, Any]) -> None:
    values = variables(objects, "api")
    fields = {name.removeprefix("IDDPM_").lower(): value for name, value in values.items()}
    settings = Settings(models=(ROOT / "models" / "fashion32",), **fields)  # type: ignore[arg-type]
    assert settings.keys_file is not None  # other pods reach the proxy
    assert not settings.allow_keyless
    assert values["IDDPM_ALLOWED_HOSTS"] == compose["api"]["environment"]["IDDPM_ALLOWED_HOSTS"]
    for_one_proxy = int(found(r":-(.*)\}", compose["api"]["environment"]["IDDPM_MAX_QUEUE"]))
    assert settings.max_queue == for_one_proxy * objects["Deployment", "proxy"]["spec"]["replicas"]
    networks = found(r":-(.*)\}", compose["api"]["environment"]["IDDPM_TRUSTED_PROXIES"]).split(",")
    assert set(networks) <= set(values["IDDPM_TRUSTED_PROXIES"].split(","))
    if overlay in ON_GPUS:
        defaults = {name: re.sub(r"^\$\{\w+:?-(.*)\}$", r"\1", v) for name, v in compose["gpu"]["environment"].items()}
        assert defaults.items() <= {**values, "IDDPM_BACKEND": "torch"}.items()


def test_replicas_with_tensorrt_share_the_engines_that_they_build() -> None:
    objects = render("tensorrt")
    values, only = variables(objects, "api"), container(objects, "api")
    assert (values["IDDPM_BACKEND"], values["IDDPM_BUILD_ENGINES"]) == ("tensorrt", "true")
    (mount,) = [mount for mount in only["volumeMounts"] if mount["mountPath"] == values["IDDPM_ENGINES_DIR"]]
    assert not mount.get("readOnly")
    (volume,) = [volume for volume in pod(objects, "api")["spec"]["volumes"] if volume["name"] == mount["name"]]
    claim = objects["PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert objects["Deployment", "api"]["spec"]["replicas"] > 1


def test_containers_run_without_privileges_on_a_read_only_root(objects: Objects, dockerfile: str) -> None:
    for name in ("api", "proxy"):
        spec, only = pod(objects, name)["spec"], container(objects, name)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert only["resources"]["limits"]["memory"] == only["resources"]["requests"]["memory"]
        assert {mount["name"] for mount in only["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    user = pod(objects, "api")["spec"]["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in dockerfile
    assert user["fsGroup"] == user["runAsGroup"]  # the keys' files are readable for the group
    volumes = {volume["name"]: volume for volume in pod(objects, "api")["spec"]["volumes"]}
    writable = {
        mount["mountPath"]
        for mount in container(objects, "api")["volumeMounts"]
        if "emptyDir" in volumes[mount["name"]]
    }
    caches = re.findall(r"\b(?:HOME|TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR|CUDA_CACHE_PATH)=(/\w+)", dockerfile)
    assert len(caches) == 4
    assert set(caches) == writable


def test_threads_are_whole_cores(objects: Objects) -> None:
    resources = container(objects, "api")["resources"]
    assert resources["limits"] == resources["requests"]  # guaranteed: other pods cannot slow a step down
    assert resources["limits"]["cpu"].isdecimal()
    assert resources["limits"].get("nvidia.com/gpu") in {None, 1}


def test_the_proxy_has_the_configuration_of_compose(objects: Objects, compose: dict[str, Any], tmp_path: Path) -> None:
    data = objects["ConfigMap", "proxy"]["data"]
    assert set(data) == {"haproxy.cfg", "errors.map"}
    for name, content in data.items():
        assert content == (HAPROXY / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(content, encoding="utf-8")
    (mount,) = container(objects, "proxy")["volumeMounts"]
    assert f":{mount['mountPath']}:ro" in compose["proxy"]["volumes"][0]
    (volume,) = pod(objects, "proxy")["spec"]["volumes"]
    assert volume["configMap"]["name"] == objects["ConfigMap", "proxy"]["metadata"]["name"]  # with the content's hash
    environment = variables(objects, "proxy")
    assert environment["API_HOST"] == "api.iddpm.svc.cluster.local"
    assert set(re.sub(r"^\$\{\w+:?-(.*)\}$", r"\1", compose["proxy"]["environment"]["ALLOWED_HOSTS"]).split()) < set(
        environment["ALLOWED_HOSTS"].split()
    )
    checked = subprocess.run(
        [tool("haproxy"), "-c", "-f", tmp_path / "haproxy.cfg"],
        env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_the_autoscaler_owns_the_number_of_replicas(keda: Objects, haproxy: str) -> None:
    scaled = ScaledObject.model_validate(keda["ScaledObject", "api"]).spec
    assert ("Deployment", scaled.scale_target_ref.name) in keda
    assert "replicas" not in keda["Deployment", scaled.scale_target_ref.name]["spec"]
    assert render("cpu")["Deployment", "api"]["spec"]["replicas"] == scaled.min_replica_count
    slots = {int(number) for number in re.findall(r"server-template api- (\d+) ", haproxy)}
    assert slots == {scaled.max_replica_count}
    wait, waiting = scaled.triggers
    assert (wait.metric_type, waiting.metric_type) == ("Value", "AverageValue")
    in_flight = int(found(r"default-server check inter 500ms .* maxconn (\d+)", haproxy))
    assert int(waiting.metadata.threshold) * 4 == in_flight


def test_the_autoscaler_s_queries_use_our_metrics(keda: Objects, haproxy: str) -> None:
    queries = [trigger["metadata"]["query"] for trigger in keda["ScaledObject", "api"]["spec"]["triggers"]]
    used = set(re.findall(r"\biddpm_\w+", " ".join(queries).replace('"iddpm"', "")))
    exposed = set(re.findall(r"^(iddpm_\w+)", generate_latest(Metrics().registry).decode(), re.MULTILINE))
    assert used == {"iddpm_predicted_wait_seconds_sum", "iddpm_predicted_wait_seconds_count"} <= exposed
    assert 'proxy="generate"' in queries[1]
    assert "\nbackend generate\n" in haproxy


@pytest.mark.parametrize(
    ("sums", "counts", "queues", "wait", "waiting"),
    [
        (["0+60x20", "0+20x20"], ["0+6x20", "0+2x20"], ["3x20", "4x20"], 10, 7),  # 80 s of 8 requests
        (["7x20"], ["3x20"], ["0x20"], 0, 0),  # no request in the last minute
        ([], [], [], 0, 0),  # no replica was scraped yet
    ],
)
def test_the_autoscaler_s_queries_give_one_number(
    keda: Objects, tmp_path: Path, sums: list[str], counts: list[str], queues: list[str], wait: float, waiting: float
) -> None:
    series = [
        {"series": f'{name}{{namespace="iddpm",proxy="generate",pod="{k}"}}', "values": values}
        for name, pods in (
            ("iddpm_predicted_wait_seconds_sum", sums),
            ("iddpm_predicted_wait_seconds_count", counts),
            ("haproxy_backend_current_queue", queues),
        )
        for k, values in enumerate(pods)
    ]
    triggers = keda["ScaledObject", "api"]["spec"]["triggers"]
    expected = [
        {"expr": trigger["metadata"]["query"], "eval_time": "3m", "exp_samples": [{"labels": "{}", "value": value}]}
        for trigger, value in zip(triggers, (wait, waiting), strict=True)
    ]
    file = tmp_path / "queries.json"  # JSON is YAML
    file.write_text(json.dumps({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": expected}]}))
    checked = subprocess.run(
        [tool("promtool"), "test", "rules", file], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
