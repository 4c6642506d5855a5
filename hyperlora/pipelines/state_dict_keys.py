"""Key map for weights saved before the networks took the attribute names of DiT and ViT.

The files in ``checkpoints/`` keep their keys until a network is trained again; only this table
reads them.
"""

import re
from collections.abc import Mapping
from typing import Final

from torch import Tensor

RENAMED_KEYS: Final[tuple[tuple[str, str], ...]] = (
    # Hypernetwork, alone or inside a PairHypernetwork
    (r"\b(hypernetwork)\.basis\.constant\.", r"\1.head.down_bias."),
    (r"\b(hypernetwork)\.basis\.down\.", r"\1.head.down_basis."),
    (r"\b(hypernetwork)\.basis\.up\.", r"\1.head.up_basis."),
    (r"\b(hypernetwork)\.basis\.", r"\1.head."),
    (r"\b(hypernetwork)\.project\.", r"\1.memory_proj."),
    (r"\b(hypernetwork)\.start$", r"\1.init_codes"),
    (r"\b(hypernetwork)\.head_weight$", r"\1.code_proj"),
    (r"\b(hypernetwork)\.guess_weight$", r"\1.code_embed"),
    # PairHypernetwork
    (r"^network\.sites\.said$", "network.text_substitution.empty_text_pinv"),
    (r"^network\.sites\.", "network.text_substitution."),
    (r"^network\.wording\.", "network.instruction_head."),
    (r"\b(instruction_head)\.usual\.", r"\1.input_norm."),
    (r"\b(instruction_head)\.place\.", r"\1.patch_proj."),
    (r"\b(instruction_head)\.whole\.", r"\1.global_proj."),
    (r"\b(instruction_head)\.what\.", r"\1.classifier."),
    (r"\b(instruction_head)\.pointing\.ask\.", r"\1.color_pointer.to_q."),
    (r"\b(instruction_head)\.pointing\.where$", r"\1.color_pointer.pos_embed"),
    (r"\b(instruction_head)\.pointing\.colour\.", r"\1.color_pointer.color_proj."),
    (r"\b(instruction_head)\.pointing\.read\.", r"\1.color_pointer.to_out."),
    # LoraDiT
    (r"^denoiser\.enter\.", "denoiser.x_embedder."),
    (r"^denoiser\.places$", "denoiser.pos_embed"),
    (r"^denoiser\.time\.", "denoiser.t_embedder."),
    (r"^denoiser\.condition\.", "denoiser.y_embedder."),
    (r"^denoiser\.nothing$", "denoiser.null_token"),
    (r"^denoiser\.leave\.", "denoiser.final_layer."),
    (r"^(denoiser(?:\.blocks\.\d+)?)\.modulate\.", r"\1.adaLN_modulation."),
    (r"^(denoiser\.blocks\.\d+)\.out\.", r"\1.attn_out."),
    (r"^(denoiser\.blocks\.\d+)\.query\.", r"\1.cross_q."),
    (r"^(denoiser\.blocks\.\d+)\.seen\.", r"\1.cross_kv."),
    (r"^(denoiser\.blocks\.\d+)\.back\.", r"\1.cross_out."),
    (r"^(denoiser\.blocks\.\d+)\.feed\.", r"\1.mlp."),
    # MixedImageFeatures
    (r"^mixture\.face\.", "mixture.face_proj."),
    (r"^mixture\.image\.", "mixture.image_proj."),
    (r"^mixture\.look\.", "mixture.cross_attn."),
    # LoraCodec
    (r"^codec\.scale\.", "codec.normalizer."),
    (r"^(codec\.autoencoder)\.basis$", r"\1.components"),
    (r"^(codec\.autoencoder)\.parts$", r"\1.factor_components"),
    (r"^(codec\.autoencoder)\.joint$", r"\1.joint_components"),
)
"""Pattern of an old key and its replacement, in the order of application.

No pattern matches a present key.
"""


def rename_state_dict_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state_dict`` with the present name of every key; present names stay as they are.

    Args:
        state_dict: Weights of a released model by the key in its ``model.safetensors``.
    """
    return {_rename_key(key): tensor for key, tensor in state_dict.items()}


def _rename_key(key: str) -> str:
    for pattern, replacement in RENAMED_KEYS:
        key = re.sub(pattern, replacement, key)
    return key
