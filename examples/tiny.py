"""A tiny random model and pairs for it, so that each example runs alone, without network."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, EOS, PAD = 97, 1, 2
PAIRS, PAIRS_PER_STEP = 12, 4


def tiny_model():
    """A random Llama, the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def trainer_options():
    """Options of TrainingArguments for one pass of plain SGD in the data's order, as the loops without a trainer do."""
    return {
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def tiny_examples():
    """Token ids: prompt_ids, chosen_ids and rejected_ids, responses with their end."""
    draw = random.Random(0)

    def ids(most):
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(2, most))]

    return [{"prompt_ids": ids(9), "chosen_ids": [*ids(8), EOS], "rejected_ids": [*ids(8), EOS]} for _ in range(PAIRS)]


def tiny_padded():
    """The same as padded rows, a dict of (2 * pairs, L) tensors for each step, chosen rows first."""
    from dpofast.reference import padded_rows

    examples = tiny_examples()
    for start in range(0, PAIRS, PAIRS_PER_STEP):
        step = examples[start : start + PAIRS_PER_STEP]
        yield padded_rows(
            [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in step]
        )


def tiny_text():
    """The same as a Dataset of text; trl adds the end of a response itself."""
    from datasets import Dataset

    def text(ids):
        return " ".join(map(str, ids))

    return Dataset.from_list(
        [
            {
                "prompt": text(pair["prompt_ids"]),
                "chosen": " " + text(pair["chosen_ids"][:-1]),
                "rejected": " " + text(pair["rejected_ids"][:-1]),
            }
            for pair in tiny_examples()
        ]
    )


def tiny_tokenizer():
    """Words "3" to "96", separated by spaces."""
    names = {EOS: "<eos>", PAD: "<pad>"}
    words = Tokenizer(models.WordLevel({names.get(i, str(i)): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
