"""What the OpenAPI document says of routes that read their bodies themselves."""

from typing import Any

from speechalign.config.serving import NAME_PATTERN
from speechalign.serving.encoding import CONTAINERS
from speechalign.serving.schema import Error, SpeechRequest

_REASONS = {
    400: "a value that cannot be served; `param` names the field",
    401: "no API key, or an unknown one",
    404: "no such model or voice",
    408: "the body did not arrive in time",
    409: "the name is taken",
    413: "the body is too large",
    415: "a body of another type",
    422: "a parameter of the path is not valid",
    429: "too many requests; `Retry-After` says when to come back",
    500: "the server failed",
    503: "the endpoint is being stopped, or is not ready",
    504: "the engine did not answer in time",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text} for status, text in _REASONS.items()
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_AUDIO_TYPES = [container.media_type for container in CONTAINERS.values()]
_EVENT = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["speech.audio.delta", "speech.audio.done", "speech.audio.error"]},
        "audio": {"type": "string", "description": "of a delta: base64"},
        "usage": {"type": "object", "description": "of the last event"},
        "error": {"type": "object", "description": "what went wrong after the first sound"},
    },
}
_EVENTS = {  # OpenAPI 3.1 has `schema` say what one event of the stream is
    "schema": {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": _EVENT,
            }
        },
    }
}
_SPEECH_CONTENT = {
    **dict.fromkeys([*_AUDIO_TYPES, "audio/pcm"], _BINARY),
    "text/event-stream": _EVENTS,
}


def _schema_of_request() -> dict[str, Any]:
    """Return the schema of the body, its definitions inside."""
    schema = SpeechRequest.model_json_schema()
    definitions = schema.pop("$defs", {})
    schema["properties"]["voice"]["anyOf"] = [{"type": "string"}, definitions["VoiceId"]]
    return schema


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


SPEECH: dict[str, Any] = {
    "openapi_extra": _body("application/json", _schema_of_request())
    | {"responses": {"200": {"description": "speech", "content": _SPEECH_CONTENT}}},
}
UPLOAD: dict[str, Any] = {
    "openapi_extra": _body(
        "multipart/form-data",
        {
            "type": "object",
            "required": ["name", "consent", "audio_sample"],
            "properties": {
                "name": {"type": "string", "pattern": NAME_PATTERN},
                "consent": {"type": "string", "enum": ["true"]},
                "audio_sample": {"type": "string", "format": "binary"},
            },
        },
    ),
}
