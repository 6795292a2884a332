"""The Ray Data face of a user's reward that reads tokens: nothing needs to be rendered for it."""

import time
from typing import Any

import pyarrow as pa

from speechalign.config.judges import PythonJudgeConfig
from speechalign.judges.user_code import UserReward
from speechalign.rewards.stage import with_errors
from speechalign.types import Measured, TokenAnswer, Unmeasured

COLUMNS = [
    "prompt_id",
    "sample_index",
    "text",
    "prompt_token_ids",
    "token_ids",
    "is_truncated",
]


class UserTokenStage:
    """A plain class: tests call it directly, Ray Data makes actors of it."""

    def __init__(self, config: PythonJudgeConfig) -> None:
        self._name = config.name
        self._reward = UserReward(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Reward one batch.

        Raises:
            DataError: the user's object returns another number of values.
        """
        started_s = time.perf_counter()
        rows = batch.select(COLUMNS).to_pylist()
        answers = [
            TokenAnswer(
                sample_id=f"{row['prompt_id']}/{row['sample_index']}",
                text=row["text"],
                prompt_token_ids=tuple(row["prompt_token_ids"]),
                token_ids=tuple(row["token_ids"]),
                is_truncated=row["is_truncated"],
            )
            for row in rows
        ]
        scores = self._reward.scores(answers)
        values = [score.value if isinstance(score, Measured) else None for score in scores]
        batch = batch.append_column(self._name, pa.array(values, pa.float32()))
        batch = with_errors(
            batch, [score.reason if isinstance(score, Unmeasured) else "" for score in scores]
        )
        share_s = (time.perf_counter() - started_s) / max(1, len(rows))
        seconds: pa.Array[Any] = pa.array([share_s] * len(rows), pa.float32())
        return batch.append_column(f"{self._name}_seconds", seconds)
