"""Samplers on sampler nodes, trainers on trainer nodes, and nodes that come when they are needed."""

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ON_LABELLED_NODES = """
import json, sys
import pyarrow as pa
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from speechalign.config.sampling import PoolConfig
from speechalign.config.training import WorkersConfig
from speechalign.sampling.pipeline import Stage, stream
from speechalign.training.launch import run_workers

POOL = "speechalign-pool"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = {pool: cluster.add_node(num_cpus=2, labels={POOL: pool}).node_id
         for pool in ("sample", "train")}
ray.init(address=cluster.address, log_to_driver=False)


class WhereAmI:
    def __call__(self, batch: pa.Table) -> pa.Table:
        here = [ray.get_runtime_context().get_node_id()] * batch.num_rows
        return batch.append_column("node", pa.array(here))


pool = PoolConfig(num_actors=2, num_cpus=0.5, batch_size=1, label_selector={POOL: "sample"})
rows = stream(pa.table({"x": [1, 2, 3, 4]}), [
    Stage(name="where", stage=WhereAmI, arguments={}, pool=pool)]).take_all()
folder = Path(sys.argv[1])


def train(settings: dict) -> None:
    import ray.train
    rank = ray.train.get_context().get_world_rank()
    (folder / f"rank{rank}").write_text(ray.get_runtime_context().get_node_id())


workers = WorkersConfig(num_workers=2, cpus_per_worker=0.5, label_selector={POOL: "train"})
run_workers(train, {}, workers, folder / "train")
print("NODES " + json.dumps({
    "sample": nodes["sample"], "sampled": sorted({row["node"] for row in rows}),
    "train": nodes["train"],
    "trained": sorted({(folder / f"rank{r}").read_text() for r in range(2)})}))
ray.shutdown()
cluster.shutdown()
"""

GROWS = """
import time
import pyarrow as pa
import ray
from speechalign.config.sampling import PoolConfig
from speechalign.sampling.pipeline import Stage, possible_resources, stream

ray.init(address="auto", log_to_driver=False)
print("POSSIBLE", possible_resources().get("sampler", 0), flush=True)


class Sample:
    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


@ray.remote(num_cpus=0, resources={"sampler": 1})
def work() -> str:
    return ray.get_runtime_context().get_node_id()


node = ray.get(work.remote(), timeout=120)
print("CAME", node, flush=True)
deadline = time.monotonic() + 120
while any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
    assert time.monotonic() < deadline, "the idle node stayed"
    time.sleep(0.5)
print("WENT", node, flush=True)
"""
