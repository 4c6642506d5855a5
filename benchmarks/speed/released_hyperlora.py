"""Seconds and peak own memory from photo to LoRA file by HyperLoRA at real size.

    python -m benchmarks.speed.released_hyperlora [--num-photos 1 4]

The weights are random, in the released layout: 3 GB, encoder and face pack included. They are
written into a temporary folder and deleted. Each measurement is a process of its own. On a busy
machine, read the seconds of CPU. Own memory
is resident memory without file pages, which the system drops when it needs memory. The face pack
finds drawn faces; antelopev2 takes about one second more.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from hyperlora.models.hyperlora_resampler import HyperLoraResampler, IdProjector

BASIS_SIZE, RANK = 128, 8
NUM_ATTENTIONS = 140
_POLL_S = 0.02


def write_network(folder: Path) -> None:
    """Write the four files of a variant in the released sizes, random, fp16."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    layers = dict(unet.named_modules())
    index: dict[str, dict[str, int]] = {}
    bases: dict[str, torch.Tensor] = {}
    pool = torch.randn(1 << 20, dtype=torch.float16)
    for i, processor in enumerate(unet.attn_processors):
        name = processor.removesuffix(".processor")
        hidden_size = layers[f"{name}.to_q"].in_features
        context_size = layers[f"{name}.to_k"].in_features
        key = f"lora_unet_{name.replace('.', '_')}"
        index[key] = {"hidden_size": hidden_size, "cross_attention_dim": context_size}
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            width = context_size if projection in ("to_k", "to_v") else hidden_size
            down, up = (BASIS_SIZE, width, RANK), (BASIS_SIZE, RANK, hidden_size)
            bases[f"{i}.{projection}.id_down_basis"] = repeat_pool(pool, down)
            bases[f"{i}.{projection}.id_up_basis"] = repeat_pool(pool, up)
    assert len(index) == NUM_ATTENTIONS
    (folder / "hyper_lora_modules.json").write_text(json.dumps(index))
    save_file(bases, folder / "hyper_lora_modules.safetensors")
    resampler = HyperLoraResampler(8 * NUM_ATTENTIONS, 1024, 1024, 1024, 768, 4096, 4, BASIS_SIZE)
    nn.init.normal_(resampler.latents)
    for network, file_name in (
        (resampler, "resampler"),
        (IdProjector(512, 16, 1024), "id_projector"),
    ):
        tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
        save_file(tensors, folder / f"{file_name}.safetensors")


def repeat_pool(pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Repeat some random numbers to a shape, which is faster than drawing 1.5 billion."""
    numel = math.prod(shape)
    return pool.repeat(numel // len(pool) + 1)[:numel].view(shape).clone()


def write_encoder(folder: Path) -> None:
    """Write CLIP-L's vision half, random, fp32 as on the hub."""
    folder.mkdir(parents=True)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    )
    tensors = CLIPVisionModel(config).state_dict()
    save_file(
        {f"vision_model.{name}": t.contiguous() for name, t in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"vision_config": config.to_dict()}))


def read_own_memory() -> int:
    """Read the resident memory of this process without file pages, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(root: Path, num_photos: int) -> None:
    """Generate one file in this process, and print seconds and the peak of own memory."""
    peak, stopped = [0], threading.Event()

    def watch() -> None:
        while not stopped.wait(_POLL_S):
            peak[0] = max(peak[0], read_own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start_time = time.perf_counter()
    from hyperlora.pipelines.auto import load_photo_model
    from hyperlora.pipelines.released.released_model import ReleasedOptions

    options = ReleasedOptions(face_pack=str(root / "antelopev2"), encoder=str(root / "clip"))
    model = load_photo_model(str(root / "HyperLoRA"), options=options)
    photos = [root / f"photo-{i}.png" for i in range(num_photos)]
    lora = model(photos)
    path = lora.save(root / f"{num_photos}.safetensors", dtype=model.file_dtype)
    seconds = time.perf_counter() - start_time
    stopped.set()
    watcher.join()
    print(
        f"{num_photos} photos: {seconds:.1f} s ({time.process_time():.1f} s of CPU, imports "
        f"included), peak own memory {peak[0] / 1e9:.2f} GB, "
        f"{len(lora.weights.layout.targets)} targets, file {path.stat().st_size / 1e6:.1f} MB, "
        f"{torch.get_num_threads()} threads"
    )


def main() -> None:
    """Parse the command line, write the weights, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-photos", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.num_photos[0])
        return
    from tests.pipelines.released.tiny_hyperlora import draw_portrait, save_face_pack

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_network(root / "HyperLoRA" / "sdxl_hyper_id_lora_v1_fidelity")
        write_encoder(root / "clip")
        save_face_pack(root / "antelopev2")
        for i in range(max(arguments.num_photos)):
            draw_portrait(i, 1024).save(root / f"photo-{i}.png")
        for num_photos in arguments.num_photos:
            command = [sys.executable, "-m", "benchmarks.speed.released_hyperlora"]
            command += ["--measure", str(root), "--num-photos", str(num_photos)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
