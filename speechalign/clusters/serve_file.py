"""Files of Ray Serve and of runtime environments, which Serve and Ray read too kindly."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from speechalign.clusters.findings import Finding, Values, items, join, mapping, unknown_keys
from speechalign.config.load import validated
from speechalign.config.serving import IMPORT_PATH, ServingConfig, is_loopback
from speechalign.errors import ConfigError

RUNTIME_KEYS = frozenset({"env_vars", "working_dir", "py_modules", "excludes", "pip", "uv", "conda",
                          "image_uri", "py_executable", "config"})  # fmt: skip


def check_serve(values: Values) -> list[Finding]:
    """Return what is wrong with a file of `serve deploy`; Serve ignores unknown keys."""
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

    findings = list(_serve_says(ServeDeploySchema, values))
    findings += unknown_keys(values, ServeDeploySchema.model_fields, "")
    http = mapping(values.get("http_options"))
    findings += unknown_keys(http, HTTPOptionsSchema.model_fields, "http_options")
    for number, application in enumerate(items(values.get("applications"))):
        where, one = f"applications.{number}", mapping(application)
        findings += unknown_keys(one, ServeApplicationSchema.model_fields, where)
        for index, deployment in enumerate(items(one.get("deployments"))):
            place = f"{where}.deployments.{index}"
            findings += unknown_keys(mapping(deployment), DeploymentSchema.model_fields, place)
            findings += _autoscaling(mapping(deployment), place)
        findings += check_runtime_env(
            mapping(one.get("runtime_env")), join(where, "runtime_env"), is_remote=True
        )
        if one.get("import_path") == IMPORT_PATH:
            findings += _ours(mapping(one.get("args")), http, join(where, "args"))
    return sorted(set(findings))


def check_runtime_env(values: Values, where: str = "", *, is_remote: bool = False) -> list[Finding]:
    """Return what is wrong with a runtime environment.

    Args:
        values: the mapping.
        where: it stands.
        is_remote: whether nobody is there to upload a folder: then `working_dir` must be an URI.
    """
    findings = unknown_keys(values, RUNTIME_KEYS, where)
    for key, value in mapping(values.get("env_vars")).items():
        if not isinstance(value, str):
            findings.append(
                Finding(join(where, f"env_vars.{key}"), f"{value!r} is no text; put it in quotes")
            )
    folder = values.get("working_dir")
    if is_remote and folder is not None and "://" not in str(folder):
        findings.append(
            Finding(join(where, "working_dir"), f"{folder!r} is no remote URI; bake the code into "
                    "the image")
        )  # fmt: skip
    if "pip" in values or "conda" in values:
        findings.append(
            Finding(where, "pip and conda install on every node, minutes each; use the image")
        )
    return findings


def _serve_says(schema: Any, values: Values) -> Iterator[Finding]:
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        for one in error.errors(include_url=False):
            yield Finding(".".join(map(str, one["loc"])), f"Serve refuses it: {one['msg']}")


def _autoscaling(deployment: Values, where: str) -> Iterator[Finding]:
    from ray.serve.config import AutoscalingConfig

    scaling = deployment.get("autoscaling_config")
    if not isinstance(scaling, dict):
        return
    place = join(where, "autoscaling_config")
    yield from unknown_keys(scaling, AutoscalingConfig.model_fields, place)
    try:
        AutoscalingConfig(**scaling)
    except ValidationError as error:
        yield Finding(place, f"Serve would fail later: {error.errors()[0]['msg']}")


def _ours(args: Values, http: Values, where: str) -> Iterator[Finding]:
    try:
        config = validated(ServingConfig, dict(args), where)
    except ConfigError as error:
        yield Finding(where, str(error))
        return
    host = str(http.get("host", "0.0.0.0"))
    if not is_loopback(host) and config.access.allow_anonymous:
        yield Finding(
            join(where, "access.allow_anonymous"),
            f"others reach {host or 'all addresses'} without a key; set keys_file, or "
            "http_options.host to 127.0.0.1",
        )
