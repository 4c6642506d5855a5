"""Tokenizers and text encoders of Lumina 2, HiDream, Krea 2 and Qwen-Image 2.1, tiny."""

from typing import Any

import torch

from tests.tiny_pipelines.text import LETTERS, WIDTH

SYSTEM_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def make_gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS, "A", "P", "S", "Y", "<mask>"]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def make_gemma2_encoder(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(4)
    return Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), num_hidden_layers=2, **SIZES))


def make_llama_tokenizer() -> Any:
    """Byte-level BPE without merges, as Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot_id|>")


def make_llama_encoder(tokenizer: Any, num_layers: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=num_layers, **SIZES)
    config._attn_implementation = "eager"  # the pipeline asks for attentions
    return LlamaForCausalLM(config)


def make_qwen3_vl_encoder(tokenizer: Any, num_layers: int = 3, causal_lm: bool = False) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    torch.manual_seed(6)
    config = Qwen3VLConfig(
        text_config=SIZES
        | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": num_layers,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return (Qwen3VLForConditionalGeneration if causal_lm else Qwen3VLModel)(config)


def make_qwen3_vl_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, merge_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=SYSTEM_CHAT_TEMPLATE,
    )
