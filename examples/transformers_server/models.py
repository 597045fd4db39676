"""Two small models with random weights and a tokenizer made by hand: nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

WORDS = [
    "a",
    "cat",
    "dog",
    "good",
    "bad",
    "film",
    "the",
    "was",
    "very",
    "and",
    "not",
    "it",
    "i",
    "liked",
    "saw",
    "this",
]
SPECIAL = ["[PAD]", "[UNK]"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows a few words."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def classifier(layers: int = 4, width: int = 128) -> BertForSequenceClassification:
    """Make an untrained classifier of two classes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=4 * width, max_position_embeddings=128,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def generator(layers: int = 2, width: int = 64) -> GPT2LMHeadModel:
    """Make an untrained generator of text."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(SPECIAL + WORDS), n_embd=width, n_layer=layers, n_head=4, n_positions=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()
