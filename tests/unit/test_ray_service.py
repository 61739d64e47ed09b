"""deploy/ray/ray-service.yaml has the documented form, and agrees with itself, the settings and the installed Ray.

No cluster is started. Kubernetes' own schemas check the pods, Ray's own schema the application, where Ray is installed.
The schema of RayService comes with KubeRay's operator; here, models with the fields that we use check the form only.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from service.settings import Settings
from tests.paths import BUNDLED, ROOT

FILE = ROOT / "deploy" / "ray" / "ray-service.yaml"


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Form):
    name: str
    namespace: str


class Template(Form):
    spec: dict[str, Any]


class Head(Form):
    ray_start_params: dict[str, str] = Field(alias="rayStartParams")
    template: Template


class Workers(Head):
    group_name: str = Field(alias="groupName")
    replicas: int
    min_replicas: int = Field(alias="minReplicas")
    max_replicas: int = Field(alias="maxReplicas")


class RayCluster(Form):
    ray_version: str = Field(alias="rayVersion")
    autoscaling: bool = Field(alias="enableInTreeAutoscaling")
    head: Head = Field(alias="headGroupSpec")
    workers: list[Workers] = Field(alias="workerGroupSpecs")


class Spec(Form):
    serve_config: str = Field(alias="serveConfigV2")
    cluster: RayCluster = Field(alias="rayClusterConfig")


class RayService(Form):
    api_version: Literal["ray.io/v1"] = Field(alias="apiVersion")
    kind: Literal["RayService"]
    metadata: Metadata
    spec: Spec


@pytest.fixture(scope="module")
def spec() -> Spec:
    return RayService.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8"))).spec


@pytest.fixture(scope="module")
def application(spec: Spec) -> dict[str, Any]:
    (only,) = yaml.safe_load(spec.serve_config)["applications"]
    assert isinstance(only, dict)
    return only


def test_its_pods_are_valid(spec: Spec) -> None:
    for group in (spec.cluster.head, *spec.cluster.workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group.template.spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        (container,) = group.template.spec["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in group.template.spec["volumes"]}


def test_a_replica_fills_a_worker_pod_and_the_head_has_none(spec: Spec, application: dict[str, Any]) -> None:
    (workers,) = spec.cluster.workers
    (container,) = workers.template.spec["containers"]
    arguments = application["args"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert int(container["resources"]["limits"]["cpu"]) == arguments["cpus"]
    assert workers.min_replicas == arguments["min_replicas"]
    assert workers.max_replicas == arguments["max_replicas"]
    assert spec.cluster.head.ray_start_params["num-cpus"] == "0"


def test_its_version_of_ray_is_the_one_that_is_tested(spec: Spec) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert spec.cluster.ray_version == pinned[1]
    assert f'"ray[serve,data]=={pinned[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_service_accepts_its_settings(application: dict[str, Any]) -> None:
    variables = application["runtime_env"]["env_vars"]
    fields = {name.removeprefix("IDDPM_").lower(): value for name, value in variables.items()}
    settings = Settings(host="", **{**fields, "models": (BUNDLED,)})
    assert settings.keys_file is not None  # other pods reach it


def test_ray_accepts_its_application(spec: Spec, application: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    schema = pytest.importorskip("ray.serve.schema")
    serve_app = pytest.importorskip("deploy.ray.serve_app")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(spec.serve_config))
    serve_app.Fleet.model_validate(application["args"])
    module, _, builder = application["import_path"].partition(":")
    assert (module, hasattr(serve_app, builder)) == (serve_app.__name__, True)
