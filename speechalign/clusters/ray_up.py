"""Files of `ray up`: Ray's own validation, and the mistakes that it accepts."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from speechalign.clusters.findings import Finding, Values, items, join, mapping, unknown_keys
from speechalign.clusters.placement import NodeKind

POOL_LABEL = "speechalign-pool"
UNLABELLED = (
    f"no label {POOL_LABEL}: a recipe whose selectors name a pool will not use these nodes, and "
    "one without selectors may place anything on them"
)
SHARED_KEYS = frozenset({"type", "region", "availability_zone", "cache_stopped_nodes",
                         "use_internal_ips"})  # fmt: skip
PROVIDER_KEYS: Mapping[str, frozenset[str]] = {
    "aws": SHARED_KEYS | {"key_pair", "security_group", "cloudwatch"},
    "gcp": SHARED_KEYS | {"project_id"},
    "local": frozenset({"type", "head_ip", "worker_ips", "external_head_ip"}),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What an instance type has."""

    cpus: int
    gpus: int


MACHINES: Mapping[str, Machine] = {
    "m6i.2xlarge": Machine(8, 0),
    "m6i.4xlarge": Machine(16, 0),
    "c6i.4xlarge": Machine(16, 0),
    "c6i.8xlarge": Machine(32, 0),
    "g5.2xlarge": Machine(8, 1),
    "g5.12xlarge": Machine(48, 4),
    "g6.2xlarge": Machine(8, 1),
    "p4d.24xlarge": Machine(96, 8),
    "p5.48xlarge": Machine(192, 8),
    "n2-standard-8": Machine(8, 0),
    "n2-standard-16": Machine(16, 0),
    "c2-standard-16": Machine(16, 0),
    "g2-standard-8": Machine(8, 1),
    "g2-standard-48": Machine(48, 4),
    "a2-highgpu-8g": Machine(96, 8),
    "a3-highgpu-8g": Machine(208, 8),
}
"""A small table: a type that is not in it cannot be checked, which is a finding too."""


def check_ray_up(values: Values, folder: Path) -> list[Finding]:
    """Return what is wrong with a cluster file.

    Args:
        values: the file.
        folder: it lies in; `file_mounts` are relative to the working directory, as in `ray up`.
    """
    checks = (
        _ray_says, _limits, _head, _workers, _provider, _files, _volumes, _image, _token,
        _commands, _machines,
    )  # fmt: skip
    return sorted({finding for check in checks for finding in check(values)})


def node_types(values: Values) -> list[NodeKind]:
    """Return each node type, the head's left out."""
    head = values.get("head_node_type")
    return [_kind(one) for name, _, one in _types(values) if name != head]


def _kind(node_type: Values) -> NodeKind:
    resources = mapping(node_type.get("resources"))
    cpus, gpus = (
        float(count) if isinstance(count, int | float) else None
        for count in (resources.get("CPU"), resources.get("GPU"))
    )
    return NodeKind(labels=mapping(node_type.get("labels")), cpus=cpus, gpus=gpus)


