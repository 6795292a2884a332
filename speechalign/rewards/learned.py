"""The Ray Data face of a reward model: samples in, the same rows with its reward out."""

import time
from typing import Any

import pyarrow as pa
import torch

from speechalign.config.judges import RewardModelJudgeConfig
from speechalign.errors import DataError
from speechalign.policy.reward_model import load_reward_model
from speechalign.rewards.stage import with_errors

ROWS_PER_FORWARD = 16
NOTHING_TO_READ = "reward_model: there is no prompt, or no answer to it"


class RewardModelStage:
    """A plain class: tests call it directly, Ray Data makes actors of it.

    A row without a prompt (a recording) or an answer cannot be rewarded and gets null.
    """

    def __init__(self, config: RewardModelJudgeConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._loaded = load_reward_model(config.path)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Reward one batch.

        Raises:
            DataError: a sample is of another codec.
        """
        started_s = time.perf_counter()
        columns = ["prompt_token_ids", "token_ids", "codec_fingerprint"]
        rows = batch.select(columns).to_pylist()
        known = self._loaded.facts["codec_fingerprint"]
        for row in rows:
            if row["codec_fingerprint"] != known:
                raise DataError(
                    f"a sample of codec {row['codec_fingerprint']} meets a reward model of codec "
                    f"{known}; their codes mean different sounds"
                )
        values: list[float | None] = [None] * len(rows)
        judged = [i for i, row in enumerate(rows) if row["prompt_token_ids"] and row["token_ids"]]
        for first in range(0, len(judged), ROWS_PER_FORWARD):
            indices = judged[first : first + ROWS_PER_FORWARD]
            asked = [(rows[i]["prompt_token_ids"], rows[i]["token_ids"]) for i in indices]
            for index, reward in zip(indices, self._loaded.rewards(asked), strict=True):
                values[index] = reward
        batch = batch.append_column("reward_model", pa.array(values, pa.float32()))
        reasons = ["" if value is not None else NOTHING_TO_READ for value in values]
        batch = with_errors(batch, reasons)
        share_s = (time.perf_counter() - started_s) / max(1, len(rows))
        seconds: pa.Array[Any] = pa.array([share_s] * len(rows), pa.float32())
        return batch.append_column("reward_model_seconds", seconds)
