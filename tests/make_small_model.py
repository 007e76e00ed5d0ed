"""Makes the trained model of the tests: ``python -m tests.make_small_model tests/fixtures/small-model``.

A Llama of 260,032 parameters and a byte-level BPE of 512 tokens, trained from scratch on text that comes with
Python (`tests/library_text.py`). Takes about four minutes on one core. The same machine, versions and seed
give the same bytes; another machine gives a model that is as good but not the same.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.library_text import KINDS, library_text

SEED = 0
LENGTH = 256  # tokens of a training window
WINDOWS_PER_KIND = 6  # of a step
N_STEPS = 850
LEARNING_RATE = 8e-3
SPECIAL = ["<unk>", "<s>", "</s>"]


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token of its own, so any text can be encoded and decodes to itself."""
    bpe = ByteLevelBPETokenizer()
    texts = [library_text(kind)[:200_000] for kind in KINDS]
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=SPECIAL, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def train(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """All weights, from a seed: each step sees as many windows of every kind of text."""
    tokens = [torch.tensor(tokenizer.encode(library_text(kind))) for kind in KINDS]
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=N_STEPS, pct_start=0.1
    )
    for step in range(N_STEPS):
        batch = torch.cat([_draw(text) for text in tokens])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1} of {N_STEPS}: perplexity {math.exp(loss.item()):.1f}", flush=True)
    return model


def _draw(text: torch.Tensor) -> torch.Tensor:
    starts = torch.randint(len(text) - LENGTH, (WINDOWS_PER_KIND,))
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    train(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
