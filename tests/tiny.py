"""Tiny, random, deterministic causal language models with a real byte-level tokenizer, for tests without a network."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

ARCHITECTURES = ("llama", "qwen3", "gemma3")
VOCAB_SIZE = 300
_TEXT = "the user tagged the movie as sci-fi, action, based on a book. a funny reply to the friend of the day"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens: 3 special, 256 bytes, and merges learnt from one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_CHAT_TEMPLATE,
    )


def tiny_config(architecture: str = "llama") -> PreTrainedConfig:
    """2 layers, hidden 64, 4 heads over 2 key-value heads; Llama and Gemma3 tie their embeddings, Qwen3 does not."""
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}[architecture]
    layer_types = {"layer_types": ["sliding_attention", "full_attention"]} if architecture == "gemma3" else {}
    return config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=architecture != "qwen3",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **layer_types,
    )


def tiny_base(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Saves a tiny base to `folder` (config, safetensors, tokenizer, chat template); same seed, same bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
