"""The bodies of the speech API: OpenAI's fields, and `stream`, `seed` and `n_best` of our own."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speechalign.config.serving import AudioFormat
from speechalign.serving.problems import invalid

ModelT = TypeVar("ModelT", bound=BaseModel)


class Body(BaseModel):
    """What a client sends: no unknown fields, no numbers written as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class VoiceId(Body):
    """A voice as OpenAI's newer clients write it."""

    id: str


class SpeechRequest(Body):
    """`POST /v1/audio/speech`."""

    model: str
    """The name of a policy, or `name@version` to insist on its version."""
    input: Annotated[str, Field(min_length=1)]
    voice: str | VoiceId
    response_format: AudioFormat = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4.0, allow_inf_nan=False)] = 1.0
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: Annotated[str, Field(max_length=4096)] | None = None
    """Taken and ignored, as OpenAI's tts-1 does: our policies read no instructions."""
    stream: bool | None = None
    """False: one whole file with its exact length in the header. Not given: all but flac stream."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """The same seed, policy version and text give the same speech."""
    n_best: Annotated[int, Field(ge=1)] = 1
    """Answers to each sentence of which a reward model chooses one; above 1 nothing is heard
    before all of a sentence's answers are made."""

    @property
    def voice_name(self) -> str:
        """The name of the voice, however it was written."""
        return self.voice if isinstance(self.voice, str) else self.voice.id


class Model(BaseModel):
    """A policy that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "speechalign"
    version: int
    """Of the policy: counts its weight updates."""
    refused: str = ""
    """Why the policy that was deployed last does not speak; empty: it does."""


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class VoiceInfo(BaseModel):
    """A voice that can be asked for."""

    id: str
    object: Literal["audio.voice"] = "audio.voice"
    name: str
    created_at: int


class VoiceList(BaseModel):
    """`GET /v1/audio/voices`."""

    object: Literal["list"] = "list"
    data: list[VoiceInfo]


class Deleted(BaseModel):
    """`DELETE /v1/audio/voices/{name}`."""

    id: str
    object: Literal["audio.voice.deleted"] = "audio.voice.deleted"
    deleted: bool = True


class Health(BaseModel):
    """`GET /health` and `/ready`."""

    status: Literal["ok"] = "ok"


class ErrorFields(BaseModel):
    """Of `Error`; all four are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What any request can be answered with."""

    error: ErrorFields


def parsed(model: type[ModelT], body: bytes) -> ModelT:
    """Return a body as a model.

    Raises:
        Problem: 400, with the field in `param`.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON", code="bad_json") from None
    if not isinstance(values, dict):
        raise invalid("the body must be a JSON object", code="bad_json")
    try:
        return model.model_validate(_numbers_as_meant(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise invalid(f"{param}: {first['msg']}", param, "invalid_value") from None


def _numbers_as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """Let JSON's one kind of number be what a field takes: 1 is a speed, 1.0 is a seed."""
    meant = dict(values)
    speed = values.get("speed")
    if isinstance(speed, int) and not isinstance(speed, bool) and abs(speed) < 1e6:
        meant["speed"] = float(speed)
    for name in ("seed", "n_best"):
        value = values.get(name)
        if isinstance(value, float) and value.is_integer():
            meant[name] = int(value)
    return meant
