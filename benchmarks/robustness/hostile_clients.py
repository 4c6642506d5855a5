"""Hostile clients of the service: each is bounded, and returns how it was answered."""

import asyncio
import base64
import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from typing import Final

import httpx
import numpy as np

from benchmarks.robustness.http_requests import (
    HOST,
    build_form,
    build_photo_request,
    build_png_chunk,
    build_request,
    generate_photo,
)
from benchmarks.robustness.malformed_request_generators import UNAUTHENTICATED_ATTACKS
from benchmarks.robustness.malformed_requests import send_request
from benchmarks.robustness.slow_senders import make_slow_photo

Attack = Callable[[int, str], Awaitable[str]]
"""Attacks the server of a port with an API key; returns a status, ``ended`` or ``left``."""
ENDED, LEFT = "ended", "left"
_FORM_TYPE: Final = "application/x-www-form-urlencoded"
_JSON_TYPE: Final = "application/json"


@cache
def build_png_of_chunks(num_chunks: int = 1_000_000) -> bytes:
    """Build a PNG of many empty chunks."""
    header = build_png_chunk(b"IHDR", struct.pack(">II", 1, 1) + b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + header + build_png_chunk(b"tEXt", b"") * num_chunks


@cache
def build_lora_of_patterns(num_patterns: int = 100_000) -> bytes:
    """Build a LoRA file whose header lists a rank for each of many patterns."""
    patterns = {f"never.there.{i}": 4 for i in range(num_patterns)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.rank_pattern": patterns})}
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{stem}.lora_{side}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [start, start + 512],
        }
        for side, shape, start in (("A", [2, 64], 0), ("B", [64, 2], 512))
    }
    header = json.dumps({"__metadata__": metadata} | tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(1024)


@cache
def build_json_of_keys(num_keys: int = 100_000) -> bytes:
    """Build the JSON of an image with many unknown keys."""
    return json.dumps({"prompt": "a"} | {f"k{i}": [] for i in range(num_keys)}).encode()


@cache
def build_slow_photo(num_scans: int) -> bytes:
    """Build a progressive JPEG of many scans once."""
    return make_slow_photo(num_scans)


async def send_bytes(port: int, data: bytes, timeout_s: float = 60.0) -> str:
    """Send one request and wait for the answer.

    Args:
        port: Port of the server.
        data: Bytes of the request.
        timeout_s: Seconds after which the client leaves.

    Returns:
        The status.
    """
    try:
        status, _ = await asyncio.wait_for(send_request(port, data), timeout_s)
    except TimeoutError:
        return LEFT
    except ConnectionError:
        return ENDED
    return str(status) if status else ENDED


def add_key(data: bytes, key: str) -> bytes:
    """Add an API key to the head of a request."""
    return data.replace(b"\r\n", b"\r\nx-api-key: " + key.encode() + b"\r\n", 1)


async def send_malformed_request(
    port: int, key: str, generate: Callable[[np.random.Generator], bytes]
) -> str:
    """Send a malformed request with a key."""
    return await send_bytes(port, add_key(generate(np.random.default_rng()), key))


async def send_photo(port: int, key: str, build_photo: Callable[[], bytes]) -> str:
    """Send a photo that is slow to decode, and leave after some seconds."""
    return await send_bytes(port, add_key(build_photo_request(build_photo()), key), 5)


async def send_image_request(
    port: int, key: str, build_body: Callable[[], bytes], timeout_s: float = 30.0
) -> str:
    """Ask for an image by JSON."""
    data = build_request("/v1/images", build_body(), _JSON_TYPE)
    return await send_bytes(port, add_key(data, key), timeout_s)


def build_large_image_request(width: int = 512, height: int = 640, num_steps: int = 50) -> bytes:
    """Build the JSON of a large image; by default of the largest that the avatars' server draws.

    Args:
        width: Pixels.
        height: Pixels.
        num_steps: Denoising steps.
    """
    size = {"num_inference_steps": num_steps, "width": width, "height": height}
    return json.dumps({"prompt": "a"} | size).encode()


def build_pattern_request() -> bytes:
    """Build the JSON of an image with a LoRA of many patterns."""
    content = base64.b64encode(build_lora_of_patterns()).decode()
    return json.dumps(
        {"prompt": "a", "num_inference_steps": 1, "loras": [{"content": content}]}
    ).encode()


async def submit_long_job(port: int, key: str) -> str:
    """Submit a job of 500 steps, and cancel it a while later."""
    url, headers = f"http://{HOST}:{port}", {"X-API-Key": key, "Prefer": "respond-async"}
    photo = generate_photo(np.random.default_rng())
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        response = await client.post(
            "/v1/loras", files={"photos": photo}, data={"refine_steps": 500}
        )
        if response.status_code == 202:
            await asyncio.sleep(5)
            await client.delete(response.headers["location"])
    return str(response.status_code)


async def upload_noise(port: int, key: str, num_bytes: int = 5 << 20) -> str:
    """Sign in on the page and upload a file that is no LoRA."""
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=60) as client:
        await client.post("/sign-in", data={"key": key})
        files = {"files": ("a.safetensors", np.random.default_rng().bytes(num_bytes))}
        response = await client.post("/gradio_api/upload", files=files)
    return str(response.status_code)


