"""Every shipped cluster file passes; every known mistake is found, with the right message."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from speechalign.cli import app
from speechalign.clusters.check import check_file
from speechalign.config.align import AlignConfig
from speechalign.config.load import load_config
from speechalign.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLUSTERS = Path("clusters")
SHIPPED = [*sorted(CLUSTERS.glob("*.yaml")), *sorted(CLUSTERS.glob("kuberay/*.yaml")),
           *sorted(Path("jobs").glob("serve-*.yaml"))]  # fmt: skip
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_a_shipped_file_has_no_mistake(file: Path):
    assert check_file(file) == []


def test_there_is_a_file_for_every_place():
    names = {file.stem for file in SHIPPED}
    assert {"local", "aws", "gcp", "raycluster", "rayjob", "rayservice"} <= names


def findings_after(file: str, change: Change, folder: Path) -> list[str]:
    values = copy.deepcopy(yaml.safe_load(Path(file).read_text()))
    change(values)
    bad = folder / "bad.yaml"
    bad.write_text(yaml.safe_dump(values, sort_keys=False))
    return [str(finding) for finding in check_file(bad)]


def types(values: dict[str, Any]) -> dict[str, Any]:
    return values["available_node_types"]


AWS_MISTAKES: list[tuple[str, Change]] = [
    ("'max_worker' was unexpected", lambda v: v.update(max_worker=1)),
    ("'label' was unexpected", lambda v: types(v)["trainer"].update(label={})),
    ("1.5 is not of type 'integer'", lambda v: types(v)["trainer"]["resources"].update(memory=1.5)),
    ("'resources' is a required property", lambda v: types(v)["trainer"].pop("resources")),
    ("`head_node_type` must be one of", lambda v: v.update(head_node_type="chief")),
    ("Must provide a container", lambda v: v["docker"].pop("container_name")),
    ("-1 is less than the minimum of 0", lambda v: v.update(idle_timeout_minutes=-1)),
    ("Unsupported node provider: awss", lambda v: v["provider"].update(type="awss")),
    ("provider.regoin: unknown key; did you mean 'region'",
     lambda v: v["provider"].update(regoin="x")),
    ("min_workers 3 exceeds max_workers 2", lambda v: types(v)["trainer"].update(min_workers=3)),
    ("no max_workers", lambda v: types(v)["trainer"].pop("max_workers")),
    ("the head's type must have 0 workers", lambda v: types(v)["head"].update(max_workers=1)),
    ("set CPU: 0", lambda v: types(v)["head"]["resources"].update(CPU=8)),
    ("a spot head", lambda v: types(v)["head"]["node_config"].update(
        InstanceMarketOptions={"MarketType": "spot"})),
    ("trainers on spot machines", lambda v: types(v)["trainer"]["node_config"].update(
        InstanceMarketOptions={"MarketType": "spot"})),
    ("g9.huge is not in the table", lambda v: types(v)["trainer"]["node_config"].update(
        InstanceType="g9.huge")),
    ("96, but g5.12xlarge has 48", lambda v: types(v)["trainer"]["resources"].update(CPU=96)),
    ("g5.12xlarge has 4 GPUs", lambda v: types(v)["trainer"]["resources"].update(GPU=2)),
    ("an old image", lambda v: types(v)["trainer"]["node_config"].update(ImageId="latest_dlami")),
    ("no label speechalign-pool: a recipe whose selectors", lambda v: types(v)["trainer"].pop(
        "labels")),
    ("Ray refuses it: KeyError: 'type'", lambda v: v.update(provider={"region": "us-west-2"})),
    ("available_node_types.trainer: no max_workers", lambda v: types(v).update(trainer=None)),
    ("/no/such/file does not exist", lambda v: v["file_mounts"].update({"/x": "/no/such/file"})),
    ("no ~/.ray/auth_token", lambda v: v.update(file_mounts={})),
    ("leave out the one at /home/ubuntu/.ray", lambda v: v["docker"]["run_options"].append(
        "-v /home/ubuntu/.ray:/home/ubuntu/.ray:ro")),
    ("leave out the one at /home/ubuntu", lambda v: v["docker"].update(
        head_run_options=["--mount", "type=bind,source=/home,target=/home/ubuntu,readonly"])),
    ("add -e RAY_AUTH_MODE=token", lambda v: v["docker"].update(run_options=[])),
    ("is not pinned", lambda v: v["docker"].update(image="speechalign:latest")),
    ("is not pinned", lambda v: v["docker"].update(image="speechalign")),
    ("its tag says Ray 2.9.0", lambda v: v["docker"].update(image="speechalign:1-ray2.9.0")),
    ("no image", lambda v: v["docker"].update(image="")),
    ("at least 1", lambda v: v.update(idle_timeout_minutes=0.1)),
    ("Ray drops it silently", lambda v: v.update(min_workers=1)),
    ("leave it at 127.0.0.1", lambda v: v.update(
        head_start_ray_commands=["ray start --head --dashboard-host=0.0.0.0"])),
]  # fmt: skip


@pytest.mark.parametrize(("says", "change"), AWS_MISTAKES, ids=[m for m, _ in AWS_MISTAKES])
def test_a_mistake_in_a_file_of_ray_up_is_found(says: str, change: Change, tmp_path: Path):
    assert any(says in finding for finding in findings_after("clusters/aws.yaml", change, tmp_path))


def test_a_volume_elsewhere_is_no_mistake(tmp_path: Path):
    def change(values: dict[str, Any]) -> None:
        values["docker"]["run_options"] += ["-v /mnt/efs:/shared", "--volume=/home/ubuntu2:/home/u"]

    assert findings_after("clusters/aws.yaml", change, tmp_path) == []


GCP_MISTAKES: list[tuple[str, Change]] = [
    ("name the project", lambda v: v["provider"].update(project_id=None)),
    ("need onHostMaintenance: TERMINATE",
     lambda v: types(v)["trainer"]["node_config"].pop("scheduling")),
    ("trainers on spot machines",
     lambda v: types(v)["trainer"]["node_config"]["scheduling"].append({"preemptible": True})),
]  # fmt: skip


@pytest.mark.parametrize(("says", "change"), GCP_MISTAKES, ids=[m for m, _ in GCP_MISTAKES])
def test_a_mistake_on_gcp_is_found(says: str, change: Change, tmp_path: Path):
    assert any(says in finding for finding in findings_after("clusters/gcp.yaml", change, tmp_path))


def cluster(values: dict[str, Any]) -> dict[str, Any]:
    return values["spec"]["rayClusterConfig"]


def group(values: dict[str, Any]) -> dict[str, Any]:
    return cluster(values)["workerGroupSpecs"][0]


def container(values: dict[str, Any]) -> dict[str, Any]:
    return group(values)["template"]["spec"]["containers"][0]


def edit_serve(**changes: Any) -> Change:
    def change(values: dict[str, Any]) -> None:
        serve = yaml.safe_load(values["spec"]["serveConfigV2"])
        serve["applications"][0].update(changes)
        values["spec"]["serveConfigV2"] = yaml.safe_dump(serve)

    return change


SERVICE_MISTAKES: list[tuple[str, Change]] = [
    ("maxReplica: unknown key; did you mean", lambda v: group(v).update(maxReplica=1)),
    ("no maxReplicas", lambda v: group(v).pop("maxReplicas")),
    ("minReplicas 9 exceeds", lambda v: group(v).update(minReplicas=9)),
    ("'2' is no int", lambda v: group(v).update(maxReplicas="2")),
    ("template: is missing", lambda v: group(v).pop("template")),
    ("must be a list", lambda v: cluster(v).update(workerGroupSpecs={})),
    ("resource: unknown key", lambda v: container(v).update(resource={})),
    ("set requests and limits", lambda v: container(v).pop("resources")),
    ("is not pinned", lambda v: container(v).update(image="speechalign:latest")),
    ("does not say ray", lambda v: container(v).update(image="speechalign:1.0")),
    ("at least 60 s to save", lambda v: group(v)["template"]["spec"].update(
        terminationGracePeriodSeconds=30)),
    ("PeriodSeconds: 299: streams may take the endpoint's drain_s, 300 s",
     lambda v: group(v)["template"]["spec"].update(terminationGracePeriodSeconds=299)),
    ("DelaySeconds: 299: streams of the old cluster may take drain_s, 300 s",
     lambda v: v["spec"].update(rayClusterDeletionDelaySeconds=299)),
    ("DelaySeconds: 60: streams of", lambda v: v["spec"].pop("rayClusterDeletionDelaySeconds")),
    ("none for port 8265", lambda v: cluster(v)["networkPolicy"]["head"].update(
        ingressRules=["8265"])),
    ("none for port 8265", lambda v: cluster(v)["networkPolicy"]["head"]["ingressRules"].pop(0)),
    ("leave it out: the operator", lambda v: cluster(v)["headGroupSpec"]["rayStartParams"].update(
        {"dashboard-host": "127.0.0.1"})),
    ("0 is no text", lambda v: group(v).update(rayStartParams={"num-cpus": 0})),
    ("no work lands on the head", lambda v: cluster(v)["headGroupSpec"].update(rayStartParams={})),
    ("the cluster's API runs code", lambda v: cluster(v).pop("authOptions")),
    ("'tokens' is not one of", lambda v: cluster(v)["authOptions"].update(mode="tokens")),
    ("every pod may talk", lambda v: cluster(v).pop("networkPolicy")),
    ("2.9.0, this is Ray", lambda v: cluster(v).update(rayVersion="2.9.0")),
    ("must be ray.io/v1", lambda v: v.update(apiVersion="ray.io/v1alpha1")),
    ("'RayServe' is not one of", lambda v: v.update(kind="RayServe")),
    ("metadata.name: is missing", lambda v: v.update(metadata={"name": ""})),
    ("spec.serveConfigV2: is missing", lambda v: v["spec"].pop("serveConfigV2")),
    ("spec.serveConfigV2: is no YAML", lambda v: v["spec"].update(serveConfigV2="a: [")),
    ("serveConfigV2.applications.0.import_pat: unknown key", edit_serve(import_pat="x")),
    ("'working_dir'", edit_serve(runtime_env={"working_dirr": "x"})),
    ("is no remote URI", edit_serve(runtime_env={"working_dir": "."})),
    ("others reach 0.0.0.0", edit_serve(args={
        "nar": "n", "policies": {"a": {"path": "p"}}, "voices": {"golden": "g"},
        "access": {"allow_anonymous": True}})),
    ("did you mean 'policies'", edit_serve(args={"nar": "n", "policy": {}})),
    ("max_ongoing_request: unknown key",
     edit_serve(deployments=[{"name": "ingress", "max_ongoing_request": 3}])),
    ("Serve would fail later", edit_serve(deployments=[
        {"name": "ingress", "autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}])),
]  # fmt: skip


@pytest.mark.parametrize(("says", "change"), SERVICE_MISTAKES, ids=[m for m, _ in SERVICE_MISTAKES])
def test_a_mistake_in_a_manifest_is_found(says: str, change: Change, tmp_path: Path):
    found = findings_after("clusters/kuberay/rayservice.yaml", change, tmp_path)
    assert any(says in finding for finding in found), found


def test_a_job_that_retries_without_going_away_is_found(tmp_path: Path):
    def change(values: dict[str, Any]) -> None:
        del values["spec"]["shutdownAfterJobFinishes"]
        values["spec"]["runtimeEnvYAML"] = "env_vars: {A: 1}"

    found = " ".join(findings_after("clusters/kuberay/rayjob.yaml", change, tmp_path))
    assert "each retry makes a new cluster" in found
    assert "spec.runtimeEnvYAML.env_vars.A: 1 is no text" in found


def test_all_mistakes_of_a_file_are_told_at_once_and_the_exit_code_is_2(tmp_path: Path):
    values = yaml.safe_load(Path("clusters/aws.yaml").read_text())
    values["provider"]["regoin"] = "x"
    values["docker"]["image"] = "speechalign:latest"
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    told = CliRunner().invoke(app, ["clusters", "check", str(tmp_path / "two.yaml")])
    assert told.exit_code == 2
    assert "regoin" in told.output
    assert "not pinned" in told.output
    fine = CliRunner().invoke(app, ["clusters", "check", "clusters/aws.yaml"])
    assert (fine.exit_code, fine.output.strip()) == (0, "clusters/aws.yaml: ok")


def recipe_with(*overrides: str, name: str = "align-embedded-cpu") -> AlignConfig:
    return load_config(AlignConfig, Path(f"jobs/{name}.yaml"), overrides)


def test_a_recipe_that_no_node_fits_is_found():
    wanted = recipe_with(
        "pools.sample.label_selector={speechalign-pool: sample}",
        "training.workers.label_selector={speechalign-pool: gold}",
    )
    (finding,) = check_file(CLUSTERS / "aws.yaml", wanted)
    assert finding.where == "training.workers.label_selector"
    assert "speechalign-pool=gold; no node type of this cluster has it" in finding.what


CLOUDS = [CLUSTERS / "aws.yaml", CLUSTERS / "gcp.yaml", CLUSTERS / "kuberay" / "raycluster.yaml",
          CLUSTERS / "kuberay" / "rayjob.yaml"]  # fmt: skip


@pytest.mark.parametrize("file", CLOUDS, ids=str)
def test_an_actor_that_has_room_on_no_node_is_found(file: Path):
    gpus = recipe_with("pools.render.num_gpus=5", "training.workers.cpus_per_worker=49")
    workers, render = sorted(check_file(file, gpus), reverse=True)
    assert render.where == "pools.render"
    assert "one actor wants 0.25 CPUs and 5 GPUs; no node type has as many" in render.what
    assert workers.where == "training.workers"
    assert "one actor wants 49 CPUs and 0 GPUs" in workers.what
    selector = "pools.sample.label_selector={speechalign-pool: judge}"
    (finding,) = check_file(file, recipe_with(selector, "pools.sample.num_gpus=1"))
    assert finding.where == "pools.sample"
    assert "no node type with speechalign-pool=judge has as many" in finding.what


def test_machines_of_which_the_file_says_nothing_are_no_finding(tmp_path: Path):
    wanted = recipe_with("pools.render.num_gpus=99")
    assert check_file(CLUSTERS / "local.yaml", wanted) == []
    values = yaml.safe_load((CLUSTERS / "kuberay" / "raycluster.yaml").read_text())
    values["spec"]["workerGroupSpecs"][0]["resources"] = {"GPU": "100"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    assert check_file(tmp_path / "x.yaml", wanted) == []


def test_a_part_of_a_core_is_rounded_up_as_the_operator_does(tmp_path: Path):
    values = yaml.safe_load((CLUSTERS / "kuberay" / "raycluster.yaml").read_text())
    for worker in values["spec"]["workerGroupSpecs"]:
        worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "1500m"
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    assert check_file(tmp_path / "x.yaml", recipe_with("pools.render.num_cpus=2")) == []
    (finding,) = check_file(tmp_path / "x.yaml", recipe_with("pools.render.num_cpus=2.5"))
    assert finding.where == "pools.render"


GPU_RECIPES = ("align-single-gpu", "align-paper-8gpu")
SAYS_WHERE = [*CLOUDS[:2], *(Path(f"jobs/{name}.yaml") for name in GPU_RECIPES)]


@pytest.mark.parametrize("name", GPU_RECIPES)
@pytest.mark.parametrize("file", SAYS_WHERE, ids=str)
def test_the_placement_that_the_comments_name_keeps_trainers_off_spot_nodes(file: Path, name: str):
    lines = re.findall(r"^#   '(\S+label_selector=\{.*\})'$", file.read_text(), re.MULTILINE)
    placed = recipe_with(*lines, name=name)
    assert placed.training.workers.label_selector == {"speechalign-pool": "train"}
    assert placed.pools.sample.label_selector == {"speechalign-pool": "sample"}
    assert placed.pools.render.label_selector == {"speechalign-pool": "judge"}
    for cloud in CLOUDS:
        assert check_file(cloud, placed) == []
        assert check_file(cloud, recipe_with(name=name)) == []


def test_a_speaker_gets_requests_when_the_proxy_of_its_pod_answers():
    values = yaml.safe_load((CLUSTERS / "kuberay" / "rayservice.yaml").read_text())
    serve = yaml.safe_load(values["spec"]["serveConfigV2"])
    probe = container(values)["readinessProbe"]["httpGet"]
    assert probe == {"path": "/-/healthz", "port": serve["http_options"]["port"]}
    assert serve["proxy_location"] == "EveryNode"


def test_the_image_has_what_the_operator_probes_with():
    assert re.search(r"apt-get install .*\bwget\b", (CLUSTERS / "Dockerfile").read_text())


@pytest.mark.parametrize("text", [b"a: 1", b"", b"[", b"- 1", b"\xff\xfe\x00"])
def test_a_file_of_no_known_kind_is_refused(tmp_path: Path, text: bytes):
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(ConfigError):
        check_file(tmp_path / "x.yaml")
