"""Seconds and own memory of the streamed encoders of released networks, at real size.

    python -m benchmarks.speed.streamed_encoders [siglip2 dinov3 ...] [--images 1 4] [--dtype auto]

Random weights in bfloat16 are written layer by layer to a temporary folder, 2.3 and 13.4 GB, and
deleted afterwards. Own memory is the peak of a process's anonymous pages above those at its start:
pages of the mapped file, which the system drops when it needs memory, are not in it. CPU seconds
are those of one thread where OMP_NUM_THREADS is 1, whatever else the machine does.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image

from hyperlora.encoders import released_encoders as encoders

_SAMPLE_INTERVAL_S: Final = 0.02
_DTYPES: Final = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
ENCODERS: Final[Mapping[str, tuple[Any, Callable[[], Any], str]]] = {
    "siglip2": (encoders.SiglipEncoder, encoders.make_siglip2_config, "SiglipVisionModel"),
    "dinov3": (encoders.Dinov3Encoder, encoders.make_dinov3_config, "DINOv3ViTModel"),
    "clip": (encoders.ClipImageEncoder, encoders.make_clip_config, "CLIPVisionModelWithProjection"),
}


def write_random_weights(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Write a safetensors file of random bfloat16 numbers, one tensor at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    blocks: dict[float, bytes] = {}  # noise of one standard deviation, repeated within a tensor
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            size = 2 * int(np.prod(shape))
            if len(shape) == 1:  # norms and layer scales are one, biases are zero
                is_scale = name.endswith((".weight", "lambda1"))
                numbers = (torch.ones if is_scale else torch.zeros)(shape)
                file.write(_to_bytes(numbers))
                continue
            std = 0.5 * float(np.prod(shape[1:])) ** -0.5
            block = blocks.setdefault(std, _to_bytes(noise * std))
            for begin in range(0, size, len(block)):
                file.write(memoryview(block)[: size - begin])


def _to_bytes(numbers: torch.Tensor) -> bytes:
    return numbers.bfloat16().view(torch.uint8).numpy().tobytes()


def list_shapes(class_name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the file of an encoder."""
    import transformers

    with init_empty_weights():
        model = getattr(transformers, class_name)(config)
    return {
        name.removeprefix("model.") if name.startswith("model.layer.") else name: tuple(t.shape)
        for name, t in model.state_dict().items()
    }


@contextmanager
def measure_own_memory() -> Any:
    """Yield a list that gets the peak of anonymous pages above those at the start, in bytes."""
    peaks, is_done = [0], threading.Event()
    start = _read_anonymous_bytes()

    def sample() -> None:
        while not is_done.wait(_SAMPLE_INTERVAL_S):
            peaks[0] = max(peaks[0], _read_anonymous_bytes() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        is_done.set()
        thread.join()


def _read_anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark needs Linux")


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="ENCODER", help=f"Of {', '.join(ENCODERS)}.")
    parser.add_argument("--images", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=_DTYPES, default="auto")
    parser.add_argument("--dir", help="Where the temporary folder is.")
    parser.add_argument("--layers", type=int, help="Fewer layers than the real encoder has.")
    arguments = parser.parse_args()
    print(
        "| encoder | file, GB | images | precision | opening, s | encoding, s | CPU, s "
        "| own memory, GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.names or ("siglip2", "dinov3"):
        encoder_class, make_config, class_name = ENCODERS[name]
        config = make_config()
        if arguments.layers:
            config.num_hidden_layers = arguments.layers
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            path = Path(folder) / "model.safetensors"
            write_random_weights(list_shapes(class_name, config), path)
            for num_images in arguments.images:
                images = [
                    Image.effect_noise((1024, 1024), 60 + i).convert("RGB")
                    for i in range(num_images)
                ]
                with measure_own_memory() as peaks:
                    start = time.perf_counter()
                    dtype = _DTYPES[arguments.dtype]
                    options = {} if dtype is None else {"dtype": dtype}
                    encoder = encoder_class(path, config, **options)
                    opened, cpu_start = time.perf_counter(), time.process_time()
                    embeddings = encoder.encode(images)
                    seconds = time.perf_counter() - opened
                    cpu_seconds = time.process_time() - cpu_start
                assert embeddings.isfinite().all()
                dtype_name = str(encoder.dtype).removeprefix("torch.")
                print(
                    f"| {name} | {os.path.getsize(path) / 1e9:.2f} | {num_images} | {dtype_name} "
                    f"| {opened - start:.1f} | {seconds:.1f} | {cpu_seconds:.1f} "
                    f"| {peaks[0] / 1e9:.2f} |",
                    flush=True,
                )
                del encoder


if __name__ == "__main__":
    main()
