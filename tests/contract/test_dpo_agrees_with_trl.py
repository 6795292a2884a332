"""The same pairs through our collate, log-probs and loss, and through TRL's DPOTrainer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speechalign.config.policy import ArConfig
from speechalign.config.preference_training import DpoLossConfig, PreferenceTrainingConfig
from speechalign.policy.ar import build_ar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.training.losses import dpo_loss, pair_loss, reference_point
from speechalign.training.reference import answer_sums, mismatched, pair_logprobs
from speechalign.types import PairKind, PreferencePair

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=16)
CONFIG = ArConfig(num_layers=2, hidden_size=32, num_heads=2)
BETA = 0.3


def a_pair(name: str, chosen: tuple[int, ...], rejected: tuple[int, ...]) -> PreferencePair:
    return PreferencePair(
        pair_id=name,
        kind=PairKind.RANKED,
        prompt_id=name,
        policy_version=0,
        codec_fingerprint="f",
        prompt_token_ids=(2, 9, 10, 3, 25, 4),
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
        margin=1.0,
    )


PAIRS = [
    a_pair("a", (8, 9, 10, 1), (11, 12, 1)),
    a_pair("b", (20, 1), (13, 14, 15, 16, 1)),
    a_pair("c", (8, 8, 8, 8, 8, 1), (9, 1)),
]


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    policy = build_ar(CONFIG, VOCABULARY)
    torch.manual_seed(1)
    return policy.eval(), build_ar(CONFIG, VOCABULARY).eval()


def a_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, VOCABULARY.size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="2")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def trl_loss(
    loss_type: str, folder: Path, pairs: list[PreferencePair], label_smoothing: float = 0.0
) -> float:
    from datasets import Dataset

    class Pretokenised(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
            return dataset

    rows = [
        {
            "prompt_ids": list(pair.prompt_token_ids),
            "chosen_ids": list(pair.chosen_token_ids),
            "rejected_ids": list(pair.rejected_token_ids),
        }
        for pair in pairs
    ]
    policy, reference = models()
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        loss_type=[loss_type],
        label_smoothing=label_smoothing,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_dropout=True,
        gradient_checkpointing=False,
    )
    trainer = Pretokenised(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=a_tokenizer(),
    )
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize(
    ("loss_type", "config"),
    [
        ("sigmoid", DpoLossConfig(beta=BETA)),
        ("ipo", DpoLossConfig(beta=BETA, variant="ipo", logprobs="length_normalised")),
        ("robust", DpoLossConfig(beta=BETA, variant="robust", label_smoothing=0.2)),
    ],
)
def test_our_loss_is_trls(loss_type: str, config: DpoLossConfig, tmp_path: Path):
    policy, reference = models()
    with torch.no_grad():
        output = dpo_loss(pair_logprobs(policy, PAIRS), pair_logprobs(reference, PAIRS), config)
    theirs = trl_loss(loss_type, tmp_path, PAIRS, config.label_smoothing)
    assert theirs == pytest.approx(float(output.loss_B.mean()), rel=1e-5)


def test_our_fine_tuning_on_the_chosen_is_trls(tmp_path: Path):
    # TRL's is the mean over the batch's tokens, ours over pairs: equal for one pair
    policy, reference = models()
    config = PreferenceTrainingConfig(method="sft")
    for pair in PAIRS:
        with torch.no_grad():
            sides = pair_logprobs(policy, [pair]), pair_logprobs(reference, [pair])
            ours = float(pair_loss(*sides, config).loss_B.mean())
        assert trl_loss("sft", tmp_path, [pair]) == pytest.approx(ours, rel=1e-5)


def test_our_simpo_is_trls():
    from trl.experimental.cpo import CPOTrainer

    policy, _ = models()
    config = DpoLossConfig(
        beta=BETA, variant="simpo", logprobs="length_normalised", target_margin=0.2
    )
    with torch.no_grad():
        sides = pair_logprobs(policy, PAIRS)
    means = sides.normalised()
    settings = SimpleNamespace(
        loss_type="simpo",
        beta=BETA,
        simpo_gamma=0.2,
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    loss_of: Any = CPOTrainer.cpo_loss
    theirs, *_ = loss_of(settings, means.chosen_B, means.rejected_B)
    assert torch.allclose(dpo_loss(sides, sides, config).loss_B, theirs)


def test_our_conservative_loss_is_trls_smoothed_one(tmp_path: Path):
    # TRL's "sigmoid" ignores label_smoothing; its "aot" smooths, and sorts: nothing for one pair
    policy, reference = models()
    config = DpoLossConfig(beta=BETA, variant="cdpo", label_smoothing=0.2)
    for pair in PAIRS:
        with torch.no_grad():
            sides = pair_logprobs(policy, [pair]), pair_logprobs(reference, [pair])
            ours = float(dpo_loss(*sides, config).loss_B.mean())
        assert trl_loss("aot", tmp_path, [pair], 0.2) == pytest.approx(ours, rel=1e-5)


def trl_kto(
    folder: Path, pairs: list[PreferencePair], others: list[PreferencePair], config: DpoLossConfig
) -> float:
    from datasets import Dataset

    class Pretokenised(trl.KTOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
            return dataset

    rows = [
        {
            "prompt_ids": list(pair.prompt_token_ids),
            "completion_ids": list(answer),
            "KL_completion_ids": list(other.chosen_token_ids),
            "label": is_good,
        }
        for pair, other in zip(pairs, others, strict=True)
        for answer, is_good in ((pair.chosen_token_ids, True), (pair.rejected_token_ids, False))
        if answer
    ]
    policy, reference = models()
    arguments = trl.KTOConfig(
        output_dir=str(folder),
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = Pretokenised(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=a_tokenizer(),
    )
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.eval(), batch))


def alone(pair: PreferencePair, *, is_good: bool) -> PreferencePair:
    empty = {"rejected_token_ids": ()} if is_good else {"chosen_token_ids": ()}
    return replace(pair, kind=PairKind.LABELLED, **empty)


@pytest.mark.parametrize(
    ("pairs", "has_kl"),
    [
        (PAIRS, True),
        ([alone(pair, is_good=pair is PAIRS[1]) for pair in PAIRS], False),
        ([alone(pair, is_good=True) for pair in PAIRS], True),
    ],
    ids=["pairs", "one good, two bad", "all good"],
)
def test_our_kto_is_trls(pairs: list[PreferencePair], has_kl: bool, tmp_path: Path):
    # TRL's terms of KTO are inside its trainer's step: its collator and step get our rows
    policy, reference = models()
    config = DpoLossConfig(beta=BETA, variant="kto", desirable_weight=1.5, undesirable_weight=0.5)
    pairs = [replace(pair, prompt_id=f"p{i}") for i, pair in enumerate(pairs)]
    others = mismatched(pairs)
    with torch.no_grad():
        rows = [(pair.prompt_token_ids, pair.chosen_token_ids) for pair in others]
        differences = answer_sums(policy, rows) - answer_sums(reference, rows)
        kl = reference_point(differences.sum(), torch.tensor(len(rows)))
        sides = pair_logprobs(policy, pairs), pair_logprobs(reference, pairs)
        ours = float(dpo_loss(*sides, config, kl).loss_B.mean())
    assert (kl > 0) is has_kl
    assert trl_kto(tmp_path, pairs, others, config) == pytest.approx(ours, rel=1e-5)
