"""Manifests of KubeRay: the fields of the operator's v1 API, strictly, and what it would accept.

The tables name the fields that we use or that people add first; a field that is not in them is
refused with the nearest name. They are a reduction of the operator's CRDs (v1, 2026-11).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from speechalign.clusters.findings import Finding, Values, items, join, mapping, unknown_keys
from speechalign.clusters.placement import NodeKind
from speechalign.clusters.ray_up import POOL_LABEL, UNLABELLED
from speechalign.clusters.serve_file import check_runtime_env, check_serve
from speechalign.config.serving import IMPORT_PATH, ServingConfig

ANY = object()
"""Anything: checked elsewhere, or by Kubernetes."""
RESOURCES = {"requests": ANY, "limits": ANY, "claims": ANY}
CONTAINER: dict[str, Any] = {
    "name!": str, "image!": str, "command": [str], "args": [str], "env": ANY, "envFrom": ANY,
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"), "lifecycle": ANY, "ports": ANY,
    "livenessProbe": ANY, "readinessProbe": ANY, "startupProbe": ANY, "resources": RESOURCES,
    "securityContext": ANY, "volumeMounts": ANY, "workingDir": str, "terminationMessagePath": str,
}  # fmt: skip
POD: dict[str, Any] = {
    "containers!": [CONTAINER], "initContainers": [CONTAINER], "volumes": ANY, "nodeSelector": ANY,
    "tolerations": ANY, "affinity": ANY, "serviceAccountName": str, "securityContext": ANY,
    "terminationGracePeriodSeconds": int, "priorityClassName": str, "imagePullSecrets": ANY,
    "automountServiceAccountToken": bool, "runtimeClassName": str, "hostNetwork": bool,
    "restartPolicy": ("Always", "OnFailure", "Never"), "dnsPolicy": str, "schedulerName": str,
    "topologySpreadConstraints": ANY, "enableServiceLinks": bool,
}  # fmt: skip
TEMPLATE = {"metadata": ANY, "spec!": POD}
DASHBOARD_PORT = 8265
DELETION_DELAY_S = 60
"""The operator's, before a RayService's old cluster is deleted."""
RULES = {"ingressRules": ANY, "egressRules": ANY}
RAY_CLUSTER: dict[str, Any] = {
    "rayVersion!": str, "enableInTreeAutoscaling": bool, "suspend": bool, "managedBy": str,
    "authOptions": {"mode": ("disabled", "token"), "secretName": str, "enableK8sTokenAuth": bool},
    "autoscalerOptions": {
        "idleTimeoutSeconds": int, "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"), "resources": RESOURCES, "image": str, "imagePullPolicy": str,
        "env": ANY, "envFrom": ANY, "securityContext": ANY, "volumeMounts": ANY,
    },
    "gcsFaultToleranceOptions": ANY, "historyServerOptions": ANY, "tlsOptions": ANY,
    "headServiceAnnotations": ANY,
    "networkPolicy": {
        "mode": ("DenyAll", "DenyAllIngress", "DenyAllEgress"), "head": RULES, "worker": RULES,
        "workerGroups": [{"groupName!": str, **RULES}],
    },
    "upgradeStrategy": {"type": ("Recreate", "None")},
    "headGroupSpec!": {
        "rayStartParams": ANY, "template!": TEMPLATE, "labels": ANY, "resources": ANY,
        "serviceType": str, "enableIngress": bool, "headService": ANY, "ingressOptions": ANY,
    },
    "workerGroupSpecs": [{
        "groupName!": str, "template!": TEMPLATE, "replicas": int, "minReplicas": int,
        "maxReplicas": int, "numOfHosts": int, "idleTimeoutSeconds": int, "priority": int,
        "rayStartParams": ANY, "labels": ANY, "resources": ANY, "suspend": bool,
        "scaleStrategy": ANY,
    }],
}  # fmt: skip
SPECS: Mapping[str, dict[str, Any]] = {
    "RayCluster": RAY_CLUSTER,
    "RayJob": {
        "entrypoint!": str, "rayClusterSpec": RAY_CLUSTER, "runtimeEnvYAML": str, "jobId": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int, "backoffLimit": int,
        "activeDeadlineSeconds": int, "preRunningDeadlineSeconds": int, "suspend": bool,
        "entrypointNumCpus": (int, float), "entrypointNumGpus": (int, float), "metadata": ANY,
        "entrypointResources": str, "deletionStrategy": ANY, "clusterSelector": ANY,
        "submitterConfig": {"backoffLimit": int}, "submitterPodTemplate": TEMPLATE,
        "managedBy": str,
    },
    "RayService": {
        "rayClusterConfig!": RAY_CLUSTER, "serveConfigV2!": str, "suspend": bool,
        "excludeHeadPodFromServeSvc": bool, "serveService": ANY, "managedBy": str,
        "rayClusterDeletionDelaySeconds": int, "serviceUnhealthySecondThreshold": int,
        "deploymentUnhealthySecondThreshold": int,
        "upgradeStrategy": {
            "type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
            "clusterUpgradeOptions": {
                "gatewayClassName!": str, "stepSizePercent!": int, "intervalSeconds!": int,
                "maxSurgePercent": int,
            },
        },
    },
}  # fmt: skip
CLUSTER_OF = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
TOP = {"apiVersion!": str, "kind!": tuple(SPECS), "metadata!": ANY, "spec!": ANY}


def check_kuberay(values: Values) -> list[Finding]:
    """Return what is wrong with a RayCluster, RayJob or RayService."""
    findings = list(_fits(values, TOP, ""))
    kind, spec = str(values.get("kind")), mapping(values.get("spec"))
    if values.get("apiVersion") != "ray.io/v1":
        findings.append(Finding("apiVersion", "must be ray.io/v1; v1alpha1 is gone"))
    if not mapping(values.get("metadata")).get("name"):
        findings.append(Finding("metadata.name", "is missing"))
    if kind not in SPECS:
        return findings
    findings += _fits(spec, SPECS[kind], "spec")
    key = CLUSTER_OF[kind]
    cluster, where = (mapping(spec.get(key)), f"spec.{key}") if key else (spec, "spec")
    if cluster:
        findings += _cluster(cluster, where)
    findings += _embedded(spec, "runtimeEnvYAML", check_runtime_env)
    findings += _embedded(spec, "serveConfigV2", check_serve)
    findings += _drains(spec)
    if spec.get("backoffLimit") and not spec.get("shutdownAfterJobFinishes"):
        findings.append(
            Finding("spec.shutdownAfterJobFinishes", "each retry makes a new cluster, and the old "
                    "ones would stay")
        )  # fmt: skip
    return sorted(set(findings))


def worker_groups(values: Values) -> list[NodeKind]:
    """Return each worker group as the kind of node that it makes."""
    spec = mapping(values.get("spec"))
    key = CLUSTER_OF.get(str(values.get("kind")), "")
    cluster = mapping(spec.get(key)) if key else spec
    return [_kind(mapping(one)) for one in items(cluster.get("workerGroupSpecs"))]


def _kind(group: Values) -> NodeKind:
    labels = mapping(group.get("labels"))
    containers = items(mapping(mapping(group.get("template")).get("spec")).get("containers"))
    if "resources" in group or not containers:  # what Ray is told instead is not read here
        return NodeKind(labels=labels, cpus=None, gpus=None)
    limits = mapping(mapping(mapping(containers[0]).get("resources")).get("limits"))
    params = mapping(group.get("rayStartParams"))
    cards = [count for name, count in limits.items() if str(name).endswith("gpu")]
    return NodeKind(
        labels=labels,
        cpus=_count(params.get("num-cpus", limits.get("cpu"))),
        gpus=_count(params.get("num-gpus", cards[0] if cards else 0)),
    )


def _count(quantity: Any) -> int | None:
    """Return a quantity of Kubernetes as the operator tells it to Ray; None: it is no number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(quantity))
    return math.ceil(float(found[1]) / (1000 if found[2] else 1)) if found else None


