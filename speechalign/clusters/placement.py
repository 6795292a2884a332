"""Whether what a recipe starts has a node to live on: its labels, CPUs and GPUs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechalign.clusters.findings import Finding, join
from speechalign.config.align import AlignConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """A kind of node that a cluster can have."""

    labels: Mapping[str, str]
    cpus: float | None
    """None: the file does not say."""
    gpus: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """One actor of a pool, or one worker of a training."""

    where: str
    cpus: float
    gpus: float
    selector: Mapping[str, str]

    def fits(self, kind: NodeKind) -> bool:
        """Whether a node of its own would have room for it, as far as the file says."""
        enough_cpus = kind.cpus is None or kind.cpus >= self.cpus
        return enough_cpus and (kind.gpus is None or kind.gpus >= self.gpus)


def check_placement(recipe: AlignConfig, kinds: Sequence[NodeKind]) -> Iterator[Finding]:
    """Find what no kind of node fits: it would wait for ever.

    Args:
        recipe: resolved.
        kinds: of the cluster's nodes, the head left out.
    """
    for actor in actors_of(recipe.model_dump(mode="json")):
        allowed = [kind for kind in kinds if actor.selector.items() <= kind.labels.items()]
        wanted = ", ".join(f"{key}={value}" for key, value in actor.selector.items())
        if wanted and not allowed:
            yield Finding(
                join(actor.where, "label_selector"),
                f"the recipe wants nodes with {wanted}; no node type of this cluster has it",
            )
        elif allowed and not any(map(actor.fits, allowed)):
            of_them = f" with {wanted}" if wanted else ""
            yield Finding(
                actor.where,
                f"one actor wants {actor.cpus:g} CPUs and {actor.gpus:g} GPUs; no node type"
                f"{of_them} has as many",
            )


def actors_of(node: Any, where: str = "") -> Iterator[Actor]:
    """Yield what each section of a resolved recipe starts that can be placed, and its place."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        pairs = list(node.items())
        if "label_selector" in node:
            yield Actor(
                where=where,
                cpus=float(node.get("num_cpus") or node.get("cpus_per_worker") or 0.0),
                gpus=float(node.get("num_gpus") or node.get("gpus_per_worker") or 0.0),
                selector=node["label_selector"],
            )
    elif isinstance(node, list):
        pairs = list(enumerate(node))
    for key, value in pairs:
        yield from actors_of(value, join(where, key))
