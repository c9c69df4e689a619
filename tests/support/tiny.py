"""Tiny random models, a tokenizer that needs no download, and preference pairs for them."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Pairs of text for save_tiny's tokenizer.
TEXT_ROWS = [{"prompt": f"{i} 4 5", "chosen": f" 6 {i}", "rejected": " 7 8 9"} for i in range(10, 30)]
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
}


def tiny_model(family="llama", *, dtype=torch.float32, **extra):
    """A random model of a family, the same at every call."""
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**SHAPE, **options, **extra})).to(dtype)


def tiny_tokenizer():
    """Words "0" to "96", with EOS and padding tokens."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2")


def save_tiny(folder, model=None):
    """A folder with a model and a tokenizer that splits text into words, for the command line. Returns it."""
    model, tokenizer = model or tiny_model(), tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Trainer writes the tokenizer's special tokens into the model's config, where they differ.
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_pairs(count=12, seed=0, longest=9):
    """Examples of token ids: mixed lengths, one-token prompts and responses among them."""
    draw = random.Random(seed)

    def ids(most):
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, most))]

    examples = []
    for _ in range(count):
        example = {"prompt_ids": ids(longest), "chosen_ids": ids(longest - 1), "rejected_ids": ids(longest - 1)}
        if example["chosen_ids"] == example["rejected_ids"]:
            example["rejected_ids"] = [3, *example["rejected_ids"]]
        examples.append(example)
    return examples


def tiny_dialogues(count=16, seed=0, systems=3):
    """Examples that begin alike, in random order: few system prompts, further turns, responses that part late."""
    draw = random.Random(seed)

    def ids(fewest, most):
        return [draw.randrange(5, VOCAB) for _ in range(draw.randint(fewest, most))]

    begun, examples = [ids(10, 14) for _ in range(systems)], []
    for _ in range(count):
        prompt, common = draw.choice(begun) + ids(1, 4), ids(0, 6)
        chosen, rejected = common + [3] + ids(0, 4), common + [4] + ids(0, 4)
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        if draw.random() < 0.4:
            begun.append(prompt + chosen)  # the next turn
    draw.shuffle(examples)
    return examples


def tiny_dataset(count=12, seed=0, pairs=tiny_pairs):
    """tiny_pairs, or tiny_dialogues, as a Dataset."""
    from datasets import Dataset  # here: tests of the GPU do without it

    return Dataset.from_list(pairs(count, seed))
