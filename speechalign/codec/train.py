"""Train the embedded codec: `speechalign codec JOB.yaml [key.sub=value ...]`.

The codec is in `codec/` of the output directory after the second phase. The same command resumes
from the last checkpoint. Set `OMP_WAIT_POLICY=PASSIVE` where other work shares the cores: threads
that spin while they wait made a step three to twenty times as slow.

Shapes: B batch, F frames of 10 ms, T frames of 20 ms, D dims.
"""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from speechalign.codec.augment import PseudoSpeakers
from speechalign.codec.crops import Corpus, CropBatch, CropSampler
from speechalign.codec.embedded import round_to_half, save_embedded
from speechalign.codec.embedded_model import EmbeddedModel
from speechalign.codec.phases import AcousticsPhase, ContentHeads, ContentPhase, Phase
from speechalign.config.codec import CodecTrainingConfig, PhaseConfig
from speechalign.errors import Diverged
from speechalign.seeds import derive_seed

logger = logging.getLogger(__name__)

_REVIVE_EVERY_STEPS = 50
_MAX_GRAD_NORM = 5.0


def train_codec(config: CodecTrainingConfig) -> Path:
    """Train both phases; return the directory of the codec."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(derive_seed(config.seed, "codec", "weights"))
    config.out_dir.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.read(config.corpus_dir)
    model = EmbeddedModel(config.model)
    heads = ContentHeads(config.model, config.teacher_dim)
    _measure_statistics(config, corpus, model, heads)
    logger.info("%.2f million parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    trainer = _Trainer(config, corpus)

    trainer.run("content", ContentPhase(model, heads), config.content)
    round_to_half(model.content)
    model.content.eval().requires_grad_(False)

    trainer.run("acoustics", AcousticsPhase(model), config.acoustics)
    round_to_half(model)
    finished = config.out_dir / "codec"
    save_embedded(model.eval(), finished)
    logger.info("the codec is in %s", finished)
    return finished


class _Trainer:
    """Runs phases over crops of one corpus, with checkpoints and metrics in one directory."""

    def __init__(self, config: CodecTrainingConfig, corpus: Corpus) -> None:
        self._config, self._corpus = config, corpus
        self._augment = PseudoSpeakers(config.augment, config.model.num_features)

    def run(self, name: str, phase: Phase, schedule: PhaseConfig) -> None:
        """Train one phase to its end, from its checkpoint if it has one."""
        rng = np.random.default_rng(derive_seed(self._config.seed, "codec", "crops", name))
        torch.manual_seed(derive_seed(self._config.seed, "codec", "augment", name))
        sampler = _sampler(self._config, self._corpus, rng)
        module = phase.modules().train()
        optimizer = torch.optim.AdamW(
            module.parameters(), betas=(0.9, 0.95), weight_decay=1e-3, fused=True
        )
        checkpoint = _Checkpoint(self._config.out_dir / f"{name}.pt", module, optimizer, rng)
        first_step = checkpoint.restore()
        meter = _Meter(self._config.out_dir / "metrics.jsonl", name)
        for step in range(first_step, schedule.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, step)
            batch = sampler.draw(schedule.batch_size)
            batch = CropBatch(self._augment(batch.features_BFD), batch.teacher_BTD)
            quantised = step >= schedule.num_unquantised_steps
            _update(phase, batch, optimizer, meter.add, quantised=quantised)
            self._after_step(step + 1, phase, schedule, checkpoint, meter)
        checkpoint.save(schedule.num_steps)

    def _after_step(
        self,
        num_done: int,
        phase: Phase,
        schedule: PhaseConfig,
        checkpoint: "_Checkpoint",
        meter: "_Meter",
    ) -> None:
        is_late = num_done > 0.85 * schedule.num_steps
        is_quantised = num_done > schedule.num_unquantised_steps
        if is_quantised and not is_late and num_done % _REVIVE_EVERY_STEPS == 0:
            meter.add({"revived": float(phase.revive())})
        if num_done % self._config.log_every_steps == 0:
            meter.write(num_done, schedule.num_steps)
        if num_done % self._config.checkpoint_every_steps == 0:
            checkpoint.save(num_done)


class _Checkpoint:
    """A phase on disk; written under another name, then renamed."""

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> None:
        self._path, self._module, self._optimizer, self._rng = path, module, optimizer, rng

    def save(self, step: int) -> None:
        """Write the state after `step` steps."""
        state = {
            "step": step,
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "numpy_rng": json.dumps(self._rng.bit_generator.state),
        }
        unfinished = self._path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self._path)

    def restore(self) -> int:
        """Read the last state, if there is one; return how many steps were done."""
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=True)
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self._rng.bit_generator.state = json.loads(state["numpy_rng"])
        logger.info("%s: resumed after step %d", self._path.stem, state["step"])
        return int(state["step"])


class _Meter:
    """Means of what a phase reports, one line of JSON at a time."""

    def __init__(self, path: Path, phase: str) -> None:
        self._path, self._phase = path, phase
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._since = time.monotonic()

    def add(self, values: dict[str, float]) -> None:
        """Remember the values of one step."""
        for name, value in values.items():
            self._sums[name].append(value)

    def write(self, step: int, num_steps: int) -> None:
        """Write the means since the last line."""
        means = {name: round(sum(v) / len(v), 4) for name, v in self._sums.items()}
        elapsed_s = round(time.monotonic() - self._since, 1)
        record = {"phase": self._phase, "step": step, "elapsed_s": elapsed_s, **means}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s %d/%d in %.1f s: %s", self._phase, step, num_steps, elapsed_s, means)
        self._sums.clear()
        self._since = time.monotonic()


def learning_rate(schedule: PhaseConfig, step: int) -> float:
    """Return a linear rise, then half a cosine down to one fiftieth."""
    rise = min(1.0, (step + 1) / max(1, schedule.num_warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / schedule.num_steps))
    return schedule.learning_rate * rise * (0.02 + 0.98 * fall)


def _update(
    phase: Phase,
    batch: CropBatch,
    optimizer: torch.optim.Optimizer,
    report: Callable[[dict[str, float]], None],
    *,
    quantised: bool,
) -> None:
    terms = phase.terms(batch, quantised=quantised)
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        raise Diverged(
            f"the codec's loss is {float(loss)} ({ {k: float(v) for k, v in terms.items()} }); "
            "lower the learning rate, or look for features that are not finite"
        )
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
    optimizer.step()
    report({name: float(value.detach()) for name, value in terms.items()})
    report({"loss": float(loss.detach()), "grad_norm": float(norm)})


def _sampler(config: CodecTrainingConfig, corpus: Corpus, rng: np.random.Generator) -> CropSampler:
    return CropSampler(corpus, crop_frames=config.crop_frames, power=config.sampling_power, rng=rng)


@torch.no_grad()
def _measure_statistics(
    config: CodecTrainingConfig, corpus: Corpus, model: EmbeddedModel, heads: ContentHeads
) -> None:
    rng = np.random.default_rng(derive_seed(config.seed, "codec", "statistics"))
    sampler = _sampler(config, corpus, rng)
    logger.info("sources are drawn at %s", {k: round(v, 3) for k, v in sampler.share.items()})
    batch = sampler.draw(1000)
    augment = PseudoSpeakers(config.augment, config.model.num_features)
    features_ND = augment(batch.features_BFD).flatten(0, 1)
    model.set_statistics(features_ND.mean(0).half(), features_ND.std(0).half())
    teacher_ND = batch.teacher_BTD.flatten(0, 1)
    heads.teacher_statistics.mean_D.copy_(teacher_ND.mean(0))
    heads.teacher_statistics.std_D.copy_(teacher_ND.std(0).clamp(min=1e-3))
