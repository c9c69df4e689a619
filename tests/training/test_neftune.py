"""NEFTune's noise: within ±alpha/√(L·D) with L a token's own sequence, in the policy's training forwards alone."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import embedding
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from dpofast import DPOConfig, attach_logprob_head, pack
from dpofast.losses.pairs import StepTotals
from dpofast.model.neftune import noisy_embeddings
from dpofast.training.step import OptimizerStep
from tests.support.families import family_model
from tests.support.tiny import SHAPE, VOCAB, tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(8)

ALPHA, WIDTH = 5.0, SHAPE["hidden_size"]
NOISE = {"neftune_noise_alpha": ALPHA}
LENGTHS = (8, 16, 32)  # tokens of prompt and response; a prompt has 3
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def pairs_of_lengths():
    """Two pairs whose responses begin with the number of the sequence: 10, 11, 12 and 13."""
    rows = [(5, 10, LENGTHS[0], 11, LENGTHS[2]), (6, 12, LENGTHS[1], 13, LENGTHS[0])]
    return [
        {
            "prompt_ids": [3, 4, prompt],
            "chosen_ids": [chosen] * (long - 3),
            "rejected_ids": [rejected] * (other - 3),
        }
        for prompt, chosen, long, rejected, other in rows
    ]


class Watch(TrainerCallback):
    """Keeps ids (rows, T) and the difference of embeddings and their table (rows, T, D) of every call in training.

    Attributes:
        calls: those in train mode; quiet: the largest noise of each in eval mode.
    """

    def __init__(self, words):
        self.words, self.calls, self.quiet, self.handle = words, [], [], None

    def on_train_begin(self, *args, **kwargs):
        self.handle = self.words.register_forward_hook(self.see)

    def see(self, module, inputs, output):
        noise = (output - embedding(inputs[0], module.weight)).detach()
        if module.training:
            self.calls.append((inputs[0].clone(), noise))
        else:
            self.quiet.append(float(noise.abs().max()))


def watched(output_dir, **options):
    """A trainer, after training with NEFTune, and its Watch."""
    trainer = make_trainer(output_dir, **{**NOISE, **options})
    watch = Watch(trainer.model.get_input_embeddings())
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


def largest(calls, first):
    """The largest |noise| among the response tokens of this id."""
    return max(float(noise[ids == first].abs().max()) for ids, noise in calls if bool((ids == first).any()))


@pytest.mark.parametrize("options", [{}, {"max_tokens": 40}, {"max_tokens": 1}, {"padded": True}], ids=str)
def test_the_bound_is_that_of_each_tokens_own_sequence(tmp_path, options):
    train = Dataset.from_list(pairs_of_lengths())
    shape = {"per_device_train_batch_size": 2, "max_steps": 20, "learning_rate": 0.0}
    _, watch = watched(tmp_path, train=train, **shape, **options)
    for first, length in zip((10, 11, 12, 13), (LENGTHS[0], LENGTHS[2], LENGTHS[1], LENGTHS[0]), strict=True):
        bound = ALPHA / (length * WIDTH) ** 0.5
        assert 0.99 * bound < largest(watch.calls, first) <= bound
    if options == {}:  # all four sequences in one row
        ids, noise = watch.calls[0]
        assert ids.shape == (1, sum(LENGTHS) + LENGTHS[0] - 4)
        assert float(noise.mean().abs()) < 0.02 and noise.unique().numel() > 0.9 * noise.numel()


def test_pairs_of_a_step_do_not_change_the_bound(tmp_path):
    rows = [{"prompt_ids": [3, i], "chosen_ids": [4, 5, 6], "rejected_ids": [6, 5, i]} for i in range(7, 39)]
    found = []
    for pairs in (2, 32):
        _, watch = watched(tmp_path, train=Dataset.from_list(rows), per_device_train_batch_size=pairs)
        found.append(max(float(noise.abs().max()) for _, noise in watch.calls))
    assert found == pytest.approx([ALPHA / (5 * WIDTH) ** 0.5] * 2, rel=0.01)


@pytest.mark.parametrize("precomputed", [True, False])
def test_reference_and_evaluation_have_none(tmp_path, precomputed):
    still = {"learning_rate": 0.0, "eval_strategy": "epoch", "precompute_ref_log_probs": precomputed}
    data = {"train": tiny_dataset(8), "evaluation": tiny_dataset(4, seed=1)}
    plain = make_trainer(tmp_path / "plain", **still, **data)
    plain.train()
    noisy, watch = watched(tmp_path / "noisy", **still, **data)
    assert watch.quiet and max(watch.quiet) == 0.0
    evaluations = [[e for e in t.state.log_history if "eval_loss" in e][0] for t in (plain, noisy)]
    same = [name for name in evaluations[0] if not re.search("runtime|per_second", name)]
    assert [evaluations[0][name] for name in same] == [evaluations[1][name] for name in same]
    if precomputed:
        columns = [t.train_dataset["ref_chosen_logps"] for t in (plain, noisy)]
        assert list(columns[0]) == list(columns[1])
    assert losses_of(noisy) != losses_of(plain)  # of equal weights


def test_a_live_reference_of_a_lora_policy_draws_nothing(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    runs = []
    for precomputed in (True, False):
        trainer, _ = watched(tmp_path, peft_config=lora, precompute_ref_log_probs=precomputed)
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


def test_both_passes_of_a_coupled_loss_have_the_same_noise(tmp_path):
    _, watch = watched(tmp_path, loss_type="aot", train=tiny_dataset(4), max_tokens=24, learning_rate=0.0)
    half = len(watch.calls) // 2
    assert half > 1 and len(watch.calls) == 2 * half
    for (ids, first), (again, second) in zip(watch.calls[:half], watch.calls[half:], strict=True):
        assert torch.equal(ids, again) and torch.equal(first, second)


def test_experts_are_counted_under_the_same_noise(tmp_path):
    _, watch = watched(tmp_path, model=family_model("mixtral"), train=tiny_dataset(4), max_tokens=24, max_steps=1)
    half = len(watch.calls) // 2
    assert half > 1 and len(watch.calls) == 2 * half
    for (ids, first), (again, second) in zip(watch.calls[:half], watch.calls[half:], strict=True):
        assert torch.equal(ids, again) and torch.equal(first, second)


def test_prompts_are_shared_without_noise_only(tmp_path):
    rows = [{"prompt_ids": [3] * 20, "chosen_ids": [4, i], "rejected_ids": [5, i]} for i in range(6, 10)]
    widths = []
    for alpha in (None, 0.0, ALPHA):
        trainer, watch = watched(tmp_path, train=Dataset.from_list(rows), neftune_noise_alpha=alpha)
        assert trainer.share == "prefix"
        widths.append(watch.calls[0][0].shape[1])
    assert widths == [20 + 2, 20 + 2, 8 * 21]  # the responses begin with 4 and with 5


def run(output_dir, **options):
    """Losses and weights of a short run."""
    trainer = make_trainer(output_dir, **SGD, max_tokens=40, max_steps=2, **options)
    trainer.train()
    return losses_of(trainer), weights_of(trainer)


def test_without_noise_a_run_is_as_it_was_and_with_it_the_seed_decides(tmp_path):
    plain, zero = run(tmp_path), run(tmp_path, neftune_noise_alpha=0.0)
    assert plain[0] == zero[0] and torch.equal(plain[1], zero[1])
    first, again = run(tmp_path, **NOISE), run(tmp_path, **NOISE)
    other = run(tmp_path, **NOISE, seed=7, data_seed=42)  # the same pairs
    assert first[0] == again[0] and torch.equal(first[1], again[1])
    assert first[0] != other[0] and first[0] != plain[0]


EAGER = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, EAGER], ids=["checkpointing", "compiled"])
def test_ways_of_computing_the_layers_do_not_change_it(tmp_path, options):
    torch.compiler.reset()
    first, second = run(tmp_path, **NOISE), run(tmp_path, **NOISE, **options)
    torch.compiler.reset()
    assert first[0] == pytest.approx(second[0], abs=1e-5)
    torch.testing.assert_close(first[1], second[1], atol=1e-5, rtol=1e-4)


def test_a_resumed_run_draws_on(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = make_trainer(tmp_path, **NOISE, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, **NOISE, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole) and torch.equal(weights_of(resumed), weights_of(whole))


class Stop(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("stop")


@pytest.mark.parametrize("ends", [True, False], ids=["done", "by an exception"])
def test_the_model_is_left_as_it_was(tmp_path, ends):
    trainer = make_trainer(tmp_path, **NOISE)
    names, words = list(trainer.model.state_dict()), trainer.model.get_input_embeddings()
    kept = set(vars(trainer.model)), set(vars(words))
    if ends:
        trainer.train()
    else:
        trainer.add_callback(Stop())
        with pytest.raises(RuntimeError, match="stop"):
            trainer.train()
    assert list(trainer.model.state_dict()) == names and not words._forward_hooks
    assert "_dpofast_embedding_noise" not in vars(trainer.model)
    assert set(vars(words)) == kept[1] and set(vars(trainer.model)) - kept[0] <= {"_is_accelerate_prepared"}


def gpt2():
    """Its backbone takes another view of the ids."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2, **off, **ends))


