"""A reward is of the tokens of an answer; the prompt's own and the padding do not count."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from speechalign.artifacts import committed_folder
from speechalign.config.judges import RewardModelJudgeConfig
from speechalign.config.policy import ArConfig
from speechalign.config.training import RewardModelConfig
from speechalign.errors import ConfigError, CorruptArtifact, DataError
from speechalign.evaluation.reward_model import calibration_points, write_reward_report
from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.prompt_format import with_feedback
from speechalign.policy.reward_model import RewardModel, load_reward_model, save_reward_model
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rewards.learned import RewardModelStage
from speechalign.rows import pairs_to_table
from speechalign.training.reward_model import RewardTask, pair_rewards
from speechalign.training.stored_pairs import PAIRS
from speechalign.types import PairKind, PreferencePair

VOCABULARY = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=16)
PROMPT, ANSWER = (2, 9, 3, 25, 4), (8, 9, 1)


def a_model() -> RewardModel:
    torch.manual_seed(0)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY)
    return RewardModel(model).eval()


def saved(folder: Path) -> Path:
    save_reward_model(folder / "rm", a_model(), VOCABULARY, {"codec_fingerprint": "f"})
    return folder / "rm"


@torch.no_grad()
def reward(model: RewardModel, *answers: tuple[int, ...]) -> list[float]:
    return model(collate_answers([(PROMPT, answer) for answer in answers])).tolist()


def test_the_reward_of_an_answer_does_not_depend_on_its_padding():
    model = a_model()
    alone, beside = reward(model, ANSWER)[0], reward(model, ANSWER, (*ANSWER[:2],) * 4)[0]
    assert beside == pytest.approx(alone, abs=1e-6)


def test_what_a_prompt_says_of_its_answer_is_not_read(tmp_path: Path):
    loaded = load_reward_model(saved(tmp_path))
    told = tuple(with_feedback(PROMPT, is_good=True))
    assert loaded.rewards([(told, ANSWER)]) == loaded.rewards([(PROMPT, ANSWER)])
    bare, good = (
        pair_rewards(loaded.model, [a_pair(prompt)])[0].tolist() for prompt in (PROMPT, told)
    )
    assert bare == good


def test_every_token_of_the_answer_counts_the_last_too():
    model = a_model()
    base, first, last = reward(model, ANSWER, (11, 9, 1), (8, 9, 12))
    assert len({round(base, 5), round(first, 5), round(last, 5)}) == 3


@torch.no_grad()
def test_a_reward_by_hand():
    model = a_model()
    model.offset += 0.25
    ids = torch.tensor([[*PROMPT, *ANSWER]])
    said = model.policy(input_ids=ids, output_hidden_states=True)
    seen: list[torch.Tensor] = []
    for place in range(len(PROMPT), len(PROMPT) + len(ANSWER)):
        expected = torch.softmax(said.logits[0, place - 1].double(), 0)
        logprob = expected[ids[0, place]].log()
        entropy = -(expected * expected.log()).sum()
        surprise = torch.stack([logprob, entropy, logprob + entropy]).float()
        seen.append(torch.cat([model.kept(said.hidden_states[-1][0, place]), surprise]))
    tokens = model.token(torch.stack(seen))
    deviation = (tokens.var(0, unbiased=False) + 1e-5).sqrt()
    by_hand = model.head(torch.cat([tokens.mean(0), deviation])) - 0.25
    assert reward(model, ANSWER)[0] == pytest.approx(float(by_hand), abs=1e-5)


def test_an_answer_of_one_token_has_a_reward_and_a_gradient():
    model = a_model()
    said = model(collate_answers([(PROMPT, (1,))]))
    said.sum().backward()
    assert torch.isfinite(said).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def a_pair(prompt: tuple[int, ...]) -> PreferencePair:
    return PreferencePair(
        pair_id="p",
        kind=PairKind.GOLDEN,
        prompt_id="p",
        policy_version=0,
        codec_fingerprint="f",
        prompt_token_ids=prompt,
        chosen_token_ids=ANSWER,
        rejected_token_ids=(11, 1),
        margin=1.0,
    )


def test_rewards_of_pairs_are_those_of_their_sides():
    model = a_model()
    with torch.no_grad():
        sides = [float(side) for side in pair_rewards(model, [a_pair(PROMPT)])]
    assert sides == pytest.approx(reward(model, ANSWER, (11, 1)), abs=1e-6)


def test_a_saved_reward_model_gives_the_same_rewards(tmp_path: Path):
    model = a_model()
    model.offset += 0.25
    save_reward_model(tmp_path / "rm", model, VOCABULARY, {"codec_fingerprint": "f"})
    loaded = load_reward_model(tmp_path / "rm")
    assert loaded.rewards([(PROMPT, ANSWER)]) == reward(model, ANSWER)


def test_what_is_no_reward_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="speechalign reward-model"):
        load_reward_model(tmp_path / "nowhere")
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY)
    facts = {"codec_fingerprint": "f", "policy_version": 0, "prefix_frames": 4}
    save_ar(tmp_path / "ar", model, VOCABULARY, facts)
    with pytest.raises(ConfigError, match="'ar' artifact, not a reward model"):
        load_reward_model(tmp_path / "ar")
    folder = saved(tmp_path)
    (folder / "vocabulary.json").write_text("{}")
    with pytest.raises(CorruptArtifact):
        load_reward_model(folder)


def samples(*prompts: tuple[int, ...], codec: str = "f") -> pa.Table:
    return pa.table(
        {
            "prompt_token_ids": [list(prompt) for prompt in prompts],
            "token_ids": [list(ANSWER)] * len(prompts),
            "codec_fingerprint": [codec] * len(prompts),
        }
    )


def test_the_stage_rewards_samples_and_leaves_recordings_without(tmp_path: Path):
    stage = RewardModelStage(RewardModelJudgeConfig(path=saved(tmp_path)))
    table = stage(samples(PROMPT, (), PROMPT))
    first, recording, last = table["reward_model"].to_pylist()
    assert [first, last] == pytest.approx([reward(a_model(), ANSWER)[0]] * 2, abs=1e-6)
    assert recording is None
    assert table["judge_errors"].to_pylist()[1] == (
        "reward_model: there is no prompt, or no answer to it"
    )
    with pytest.raises(DataError, match="their codes mean different sounds"):
        stage(samples(PROMPT, codec="other"))


def test_calibration_by_hand():
    # five bins of one pair: |margin| 0, 0, 0, 0 and ln 3; only positive margins are right
    points = calibration_points([0.0, 0.0, 0.0, 0.0, -1.0986123])
    assert points[0] == (0.5, 0.0, 1)
    assert points[-1] == (pytest.approx(0.75), 0.0, 1)
    assert calibration_points([1.0986123])[-1] == (pytest.approx(0.75), 1.0, 1)


def test_the_page_says_what_the_model_is_and_shows_its_plots(tmp_path: Path):
    facts = {"pairs of <a>": "90 % & more", "num_steps": 600}
    margins = {"golden": [1.0, -0.5], "ranked": [0.25]}
    write_reward_report(facts, margins, [{"step": 1, "loss": 0.7}], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="row">pairs of &lt;a&gt;</th><td>90 % &amp; more</td>' in page
    assert "<td>600</td>" in page
    assert page.count("<svg") == 3  # margins, calibration, loss
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


class Worths(nn.Module):
    """Rewards an answer by its first token."""

    def __init__(self, worths: dict[int, float]) -> None:
        super().__init__()
        values_V = torch.zeros(VOCABULARY.size)
        for token, worth in worths.items():
            values_V[token] = worth
        self.worth_V = nn.Parameter(values_V)

    def forward(self, batch: AnswerBatch) -> torch.Tensor:
        first_B = batch.answer_mask_BS.int().argmax(1)
        return self.worth_V[batch.input_ids_BS[torch.arange(len(first_B)), first_B]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss", "slope"),
    [
        (2.0, 1.0, 0.3132617, 0.2689414),  # ln(1 + 1/e), and sigmoid(-1)
        (0.0, 3.0, 3.0485874, 0.9525741),  # ln(1 + e^3), and sigmoid(3)
        (1.5, 1.5, 0.6931472, 0.5),
    ],
)
def test_bradley_terry_by_hand(
    tmp_path: Path, chosen: float, rejected: float, loss: float, slope: float
):
    pairs = [replace(a_pair(PROMPT), pair_id=f"p{i}", prompt_id=f"p{i}") for i in range(12)]
    with committed_folder(tmp_path / "pairs", {}) as partial:
        pq.write_table(pairs_to_table(pairs), partial / PAIRS)
    ar = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY)
    facts = {"codec_fingerprint": "f", "policy_version": 0, "prefix_frames": 4}
    save_ar(tmp_path / "ar", ar, VOCABULARY, facts)
    config = RewardModelConfig(
        policy=tmp_path / "ar",
        pairs=(tmp_path / "pairs",),
        output=tmp_path / "rm",
        num_steps=1,
        rows_per_step=4,
        heldout_share=0.2,
    )
    task, model = RewardTask(config), Worths({ANSWER[0]: chosen, 11: rejected})
    total, count = task.loss(model, [0, 1, 2, 3], 0)
    assert (total.item(), count.item()) == (pytest.approx(4 * loss), 4.0)
    total.backward()
    assert model.worth_V.grad is not None
    assert float(model.worth_V.grad[ANSWER[0]]) == pytest.approx(-4 * slope)  # rises, as loss falls
    assert float(model.worth_V.grad[11]) == pytest.approx(4 * slope)
    assert task.heldout(model) == {
        "heldout_loss": pytest.approx(loss),
        "heldout_accuracy": float(chosen > rejected),
        "heldout_margin": pytest.approx(chosen - rejected),
    }
