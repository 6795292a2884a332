"""`speechalign clusters check`: which kind of file it is, and all that is wrong with it."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from speechalign.clusters.findings import Finding, Values, mapping
from speechalign.clusters.kuberay import check_kuberay, worker_groups
from speechalign.clusters.placement import check_placement
from speechalign.clusters.ray_up import check_ray_up, node_types
from speechalign.clusters.serve_file import RUNTIME_KEYS, check_runtime_env, check_serve
from speechalign.config.align import AlignConfig
from speechalign.errors import ConfigError


def check_file(path: Path, recipe: AlignConfig | None = None) -> list[Finding]:
    """Return what is wrong with a file of `ray up`, KubeRay, Serve, or a runtime environment.

    Args:
        path: YAML; a file of KubeRay may hold several documents.
        recipe: whose actors and workers some node of the cluster must fit.

    Raises:
        ConfigError: the file cannot be read, or is of none of these kinds.
    """
    try:
        documents = [one for one in yaml.safe_load_all(path.read_text()) if one is not None]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not documents:
        raise ConfigError(f"{path} is empty")
    return [finding for values in documents for finding in _check(mapping(values), path, recipe)]


def _check(values: Values, path: Path, recipe: AlignConfig | None) -> Iterator[Finding]:
    if "cluster_name" in values or "available_node_types" in values:
        yield from check_ray_up(values, path.parent)
        if recipe is not None:
            yield from check_placement(recipe, node_types(values))
    elif str(values.get("apiVersion", "")).startswith("ray.io/"):
        yield from check_kuberay(values)
        if recipe is not None:
            yield from check_placement(recipe, worker_groups(values))
    elif "applications" in values:
        yield from check_serve(values)
    elif values.keys() & RUNTIME_KEYS:
        yield from check_runtime_env(values)
    else:
        raise ConfigError(
            f"{path} is no file of `ray up`, KubeRay (ray.io), Serve (applications) or a runtime "
            "environment (env_vars, working_dir)"
        )
