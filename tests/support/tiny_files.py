"""A tiny model on disk, as a user would have it: config, safetensors, tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_LINES = [
    "Question: how many apples are left over? Answer with one short sentence and the number. Answer: 12"
]

CONTEXT = 105  # positions: some prompts of the demo tasks are longer, most are not
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def save_tiny_llama(directory: Path, context: int = CONTEXT) -> Path:
    """Write a random-weight Llama and a byte-level tokenizer; equal calls write equal weights."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # as real models have it; torch attends to heads of 8 differently on one and two threads
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # logits spread enough that hesitation comes and goes
    model.save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)
