"""The HTTP face of the endpoint: OpenAI's `/v1/audio/speech`, voices, models, health, a page.

A plain FastAPI application; Serve runs it in every replica of the ingress.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speechalign.config.serving import NAME_PATTERN, Name
from speechalign.serving import schema
from speechalign.serving.bodies import body_of, limited
from speechalign.serving.keys import ApiKey, Gate
from speechalign.serving.openapi import ERRORS, SPEECH, UPLOAD
from speechalign.serving.problems import Problem, failed, invalid, unknown_model
from speechalign.serving.service import Order, SpeechService, as_problem
from speechalign.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
VOICE_NAME = re.compile(NAME_PATTERN)
PAGE = Path(__file__).with_name("page.html")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; media-src blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class SpeechRoutes:
    """The routes, bound to what answers them."""

    def __init__(self, service: SpeechService, gate: Gate, telemetry: Telemetry) -> None:
        self._service, self._gate, self._telemetry = service, gate, telemetry

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        add = router.add_api_route
        add("/v1/audio/speech", self.speak, methods=["POST"], responses=ERRORS, **SPEECH)
        add("/v1/models", self.models, responses=ERRORS, response_model=schema.ModelList)
        add("/v1/models/{model}", self.model, responses=ERRORS, response_model=schema.Model)
        voices = "/v1/audio/voices"
        add(voices, self.voices, responses=ERRORS, response_model=schema.VoiceList)
        add(voices, self.upload, methods=["POST"], responses=ERRORS,
            response_model=schema.VoiceInfo, **UPLOAD)  # fmt: skip
        add(voices + "/{voice}", self.delete_voice, methods=["DELETE"], responses=ERRORS,
            response_model=schema.Deleted)  # fmt: skip
        add("/health", self.health, response_model=schema.Health)
        add("/ready", self.ready, response_model=schema.Health, responses=ERRORS)
        add("/", page, include_in_schema=False)
        return router

    def _key(self, request: Request) -> ApiKey:
        return self._gate.admit(request.headers.get("authorization"))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Count a client that leaves in the middle of its body with those that leave later.

        Serve tells of it twice, by a message and by cancelling the request, in either order.
        """
        try:
            yield
        except (ClientDisconnect, asyncio.CancelledError):
            self._telemetry.ends.inc(tags={"model": "", "end": "cancelled"})
            raise

    async def speak(self, request: Request) -> Response:
        """Speak a text."""
        key = self._key(request)
        limits = self._service.config.limits
        content_type = request.headers.get("content-type", "application/json")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise invalid("the body must be application/json", code="bad_type", status=415)
        with self._reading():
            body = await body_of(request, limits.max_body_bytes, limits.body_timeout_s)
        asked = schema.parsed(schema.SpeechRequest, body)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._service.slot())
            order = await self._service.order(asked, key)
            is_sse = asked.stream_format == "sse"
            parts = self._service.events(order) if is_sse else self._service.audio(order)
            chunks = await stack.enter_async_context(aclosing(parts))
            first = await anext(chunks)
            held = stack.pop_all()
        return self._streamed(order, first, chunks, held)

    def _streamed(
        self, order: Order, first: bytes, chunks: AsyncGenerator[bytes], held: AsyncExitStack
    ) -> Response:
        async def rest() -> AsyncGenerator[bytes]:
            async with held:
                yield first
                async for chunk in chunks:
                    yield chunk

        headers = {
            "X-Policy-Version": str(order.policy_version),
            "X-Seed": str(order.seed),
            "X-Accel-Buffering": "no",
            "Cache-Control": "no-store",
        }
        return StreamingResponse(
            rest(), media_type=self._service.media_type(order), headers=headers
        )

    async def models(self, request: Request) -> schema.ModelList:
        """List the policies."""
        self._key(request)
        found = await self._service.models()
        return schema.ModelList(data=[_model(name, facts) for name, facts in found.items()])

    async def model(self, request: Request, model: str) -> schema.Model:
        """Return one policy."""
        self._key(request)
        found = await self._service.models()
        if model not in found:
            raise unknown_model(model, list(found))
        return _model(model, found[model])

    async def voices(self, request: Request) -> schema.VoiceList:
        """List the voices."""
        self._key(request)
        voices = self._service.voices
        return schema.VoiceList(
            data=[
                schema.VoiceInfo(id=name, name=name, created_at=created)
                for name, created in voices.listed().items()
            ]
        )

    async def upload(self, request: Request) -> schema.VoiceInfo:
        """Make a voice of an uploaded clip; who uploads it says that the speaker agreed."""
        key = self._key(request)
        name, clip = await self._uploaded(request, key)
        voice = await self._service.upload(name, clip)
        logger.info("voice %s was uploaded with the key %s", name, key.name)
        return schema.VoiceInfo(id=voice.name, name=voice.name, created_at=voice.created)

    async def _uploaded(self, request: Request, key: ApiKey) -> tuple[Name, bytes]:
        limits = self._service.config.limits
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("the body must be multipart/form-data", code="bad_type", status=415)
        most = key.max_upload_bytes or limits.max_upload_bytes
        bounded = limited(request, most, limits.body_timeout_s)
        async with AsyncExitStack() as stack:
            try:
                with self._reading():
                    form = await stack.enter_async_context(
                        bounded.form(max_files=1, max_fields=4, max_part_size=4096)
                    )
            except (MultiPartException, HTTPException, KeyError):
                raise invalid(
                    "the body is no well-formed multipart form", code="bad_form"
                ) from None
            name, consent, clip = (form.get(part) for part in ("name", "consent", "audio_sample"))
            if not isinstance(name, str) or not VOICE_NAME.fullmatch(name):
                raise invalid(
                    "name must be letters, digits, '.', '_' and '-', at most 64, and begin with a "
                    "letter or digit", "name", "invalid_value",
                )  # fmt: skip
            if consent != "true":
                raise invalid(
                    "consent must be 'true': the speaker agreed to this", "consent", "no_consent"
                )
            if not isinstance(clip, UploadFile):
                raise invalid("audio_sample must be a file", "audio_sample", "invalid_value")
            return name, await clip.read()

    async def delete_voice(self, request: Request, voice: str) -> schema.Deleted:
        """Forget an uploaded voice."""
        self._key(request)
        if not VOICE_NAME.fullmatch(voice) or not self._service.voices.delete(voice):
            raise invalid("there is no such uploaded voice", "voice", "unknown_voice", 404)
        return schema.Deleted(id=voice)

    async def health(self) -> schema.Health:
        """Say that the process lives."""
        return schema.Health()

    async def ready(self) -> schema.Health:
        """Say that every policy answers."""
        try:
            await self._service.models()
        except TimeoutError:
            raise failed("not_ready", "a policy does not answer", 503) from None
        return schema.Health()


