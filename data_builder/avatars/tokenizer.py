"""A CLIP tokenizer whose vocabulary holds each word of the avatar world as one token."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from data_builder.avatars import vocabulary
from data_builder.avatars.captions import sample_caption
from data_builder.avatars.identity import sample_identity, sample_scene

_BOS_TOKEN, _EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(output_dir: Path, max_length: int = 48) -> CLIPTokenizer:
    """Train a byte-pair encoding on captions of the avatar world until each word is one token, and
    save it.

    Letters stay tokens too, so that any prompt can be encoded.

    Args:
        output_dir: Folder to write, readable by ``CLIPTokenizer.from_pretrained``.
        max_length: Number of tokens of a prompt, with start and end token.

    Returns:
        The tokenizer.
    """
    rng = np.random.default_rng(0)
    corpus = [sample_caption(sample_identity(i), sample_scene(i, 0), rng, 1.0) for i in range(4000)]
    tables = (vocabulary.IDENTITY_ATTRIBUTES | vocabulary.PROMPT_ATTRIBUTES).values()
    corpus += [name for table in tables for name in table] * 20
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_EOS_TOKEN))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        # letters at the ends of words get their ids here; the trainer would number them in the
        # order of a hash map, another one in every run, and break ties of merges by that
        special_tokens=[f"{letter}</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe_vocab = bpe.get_vocab()
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*sorted(bpe_vocab, key=lambda t: bpe_vocab[t]), _BOS_TOKEN, _EOS_TOKEN]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=max_length,
    )
    tokenizer.save_pretrained(output_dir)
    return tokenizer
