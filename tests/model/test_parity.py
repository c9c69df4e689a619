"""What the checks at attach find: dropout that stays on, random routers, masks beside the layout, unknown logits."""

import re

import pytest
import torch
import transformers
from datasets import Dataset

from dpofast import DPOConfig, DPOTrainer, attach_logprob_head, pack
from dpofast.integrations._trl.forward import fuse
from dpofast.integrations._trl.scores import FusedOptions
from dpofast.model.dropout import active_dropout, disable_dropout
from tests.support.alone import alone
from tests.support.families import family_model
from tests.support.tiny import SHAPE, VOCAB, tiny_model, tiny_pairs

_SMALL = {**SHAPE, "num_hidden_layers": 2}
_BART = {
    "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(classes, **options):
    """A random model whose vectors are not 0 and 1, which would hide what they do."""
    torch.manual_seed(0)
    config = getattr(transformers, classes.partition("For")[0] + "Config")(**options)
    model = getattr(transformers, classes)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# Families whose layers keep the rate as a number and call functional dropout
FUNCTIONAL = {
    "seed-oss": lambda: made("SeedOssForCausalLM", **_SMALL, head_dim=8, residual_dropout=0.2, attention_dropout=0.2),
    "starcoder2": lambda: made("Starcoder2ForCausalLM", **_SMALL, residual_dropout=0.2, embedding_dropout=0.2),
    "opt": lambda: made("OPTForCausalLM", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, ffn_dim=48,
                        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.2),
    "gpt-bigcode": lambda: made("GPTBigCodeForCausalLM", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4,
                                n_positions=64, attn_pdrop=0.2),
}  # fmt: skip


@pytest.mark.parametrize("family", FUNCTIONAL)
def test_disabled_dropout_is_off_in_train_mode(family):
    model = FUNCTIONAL[family]()
    (batch,) = pack(tiny_pairs(6))
    truth = alone(model, batch)
    noisy = attach_logprob_head(FUNCTIONAL[family]()).train()(packed=batch).logps  # dropout on: the user's choice
    assert (noisy - truth).abs().max() > 0.01
    disable_dropout(model)
    assert active_dropout(model) == {}
    attach_logprob_head(model).train()
    torch.testing.assert_close(model(packed=batch).logps.double(), truth, atol=1e-5, rtol=0)


def test_a_rate_that_layers_read_from_the_config_is_refused_by_name():
    model = made("FalconForCausalLM", **_SMALL, hidden_dropout=0.3)
    disable_dropout(model)
    with pytest.raises(ValueError, match="log-probs in train mode differ.*set hidden_dropout of its config to 0"):
        attach_logprob_head(model, padded=True)
    model.config.hidden_dropout = 0.0
    attach_logprob_head(model, padded=True)


def test_a_random_router_is_refused_before_anything_is_trained(tmp_path):
    shape = {**_SMALL, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    rows = Dataset.from_list(tiny_pairs(2))
    with pytest.raises(ValueError, match="PhimoeForCausalLM: its log-probs in train mode differ.*router that samples"):
        DPOTrainer(model=made("PhimoeForCausalLM", **shape), args=args, train_dataset=rows)


def test_the_check_leaves_the_generator_and_the_mode_as_they_are():
    for training in (False, True):
        model = tiny_model().train(training)
        before = torch.get_rng_state()
        attach_logprob_head(model)
        assert torch.equal(before, torch.get_rng_state()) and model.training is training


def test_a_mask_beside_the_layout_is_refused_in_bfloat16_too():
    """Doge masks by the values of its keys: at most 0.02 nats off packed here, far below bfloat16's tolerance."""
    model = made("DogeForCausalLM", **_SMALL, max_position_embeddings=64).bfloat16()
    with pytest.raises(ValueError, match="its attention has a mask of its own, DogeAttention's of shape.*padded=True"):
        attach_logprob_head(model)
    attach_logprob_head(model, padded=True)


@pytest.mark.parametrize("padded", [False, True])
def test_bfloat16_does_not_hide_a_twist_that_float32_shows(padded):
    plain = type(tiny_model())

    class Twisted(plain):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.05
            return output

    model = tiny_model().bfloat16()
    model.__class__ = Twisted
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    with pytest.raises(ValueError, match=r"differ by 0\.[01]\d* nats, more than 0\.002"):
        attach_logprob_head(model, padded=padded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt-oss", "deepseek-v3", "granite"])
def test_models_of_16_bits_pass(family, dtype):
    attach_logprob_head(family_model(family).to(dtype))


def test_the_final_cap_is_known_under_every_name():
    width = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
    recurrent = made("RecurrentGemmaForCausalLM", **width, num_attention_heads=4, lru_width=32, head_dim=8,
                     logits_soft_cap=2.0)  # fmt: skip
    (batch,) = pack(tiny_pairs(4))
    truth = alone(recurrent, batch)
    attach_logprob_head(recurrent, padded=True)
    torch.testing.assert_close(recurrent(packed=batch).logps.double(), truth, atol=1e-5, rtol=0)


def test_an_unknown_entry_is_named_and_padded_rows_are_not_advised():
    plain = type(tiny_model())

    class Capped(plain):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            cap = self.config.head_logit_cap
            output.logits = cap * torch.tanh(output.logits / cap)
            return output

    model = tiny_model()
    model.config.head_logit_cap = 0.5
    model.__class__ = Capped
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    with pytest.raises(
        ValueError, match="cannot run packed.*Padded rows do not help.*config has head_logit_cap=0.5"
    ) as e:
        attach_logprob_head(model)
    assert "padded=True" not in str(e.value) and type(model) is Capped
    with pytest.raises(ValueError, match="scales its logits in a way that dpofast does not know.*unpatch_trl"):
        fuse(model, FusedOptions("forward", "raise"))
    assert type(model) is Capped


@pytest.mark.parametrize("width", [24, 32])  # of the head, whose backbone is 32 wide
@pytest.mark.parametrize("padded", [False, True])
def test_layers_between_backbone_and_head_are_named(padded, width):
    shape = {**_SMALL, "max_position_embeddings": 64, "is_decoder": True, "input_embedding_size": 16}
    model = made("RemBertForCausalLM", **shape, output_embedding_size=width)
    with pytest.raises(ValueError, match=r"other layers with weights run between the two \(cls.predictions.dense") as e:
        attach_logprob_head(model, padded=padded)
    assert "padded=True" not in str(e.value)


def test_an_encoder_is_told_that_it_sees_later_tokens():
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**_SMALL, max_position_embeddings=64)).eval()
    with pytest.raises(ValueError, match="they depend on later tokens, so it is no causal language model") as error:
        attach_logprob_head(model)
    assert "padded=True" not in str(error.value)


@pytest.mark.parametrize("padded", [False, True])
def test_the_decoder_of_an_encoder_decoder_is_attached_as_a_causal_model(padded):
    model = made("BartForCausalLM", **_BART)
    (batch,) = pack(tiny_pairs(4))
    truth = alone(model, batch)
    disable_dropout(model)
    attach_logprob_head(model, padded=padded).train()
    torch.testing.assert_close(model(packed=batch).logps.double(), truth, atol=1e-5, rtol=0)
    (long,) = pack([{"prompt_ids": [5] * 60, "chosen_ids": [6] * 10, "rejected_ids": [7]}])
    with pytest.raises(ValueError, match=re.escape("has 69 positions, and the model's table holds 64")):
        model(packed=long)


def test_positions_beyond_whispers_table_are_refused():
    options = {name: value for name, value in _BART.items() if name != "max_position_embeddings"}
    model = attach_logprob_head(made("WhisperForCausalLM", **options, max_target_positions=64), padded=True)
    (long,) = pack([{"prompt_ids": [5] * 60, "chosen_ids": [6] * 10, "rejected_ids": [7]}])
    with pytest.raises(ValueError, match=r"the model's table holds 64 \(max_target_positions\): cut the data"):
        model(packed=long)


def test_attention_by_random_hashes_is_refused():
    options = {"vocab_size": VOCAB, "hidden_size": 32, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]}
    torch.manual_seed(0)
    model = transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**options, is_decoder=True))
    with pytest.raises(ValueError, match="ReformerModelWithLMHead: expected a forward that is the same at every call"):
        attach_logprob_head(model, padded=True)
