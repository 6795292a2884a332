"""What a cluster has, and what it could have."""


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
