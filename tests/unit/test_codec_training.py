from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from speechalign.codec.augment import PseudoSpeakers, SpectralBasis
from speechalign.codec.crops import Corpus, CropSampler, equal_length_batches
from speechalign.codec.embedded import EmbeddedCodec
from speechalign.codec.embedded_model import EmbeddedModel
from speechalign.codec.encode_corpus import encode_corpus
from speechalign.codec.losses import ReconstructionLoss
from speechalign.codec.quantise import quantise, revive_dead_codes
from speechalign.codec.train import learning_rate, train_codec
from speechalign.config.codec import (
    AugmentConfig,
    CodecTrainingConfig,
    EmbeddedModelConfig,
    EncodeCorpusConfig,
    PhaseConfig,
)
from speechalign.errors import CorruptArtifact, DataError
from speechalign.rows import GOLDEN

TINY = EmbeddedModelConfig(
    hidden_dim=16,
    latent_dim=8,
    post_dim=8,
    num_acoustic_codebooks=2,
    codebook_size=8,
    content_dilations=(1,),
    acoustic_dilations=(1,),
    decoder_dilations=(1,),
    post_dilations=(1,),
)
NUM_FRAMES = [30, 7, 25, 30, 40]
SPLITS = ["train", "train", "heldout", "train", "train"]
SOURCES = ["a", "a", "a", "b", "b"]
TEXTS = ["one", "two", "three", "four", ""]


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    columns = {
        "clip_id": [f"clip{i}" for i in range(5)],
        "text": TEXTS,
        "phonemes": TEXTS,
        "speaker_id": SOURCES,
        "source": SOURCES,
        "kind": ["synthetic"] * 5,
        "split": SPLITS,
        "start": np.cumsum([0, *NUM_FRAMES[:-1]]) * 320,
        "num_samples": np.array(NUM_FRAMES) * 320,
        "num_frames": NUM_FRAMES,
    }
    pq.write_table(pa.table(columns), path / "clips.parquet")
    rng = np.random.default_rng(0)
    total = sum(NUM_FRAMES)
    features_FD = rng.normal(size=(2 * total, 43))
    features_FD[:, 0] += 5
    features_FD[:, 1] = rng.integers(0, 2, 2 * total)
    np.save(path / "world.npy", features_FD.astype(np.float16))
    np.save(path / "whisper.npy", rng.normal(size=(total, 12)).astype(np.float16))
    return path


def a_job(corpus_dir: Path, out_dir: Path, num_steps: int = 4) -> CodecTrainingConfig:
    phase = PhaseConfig(num_steps=num_steps, batch_size=3, num_unquantised_steps=1)
    return CodecTrainingConfig(
        corpus_dir=corpus_dir,
        out_dir=out_dir,
        num_threads=1,
        crop_frames=20,
        teacher_dim=12,
        log_every_steps=2,
        checkpoint_every_steps=2,
        model=TINY,
        content=phase,
        acoustics=phase,
    )


def test_training_leaves_a_codec_that_makes_golden_codes(corpus_dir: Path, tmp_path: Path):
    codec_dir = train_codec(a_job(corpus_dir, tmp_path / "out"))
    out_file = tmp_path / "golden.parquet"
    encode_corpus(
        EncodeCorpusConfig(
            corpus_dir=corpus_dir, codec_dir=codec_dir, out_file=out_file, num_threads=1
        )
    )
    golden = pq.read_table(out_file)
    assert golden.schema.equals(GOLDEN)
    assert golden["text"].to_pylist() == TEXTS[:4]
    assert set(golden["codec_fingerprint"].to_pylist()) == {
        EmbeddedCodec.load(codec_dir).fingerprint
    }
    codes = [np.reshape(row, (3, -1)) for row in golden["codes"].to_pylist()]
    assert [c.shape[1] for c in codes] == NUM_FRAMES[:4]