async def request_path(port: int, key: str, path: str) -> str:
    """Sign in on the page and ask for a path of it."""
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=60) as client:
        await client.post("/sign-in", data={"key": key})
        response = await client.get(path)
    return str(response.status_code)


async def sign_in_without_end(port: int, key: str, num_mib: int = 8) -> str:
    """Send a sign-in form in chunks without a length; it needs no key."""
    head = build_request("/sign-in", content_type=_FORM_TYPE, transfer_encoding="chunked")
    head = head.replace(b"content-length: 0\r\n", b"")
    chunk = b"100000\r\n" + b"k" * (1 << 20) + b"\r\n"
    return await send_bytes(port, head + chunk * num_mib)


async def sign_in_with_charset(port: int, key: str) -> str:
    """Send a sign-in form of a slow codec; it needs no key."""
    return await send_bytes(
        port,
        build_request("/sign-in", b"key=" + b"a" * 9_000, f"{_FORM_TYPE}; charset=punycode"),
    )


async def send_headers_without_end(port: int, key: str, num_mib: int = 8) -> str:
    """Send headers that never end; it needs no key."""
    lines = b"x-a: " + b"b" * 4096 + b"\r\n"
    return await send_bytes(
        port, b"GET / HTTP/1.1\r\nhost: localhost\r\n" + lines * (num_mib * 256)
    )


async def send_slow_head(port: int, key: str, duration_s: float = 15.0) -> str:
    """Send a byte of the head each half second; it needs no key."""
    reader, writer = await asyncio.open_connection(HOST, port)
    answer = asyncio.create_task(reader.read(100))
    with suppress(ConnectionError):
        for _ in range(int(duration_s * 2)):
            writer.write(b"x")
            await writer.drain()
            if answer.done():
                break
            await asyncio.sleep(0.5)
    writer.close()
    return await _describe_end(answer)


async def open_idle_connections(port: int, key: str, num_connections: int = 150) -> str:
    """Open connections that send nothing for some seconds; it needs no key."""
    connections = [await asyncio.open_connection(HOST, port) for _ in range(num_connections)]
    first_answer = asyncio.create_task(connections[0][0].read(100))
    await asyncio.sleep(3)
    for _, writer in connections:
        writer.close()
    return await _describe_end(first_answer)


async def _describe_end(answer: "asyncio.Task[bytes]") -> str:
    if not answer.done():
        answer.cancel()
        return LEFT
    with suppress(ConnectionError):
        if (data := answer.result()).startswith(b"HTTP/"):
            return data.split(b" ", 2)[1].decode()
    return ENDED


async def send_odd_host(port: int, key: str) -> str:
    """Send a host name that cannot be parsed."""
    data = build_request("/v1/models", method="GET", host="[", origin="http://[")
    return await send_bytes(port, add_key(data, key))


async def upgrade_to_websocket(port: int, key: str) -> str:
    """Ask the page for a WebSocket; it needs no key."""
    data = build_request(
        "/gradio_api/queue",
        method="GET",
        connection="Upgrade",
        upgrade="websocket",
        sec_websocket_version="13",
        sec_websocket_key=base64.b64encode(bytes(16)).decode(),
    )
    return await send_bytes(port, data, 10)


async def stall_upload(port: int, key: str) -> str:
    """Send half of a form, wait, and leave."""
    form = build_form(("photos", bytes(1 << 20)))
    data = build_request("/v1/loras", form[: 1 << 19], content_length=str(len(form)))
    return await send_bytes(port, add_key(data, key), 5)


ATTACKS: Final[Mapping[str, Attack]] = {
    f"malformed {name}": partial(send_malformed_request, generate=generate)
    for name, generate in UNAUTHENTICATED_ATTACKS.items()
    if name != "hosts and origins"  # a server with keys answers any
} | {
    "JPEG of 99 scans": partial(send_photo, build_photo=partial(build_slow_photo, 99)),
    "JPEG of 20,000 scans": partial(send_photo, build_photo=partial(build_slow_photo, 20_000)),
    "PNG of 1,000,000 chunks": partial(send_photo, build_photo=build_png_of_chunks),
    "JSON of 100,000 keys": partial(send_image_request, build_body=build_json_of_keys),
    "LoRA of 100,000 patterns": partial(send_image_request, build_body=build_pattern_request),
    "512x640 image, left after 1 s": partial(
        send_image_request, build_body=build_large_image_request, timeout_s=1.0
    ),
    "job of 500 steps": submit_long_job,
    "noise uploaded to the page": upload_noise,
    "address for the page to fetch": partial(
        request_path, path="/gradio_api/file=https://example.org/"
    ),
    "sign-in in chunks": sign_in_without_end,
    "sign-in in punycode": sign_in_with_charset,
    "headers without end": send_headers_without_end,
    "slow head": send_slow_head,
    "150 idle connections": open_idle_connections,
    "1024x1024 image": partial(
        send_image_request, build_body=partial(build_large_image_request, 1024, 1024, 1)
    ),
    "host and origin [": send_odd_host,
    "WebSocket": upgrade_to_websocket,
    "half of an upload": stall_upload,
}
"""Attacks by name."""
