"""What every actor of a pipeline imports, whatever its stage: so it imports next to nothing.

A judge that needs no torch must not wait for it: importing the pipeline takes 6 s of a core.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from speechalign.errors import EngineDead, SpeechalignError
from speechalign.startup import collect_seldom

logger = logging.getLogger(__name__)


class ActorFace:
    """A stage in its actor, whose errors reach the driver as themselves.

    Ray reports an error of an actor's constructor as a dead actor and a page of text, after
    three attempts; an error of a call keeps its type. So the first call raises both.
    """

    def __init__(
        self, stage: Callable[..., Callable[[pa.Table], pa.Table]], arguments: Mapping[str, Any]
    ) -> None:
        collect_seldom()
        try:
            self._stage = stage(**arguments)
        except SpeechalignError as error:
            self._stage = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Pass a batch through the stage; where its engine is dead, the process ends.

        Raises:
            SpeechalignError: what the constructor or the call of the stage raised.
        """
        if isinstance(self._stage, SpeechalignError):
            raise self._stage
        try:
            return self._stage(batch)
        except EngineDead:
            # Ray gives the batch to another process if this one dies, not if it raises.
            logger.exception("the engine is dead: its process ends, so that Ray starts another")
            os._exit(1)