def test_a_killed_training_resumes_where_it_was(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train_codec(a_job(corpus_dir, tmp_path / "whole"))

    def die(model: EmbeddedModel, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("speechalign.codec.train.save_embedded", die)
        train_codec(a_job(corpus_dir, tmp_path / "killed"))
    resumed = train_codec(a_job(corpus_dir, tmp_path / "killed"))
    assert (whole / "model.safetensors").read_bytes() == (
        resumed / "model.safetensors"
    ).read_bytes()


def test_no_crop_reaches_into_a_clip_that_is_not_for_training(corpus_dir: Path):
    corpus = Corpus.read(corpus_dir)
    features_FD = np.array(corpus.features_FD)
    features_FD[2 * 37 : 2 * 62] = np.inf
    marked = Corpus(
        clips=corpus.clips,
        features_FD=features_FD,
        teacher_TD=corpus.teacher_TD,
        num_frames_C=corpus.num_frames_C,
        starts_C=corpus.starts_C,
    )
    sampler = CropSampler(marked, crop_frames=45, power=0.5, rng=np.random.default_rng(0))
    batch = sampler.draw(50)
    assert batch.features_BFD.shape == (50, 90, 43)
    assert torch.isfinite(batch.features_BFD).all()


def test_features_and_teacher_of_a_crop_are_of_the_same_instants(corpus_dir: Path):
    corpus = Corpus.read(corpus_dir)
    total = sum(NUM_FRAMES)
    counted = Corpus(
        clips=corpus.clips,
        features_FD=np.arange(2 * total, dtype=np.float32)[:, None],
        teacher_TD=np.arange(total, dtype=np.float16)[:, None],
        num_frames_C=corpus.num_frames_C,
        starts_C=corpus.starts_C,
    )
    batch = CropSampler(counted, crop_frames=10, power=1.0, rng=np.random.default_rng(0)).draw(8)
    assert torch.equal(batch.features_BFD[:, ::2], 2 * batch.teacher_BTD)
    assert torch.equal(batch.features_BFD[:, 1::2], 2 * batch.teacher_BTD + 1)


def test_rare_sources_are_drawn_more_often_than_their_minutes_say(corpus_dir: Path):
    sampler = CropSampler(
        Corpus.read(corpus_dir), crop_frames=10, power=0.5, rng=np.random.default_rng(0)
    )
    assert sampler.share["b"] / sampler.share["a"] == pytest.approx((70 / 37) ** 0.5)


def test_a_corpus_of_other_length_than_its_clips_is_refused(corpus_dir: Path):
    np.save(corpus_dir / "whisper.npy", np.zeros((5, 12), np.float16))
    with pytest.raises(CorruptArtifact, match=r"whisper\.npy"):
        Corpus.read(corpus_dir)


def test_a_corpus_without_training_clips_is_refused(corpus_dir: Path):
    clips = pq.read_table(corpus_dir / "clips.parquet")
    index = clips.column_names.index("split")
    pq.write_table(
        clips.set_column(index, "split", pa.array(["heldout"] * 5)), corpus_dir / "clips.parquet"
    )
    with pytest.raises(DataError, match="train"):
        CropSampler(
            Corpus.read(corpus_dir), crop_frames=10, power=0.5, rng=np.random.default_rng(0)
        )


def test_batches_have_one_length_and_every_clip_once():
    num_frames_C = np.array([5, 3, 5, 0, 3, 5])
    batches = equal_length_batches(num_frames_C, max_frames=10)
    assert [batch.tolist() for batch in batches] == [[1, 4], [0, 2], [5]]


def test_warping_by_one_changes_nothing_and_by_more_moves_a_peak_up():
    basis = SpectralBasis(40)
    frequency_M = torch.linspace(0, 1, 64)
    peak_M = torch.exp(-(((frequency_M - 0.5) / 0.1) ** 2))
    coefficients_E = peak_M @ basis.from_log_power_ME
    torch.testing.assert_close(coefficients_E @ basis.warp_EE(1.0), coefficients_E)
    warped_M = coefficients_E @ basis.warp_EE(1.2) @ basis.to_log_power_EM
    assert warped_M.argmax() > peak_M.argmax()


def test_a_pseudo_speaker_keeps_the_words_voicing_and_breath():
    torch.manual_seed(0)
    features_BFD = torch.rand(6, 20, 43) + 4.5
    changed_BFD = PseudoSpeakers(AugmentConfig(probability=1.0), 43)(features_BFD)
    assert torch.equal(changed_BFD[..., [1, 42]], features_BFD[..., [1, 42]])
    assert not torch.isclose(changed_BFD[..., 0], features_BFD[..., 0]).all()
    kept_BFD = PseudoSpeakers(AugmentConfig(probability=0.0), 43)(features_BFD)
    assert torch.equal(kept_BFD, features_BFD)


def test_a_depth_of_zero_says_nothing_and_full_depth_says_most():
    torch.manual_seed(0)
    quantiser = EmbeddedModel(TINY).acoustics.quantiser.train()
    latent_BTD = torch.randn(3, 30, 8, requires_grad=True)
    result = quantise(quantiser, latent_BTD, torch.tensor([0, 1, 2]))
    assert not result.values_BTD[0].any()
    errors = (result.values_BTD - latent_BTD).pow(2).mean((1, 2)).tolist()
    assert errors[0] > errors[1] > errors[2]
    result.values_BTD.sum().backward()
    assert latent_BTD.grad is not None
    assert latent_BTD.grad[:, 0, 0].tolist() == [0.0, 1.0, 1.0]


def test_quantising_learns_as_the_package_does():
    torch.manual_seed(0)
    ours, theirs = (EmbeddedModel(TINY).acoustics.quantiser.train() for _ in range(2))
    latent_BTD = torch.randn(2, 30, 8)
    quantise(ours, latent_BTD)
    theirs.load_state_dict(ours.state_dict())
    quantise(ours, 2 * latent_BTD)
    with torch.no_grad():
        theirs.vq(2 * latent_BTD.transpose(1, 2))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)


def test_a_dead_code_is_moved_onto_a_residual():
    torch.manual_seed(0)
    quantiser = EmbeddedModel(TINY).content.quantiser.train()
    latent_BTD = torch.randn(2, 30, 8)
    quantise(quantiser, latent_BTD)
    book = quantiser.vq.layers[0]._codebook
    book.cluster_size.fill_(10.0)
    book.cluster_size[3] = 0.0
    assert revive_dead_codes(quantiser, latent_BTD) == 1
    assert (latent_BTD.reshape(-1, 8) == book.embed[3]).all(-1).any()
    assert revive_dead_codes(quantiser, latent_BTD) == 0


def test_the_loss_is_least_for_the_truth_and_weighs_pitch_where_there_is_voice():
    loss = ReconstructionLoss(torch.ones(43))
    target_BFD = torch.randn(2, 10, 43)
    target_BFD[..., 1] = 0.0
    truth_BFD = target_BFD.clone()
    truth_BFD[..., 1] = -20.0
    assert sum(loss(truth_BFD, target_BFD).values()) < 1e-4
    wrong_BFD = truth_BFD.clone()
    wrong_BFD[..., 0] += 1.0
    unvoiced = loss(wrong_BFD, target_BFD)["pitch"]
    target_BFD[..., 1] = 1.0
    assert loss(wrong_BFD, target_BFD)["pitch"] == pytest.approx(21 * unvoiced)


def test_the_learning_rate_rises_then_falls():
    schedule = PhaseConfig(
        num_steps=100, learning_rate=1.0, num_warmup_steps=10, num_unquantised_steps=1
    )
    rates = [learning_rate(schedule, step) for step in (0, 10, 50, 99)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[1] > rates[2] > rates[3] > 0.02


def test_a_phase_that_never_quantises_is_refused():
    phase = PhaseConfig(num_steps=10, num_unquantised_steps=10)
    with pytest.raises(ValueError, match="codebook"):
        CodecTrainingConfig(corpus_dir=Path("a"), out_dir=Path("b"), content=phase, acoustics=phase)
