"""From a YAML file and `a.b=c` overrides to a checked config.

A mistake is reported as a person would: the key, the file, the nearest valid name, the value.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from speechalign.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(model: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a config file and apply dotted overrides.

    Args:
        model: the config to build.
        path: a YAML mapping; relative paths inside it are relative to the working directory.
        overrides: `training.beta=0.2`; the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not one the config takes.
    """
    return validated(model, with_overrides(read_yaml(path), overrides), str(path))


def validated(model: type[ConfigT], values: Any, source: str) -> ConfigT:
    """Return values as a config.

    Raises:
        ConfigError: a key or value is not one the config takes; `source` says whose it is.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, values, source)) from None


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of values with dotted overrides applied.

    Raises:
        ConfigError: an override has no key, or a value that is not YAML.
    """
    changed = copy.deepcopy(values)
    for override in overrides:
        _apply(changed, override)
    return changed


def dump_yaml(config: BaseModel) -> str:
    """Return the resolved config, complete, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(config: BaseModel) -> str:
    """Return 12 hex digits that are equal for equal configs."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a recipe, e.g. one of jobs/") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no such date
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return cast("dict[str, Any]", values)


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} is not of the form key.subkey=value")
    *parents, last = dotted.split(".")
    node: Any = values
    for key in parents:
        node = _step(node, key, override)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no such date
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    if isinstance(node, list):
        node[_index(cast("list[Any]", node), last, override)] = value
    else:
        node[last] = value


def _step(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        items = cast("list[Any]", node)
        return items[_index(items, key, override)]
    child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    return cast("Any", child)


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(
            f"override {override!r}: {key!r} is not an index into a list of {len(items)}"
        )
    return int(key)


def _explain(error: ValidationError, model: type[BaseModel], values: Any, source: str) -> str:
    problems = error.errors(include_url=False)
    lines = [f"{source} has {len(problems)} mistake{'s' if len(problems) > 1 else ''}:"]
    for problem in problems:
        where = ".".join(map(str, _written_key(problem, values)))
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "model_type":
            said = "must be a section of keys and values"
        lines.append(f"  {where}{': ' if where else ''}{said}{_hint(problem, model)}")
    return "\n".join(lines)


def _written_key(problem: Any, values: Any) -> list[int | str]:
    """Return the place of a mistake as a person writes it.

    pydantic also names the branches of a union, which are no keys: `training.on_pairs.beta`.
    """
    written: list[int | str] = []
    location, node = problem["loc"], values
    for place, key in enumerate(location):
        is_new = problem["type"] == "missing" and place == len(location) - 1
        is_index = isinstance(node, list | tuple) and isinstance(key, int)
        if is_new or is_index or (isinstance(node, Mapping) and key in node):
            written.append(key)
            node = None if is_new else cast("Any", node)[key]
    return written


def _hint(problem: Any, model: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = sorted(_names_beside(model, problem["loc"]))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
    if problem["type"] == "missing" or isinstance(problem["input"], Mapping):
        return ""  # a whole section would bury the message
    return f" (got {problem['input']!r})"


def _names_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Return the field names valid at the place of an unknown key."""
    models = {model}
    for key in location[:-1]:
        annotations = [m.model_fields[str(key)].annotation for m in models if key in m.model_fields]
        if annotations:  # list indices and union tags lead to no field: stay where we are
            models = {m for a in annotations for m in _models_in(a)}
    return {name for m in models for name in m.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list, tuple, dict) or get_args(annotation):
        for argument in get_args(annotation):
            yield from _models_in(argument)
