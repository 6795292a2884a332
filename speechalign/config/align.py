"""A recipe of `speechalign align`: everything a run can be told, in the order of the data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from speechalign.config.base import Config
from speechalign.config.codec import CodecConfig, EmbeddedCodecConfig
from speechalign.config.evaluation import EvaluationConfig
from speechalign.config.guards import GuardsConfig
from speechalign.config.judges import (
    TRUNCATED,
    HttpJudgeConfig,
    JudgeConfig,
    PythonJudgeConfig,
    RecogniserConfig,
    RewardConfig,
    RewardModelJudgeConfig,
    judge_measures,
)
from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.config.preferences import PairingConfig
from speechalign.config.sampling import (
    GenerationEngineConfig,
    PromptsConfig,
    RenderingConfig,
    SamplingConfig,
    SamplingPoolsConfig,
    VllmConfig,
)
from speechalign.types import PairKind

ONLINE_METHODS = ("ppo", "grpo", "online_dpo")


def _kind_of_training(values: Any) -> str:
    method = values.get("method") if isinstance(values, Mapping) else getattr(values, "method", "")
    return "online" if method in ONLINE_METHODS else "on_pairs"


AlignTrainingConfig: TypeAlias = Annotated[
    Annotated[PreferenceTrainingConfig, Tag("on_pairs")]
    | Annotated[OnlineTrainingConfig, Tag("online")],
    Discriminator(_kind_of_training),
]


class PipelineConfig(Config):
    """How often the wheel turns."""

    iterations: int = Field(default=1, gt=0)
    """Sample, judge, pair, train, evaluate: once each an iteration (SpeechAlign, Algorithm 1)."""
    prompts: Literal["fresh", "same"] = "fresh"
    """Whether each iteration is given other texts to speak, `prompts.num_prompts` of them."""
    earlier_pairs: Literal["none", "previous", "all"] = "previous"
    """Trained on beside the new pairs: those of the iteration before (the paper), or of all."""
    reference: Literal["previous", "first"] = "previous"
    """DPO's frozen reference: the policy of the iteration before, or the one of the start."""
    guards: GuardsConfig = GuardsConfig()