@lru_cache
def _page_text() -> str:
    return PAGE.read_text()


async def page() -> HTMLResponse:
    """Return the page on which people compare policies."""
    return HTMLResponse(_page_text(), headers=SECURITY_HEADERS)


def build_api(service: SpeechService, gate: Gate, telemetry: Telemetry) -> FastAPI:
    """Return the ASGI application."""
    api = FastAPI(title="speechalign", version="1", docs_url=None, redoc_url=None)
    api.include_router(SpeechRoutes(service, gate, telemetry).router())

    async def on_problem(request: Request, error: Exception) -> Response:
        problem = error if isinstance(error, Problem) else as_problem(error)
        telemetry.rejects.inc(tags={"reason": problem.body.code or "other"})
        if problem.status >= 500:
            logger.error("%s failed", _request_id(request), exc_info=error)
        return JSONResponse(problem.to_json(), problem.status, problem.headers)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
        problem = invalid(str(error.detail), code="not_found", status=error.status_code)
        problem.headers.update(error.headers or {})
        return await on_problem(request, problem)

    async def on_bad_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
        return await on_problem(request, invalid("a parameter is not valid"))

    async def on_client_left(request: Request, error: Exception) -> Response:
        del request, error
        return Response(status_code=499)  # nobody hears it; Serve's proxy counts it as this too

    api.add_exception_handler(Problem, on_problem)
    api.add_exception_handler(ClientDisconnect, on_client_left)
    api.add_exception_handler(HTTPException, on_http_error)
    api.add_exception_handler(RequestValidationError, on_bad_request)
    api.add_exception_handler(Exception, on_problem)
    api.add_middleware(RequestIds)
    return api


class RequestIds:
    """Gives every answer the id of its request.

    Plain ASGI: Starlette's own kind of middleware would end a stream that failed as if it were
    whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = _request_id(request)
            await send(message)

        await self._app(scope, receive, send_with_id)


def _request_id(request: Request) -> str:
    """Return the id that the client or a proxy gave, or one made here."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        own = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request.state.request_id = own
    return request.state.request_id


def _model(name: str, facts: Mapping[str, Any]) -> schema.Model:
    return schema.Model(id=name, version=facts["version"], refused=facts["refused"])