def _ray_says(values: Values) -> Iterator[Finding]:
    """Run Ray's own validation; its functions are private, and wrapped only here."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(dict(values))))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        yield Finding(where, f"Ray refuses it: {error.message}")
    except Exception as error:  # noqa: BLE001 - whatever Ray stumbles over, `ray up` would too
        yield Finding("", f"Ray refuses it: {type(error).__name__}: {error}")


def _types(values: Values) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, one in mapping(values.get("available_node_types")).items():
        yield name, f"available_node_types.{name}", mapping(one)


def _limits(values: Values) -> Iterator[Finding]:
    if "min_workers" in values:
        yield Finding("min_workers", "Ray drops it silently; set min_workers in the node types")
    idle = values.get("idle_timeout_minutes", 5)
    if isinstance(idle, int | float) and idle < 1:
        yield Finding("idle_timeout_minutes", f"{idle} kills nodes between two stages; at least 1")
    head = values.get("head_node_type")
    for name, where, one in _types(values):
        least, most = one.get("min_workers", 0), one.get("max_workers")
        if name != head and most is None and not _is_local(values):
            yield Finding(where, "no max_workers: the type could grow to the cluster's maximum")
        if isinstance(most, int) and isinstance(least, int) and least > most:
            yield Finding(where, f"min_workers {least} exceeds max_workers {most}")


def _is_local(values: Values) -> bool:
    return mapping(values.get("provider")).get("type") == "local"


def _head(values: Values) -> Iterator[Finding]:
    if _is_local(values):
        return  # machines on premises are all of one type
    name = str(values.get("head_node_type"))
    head = mapping(mapping(values.get("available_node_types")).get(name))
    where = f"available_node_types.{name}"
    if head.get("max_workers", 0):
        yield Finding(join(where, "max_workers"), "the head's type must have 0 workers")
    if mapping(head.get("resources")).get("CPU") != 0:
        yield Finding(join(where, "resources"), "set CPU: 0, so that no work lands on the head")
    if _is_spot(mapping(head.get("node_config"))):
        yield Finding(join(where, "node_config"), "a spot head takes the whole cluster with it")


def _workers(values: Values) -> Iterator[Finding]:
    for worker, place, one in _types(values):
        if worker == values.get("head_node_type"):
            continue
        pool = mapping(one.get("labels")).get(POOL_LABEL)
        if pool is None:
            yield Finding(place, UNLABELLED)
        if pool == "train" and _is_spot(mapping(one.get("node_config"))):
            yield Finding(place, "trainers on spot machines restart again and again; on demand")


def _is_spot(node_config: Values) -> bool:
    aws = mapping(node_config.get("InstanceMarketOptions")).get("MarketType") == "spot"
    scheduling = node_config.get("scheduling") or []
    parts = scheduling if isinstance(scheduling, list) else [scheduling]
    gcp = any(mapping(one).get("preemptible") or mapping(one).get("provisioningModel") == "SPOT"
              for one in parts)  # fmt: skip
    return aws or gcp


def _provider(values: Values) -> Iterator[Finding]:
    provider = mapping(values.get("provider"))
    known = PROVIDER_KEYS.get(str(provider.get("type")))
    if known is None:
        return  # Ray says so, or it is one that we ship no file for
    yield from unknown_keys(provider, known, "provider")
    if provider["type"] == "gcp" and not provider.get("project_id"):
        yield Finding("provider.project_id", "name the project; Ray accepts none and fails later")
    if provider["type"] == "gcp":
        for _, where, one in _types(values):
            yield from _gcp_gpus(mapping(one.get("node_config")), where)


def _gcp_gpus(node_config: Values, where: str) -> Iterator[Finding]:
    if not items(node_config.get("guestAccelerators")):
        return
    maintenance = [mapping(one).get("onHostMaintenance")
                   for one in items(node_config.get("scheduling"))]  # fmt: skip
    if "TERMINATE" not in maintenance:
        yield Finding(
            join(where, "node_config.scheduling"), "GPUs on GCP need onHostMaintenance: TERMINATE"
        )


def _files(values: Values) -> Iterator[Finding]:
    for target, source in mapping(values.get("file_mounts")).items():
        path = Path(str(source)).expanduser()
        if not path.exists() and path.name != "auth_token":
            yield Finding(f"file_mounts.{target}", f"{source} does not exist; `ray up` would fail")


def _volumes(values: Values) -> Iterator[Finding]:
    """Find volumes that hold the place where Ray mounts a file itself (`docker_start_cmds`)."""
    docker = mapping(values.get("docker"))
    for key in ("run_options", "head_run_options", "worker_run_options"):
        options = " ".join(str(one) for one in items(docker.get(key)))
        for target in _targets(options):
            for mount in mapping(values.get("file_mounts")):
                if PurePosixPath(str(mount)).is_relative_to(target):
                    yield Finding(
                        f"docker.{key}", f"Ray mounts {mount} into the container itself, and in a "
                        f"read-only volume Docker cannot; leave out the one at {target}"
                    )  # fmt: skip


def _targets(options: str) -> list[str]:
    """Return where the volumes of `docker run` appear in the container."""
    volumes = re.findall(r"(?:^|\s)(?:-v|--volume)[ =]*(\S+)", options)
    mounts = re.findall(r"(?:^|\s)--mount[ =]\S*?(?:target|destination|dst)=([^,\s]+)", options)
    return [volume.split(":")[1] for volume in volumes if ":" in volume] + mounts


def _image(values: Values) -> Iterator[Finding]:
    import ray

    docker = mapping(values.get("docker"))
    image = str(docker.get("image", ""))
    if not image:
        yield Finding("docker", "no image: every node would install its own versions")
        return
    name, _, tag = image.rpartition(":")
    if not name or tag == "latest" or "/" in tag:
        yield Finding("docker.image", f"{image} is not pinned; name a tag")
    versions = re.findall(r"ray(\d+\.\d+\.\d+)", tag)
    if versions != [ray.__version__]:
        found = versions[0] if versions else "none"
        yield Finding(
            "docker.image", f"its tag says Ray {found}, this is {ray.__version__}: they must agree"
        )


def _token(values: Values) -> Iterator[Finding]:
    mounts = [str(target) for target in mapping(values.get("file_mounts"))]
    if not any(target.endswith("/.ray/auth_token") for target in mounts):
        yield Finding("file_mounts", "no ~/.ray/auth_token: the cluster's API would be open")
    docker = mapping(values.get("docker"))
    options = " ".join(str(one) for one in items(docker.get("run_options")))
    if "RAY_AUTH_MODE=token" not in options:
        yield Finding("docker.run_options", "add -e RAY_AUTH_MODE=token, or nobody asks for it")


def _commands(values: Values) -> Iterator[Finding]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for number, command in enumerate(items(values.get(key))):
            if re.search(r"--dashboard-host[= ]0\.0\.0\.0", str(command)):
                yield Finding(f"{key}.{number}", "the dashboard runs code for whoever reaches it; "
                              "leave it at 127.0.0.1 and use `ray dashboard`")  # fmt: skip


def _machines(values: Values) -> Iterator[Finding]:
    for _, where, one in _types(values):
        config, resources = mapping(one.get("node_config")), mapping(one.get("resources"))
        if str(config.get("ImageId", "")).startswith("latest"):
            yield Finding(join(where, "node_config.ImageId"), "an old image; name an AMI of yours")
        name = str(config.get("InstanceType") or config.get("machineType") or "").split("/")[-1]
        if not name:
            continue
        if name not in MACHINES:
            yield Finding(join(where, "node_config"), f"{name} is not in the table of "
                          "speechalign/clusters/ray_up.py: add it there to check it")  # fmt: skip
            continue
        machine = MACHINES[name]
        for key, has in (("CPU", machine.cpus), ("GPU", machine.gpus)):
            asked = resources.get(key, 0)
            if isinstance(asked, int) and asked > has:
                yield Finding(join(where, f"resources.{key}"), f"{asked}, but {name} has {has}")
        if machine.gpus and resources.get("GPU", 0) != machine.gpus:
            yield Finding(join(where, "resources.GPU"), f"{name} has {machine.gpus} GPUs: say so")
