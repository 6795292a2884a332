"""The one door to DeepSpeed: a model, an optimizer and a schedule, on one rank or many.

Gradients are averaged over ranks by DeepSpeed. A loss that is a mean over tokens or pairs is
therefore divided by the *global* count and multiplied by the number of ranks (`global_mean`),
so that N ranks with one row compute what one rank computes with N rows.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speechalign.config.training import EngineConfig
from speechalign.errors import Diverged

CLIENT_STATE = "client"


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""

    def __init__(self, model: nn.Module, config: EngineConfig) -> None:
        embeddings = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
        in_muon = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in in_muon]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay
            ),
            torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([*matrices, *others], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let both optimizers step."""
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


class Engine:
    """A model in training."""

    def __init__(self, model: nn.Module, config: EngineConfig, num_steps: int) -> None:
        os.environ["DS_ACCELERATOR"] = config.device  # read when deepspeed is imported
        import deepspeed

        # DeepSpeed would compile shared-memory collectives with g++ when it starts: minutes, and a
        # process killed meanwhile leaves a lock that the next one waits for without end. Gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._config = config
        self._num_steps = num_steps
        self.device = (
            torch.device(config.device, torch.cuda.current_device())
            if (config.device == "cuda")
            else torch.device("cpu")
        )
        model = model.to(self.device)
        if config.precision == "bf16":
            # DeepSpeed's forward switches an autocast around it off (it looks at CUDA's only).
            model.forward = self.autocast()(model.forward)
        self._deepspeed = deepspeed
        self._engine: Any  # DeepSpeed is untyped
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_build_optimizer(model, config),
            config=_deepspeed_config(config),
            dist_init_required=False,
        )
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        self.step_index = 0

    @property
    def module(self) -> nn.Module:
        """The model; call it inside `autocast()`."""
        return self._engine

    @property
    def unwrapped(self) -> nn.Module:
        """The model itself, without the engine around it."""
        return self._engine.module

    def autocast(self) -> torch.autocast:
        """Compute in the configured precision."""
        enabled = self._config.precision == "bf16"
        return torch.autocast(self._config.device, torch.bfloat16, enabled=enabled)

    def update(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch; every `num_accumulated`-th call moves the weights."""
        self._set_learning_rates()
        self._engine.backward(loss)
        moves = self._engine.is_gradient_accumulation_boundary()  # of this micro-batch: ask first
        self._engine.step()
        if moves:
            self.step_index += 1

    def pass_over(self) -> None:
        """Let a micro-batch that is not finite count, with a gradient of zero.

        What came before it in the same update is kept, and no later one is out of step.

        Raises:
            Diverged: ZeRO-3 spreads the weights, so that nothing can be computed of them here.
        """
        if self._config.zero_stage == 3:
            raise Diverged("the loss was not finite, which ZeRO-3 cannot pass over; resume, or "
                           "lower the learning rate")  # fmt: skip
        learned = [p for p in self._engine.module.parameters() if p.requires_grad]
        self.update(torch.stack([parameter.sum() for parameter in learned]).sum() * 0)

    @property
    def grad_norm(self) -> float:
        """Of the last update, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        """Of the last parameter group, which is AdamW's."""
        return float(self._optimizer.param_groups[-1]["lr"])

    @contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """Yield the model with all its weights on every rank, whatever ZeRO did to them."""
        model = self._engine.module
        if self._config.zero_stage == 3:
            with self._deepspeed.zero.GatheredParameters(list(model.parameters())):
                yield model
        else:
            yield model

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and step; every rank must call it."""
        self._engine.save_checkpoint(
            str(folder), tag=CLIENT_STATE, client_state={"step_index": self.step_index}
        )

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. DeepSpeed unpickles: only ever load a run's own folder."""
        _, state = self._engine.load_checkpoint(str(folder), tag=CLIENT_STATE)
        self.step_index = int(state["step_index"])

    def _set_learning_rates(self) -> None:
        share = schedule_share(self._config, self.step_index, self._num_steps)
        for group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * share


def schedule_share(config: EngineConfig, step: int, num_steps: int) -> float:
    """Return the factor on the learning rate: a linear rise, a plateau, a linear fall."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_share * num_steps
    left = (num_steps - step) / decay_steps if decay_steps else 1.0
    return rise * max(config.final_share, min(1.0, left))


def world() -> tuple[int, int]:
    """Return (rank, number of ranks); (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for all ranks."""
    if world()[1] > 1:
        dist.barrier()


def global_sum(value: Tensor) -> Tensor:
    """Return the sum over all ranks of a detached value."""
    total = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total


def global_max(value: Tensor) -> Tensor:
    """Return the maximum over all ranks of a detached value."""
    largest = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return a loss whose rank-averaged gradient is that of (sum of totals) / (sum of counts)."""
    return total * world()[1] / global_sum(count).clamp(min=1)


def _build_optimizer(model: nn.Module, config: EngineConfig) -> torch.optim.Optimizer:
    if config.optimizer == "muon":
        return MuonWithAdamW(model, config)
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )


def _deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its product with the ranks is ever read
        "gradient_accumulation_steps": config.num_accumulated,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
