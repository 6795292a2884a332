from pathlib import Path

import pytest

from speechalign.pipeline import doctor
from speechalign.pipeline.doctor import examine
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


def test_a_policy_that_says_nothing_is_found_out(stack: TinyStack, tmp_path: Path):
    """The stack's weights are random; the trained one speaks in tests/after_demo."""
    findings = list(examine(tiny_recipe(stack, tmp_path / "run"), speak=True))
    (wrong,) = [f for f in findings if not f.is_well and f.is_fatal]
    assert (wrong.subject, wrong.detail) == (
        "engine",
        "the policy said nothing; is it trained?",
    )


def test_what_is_wrong_is_named_and_the_rest_is_still_looked_at(stack: TinyStack, tmp_path: Path):
    (tmp_path / "file").touch()
    recipe = tiny_recipe(
        stack,
        tmp_path / "file" / "run",
        policy=tmp_path / "nowhere",
        pools={"render": {"num_cpus": 500}},
    )
    findings = {f.subject: f for f in examine(recipe, speak=False)}
    assert "nowhere does not exist" in findings["artifacts"].detail
    assert "render 500" in findings["ray"].detail
    assert not findings["storage"].is_well


def test_another_version_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, stack: TinyStack, tmp_path: Path
):
    monkeypatch.setattr(doctor, "TESTED_VERSIONS", {"numpy": "0.1", "no-such-package": "1"})
    findings = list(examine(tiny_recipe(stack, tmp_path / "run"), speak=False))
    versions = [f for f in findings if f.subject in {"numpy", "no-such-package"}]
    assert [(f.is_well, f.is_fatal) for f in versions] == [(False, False)] * 2
    assert "tested: 0.1" in versions[0].detail
