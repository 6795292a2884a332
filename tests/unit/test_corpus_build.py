from pathlib import Path

import numpy as np
import pytest
from G722 import G722

from speechalign.config.corpus import CorpusConfig
from speechalign.corpus.build import CODEC_FRAME_SAMPLES, pseudo_speaker, script, trim
from speechalign.corpus.grammar import sentences
from speechalign.corpus.sources import Recording, asterisk_foreign, speakable

TINY = CorpusConfig(num_train_sentences=900, num_heldout_sentences=60, num_flite_sentences=40)


def tone(num_samples: int, period: int = 80) -> np.ndarray:
    return np.sin(2 * np.pi * np.arange(num_samples) / period).astype(np.float32)


def recording(wave: np.ndarray) -> Recording:
    return Recording(
        clip_id="a/1",
        text="hello",
        speaker_id="a",
        source="p",
        kind="human",
        split="heldout",
        waveform_N=wave,
    )


def test_a_seed_names_its_sentences():
    assert sentences(50, seed=1) == sentences(50, seed=1)
    assert sentences(50, seed=1) != sentences(50, seed=2)


def test_sentences_are_distinct_and_more_of_them_begin_with_the_same():
    many = sentences(3000, seed=0)
    assert len(set(many)) == 3000
    assert sentences(100, seed=0) == many[:100]


def test_no_voice_speaks_a_heldout_sentence_in_training():
    hibari, flite = script(TINY)
    heldout = set(hibari[TINY.num_train_sentences :])
    spoken = [*hibari[: TINY.num_train_sentences], *(t for texts in flite.values() for t in texts)]
    assert len(heldout) == 60
    assert [len(texts) for texts in flite.values()] == [40, 40, 40, 40]
    assert heldout.isdisjoint(spoken)
    assert len(set(spoken)) == len(spoken) == 900 + 4 * 40


def test_the_sentences_of_hibari_do_not_depend_on_flite():
    without = TINY.model_copy(update={"num_flite_sentences": 0})
    assert script(without) == (script(TINY)[0], {})


def test_heldout_pseudo_speakers_have_factors_of_their_own():
    config = CorpusConfig()
    assert set(config.train_factors).isdisjoint(config.heldout_factors)
    assert min(config.train_factors) < min(config.heldout_factors)
    assert max(config.heldout_factors) < max(config.train_factors)


def test_training_does_not_say_what_a_heldout_prompt_says():
    names = ("locked", "is-locked", "bye")
    locked, is_locked, bye = files = [Path(f"{name}.g722") for name in names]
    texts = {"locked": "It is locked.", "is-locked": "it is locked", "bye": "Good bye now."}
    assert list(speakable(files, {locked}, texts)) == [locked, bye]
    assert list(speakable(files, {bye}, texts)) == [locked, is_locked, bye]


def test_two_files_of_one_name_have_no_certain_transcript():
    files = [Path("try.g722"), Path("followme/try.g722"), Path("bye.g722")]
    texts = {"try": "Please hold while we try.", "bye": "Good bye now."}
    assert list(speakable(files, {files[2]}, texts)) == [files[2]]


def test_pauses_are_no_speech_and_ids_tell_folders_apart(tmp_path: Path):
    root = tmp_path / "asterisk-core-sounds-xx-g722" / "sounds" / "voice"
    samples = (8000 * tone(32000)).astype(np.int16)
    for name in ("silence/2", "followme/sorry", "sorry"):
        path = root / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(G722(16000, 64000).encode(samples)))
    clips = list(asterisk_foreign(tmp_path, "xx", 1.0, seed=0))
    assert {clip.clip_id for clip in clips} == {"xx/followme/sorry", "xx/voice/sorry"}
    assert {len(clip.waveform_N) for clip in clips} == {32000}


@pytest.mark.parametrize("num_samples", [16000, 16001, 16319])
def test_a_clip_is_a_whole_number_of_codec_frames(num_samples: int):
    assert len(trim(tone(num_samples))) == 16000 // CODEC_FRAME_SAMPLES * CODEC_FRAME_SAMPLES


def test_at_most_80_ms_of_silence_stay_on_either_side():
    silence = np.zeros(16000, np.float32)
    speech = trim(np.concatenate([silence, tone(8000, period=83), silence]))
    loud = np.flatnonzero(np.abs(speech) > 0.01)
    assert 1270 <= loud[0] <= 1290
    assert 1280 - 2 * CODEC_FRAME_SAMPLES < len(speech) - loud[-1] <= 1290


def test_a_pseudo_speaker_is_slower_and_lower_and_stays_in_its_split():
    slow = pseudo_speaker(recording(tone(16000, period=80)), 1.25, "b")
    assert (slow.clip_id, slow.speaker_id, slow.split) == ("a/1-b", "a-b", "heldout")
    assert len(slow.waveform_N) == 20000
    loudest_bin = np.abs(np.fft.rfft(slow.waveform_N)).argmax()
    assert loudest_bin * 16000 / 20000 == pytest.approx(160, abs=1)
