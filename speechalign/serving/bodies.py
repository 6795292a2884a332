"""Reads what clients send, and stops reading when it is too much or too slow."""

import asyncio

from starlette.requests import Request
from starlette.types import Message

from speechalign.serving.problems import invalid


def limited(request: Request, max_bytes: int, timeout_s: float) -> Request:
    """Return the request with a body that ends in a `Problem` above a size or after a time.

    Raises:
        Problem: 413 when the declared length is already too much, 400 when it is no number.
    """
    declared = request.headers.get("content-length")
    if declared is not None:
        if not declared.isdecimal():
            raise invalid("Content-Length is not a number", code="bad_content_length")
        if int(declared) > max_bytes:
            raise _too_large(max_bytes)
    deadline = asyncio.get_running_loop().time() + timeout_s
    received = 0

    async def receive() -> Message:
        nonlocal received
        try:
            async with asyncio.timeout_at(deadline):
                message = await request.receive()
        except TimeoutError:
            raise invalid(
                f"the body did not arrive within {timeout_s:g} s", code="body_timeout", status=408
            ) from None
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return Request(request.scope, receive)


async def body_of(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Return a body.

    Raises:
        Problem: 400, 408 or 413; what came until then is dropped.
    """
    chunks = [chunk async for chunk in limited(request, max_bytes, timeout_s).stream()]
    return b"".join(chunks)


def _too_large(max_bytes: int) -> Exception:
    return invalid(f"the body is larger than {max_bytes} bytes", code="body_too_large", status=413)
