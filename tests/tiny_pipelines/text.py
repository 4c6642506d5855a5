"""Tokenizers and text encoders of the real classes, tiny and untrained."""

import string
from typing import Any

import torch

LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH = 16


def make_clip_tokenizer(max_length: int = 48) -> Any:
    from transformers import CLIPTokenizer

    tokens = [
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length)


def make_clip_encoder(tokenizer: Any, seed: int = 1, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        projection_dim=WIDTH // 2,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_t5_tokenizer(max_length: int = 48) -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(
        vocab=[(piece, 0.0 if i < 3 else -1.0) for i, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=max_length,
    )


def make_t5_encoder(tokenizer: Any, width: int = WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))


def make_qwen_tokenizer() -> Any:
    """Byte-level BPE without merges, with the special tokens of Qwen's chats."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    vocab |= {token: len(vocab) + i for i, token in enumerate(special)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_qwen3_encoder(tokenizer: Any, num_layers: int = 3, causal_lm: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return (Qwen3ForCausalLM if causal_lm else Qwen3Model)(config)


def make_pixtral_processor() -> Any:
    """The processor of Mistral 3: byte-level BPE without merges, and a chat of content parts."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = make_qwen_tokenizer()
    tokenizer.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    template = (
        "{% for message in messages %}[{{ message['role'] }}]"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    processor = PixtralImageProcessor()
    return PixtralProcessor(image_processor=processor, tokenizer=tokenizer, chat_template=template)


def make_mistral3_encoder(processor: Any, num_layers: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(4)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    text_config = sizes | {
        "model_type": "mistral",
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 1,
        "vocab_size": len(processor.tokenizer),
    }
    vision_config = sizes | {"model_type": "pixtral", "num_hidden_layers": 1}
    config = Mistral3Config(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=processor.image_token_id,
    )
    return Mistral3ForConditionalGeneration(config)


def make_qwen2_5_vl_processor(tokenizer: Any) -> Any:
    """A processor that shrinks images to at most 8 tokens."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=8 * 28**2),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
    )


def make_qwen2_5_vl_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(5)
    text_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    token_ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, **token_ids)
    return Qwen2_5_VLForConditionalGeneration(config)
