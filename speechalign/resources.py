"""What a cluster has, what it could have, and whether that is enough."""

from collections.abc import Mapping
from typing import Protocol

from speechalign.errors import ConfigError


class Needs(Protocol):
    """What one actor or replica needs."""

    @property
    def num_cpus(self) -> float: ...  # noqa: D102
    @property
    def num_gpus(self) -> float: ...  # noqa: D102


def check_room(
    who: str, parts: Mapping[str, tuple[int, Needs]], available: Mapping[str, float], knobs: str
) -> None:
    """Refuse parts that can never all live at the same time; Ray itself would wait for ever.

    Args:
        who: begins the message, e.g. "the pools want".
        parts: how many of each there are, and what one needs, by its name.
        available: of the cluster, as `possible_resources` tells.
        knobs: what can be lowered besides the need of one.

    Raises:
        ConfigError: naming what is missing, and which part wants how much.
    """
    for resource, attribute in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        wanted = {name: count * getattr(one, attribute) for name, (count, one) in parts.items()}
        total, found = sum(wanted.values()), available.get(resource, 0.0)
        if total > found + 1e-6:
            shown = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
            raise ConfigError(
                f"{who} {total:g} {resource} ({shown}), the cluster has {found:g}; lower "
                f"{attribute} or {knobs}, or join a larger cluster (RAY_ADDRESS)"
            )


def possible_resources() -> dict[str, float]:
    """Return what the cluster has, or could have when its autoscaler has added all nodes it may.

    The autoscaler tells Ray its node types; a cluster without one has what it has.
    """
    import ray
    from ray._private.state import state  # the one place; Ray Train and Ray Data read it there too

    possible: dict[str, float] = dict(ray.cluster_resources())
    for name, most in (state.get_max_resources_from_cluster_config() or {}).items():
        possible[name] = max(possible.get(name, 0.0), float(most))
    return possible
