"""Texts of the page: HTML, example prompts and programs to copy."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Final

from hyperlora.service.engine.requests import ModelInfo

HEADER: Final = """<header class="masthead"><div><h1>hyperlora</h1>
<p>A photo goes in, a LoRA comes out: an ordinary file for diffusers, ComfyUI, A1111 and kohya’s
tools.</p></div>
<a href="/docs">API</a></header>"""
SIGN_IN: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hyperlora</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 17px/1.5 ui-sans-serif, system-ui, sans-serif }
form { max-width: 22rem; margin: 18vh auto; padding: 0 1.5rem; display: grid; gap: .75rem }
h1 { margin: 0; font-size: 1.6rem } p { margin: 0 }
input, button { font: inherit; padding: .6rem .8rem }
button { border: 0; border-radius: .5rem; background: #4f46e5; color: white }
input { border-radius: .5rem }
.wrong { color: #dc2626 }</style>
<form method="post" action="/sign-in"><h1>hyperlora</h1>
<label for="key">This server asks for an API key.</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p class="wrong" role="alert">SENTENCE</p><button>Come in</button></form></html>"""
EMPTY_PORTRAITS: Final = """<div class="empty"><b>Portraits appear here</b>
<p>Add one or more photos of the same person, choose a prompt, and press the button.
The LoRA takes a moment, the portraits a few seconds.</p></div>"""
EMPTY_EDITS: Final = """<div class="empty"><b>Edited images appear here</b>
<p>Give the same image before and after an edit.
The LoRA of the edit does the same to other images.</p></div>"""
EMPTY_COMPOSITION: Final = """<div class="empty"><b>Images appear here</b>
<p>LoRAs made in this window are there already.
Add files of your own, up to six in all.</p></div>"""
EMPTY_TRAY: Final = "<p class='aside'>No LoRA yet: make one from photos, or add a file.</p>"
NO_IMAGES: Final = "This server does not hold the base of the model, so it draws no portraits."
STRATEGIES: Final = [
    ("Merge: all at once, in one LoRA", "merge"),
    ("Switch: one after another, step by step", "switch"),
    ("Composite: each predicts, the predictions are averaged", "composite"),
]
SIMILARITY_NOTE: Final = (
    "Identity similarity is computed by a separate network: "
    "0 is anyone, 1 another real photo of the same person."
)
_AVATAR_SCENES: Final = {
    "Red hoodie": "smiling, open eyes, wearing a red hoodie, sky background",
    "Sunglasses": "serious, open eyes, wearing a black t-shirt, sunglasses, orange background",
    "White tuxedo": "laughing, happy eyes, wearing a white tuxedo, gray background",
    "Round glasses": "sad, closed eyes, wearing a green sweater, round glasses, pink background",
    "Blue overall": "screaming, surprised eyes, wearing a blue overall, white background",
    "Spacesuit": "grimacing, side eyes, wearing a spacesuit, glasses, blue background",
}
_GENERIC_SCENES: Final = {
    "Portrait": "",
    "Smiling": "smiling",
    "Outdoors": "outdoors, soft light",
    "Drawing": "pencil drawing",
}
_SCENES_BY_DOMAIN: Final[Mapping[str, Mapping[str, str]]] = {"avatars": _AVATAR_SCENES}
"""Example scenes by the domain of a model (``ModelInfo.domain``)."""
PRESET_LABELS: Final = tuple(_GENERIC_SCENES)
"""Labels of the example prompts until the model is known."""
_SIMILARITY_LABELS: Final = (
    (0.8, "very alike"),
    (0.55, "clearly alike"),
    (0.3, "somewhat alike"),
    (0.1, "hardly alike"),
)
"""Smallest score of each label."""


def get_prompt_presets(model_info: ModelInfo) -> dict[str, str]:
    """Return example prompts by their label, in phrases that the model's base knows."""
    scenes = _SCENES_BY_DOMAIN.get(model_info.domain, _GENERIC_SCENES)
    if model_info.prompt_prefix:
        subject = f"{model_info.prompt_prefix}a portrait of a person"
    else:
        subject = f"a portrait of {model_info.trigger_phrase or 'a person'}"
    return {label: ", ".join(filter(None, (subject, scene))) for label, scene in scenes.items()}


def get_similarity_label(similarity: float) -> str:
    """Return an identity similarity in plain words."""
    return next(
        (label for minimum, label in _SIMILARITY_LABELS if similarity >= minimum),
        "could be anyone",
    )


def format_score(score: float) -> str:
    """Format a score with two decimals and a real minus sign."""
    return f"{score + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")


def render_card(model_info: ModelInfo) -> str:
    """Render what a visitor should know of a model: purpose, base, licenses, strength, size."""
    commercial_uses = {"yes": "allowed", "no": "not allowed", "unknown": "unknown"}
    rows = {
        "For": model_info.purpose,
        "Base": model_info.base,
        "Licenses": model_info.license_notice,
        "Commercial use": commercial_uses[model_info.commercial_use],
        "Begin prompts with": model_info.prompt_prefix or model_info.trigger_phrase,
        "Strength": f"{model_info.strength:g}",
        "Download": format_bytes(model_info.download_bytes),
        "Images here": "" if model_info.can_generate_images else "none: its base is not served",
    }
    items = "".join(
        f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in rows.items() if value
    )
    return f'<dl class="card">{items}</dl>'


def render_notes(notes: Sequence[str]) -> str:
    """Render notes of the API, e.g. on licenses, each once."""
    lines = (html.escape(f"{note[:1].upper()}{note[1:]}.") for note in dict.fromkeys(notes))
    return "".join(f'<p class="aside">{line}</p>' for line in lines)


def format_bytes(num_bytes: int) -> str:
    """Format a size in MB or GB; empty for none."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.1f} GB"
    return f"{num_bytes / 10**6:.0f} MB" if num_bytes else ""


def make_snippet(base: str, file: str, prompt: str, strength: float = 1.0) -> str:
    """Make a program that generates an image with a LoRA file in plain diffusers.

    Args:
        base: Id of the base.
        file: Name of the LoRA file.
        prompt: The prompt.
        strength: Factor of the LoRA.

    Returns:
        Python source.
    """
    fuse_line = f"pipe.fuse_lora(lora_scale={strength:g})\n" if strength != 1 else ""
    return f'''from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")  # its folder or hub id
pipe.load_lora_weights("{file}")
{fuse_line}image = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]
image.save("portrait.png")
'''


def make_edit_snippet(base: str, file: str) -> str:
    """Make a program that edits an image with a LoRA file in plain diffusers.

    Args:
        base: Id of the InstructPix2Pix base.
        file: Name of the LoRA file.

    Returns:
        Python source.
    """
    return f'''from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained("{base}")  # its folder or hub id
pipe.load_lora_weights("{file}")
pipe("", image=Image.open("me.png").convert("RGB")).images[0].save("edited.png")
'''
