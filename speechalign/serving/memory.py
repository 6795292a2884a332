"""What the replicas of a policy last spoke with, kept where no death of theirs reaches it.

Serve gives a replica that starts the policy that was last asked for, though it was refused. Which
one spoke instead nobody else remembers: Serve has no hook before a policy becomes its target, and
a file of Serve names only the first policy and the last. So Ray's key-value store does, where
Serve keeps its own state; it has private names only.
"""

import uuid

from ray.experimental import internal_kv as store

from speechalign.config.serving import ServedPolicyConfig

NAMESPACE = "speechalign"


class Memory:
    """Of one policy's deployment.

    Made when Serve builds the application, which it does once, however often policies are swapped:
    what an earlier application spoke with is not remembered.
    """

    def __init__(self, deployment: str) -> None:
        self._key = f"{deployment} {uuid.uuid4().hex}"

    def recall(self) -> ServedPolicyConfig | None:
        """Return what was kept; none: no replica has spoken yet."""
        kept = store._internal_kv_get(self._key, namespace=NAMESPACE)  # pyright: ignore[reportPrivateUsage]
        return ServedPolicyConfig.model_validate_json(kept) if kept else None

    def keep(self, served: ServedPolicyConfig) -> None:
        """Keep what speaks from here on."""
        value = served.model_dump_json()
        store._internal_kv_put(self._key, value, namespace=NAMESPACE)  # pyright: ignore[reportPrivateUsage]
