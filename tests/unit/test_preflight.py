"""What is refused before the first actor starts, and what a probe is made of."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from speechalign.artifacts import committed_folder, manifest_facts
from speechalign.config.sampling import VllmConfig
from speechalign.errors import ConfigError, DataError
from speechalign.generation import vllm
from speechalign.pipeline.doctor import examine
from speechalign.pipeline.online import probes_of
from speechalign.pipeline.preflight import check_artifacts
from speechalign.pipeline.sample import training_prompts, write_prompts
from tests.tiny_stack import TinyStack, build_tiny_stack, tiny_recipe


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TinyStack:
    return build_tiny_stack(tmp_path_factory.mktemp("stack"))


def test_an_engine_longer_than_the_policys_positions_is_refused(stack: TinyStack, tmp_path: Path):
    check_artifacts(tiny_recipe(stack, tmp_path / "run"))
    engine = {"kind": "transformers", "max_model_len": 1025}
    with pytest.raises(ConfigError, match=r"max_model_len is 1025, .* built for 1024 positions"):
        check_artifacts(tiny_recipe(stack, tmp_path / "run", engine=engine))


@pytest.mark.parametrize(
    ("swapped", "message"),
    [
        ({"policy": "nar"}, "holds a 'nar' artifact, not an AR policy"),
        ({"nar": "ar"}, "holds a 'ar' artifact, not a NAR model"),
        ({"policy": "codec"}, "not an AR policy"),
    ],
)
def test_an_artifact_of_another_kind_is_refused(
    stack: TinyStack, tmp_path: Path, swapped: dict[str, str], message: str
):
    changes = {key: getattr(stack, kind) for key, kind in swapped.items()}
    with pytest.raises(ConfigError, match=message):
        check_artifacts(tiny_recipe(stack, tmp_path / "run", **changes))


@pytest.mark.parametrize("key", ["policy", "nar"])
def test_an_artifact_of_another_codec_is_refused(stack: TinyStack, tmp_path: Path, key: str):
    source = stack.ar if key == "policy" else stack.nar
    facts = manifest_facts(source) | {"codec_fingerprint": "another"}
    folder = tmp_path / "other"
    with committed_folder(folder, facts) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        (partial / "manifest.json").unlink()
    with pytest.raises(DataError, match=f"{key} .* was trained on codec another"):
        check_artifacts(tiny_recipe(stack, tmp_path / "run", **{key: folder}))


def test_vllm_refuses_what_is_no_policy(stack: TinyStack):
    with pytest.raises(ConfigError, match="not an AR policy"):
        vllm.VllmEngine(stack.nar, VllmConfig())


def test_a_probe_fits_into_the_engine(stack: TinyStack, tmp_path: Path):
    config = tiny_recipe(stack, tmp_path / "run")
    write_prompts(config, config.run_dir / "prompts")
    prompts = training_prompts(config, 1).slice(0, 4)
    whole = probes_of(prompts, stack.ar, max_tokens=1024)
    most = min(len(probe.prompt_token_ids) + len(probe.answer_token_ids) for probe in whole)
    for probe, longer in zip(probes_of(prompts, stack.ar, max_tokens=most), whole, strict=True):
        length = len(probe.prompt_token_ids) + len(probe.answer_token_ids)
        assert length == most - 1  # and one that the engine must generate
        assert probe.answer_token_ids == longer.answer_token_ids[: len(probe.answer_token_ids)]


@pytest.mark.parametrize(("device", "share"), [("cuda", 0.05), ("cpu", None)])
def test_a_gpu_may_be_shared(
    stack: TinyStack, monkeypatch: pytest.MonkeyPatch, device: str, share: float | None
):
    made: list[dict[str, object]] = []

    def llm(**settings: object) -> None:
        made.append(settings)

    def import_vllm(config: VllmConfig) -> SimpleNamespace:
        return SimpleNamespace(LLM=llm)

    monkeypatch.setattr(vllm, "_import_vllm", import_vllm)
    vllm.VllmEngine(stack.ar, VllmConfig.model_validate({"device": device}))
    assert made[0].get("gpu_memory_utilization") == share


def test_the_doctor_says_which_key_asks_for_a_gpu_that_is_not_there(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = tiny_recipe(stack, tmp_path / "run", engine={"kind": "vllm", "device": "cuda"})
    findings = examine(config, speak=False)  # lazily: nothing after this one is examined
    device = next(finding for finding in findings if finding.subject == "device")
    assert not device.is_well
    assert "set engine.device to cpu" in device.detail
