"""The OpenAPI document tells the truth: schemathesis asks everything that it allows, and more."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from speechalign.config.serving import LimitsConfig
from speechalign.serving.api import build_api
from speechalign.serving.keys import ApiKey, Gate
from speechalign.serving.telemetry import Telemetry
from tests.serving_stack import AUTHORISED, KEY, build_service, serving_config

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    speaking = {"max_new_tokens": 60, "temperature": 0.7}
    config = serving_config(tmp_path_factory.mktemp("voices") / "uploads", speaking=speaking)
    limits = LimitsConfig(requests_per_minute=100_000)
    service = build_service(config)
    yield build_api(service, Gate([ApiKey(name="me", key=KEY)], limits), Telemetry())


SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
REFUSALS = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}}}
)
"""A body that is too large (413) is refused, too; by itself schemathesis does not count that."""
SPEECH = "POST /v1/audio/speech"
OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{model}", "GET /v1/audio/voices", "POST /v1/audio/voices",
    "DELETE /v1/audio/voices/{voice}", SPEECH, "GET /health", "GET /ready",
]  # fmt: skip


def test_every_documented_operation_is_asked(api: FastAPI):
    methods = {path: list(one) for path, one in api.openapi()["paths"].items()}
    documented = {f"{m.upper()} {path}" for path, some in methods.items() for m in some}
    assert documented == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_good_request_makes_a_server_error_or_an_undocumented_answer(api: FastAPI, label: str):
    ask_often(api, label, GenerationMode.POSITIVE, 8 if label == SPEECH else 20)


def test_events_are_what_the_document_says(api: FastAPI):
    operation = schemathesis.openapi.from_asgi("/openapi.json", api)["/v1/audio/speech"]["POST"]
    body: Any = {"model": "base", "voice": "alloy", "input": "Good.", "stream_format": "sse"}
    case = operation.Case(body=body, media_type="application/json")
    case.call_and_validate(headers=AUTHORISED)


def test_no_bad_request_makes_a_server_error_or_an_undocumented_answer(api: FastAPI):
    ask_often(api, SPEECH, GenerationMode.NEGATIVE, 40)


def ask_often(api: FastAPI, label: str, mode: GenerationMode, count: int) -> None:
    method, path = label.split()
    operation = schemathesis.openapi.from_asgi("/openapi.json", api, config=REFUSALS)[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count, derandomize=True, deadline=None, suppress_health_check=SLOW_IS_FINE
    )
    def ask(case: Any) -> None:
        if label == SPEECH and mode is GenerationMode.POSITIVE:
            case.body |= {"model": "base", "voice": "alloy"}  # or few would reach the policy
        # What a schema cannot say (which texts and clips can be used) is refused with 400.
        case.call_and_validate(headers=AUTHORISED, excluded_checks=[positive_data_acceptance])

    ask()