EMBEDDINGS_TRAINED = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
EMBEDDINGS_ADAPTED = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("peft_config", [EMBEDDINGS_TRAINED, EMBEDDINGS_ADAPTED], ids=["saved", "adapted"])
def test_embeddings_under_an_adapter(tmp_path, peft_config):
    quiet, noisy = (make_trainer(tmp_path, peft_config=peft_config, max_steps=1, **o) for o in ({}, NOISE))
    for trainer in (quiet, noisy):
        trainer.train()
    assert losses_of(quiet)[0] == pytest.approx(0.6931, abs=1e-4) != pytest.approx(losses_of(noisy)[0], abs=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_calls_of_a_model(padded):
    model = attach_logprob_head(gpt2(), padded=padded).train()
    batch, (shared,) = pack(tiny_pairs(4), share="none")[0], pack(tiny_pairs(4))
    with torch.no_grad():
        plain = model.eval()(packed=batch).logps
        model.train()
        with noisy_embeddings(model, ALPHA):
            assert not torch.allclose(model(packed=batch).logps, plain, atol=1e-3)
            if not padded:
                with pytest.raises(ValueError, match='share rows: pack with share="none"'):
                    model(packed=shared)
            assert torch.equal(model.eval()(packed=batch).logps, plain)
            ids = torch.arange(3, 9)[None]
            assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_response_that_begins_another_is_refused_though_nothing_forks():
    model = attach_logprob_head(tiny_model()).train()
    (batch,) = pack([{"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [5, 6, 7]}])
    assert batch.segments.num_segments == 1
    with (
        noisy_embeddings(model, ALPHA),
        pytest.raises(ValueError, match="whose sequences share nothing"),
    ):
        model(packed=batch)


def test_a_rank_without_pairs_runs_along(tmp_path):
    trainer = make_trainer(tmp_path, **NOISE, max_steps=1)
    trainer.train()
    step = OptimizerStep(trainer._settings, trainer.model.train(), [], StepTotals(4, 4, None))
    with noisy_embeddings(trainer.model, ALPHA):
        result = step.run()
    assert result is not None and len(torch.cat(result.losses)) == 0


def test_an_embedding_that_is_not_called_is_refused():
    model = attach_logprob_head(tiny_model()).train()
    (batch,) = pack(tiny_pairs(2), share="none")
    other = torch.nn.Embedding(VOCAB, WIDTH)
    model.get_input_embeddings = lambda: other
    with noisy_embeddings(model, ALPHA), pytest.raises(ValueError, match="does not call its input embedding"):
        model(packed=batch)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_alpha_is_checked(tmp_path, alpha):
    with pytest.raises(ValueError, match="neftune_noise_alpha: expected 0 or more, got"):
        DPOConfig(str(tmp_path), use_cpu=True, neftune_noise_alpha=alpha)
