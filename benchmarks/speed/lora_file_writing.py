"""Seconds and peak memory of finding the targets of real bases and of writing their LoRA files.

    python -m benchmarks.speed.lora_file_writing [BASE ...] [--rank 16] [--preset attention]

The bases have no weights (meta device), so any of them fits. Each file is written in a process of
its own. Its peak is what writing adds to the memory of the weights, of which some 35 MB are code.
``kohya`` files exist for UNets alone.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import torch

from hyperlora.diffusion.target_modules import TARGET_PRESETS, make_layout
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.training.known_bases import KNOWN_BASES, make_meta_base

DEFAULT_BASES: Final = (
    "black-forest-labs/FLUX.2-klein-4B",
    "Tongyi-MAI/Z-Image",
    "Qwen/Qwen-Image",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
_FORMATS: Final[dict[str, tuple[LoraFormat, ...]]] = {
    "unet": ("diffusers", "kohya"),
    "transformer": ("diffusers",),
}
"""Formats by the component that denoises."""


def measure_in_process(function: Callable[[], int]) -> tuple[float, int, int]:
    """Run a function in a forked process.

    Args:
        function: Returns a number.

    Returns:
        Seconds, bytes that its peak is above the memory at its start, and what it returns.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(function, sender))
    process.start()
    result: tuple[float, int, int] = receiver.recv()
    process.join()
    return result


def _measure(function: Callable[[], int], sender: Connection) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the parent
    start_bytes, start = _read_status_bytes("VmRSS"), time.perf_counter()
    value = function()
    seconds = time.perf_counter() - start
    sender.send((seconds, _read_status_bytes("VmHWM") - start_bytes, value))


def _read_status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_weights(layout: LoraLayout) -> LoraWeights:
    """Make random weights in memory that no other process shares."""
    return LoraWeights.unflatten(layout, torch.randn(layout.numel))


def list_rows(base_id: str, preset: str, rank: int) -> Iterator[str]:
    """Measure one base.

    Args:
        base_id: Hub id of ``KNOWN_BASES``.
        preset: Target preset.
        rank: Of the LoRA.

    Yields:
        Rows of the table, one for each file.
    """
    base = make_meta_base(base_id)
    component = base.family.denoiser_name
    start = time.perf_counter()
    layout = make_layout({component: base.denoiser}, preset, rank, base_id)
    layout_seconds = time.perf_counter() - start
    weights = make_weights(layout)
    with tempfile.TemporaryDirectory() as folder:
        for lora_format in _FORMATS[component]:
            for dtype in (torch.float32, torch.float16):
                path = Path(folder) / f"{lora_format}.safetensors"

                def write(path: Path = path, f: LoraFormat = lora_format, d: torch.dtype = dtype):
                    return os.path.getsize(save_lora(weights, path, format=f, dtype=d))

                seconds, peak_bytes, size = measure_in_process(write)
                dtype_name = str(dtype).removeprefix("torch.")
                yield (
                    f"| {base_id.split('/')[1]} | {len(layout.targets)} | {layout_seconds:.3f} "
                    f"| {lora_format}, {dtype_name} | {seconds:.2f} | {size / 1e6:.0f} "
                    f"| {peak_bytes / 1e6:.0f} |"
                )


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bases", nargs="*", metavar="BASE", help=f"Of {', '.join(KNOWN_BASES)}.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--preset", choices=TARGET_PRESETS, default="attention")
    arguments = parser.parse_args()
    print("| base | targets | finding them, s | file | writing it, s | file, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for base_id in arguments.bases or DEFAULT_BASES:
        for row in list_rows(base_id, arguments.preset, arguments.rank):
            print(row, flush=True)


if __name__ == "__main__":
    main()
