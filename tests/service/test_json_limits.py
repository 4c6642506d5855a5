"""JSON bodies are counted before they are parsed."""

import base64
import json
from contextlib import suppress
from time import process_time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from hyperlora.service.json_limits import MAX_DEPTH, MAX_TOKENS, check_json
from tests.service.conftest import StartClient, assert_problem

LARGEST_REQUEST: dict[str, Any] = {
    "prompt": '"[{:,}]\\' * 125,
    "negative_prompt": "é\ud83d\ude00" * 300,
    "loras": [{"content": "ab/+" * 250_000, "weight": -0.123456789}] * 8,
    "regions": [[0.25, 0.5, 0.75, 1.0]] * 8,
    "negative_lora": {"id": "0" * 64},
}


@pytest.mark.parametrize("options", [{}, {"indent": 4}, {"ensure_ascii": False}])
def test_check_json_takes_large_requests(options: dict[str, Any]) -> None:
    text = json.dumps(LARGEST_REQUEST, **options)
    check_json(text.encode("utf-8", "surrogatepass").replace(b"/", rb"\/"))  # as PHP writes it
    check_json(b"")
    check_json(b"no JSON, which the route refuses")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (json.dumps({f"k{i}": 0 for i in range(MAX_TOKENS)}).encode(), "strings and signs"),
        (b"[" + b"[]," * MAX_TOKENS, "strings and signs"),
        (b'{"a":1,' * MAX_TOKENS, "strings and signs|levels deep"),
        (b'["\\"' + b'",""' * MAX_TOKENS, "strings and signs"),
        (b"[1" + b",1" * MAX_TOKENS, "strings and signs"),
        (b'"' * 20 * MAX_TOKENS, "strings and signs"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "levels deep"),
        (b'{"a":' * (MAX_DEPTH + 1), "levels deep"),
        (b'["a", ' + b" " * (300 << 10) + b"1]", "KiB of numbers and spaces"),
        (b"[1" + b"1" * (300 << 10) + b"]", "KiB of numbers and spaces"),
        (json.dumps(["∀" * 9]).encode("utf-16"), "UTF-8 expected"),
        (json.dumps(["a"]).encode("utf-16-le"), "UTF-8 expected"),
        (json.dumps(["a"]).encode("utf-32-be"), "UTF-8 expected"),
    ],
)
def test_check_json_refuses_many_values(body: bytes, sentence: str) -> None:
    with pytest.raises(HTTPException, match=sentence):
        check_json(body)


@pytest.mark.parametrize("unit", [b"\\n", b"\\", b'\\"', b"a", b" ", b'"a', b"[", b"\xff"])
def test_check_json_takes_linear_time(unit: bytes) -> None:
    body = b'["' + unit * ((4 << 20) // len(unit))
    start_s = process_time()
    with suppress(HTTPException):
        check_json(body)
    assert process_time() - start_s < 1.5  # 0.05 s; quadratic time would be hours


def test_generate_image_counts_keys_before_it_parses(client: TestClient) -> None:
    body = json.dumps({"prompt": "a"} | {f"k{i}": [] for i in range(20_000)})
    for media_type in ("application/json", "application/problem+json; charset=latin-1", ""):
        headers = {"Content-Type": media_type}
        answer = client.post("/v1/images", content=body, headers=headers)
        assert_problem(answer, 413, "strings and signs")
    few_keys: dict[str, Any] = {f"k{i}": [] for i in range(500)} | {"k" * 100_000: 1}
    answer = client.post("/v1/images", json=few_keys | {"prompt": "a"})
    assert_problem(answer, 422, "k0: extra inputs are not permitted")
    answer = client.post("/v1/images", json={"prompt": "a", "k" * 100_000: 1})
    assert_problem(answer, 422, "kkk: extra inputs")
    assert len(answer.json()["detail"]) < 300


def test_routes_limit_the_bytes_of_bodies_by_path(start_client: StartClient) -> None:
    client = start_client(max_json_bytes=3 << 20)
    content = base64.b64encode(bytes(3 << 19)).decode()
    loras = [{"content": content}]
    body = {"prompt": "a", "loras": loras}
    assert_problem(client.post("/v1/images", json=body), 400, "not a safetensors file")
    answer = client.post("/v1/images", json=body | {"loras": loras * 2})
    assert_problem(answer, 413, "larger than 3 MiB")
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/images", content=bytes(4 << 20), headers=headers)
    assert_problem(answer, 413, "larger than 3 MiB")
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/v1/loras", content=bytes(2 << 20), headers=headers)
    assert_problem(answer, 413, "larger than 1 MiB")
