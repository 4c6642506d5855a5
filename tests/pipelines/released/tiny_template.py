"""A tiny "Diffusion Template": its code, its weights and what it computes."""

import textwrap
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

HEAD = """
import torch
from torch import nn
from PIL import Image
from transformers import SiglipVisionTransformer  # a name that transformers 5 no longer has

class Model(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.scale = nn.Linear(width, 2, bias=False)
        self.register_buffer("shift", torch.full((3,), 0.25), persistent=False)

    def process_inputs(self, pipe=None, image=None, **kwargs):
        pixels = [torch.tensor(list(p.resize((1, 1)).getdata())[0]) / 255 for p in image]
        return {"pixels": torch.stack(pixels)}

    def forward(self, pipe=None, pixels=None, **kwargs):
        # EXTRA
        code = self.scale(pixels.to(self.scale.weight.dtype).mean(0) + self.shift)
        return {"lora": {"layers.0.attention.to_q.lora_A.default.weight": code[None],
                         "layers.0.attention.to_q.lora_B.default.weight": code[:, None]}}

TEMPLATE_MODEL = Model
TEMPLATE_MODEL_PATH = "model.safetensors"
TEMPLATE_MODEL_CONFIG = {"width": 3}
"""
WEIGHT = torch.tensor([[1.0, 2.0, 4.0], [0.5, -1.0, 2.0]])
IMAGES = [Image.new("RGB", (8, 4), (255, 0, 51)), Image.new("RGB", (4, 8), (51, 0, 255))]


def make_template(folder: Path, extra: str = "pass", head: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    body = HEAD.replace("# EXTRA", textwrap.indent(textwrap.dedent(extra), " " * 8).strip())
    (folder / "model.py").write_text(textwrap.dedent(head) + body)
    save_file({"scale.weight": WEIGHT}, folder / "model.safetensors")
    return folder
