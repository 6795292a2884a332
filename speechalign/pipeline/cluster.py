"""How a run reaches Ray: the cluster of RAY_ADDRESS, or one of its own on this machine."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from speechalign.training.stopping import handlers_kept, install_stop_handler

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 2_000_000_000
"""Of a local cluster; memory that is not used is not taken.

Ray Data gives each stage a share and feeds none beyond it: with 300 MB the rendering stood still,
a core idle, until all prompts were sampled.
"""
LOCAL_ENVIRONMENT = {
    # Threads that spin while they wait for work make a step several times as slow as soon as
    # two processes share a core: 1.2 to 8.3 s against 0.37 s was measured on two cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A local run starts a Ray of its own that no other user of the machine shall reach.
    "RAY_AUTH_MODE": "disabled",
}
"""Inherited by every process of a local cluster; a real cluster sets its own."""


@contextmanager
def connected() -> Iterator[None]:
    """Be connected to Ray inside the block; a local cluster ends with it.

    A plain `ray.init()` would join whatever cluster the temp folder names; this joins only the
    one that RAY_ADDRESS names. Inside a Ray job that is the job's cluster: Ray sets it, and also
    the runtime environment, so none is given here.
    """
    import ray

    if ray.is_initialized():
        # The error of a pipeline that failed holds its actors in a cycle, and they hold cores that
        # the next stage would wait for without end.
        gc.collect()
        yield
        return
    with handlers_kept():
        _initialise()
        install_stop_handler()
        try:
            yield
        finally:
            ray.shutdown()


def _initialise() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
        logger.info("joined the Ray cluster at %s", address)
    else:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
        )
        logger.info("started Ray on this machine with %d CPUs", os.cpu_count() or 1)
    _quiet_data_progress()


def _quiet_data_progress() -> None:
    """Show Ray Data's bars to people only; a log gets a line a block from the pipeline."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