def _fits(value: Any, shape: Any, where: str) -> Iterator[Finding]:
    """Compare a value with a table: names, types, required fields."""
    if isinstance(shape, dict):
        yield from _fits_table(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield Finding(where, "must be a list")
        for number, one in enumerate(items(value)):
            yield from _fits(one, shape[0], join(where, number))
    elif shape is not ANY:
        yield from _fits_leaf(value, shape, where)


def _fits_leaf(value: Any, shape: Any, where: str) -> Iterator[Finding]:
    if isinstance(shape, tuple) and isinstance(shape[0], str):
        if value not in shape:
            yield Finding(where, f"{value!r} is not one of {', '.join(shape)}")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        name = shape.__name__ if isinstance(shape, type) else "number"
        yield Finding(where, f"{value!r} is no {name}")


def _fits_table(value: Any, shape: dict[str, Any], where: str) -> Iterator[Finding]:
    if not isinstance(value, Mapping):
        yield Finding(where, "must be a mapping")
        return
    fields = {name.rstrip("!"): one for name, one in shape.items()}
    yield from unknown_keys(value, fields, where)
    for name in shape:
        if name.endswith("!") and name[:-1] not in value:
            yield Finding(join(where, name[:-1]), "is missing")
    for name, one in value.items():
        if name in fields:
            yield from _fits(one, fields[name], join(where, name))


def _cluster(cluster: Values, where: str) -> Iterator[Finding]:
    import ray

    version = cluster.get("rayVersion")
    if version != ray.__version__:
        yield Finding(join(where, "rayVersion"), f"{version}, this is Ray {ray.__version__}")
    if mapping(cluster.get("authOptions")).get("mode") != "token":
        yield Finding(join(where, "authOptions.mode"), "set token: the cluster's API runs code")
    if not cluster.get("networkPolicy"):
        yield Finding(join(where, "networkPolicy"), "none: every pod may talk to the cluster")
    if where != "spec":  # a RayJob or a RayService
        yield from _reached_by_the_operator(cluster, where)
    head = mapping(cluster.get("headGroupSpec"))
    place = join(where, "headGroupSpec")
    if str(mapping(head.get("rayStartParams")).get("num-cpus")) != "0":
        yield Finding(place, 'set rayStartParams num-cpus: "0", so that no work lands on the head')
    if mapping(head.get("rayStartParams")).get("dashboard-host") in ("127.0.0.1", "localhost"):
        yield Finding(join(place, "rayStartParams.dashboard-host"), "leave it out: the operator "
                      "sends jobs and Serve's config there, from another pod")  # fmt: skip
    yield from _params(head, place)
    yield from _images(head, place)
    for number, worker in enumerate(items(cluster.get("workerGroupSpecs"))):
        yield from _worker(mapping(worker), join(where, f"workerGroupSpecs.{number}"))


def _reached_by_the_operator(cluster: Values, where: str) -> Iterator[Finding]:
    policy = mapping(cluster.get("networkPolicy"))
    rules = items(mapping(policy.get("head")).get("ingressRules"))
    ports = [mapping(port).get("port") for rule in rules
             for port in items(mapping(rule).get("ports"))]  # fmt: skip
    if policy and policy.get("mode") != "DenyAllEgress" and DASHBOARD_PORT not in ports:
        yield Finding(join(where, "networkPolicy.head.ingressRules"),
                      f"none for port {DASHBOARD_PORT}: the operator could not send the job or "
                      "Serve's config")  # fmt: skip


def _worker(group: Values, where: str) -> Iterator[Finding]:
    # The API server fills in these defaults before anything is compared.
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield Finding(where, f"minReplicas {least} exceeds maxReplicas {most}")
    if "maxReplicas" not in group:
        yield Finding(where, "no maxReplicas: the group could grow without end")
    if POOL_LABEL not in mapping(group.get("labels")):
        yield Finding(where, UNLABELLED)
    yield from _params(group, where)
    yield from _images(group, where)
    grace = mapping(mapping(group.get("template")).get("spec")).get("terminationGracePeriodSeconds")
    if not isinstance(grace, int) or grace < 60:
        yield Finding(join(where, "template.spec.terminationGracePeriodSeconds"),
                      f"{grace}: a stopped worker needs at least 60 s to save")  # fmt: skip


def _drains(spec: Values) -> Iterator[Finding]:
    """Find what would end the streams of a RayService before Serve does."""
    drain_s = _drain_s(spec)
    delay_s = spec.get("rayClusterDeletionDelaySeconds", DELETION_DELAY_S)
    if isinstance(delay_s, int) and delay_s < drain_s:
        yield Finding(
            "spec.rayClusterDeletionDelaySeconds",
            f"{delay_s}: streams of the old cluster may take drain_s, {drain_s:g} s",
        )
    groups = items(mapping(spec.get("rayClusterConfig")).get("workerGroupSpecs"))
    for number, group in enumerate(groups):
        pod = mapping(mapping(mapping(group).get("template")).get("spec"))
        grace_s = pod.get("terminationGracePeriodSeconds")
        if isinstance(grace_s, int) and grace_s < drain_s:
            place = f"spec.rayClusterConfig.workerGroupSpecs.{number}.template.spec"
            yield Finding(
                join(place, "terminationGracePeriodSeconds"),
                f"{grace_s}: streams may take the endpoint's drain_s, {drain_s:g} s",
            )


def _drain_s(spec: Values) -> float:
    """Return how long our application may finish its streams; 0 without one."""
    try:
        served = mapping(yaml.safe_load(str(spec.get("serveConfigV2"))))
    except yaml.YAMLError:
        return 0.0  # which is said where it stands
    usual = ServingConfig.model_fields["drain_s"].default
    applications = [mapping(one) for one in items(served.get("applications"))]
    given = [mapping(one.get("args")).get("drain_s", usual)
             for one in applications if one.get("import_path") == IMPORT_PATH]  # fmt: skip
    return max((float(one) for one in given if isinstance(one, int | float)), default=0.0)


def _params(group: Values, where: str) -> Iterator[Finding]:
    for key, value in mapping(group.get("rayStartParams")).items():
        if not isinstance(value, str):
            yield Finding(join(where, f"rayStartParams.{key}"), f"{value!r} is no text; quote it")


def _images(group: Values, where: str) -> Iterator[Finding]:
    import ray

    spec = mapping(mapping(group.get("template")).get("spec"))
    for number, container in enumerate(items(spec.get("containers"))):
        one, place = mapping(container), join(where, f"template.spec.containers.{number}")
        image = str(one.get("image", ""))
        tag = image.rpartition(":")[2] if ":" in image else ""
        if tag in ("", "latest"):
            yield Finding(join(place, "image"), f"{image} is not pinned; name a tag")
        versions = re.findall(r"ray(\d+\.\d+\.\d+)", tag)
        if tag not in ("", "latest") and versions != [ray.__version__]:
            yield Finding(join(place, "image"), f"its tag does not say ray{ray.__version__}")
        resources = mapping(one.get("resources"))
        if not resources.get("requests") or not resources.get("limits"):
            yield Finding(join(place, "resources"), "set requests and limits: Ray reads them")


def _embedded(spec: Values, key: str, check: Any) -> Iterator[Finding]:
    """Check a YAML text inside the manifest."""
    text = spec.get(key)
    if not isinstance(text, str):
        return
    where = f"spec.{key}"
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield Finding(where, f"is no YAML: {error}")
        return
    if not isinstance(values, Mapping):
        yield Finding(where, "must hold a mapping")
        return
    for finding in check(values):
        yield Finding(join(where, finding.where), finding.what)
