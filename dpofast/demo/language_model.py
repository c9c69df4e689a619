"""The demo's first stage: trains a tokenizer and a small Llama from scratch on the bundled text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from dpofast.report.progress import follow

END, PAD = "<|end|>", "<|pad|>"
BLOCK = 128


def train_tokenizer(documents: list[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the documents. It pads on the left, as batched generation requires."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")


def small_llama(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """Build a Llama with random weights, about a million by default.

    Attention heads have 32 dimensions, the MLP three times the hidden size; the embeddings are tied.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_language_model(documents: list[str], folder: Path, *, steps: int, seed: int) -> tuple[Any, Any]:
    """Train tokenizer and model on the documents and save both to `folder`. Returns the model and its tokenizer.

    The concatenated documents are cut into blocks of BLOCK tokens; a step takes 8 blocks.
    """
    tokenizer = train_tokenizer(documents)
    set_seed(seed)
    model = small_llama(tokenizer)
    ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 2),
        weight_decay=0.01,
        adam_beta2=0.99,
        logging_steps=max(1, steps // 8),
        include_num_input_tokens_seen="all",
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        data_collator=default_data_collator,
    )
    follow(trainer, folder / "metrics.jsonl", title="learning the text")
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
