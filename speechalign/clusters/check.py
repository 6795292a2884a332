"""`speechalign clusters check`: which kind of file it is, and all that is wrong with it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from speechalign.clusters.findings import Finding, Values, mapping
from speechalign.clusters.kuberay import check_kuberay, pool_labels
from speechalign.clusters.ray_up import check_ray_up, labels_of
from speechalign.clusters.serve_file import RUNTIME_KEYS, check_runtime_env, check_serve
from speechalign.config.align import AlignConfig
from speechalign.errors import ConfigError


def check_file(path: Path, recipe: AlignConfig | None = None) -> list[Finding]:
    """Return what is wrong with a file of `ray up`, KubeRay, Serve, or a runtime environment.

    Args:
        path: YAML; a file of KubeRay may hold several documents.
        recipe: whose label selectors some node of the cluster must fit.

    Raises:
        ConfigError: the file cannot be read, or is of none of these kinds.
    """
    try:
        documents = [one for one in yaml.safe_load_all(path.read_text()) if one is not None]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not documents:
        raise ConfigError(f"{path} is empty")
    return [finding for values in documents for finding in _check(mapping(values), path, recipe)]


def _check(values: Values, path: Path, recipe: AlignConfig | None) -> Iterator[Finding]:
    if "cluster_name" in values or "available_node_types" in values:
        yield from check_ray_up(values, path.parent)
        yield from _placed(recipe, labels_of(values))
    elif str(values.get("apiVersion", "")).startswith("ray.io/"):
        yield from check_kuberay(values)
        yield from _placed(recipe, pool_labels(values))
    elif "applications" in values:
        yield from check_serve(values)
    elif values.keys() & RUNTIME_KEYS:
        yield from check_runtime_env(values)
    else:
        raise ConfigError(
            f"{path} is no file of `ray up`, KubeRay (ray.io), Serve (applications) or a runtime "
            "environment (env_vars, working_dir)"
        )


def _placed(recipe: AlignConfig | None, nodes: Sequence[dict[str, str]]) -> Iterator[Finding]:
    """Find label selectors that no kind of node fits: their actors would wait forever."""
    if recipe is None:
        return
    for where, selector in selectors_of(recipe.model_dump(mode="json")):
        if not any(selector.items() <= labels.items() for labels in nodes):
            wanted = ", ".join(f"{key}={value}" for key, value in selector.items())
            yield Finding(
                where, f"the recipe wants nodes with {wanted}; no node type of this cluster has it"
            )


def selectors_of(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every label selector of a resolved recipe that asks for something, and its place."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        pairs = list(node.items())
    elif isinstance(node, list):
        pairs = list(enumerate(node))
    for key, value in pairs:
        place = f"{where}.{key}" if where else str(key)
        if key == "label_selector" and value:
            yield place, value
        else:
            yield from selectors_of(value, place)
