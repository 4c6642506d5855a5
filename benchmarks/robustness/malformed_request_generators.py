"""Generators of malformed HTTP requests by class, as bytes for a socket."""

import base64
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Final

import safetensors.torch
import torch
from PIL import Image

from benchmarks.robustness.http_requests import (
    FORM,
    Random,
    build_form,
    build_photo_request,
    build_png_chunk,
    build_request,
    generate_photo,
)


def generate_mutated_photo(random: Random) -> bytes:
    """Change, insert or delete bytes of an image; some still decode, and a LoRA is the right answer
    then.
    """
    data = bytearray(generate_photo(random))
    for _ in range(random.integers(1, 20)):
        position = int(random.integers(len(data)))
        match int(random.integers(3)):
            case 0:
                data[position] = int(random.integers(256))
            case 1:
                data[position:position] = random.bytes(int(random.integers(1, 60)))
            case 2:
                del data[position : position + int(random.integers(1, 30))]
    return build_photo_request(bytes(data))


def generate_truncated_photo(random: Random) -> bytes:
    """Cut an image off."""
    data = generate_photo(random)
    return build_photo_request(data[: int(random.integers(1, len(data) * 3 // 4))])


def generate_decompression_bomb(random: Random) -> bytes:
    """Generate a small file that holds or declares a lot: pixels, text, a color profile."""
    side = int(random.choice([5100, 9000, 60000, 2**31 - 1]))
    header = build_png_chunk(b"IHDR", struct.pack(">II", side, side) + b"\x08\x02\0\0\0")
    zeros = zlib.compress(bytes(int(random.integers(1, 40)) << 20))
    extra = [
        b"",
        build_png_chunk(b"zTXt", b"a\0\0" + zeros),
        build_png_chunk(b"iCCP", b"a\0\0" + zeros),
    ][random.integers(3)]
    return build_photo_request(
        b"\x89PNG\r\n\x1a\n"
        + header
        + extra
        + build_png_chunk(b"IDAT", zeros)
        + build_png_chunk(b"IEND", b"")
    )


def generate_wrong_file_type(random: Random) -> bytes:
    """Send a file of another type as photo."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(
        buffer, ["GIF", "TIFF", "BMP", "ICO", "PPM", "PDF"][random.integers(6)]
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    other_files = [
        svg,
        pickle.dumps({"a": 1}),
        b"PK\3\4" + random.bytes(90),
        b"\x7fELF" + random.bytes(90),
        b"<html>",
        b"",
    ]
    files = [buffer.getvalue(), *other_files, random.bytes(500)]
    return build_photo_request(files[random.integers(len(files))])


def generate_malformed_lora(random: Random) -> bytes:
    """Send a file that is no LoRA, or one that must not be loaded, with a prompt or an image."""
    down, up = torch.zeros(2, 64), torch.zeros(64, 2)
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    save = safetensors.torch.save
    header = json.dumps(
        {a: {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ).encode()
    files: list[Callable[[], bytes]] = [
        lambda: random.bytes(int(random.integers(0, 2000))),
        lambda: pickle.dumps({"state_dict": [1, 2]}),
        lambda: struct.pack("<Q", 2**62) + b"{}",
        lambda: struct.pack("<Q", len(header)) + header,
        lambda: struct.pack("<Q", 200_000) + b"[" * 200_000,
        lambda: save({a: down * float("nan"), b: up}),
        lambda: save({a: down + float("inf"), b: up}),
        lambda: save({"../../etc/passwd": down, "unet.../x.lora_B.weight": up}),
        lambda: save({a: down}),
        lambda: save({a: down, b: up.to(torch.int64)}),
        lambda: save({a: torch.zeros(2, 7), b: torch.zeros(9, 2)}),
        lambda: save({a: torch.zeros(0, 64), b: torch.zeros(64, 0)}),
        lambda: save({f"lora_unet_x{i}.alpha": torch.zeros(()) for i in range(3000)}),
        lambda: save({a: down, b: up}, {"lora_adapter_metadata": '{"unet.r": "\\ud800"}'}),
    ]
    file = files[random.integers(len(files))]()
    if random.integers(2):
        return build_request(
            "/v1/edits", build_form(("image", generate_photo(random, "PNG")), ("lora", file))
        )
    image_request = {
        "prompt": "a",
        "num_inference_steps": 1,
        "loras": [{"content": base64.b64encode(file).decode()}],
    }
    return build_request("/v1/images", json.dumps(image_request).encode(), "application/json")


def generate_invalid_field(random: Random) -> bytes:
    """Send a form field out of its range."""
    invalid_fields = [
        ("rank", "0"),
        ("rank", "-1"),
        ("rank", "9" * 400),
        ("rank", "four"),
        ("strength", "nan"),
        ("title", "x" * 9999),
    ]
    invalid_fields += [
        ("strength", "1e999"),
        ("refine_steps", "501"),
        ("refine_steps", "1.5"),
        ("format", "ckpt"),
        ("store", "perhaps"),
    ]
    invalid_fields += [
        ("strength", "\u0661\ud7ff"),
        ("rank", "129"),
        ("refine_steps", "-0.5"),
        ("before", "text"),
        ("consent", "\0"),
    ]
    return build_photo_request(
        generate_photo(random, "PNG"), invalid_fields[random.integers(len(invalid_fields))]
    )


def generate_invalid_json(random: Random) -> bytes:
    """Send broken JSON, or JSON that breaks the schema."""
    valid = {"prompt": "a", "num_inference_steps": 1}
    invalid_values = [
        {"prompt": 1},
        {"num_inference_steps": 0},
        {"num_inference_steps": "x"},
        {"seed": -1},
        {"seed": 2**70},
        {"width": 63},
        {"gamma": 1e9},
    ]
    invalid_values += [
        {"loras": [{}]},
        {"loras": [{"id": "../../x"}]},
        {"loras": "x"},
        {"regions": [[2, 0, 0, 0]]},
        {"unknown": 1},
    ]
    invalid_values += [
        {"prompt": "<lora:../../etc/passwd>"},
        {"strategy": "composite"},
        {"loras": [{"content": "%%%"}]},
    ]
    texts = [json.dumps(valid | invalid).encode() for invalid in invalid_values]
    texts += [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b'{"prompt": "\xed\xa0\x80"}',
        b"NaN",
        b"1" * 5000,
    ]
    texts += [
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": 1e999}',
        random.bytes(300),
    ]
    return build_request("/v1/images", texts[random.integers(len(texts))], "application/json")


def generate_invalid_multipart(random: Random) -> bytes:
    """Send a form that is broken, cut off, or has too many parts."""
    whole = build_form(("photos", generate_photo(random, "PNG")))
    many = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 3000 + b"--b--\r\n"
    long = (
        b"--b\r\nContent-Disposition: form-data; name=photos; "
        + b"x" * 70_000
        + b"\r\n\r\n\r\n--b--\r\n"
    )
    bodies = [
        whole[: int(random.integers(1, len(whole) - 10))],
        many,
        long,
        b"",
        b"--b",
        b"--b--\r\n",
        random.bytes(900),
    ]
    bodies += [
        whole.replace(b'name="photos"; ', b""),
        whole.replace(b"photos", b"photo"),
        whole.replace(b"\r\n", b"\n"),
    ]
    content_types = [
        FORM,
        FORM,
        FORM,
        "multipart/form-data",
        "multipart/form-data; boundary=" + "b" * 5000,
        "text/plain",
    ]
    content_types += [
        "multipart/form-data; boundary=other",
        "multipart/mixed; boundary=b",
        "application/json",
        "a/\xff; boundary=\xfe",
    ]
    data = bodies[random.integers(len(bodies))]
    return build_request("/v1/loras", data, content_types[random.integers(len(content_types))])


def generate_invalid_header(random: Random) -> bytes:
    """Send headers that no server should accept: huge, contradictory, or not HTTP at all."""
    data = build_form(("photos", b"x"))
    whole = build_request("/v1/loras", data)
    requests = [build_request("/v1/loras", data, x_long="x" * size) for size in (65_000, 200_000)]
    requests += [build_request("/v1/loras", data, **{f"x_{i}": "y" * 1000 for i in range(100)})]
    requests += [
        build_request("/v1/loras", data, content_length=size)
        for size in ("-1", "x", "1, 2", "9" * 30, "10000000000000")
    ]
    requests += [
        build_request("/v1/loras", b"zz\r\n" + data, transfer_encoding="chunked"),
        build_request("/v1/loras" + "/x" * 40_000),
    ]
    requests += [
        whole.replace(b"host:", b"ho st:"),
        whole.replace(b"host:", b"ho\0st:"),
        whole.replace(b"HTTP/1.1", b"HTTP/9.9"),
    ]
    requests += [
        whole.replace(b"host: 127.0.0.1", b"x: y"),
        whole.replace(b"POST", b"P\xffST"),
        b"\x16\3\1\2\0\1\0\1\xfc\3\3" * 9 + b"\r\n\r\n",
    ]
    requests += [
        build_request("/v1/loras/%00%ff", method="GET"),
        build_request("/v1/loras", method="BREW"),
        random.bytes(300) + b"\r\n\r\n",
    ]
    return requests[random.integers(len(requests))]


def generate_invalid_path(random: Random) -> bytes:
    """Request a path that does not exist or leads out of the server's folders."""
    paths = [
        "/v1/loras/../../etc/passwd",
        "/v1/loras/..%2F..%2Fetc%2Fpasswd",
        "/v1/jobs/%2e%2e",
        "/v1/images/" + "g" * 64,
        "/v1",
    ]
    paths += [
        "/v1/jobs/" + "0" * 32,
        "/v1/loras/" + "0" * 64,
        "/v1/jobs/1' OR 1=1--",
        "//etc/passwd",
        "/v1/loras?x=" + "y" * 3000,
    ]
    return build_request(
        paths[random.integers(len(paths))].replace(" ", "%20"),
        method=str(random.choice(["GET", "DELETE"])),
    )


def generate_foreign_origin(random: Random) -> bytes:
    """Send a request of a foreign page or host name to a server without keys."""
    hosts = [
        "evil.example",
        "127.0.0.1.evil.example",
        "[::2]",
        "localhost:x@evil.example",
        "10.0.0.1:8000",
    ]
    data = build_form(("photos", generate_photo(random, "PNG")))
    if random.integers(2):
        return build_request("/v1/loras", data, host=hosts[random.integers(len(hosts))])
    return build_request(
        "/v1/loras", data, origin=str(random.choice(["null", "https://evil.example", "file://"]))
    )


def generate_invalid_key(random: Random) -> bytes:
    """Send a wrong API key to a server with keys."""
    invalid_keys = [
        "Bearer wrong",
        "Bearer " + "x" * 8000,
        "Basic YTpi",
        "Bearer",
        "bearer \xff\xfe",
        "Bearer a-right-key-0123456 x",
    ]
    data = build_form(("photos", generate_photo(random, "PNG")))
    choice = int(random.integers(len(invalid_keys) + 2))
    if choice == len(invalid_keys):
        return build_request("/v1/loras", data)
    if choice > len(invalid_keys):
        return build_request("/v1/loras", data, x_api_key=str(random.bytes(20).hex()))
    return build_request("/v1/loras", data, authorization=invalid_keys[choice])


UNAUTHENTICATED_ATTACKS: Final[dict[str, Callable[[Random], bytes]]] = {
    "mutated images": generate_mutated_photo,
    "truncated images": generate_truncated_photo,
    "decompression bombs": generate_decompression_bomb,
    "wrong file types": generate_wrong_file_type,
    "LoRA files": generate_malformed_lora,
    "form fields": generate_invalid_field,
    "JSON": generate_invalid_json,
    "multipart": generate_invalid_multipart,
    "headers": generate_invalid_header,
    "paths": generate_invalid_path,
    "hosts and origins": generate_foreign_origin,
}
AUTHENTICATED_ATTACKS: Final = {"keys": generate_invalid_key}
