import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyperlora import bundle
from hyperlora.training.spreading import spread_words

WORDS = ["open", "closed", "heart"]


def test_words_move_away_from_their_mean_and_no_other_moves():
    tokenizer = CLIPTokenizer.from_pretrained(bundle.BASE / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    encoder = CLIPTextModel(config)
    before = encoder.get_input_embeddings().weight.detach().clone()
    spread_words(encoder, tokenizer, WORDS, 5.0)
    after = encoder.get_input_embeddings().weight.detach()
    ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS]
    others = [i for i in range(len(before)) if i not in ids]
    assert torch.equal(before[others], after[others])
    torch.testing.assert_close(torch.pdist(after[ids]), 5 * torch.pdist(before[ids]))
    torch.testing.assert_close(after[ids].mean(0), before[ids].mean(0))
