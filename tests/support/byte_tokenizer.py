"""A tokenizer whose ids can be worked out by hand.

id = 3 + byte, after <s> 0, </s> 1 and <unk> 2, and one merge, "ab" 259.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS, AB = 1, 259


def make_tokenizer(template=None, **options):
    """`template` is the tokenizer's post-processor ("<s> $A" adds BOS); `options` go to PreTrainedTokenizerFast."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in visible}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelled)}
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "ab": AB} | {spelled[byte]: 3 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>"} | options)


def ids(text):
    """The ids of a text's bytes, without special tokens and merges."""
    return [3 + byte for byte in text.encode()]
