"""The Ray Data faces of sampling and rendering: Arrow in, Arrow out, and no Ray in here.

Each is a plain class: tests call it directly, Ray Data makes actors of it.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from speechalign.artifacts import manifest_facts
from speechalign.codec.base import Codec, check_fingerprint
from speechalign.codec.build import build_codec
from speechalign.config.codec import CodecConfig
from speechalign.config.sampling import GenerationEngineConfig, RenderingConfig, SamplingConfig
from speechalign.generation.base import Engine, Generation, GenerationRequest, SamplingParams
from speechalign.generation.build import build_generation_engine
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.nar import load_nar
from speechalign.policy.prompt_format import asked_prompt
from speechalign.policy.vocabulary import EOS_ID, Vocabulary
from speechalign.rows import (
    RENDERED,
    Row,
    codes_from_flat,
    pcm_from_waveform,
    prompts_from_table,
    samples_to_table,
)
from speechalign.sampling.rendering import Answer, Renderer
from speechalign.seeds import derive_seed
from speechalign.types import Prompt, Sample

SAMPLE_SECONDS = pa.field("sample_seconds", pa.float32(), nullable=False)
RENDER_SECONDS = pa.field("render_seconds", pa.float32(), nullable=False)
"""Seconds that an actor spent on a row: those of its batch, shared evenly."""


class Speaker:
    """A policy that answers tables of prompts.

    A sample's seed is made of its prompt and index, so one row can be sampled again without the
    others.
    """

    def __init__(self, ar_folder: Path, engine: Engine, sampling: SamplingConfig) -> None:
        self.engine = engine
        self._vocabulary = Vocabulary.load(ar_folder / VOCABULARY)
        self._facts = manifest_facts(ar_folder)
        self._sampling = sampling

    def answer(self, batch: pa.Table, count: int, seed_parts: Sequence[str | int]) -> pa.Table:
        """Return rows.SAMPLE with the answers of each prompt, one prompt after another.

        Args:
            batch: rows.PROMPT.
            count: answers a prompt.
            seed_parts: what the seeds are made of, beside prompt and index.

        Raises:
            DataError: a prompt is of another codec, or was never admitted (`admit_prompts`).
        """
        prompts = prompts_from_table(batch)
        requests = [
            self._request(
                prompt,
                [derive_seed(*seed_parts, prompt.prompt_id, index) for index in range(count)],
            )
            for prompt in prompts
        ]
        answers = self._answers(requests)
        samples = [
            Sample(
                prompt_id=prompt.prompt_id,
                sample_index=index,
                policy_version=self.engine.policy_version,
                codec_fingerprint=prompt.codec_fingerprint,
                prompt_token_ids=request.prompt_token_ids,
                token_ids=generation.token_ids,
                logprobs=generation.logprobs,
                temperature=temperature,
                is_truncated=generation.is_truncated,
            )
            for prompt, request, group in zip(prompts, requests, answers, strict=True)
            for index, (temperature, generation) in enumerate(group)
        ]
        return samples_to_table(samples, {prompt.prompt_id: prompt for prompt in prompts})

    def _answers(
        self, requests: Sequence[GenerationRequest]
    ) -> list[list[tuple[float, Generation]]]:
        """Return each prompt's answers with their temperatures, in the order of the seeds."""
        temperatures = self._sampling.temperatures
        turns = len(temperatures)
        dealt = [
            self.engine.generate(
                [replace(request, seeds=request.seeds[turn::turns]) for request in requests],
                sampling_params(self._sampling, temperature),
            )
            for turn, temperature in enumerate(temperatures)
        ]
        return [
            [
                (temperatures[index % turns], dealt[index % turns][row][index // turns])
                for index in range(len(request.seeds))
            ]
            for row, request in enumerate(requests)
        ]

    def _request(self, prompt: Prompt, seeds: Sequence[int]) -> GenerationRequest:
        check_fingerprint(
            prompt.codec_fingerprint, self._facts["codec_fingerprint"], "the AR policy"
        )
        ids = asked_prompt(self._vocabulary, self._facts, prompt.phonemes, prompt.speaker_codes_KT)
        return GenerationRequest(prompt_token_ids=ids, seeds=tuple(seeds))


class SampleStage:
    """rows.PROMPT in, rows.SAMPLE and `sample_seconds` out: every prompt is answered N times.

    The seeds are of a policy version, unless `common_seeds`: then all policies share their luck,
    and less of the difference between two of them is chance.
    """

    def __init__(
        self,
        ar_folder: Path,
        engine: GenerationEngineConfig,
        sampling: SamplingConfig,
        run_seed: int,
    ) -> None:
        built = build_generation_engine(ar_folder, engine)
        self._speaker = Speaker(ar_folder, built, sampling)
        luck_of = "all policies" if sampling.common_seeds else built.policy_version
        self._seed_parts = (run_seed, "sampling", luck_of)
        self._count = sampling.samples_per_prompt

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer one batch of prompts.

        Raises:
            DataError: a prompt is of another codec, or was never admitted (`admit_prompts`).
        """
        started = time.perf_counter()
        table = self._speaker.answer(batch, self._count, self._seed_parts)
        return with_seconds(table, SAMPLE_SECONDS, time.perf_counter() - started)


class RenderStage:
    """rows.SAMPLE in, rows.RENDERED and `render_seconds` out; a bad row never kills a batch.

    An empty or malformed answer has an empty waveform and no error: nothing was said, and the
    judges say so. A row that could not be rendered for another reason has `judge_errors`
    starting with `rendering: `; the pipeline moves it to the quarantine.
    """

    def __init__(
        self, codec: CodecConfig, ar_folder: Path, nar_folder: Path, config: RenderingConfig
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self._codec: Codec = build_codec(codec)
        nar = load_nar(nar_folder)
        check_fingerprint(self._codec.fingerprint, nar.facts["codec_fingerprint"], "the NAR model")
        vocabulary = Vocabulary.load(ar_folder / VOCABULARY)
        self._renderer = Renderer(self._codec, vocabulary, nar, config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Render one batch of samples.

        Raises:
            DataError: a sample is of another codec.
        """
        started = time.perf_counter()
        for fingerprint in sorted({str(value) for value in batch["codec_fingerprint"].to_pylist()}):
            check_fingerprint(fingerprint, self._codec.fingerprint, "the codec")
        names = ["token_ids", "speaker_codes", "golden_codes", "num_codebooks"]
        answers = [_answer(row) for row in batch.select(names).to_pylist()]
        rendered = self._renderer.render(answers)
        columns = {
            "sample_rate_hz": [self._codec.sample_rate_hz] * len(answers),
            "golden_duration_s": [self._golden_duration_s(answer) for answer in answers],
            "waveform_pcm": [pcm_from_waveform(sound.waveform_N) for sound in rendered],
            "reference_pcm": [pcm_from_waveform(sound.reference_N) for sound in rendered],
            "judge_errors": [sound.error for sound in rendered],
        }
        for name, values in columns.items():
            field = RENDERED.field(name)
            batch = batch.append_column(field, pa.array(values, field.type))
        return with_seconds(batch, RENDER_SECONDS, time.perf_counter() - started)

    def _golden_duration_s(self, answer: Answer) -> float:
        return answer.golden_codes_KT.shape[1] / self._codec.frame_rate_hz


def sampling_params(config: SamplingConfig, temperature: float) -> SamplingParams:
    """Return what an engine needs of a config, for samples of one temperature."""
    return SamplingParams(
        temperature=temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        eos_id=EOS_ID,
    )


def _answer(row: Row) -> Answer:
    return Answer(
        token_ids=tuple(row["token_ids"]),
        speaker_codes_KT=codes_from_flat(row["speaker_codes"], row["num_codebooks"]),
        golden_codes_KT=codes_from_flat(row["golden_codes"], row["num_codebooks"]),
    )


def with_seconds(table: pa.Table, field: "pa.Field[Any]", seconds: float) -> pa.Table:
    """Append the seconds of a batch, shared evenly by its rows."""
    share = seconds / max(table.num_rows, 1)
    return table.append_column(field, pa.array([share] * table.num_rows, pa.float32()))