class AlignConfig(Config):
    """A run."""

    run_dir: Path
    seed: int = 0
    codec: CodecConfig = EmbeddedCodecConfig()
    golden: Path
    """Golden codec tokens, of `speechalign prepare`."""
    policy: Path
    """The AR model to align."""
    nar: Path
    """Fills the codec levels that the AR model leaves out; not trained here."""
    prompts: PromptsConfig = PromptsConfig()
    engine: GenerationEngineConfig = VllmConfig()
    sampling: SamplingConfig = SamplingConfig()
    rendering: RenderingConfig = RenderingConfig()
    pools: SamplingPoolsConfig = SamplingPoolsConfig()
    judges: tuple[JudgeConfig, ...] = ()
    reward: RewardConfig = RewardConfig()
    pairing: PairingConfig = PairingConfig()
    training: AlignTrainingConfig = PreferenceTrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pipeline: PipelineConfig = PipelineConfig()

    @property
    def heldout_judges(self) -> tuple[JudgeConfig, ...]:
        """Who hears the held-out answers of an online training, and no others."""
        if isinstance(self.training, OnlineTrainingConfig):
            return self.training.heldout.judges
        return ()

    @model_validator(mode="after")
    def _rewards_are_measured(self) -> "AlignConfig":
        measured = {TRUNCATED} | {name for judge in self.judges for name in judge_measures(judge)}
        for term in self.reward.terms:
            if term.measure not in measured:
                raise ValueError(
                    f"reward.terms uses {term.measure!r}, which is measured by no judge in "
                    f"`judges`; available: {', '.join(sorted(measured))}"
                )
        return self

    @model_validator(mode="after")
    def _a_measure_has_one_judge(self) -> "AlignConfig":
        for judges in ((*self.judges, *self.heldout_judges), self.evaluation.judges):
            names = [name for judge in judges for name in judge_measures(judge)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"two judges both measure {', '.join(twice)}; remove one (only python and "
                    "http judges can be renamed)"
                )
        return self

    @model_validator(mode="after")
    def _who_needs_a_reward_has_one(self) -> "AlignConfig":
        paired = self.training.method in ("dpo", "sft", "coh")
        golden_only = self.pairing.kinds == (PairKind.GOLDEN,)
        is_worst = self.pairing.golden_rejected == "worst"
        if paired and golden_only and not is_worst and self.evaluation.best_of == 1:
            return self
        if not self.reward.terms:
            raise ValueError(
                "reward.terms is empty, but this recipe chooses by a reward; add a judge to "
                "`judges` and its measure to reward.terms, or learn from golden pairs alone "
                "(pairing.kinds: [golden], golden_rejected: first, evaluation.best_of: 1)"
            )
        return self

    @model_validator(mode="after")
    def _pairs_across_temperatures_have_two(self) -> "AlignConfig":
        dealt = set(self.sampling.temperatures[: self.sampling.samples_per_prompt])
        if self.pairing.across_temperatures and len(dealt) < 2:
            raise ValueError(
                "pairing.across_temperatures needs samples of two temperatures; set "
                "sampling.temperatures, e.g. [1.0, 0.7], and samples_per_prompt to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _who_learns_from_labels_compares_nothing(self) -> "AlignConfig":
        if PairKind.LABELLED not in self.pairing.kinds:
            return self
        training = self.training
        is_kto = training.method == "dpo" and training.loss.variant == "kto"
        if not is_kto:
            raise ValueError(
                "labelled answers have no other one to be compared with; only kto learns from "
                "them: set training.method: dpo and training.loss.variant: kto"
            )
        return self

    @model_validator(mode="after")
    def _best_of_n_has_a_choice(self) -> "AlignConfig":
        if self.training.method != "best_of_n":
            return self
        if self.evaluation.best_of < 2:
            raise ValueError("best_of_n picks among evaluation.best_of samples; set it above 1")
        if self.pipeline.iterations > 1:
            raise ValueError("best_of_n trains nothing; set pipeline.iterations to 1")
        return self

    @model_validator(mode="after")
    def _online_training_knows_what_it_samples(self) -> "AlignConfig":
        if not isinstance(self.training, OnlineTrainingConfig):
            return self
        sampling, method = self.sampling, self.training.method
        if len(set(sampling.temperatures)) > 1 or not sampling.temperatures[0]:
            raise ValueError(f"{method} needs one sampling temperature, above 0")
        if (sampling.top_p, sampling.top_k) != (1.0, 0):
            raise ValueError(f"{method} learns from the whole softmax; remove top_p and top_k")
        if self.reward.normalise == "group":
            raise ValueError(
                f"{method} chooses its best version by the mean held-out reward, which "
                "reward.normalise: group makes 0; remove it (grpo normalises by itself)"
            )
        if method != "ppo" and sampling.samples_per_prompt < 2:
            raise ValueError(f"{method} compares the answers of a prompt; sample at least 2")
        return self

    @model_validator(mode="after")
    def _who_is_to_learn_from_cut_answers_sees_them(self) -> "AlignConfig":
        training = self.training
        if not isinstance(training, OnlineTrainingConfig) or training.truncated == "kept":
            return self
        is_rewarded = any(term.measure == TRUNCATED for term in self.reward.terms)
        if is_rewarded and training.method != "grpo":  # it compares the others with them
            raise ValueError(
                f"reward.terms uses {TRUNCATED!r}, but with training.truncated: masked "
                f"{training.method} never learns from a cut answer, and the term teaches nothing; "
                "set training.truncated: kept"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_listens_with_other_ears(self) -> "AlignConfig":
        rewarded = {j.model for j in self.judges if isinstance(j, RecogniserConfig)}
        for name, judges, role in (
            ("judges", self.judges, "reward"),
            ("training.heldout.judges", self.heldout_judges, "eval"),
            ("evaluation.judges", self.evaluation.judges, "eval"),
        ):
            recognisers = [j for j in judges if isinstance(j, RecogniserConfig)]
            if any(j.role != role for j in recognisers):
                raise ValueError(f"a recogniser of {name} needs role: {role}")
            both = rewarded & {j.model for j in recognisers}
            if role == "eval" and both:
                raise ValueError(
                    f"the recogniser {sorted(both)} makes rewards and evaluates; "
                    f"give {name} another model"
                )
        return self

    @model_validator(mode="after")
    def _evaluation_measures_what_made_no_reward(self) -> "AlignConfig":
        another = "add a judge that makes no reward, e.g. {kind: distillmos}"
        if not self.evaluation.judges:
            raise ValueError(f"evaluation.judges is empty: nobody would hear the policy; {another}")
        used = {term.measure for term in self.reward.terms}
        rewarded = {
            _ear(j, name) for j in self.judges for name in judge_measures(j) if name in used
        }
        heard = {_ear(j, name) for j in self.evaluation.judges for name in judge_measures(j)}
        if heard <= rewarded:
            raise ValueError(
                "evaluation.judges measures nothing but what makes the reward: a better number "
                f"could mean a policy that pleases it and nobody else; {another}"
            )
        return self


def _ear(judge: JudgeConfig, measure: str) -> tuple[str, str]:
    """Return whose measure it is, and which; a user's judge is the same under another name."""
    match judge:
        case PythonJudgeConfig():
            return f"{judge.target} {judge.arguments}", ""
        case HttpJudgeConfig():
            return judge.url, ""
        case RewardModelJudgeConfig():
            return str(judge.path), measure
        case _:
            return judge.kind, measure
