"""trl 1.16's own DPOTrainer._compute_loss against the packed model: loss, gradients and logged metrics, 1e-5 float32.

Known differences, each tested below or against reference.py in tests/losses/test_kinds.py:
- trl's "sigmoid" ignores label_smoothing; here it is honoured (conservative DPO), so parity is at 0.
- "sft" with f_divergence_type is accepted by trl and changes nothing; here it is refused.
- use_weighting multiplies in place in trl, which stops "sft" in forward and "hinge" in backward; here both work.
"""

import copy

import pytest
import torch
from datasets import Dataset

from dpofast import PreferenceLoss, attach_logprob_head, pack, sequence_logprobs
from dpofast.evaluation.metrics import TOKEN_STATISTICS, MetricSums
from dpofast.losses.kinds import KINDS
from dpofast.losses.sequences import pair_logprobs
from dpofast.model.attach import PackedPreference
from tests.support.losses_cases import DIVERGENCES
from tests.support.tiny import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = pytest.mark.slow(60)

try:
    import trl
except ImportError as error:
    raise ImportError("this test needs trl 1.16: pip install -c constraints.txt '.[test]'") from error
assert trl.__version__.startswith("1.16."), (
    f"this test reads the losses of trl 1.16, and {trl.__version__} is installed"
)

TRL_KINDS = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.1}
BETA = 0.3
UNWEIGHTED = ("aot", "aot_unpaired", "sft", "hinge")


def cases():
    """Attributes of a trl trainer, by name."""
    found = {}
    for kind in TRL_KINDS:
        for divergence in DIVERGENCES if KINDS[kind].divergence else DIVERGENCES[:1]:
            for ld_alpha in (None, 0.4) if kind != "sft" else (None,):
                for weighting in (False, True) if kind not in UNWEIGHTED else (False,):
                    name = f"{kind} {divergence}{' ld' if ld_alpha else ''}{' weighted' if weighting else ''}"
                    found[name] = {
                        "loss_types": [kind],
                        "label_smoothing": SMOOTHING.get(kind, 0.0),
                        "f_divergence_type": divergence,
                        "ld_alpha": ld_alpha,
                        "use_weighting": weighting,
                    }
    mix = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
    found["mpo"] = {**mix, "loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    found["all kinds at once"] = {
        **mix,
        "loss_types": [kind for kind in TRL_KINDS if kind != "exo_pair"],
        "loss_weights": [0.1 * (i + 1) for i in range(len(TRL_KINDS) - 1)],
    }
    found["a mix, of divergences"] = {
        **mix,
        "loss_types": ["hinge", "ipo", "sft"],
        "loss_weights": [1.0, 2.0, 0.5],
        "f_divergence_type": "alpha_divergence",
        "ld_alpha": 0.2,
    }
    found["a weighted mix"] = {
        **mix,
        "loss_types": ["exo_pair", "robust", "apo_zero"],
        "loss_weights": [1.0, 0.5, 2.0],
        "label_smoothing": 0.1,
        "ld_alpha": 0.7,
        "use_weighting": True,
    }
    return found


CASES = cases()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One trl trainer whose policy has left the reference."""
    model, ref_model = (tiny_model(num_hidden_layers=1) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    args = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=BETA,
        use_weighting=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    text = Dataset.from_list([{"prompt": "3 4", "chosen": " 5 6", "rejected": " 7 8 9"}])
    return trl.DPOTrainer(model, ref_model, args=args, train_dataset=text, processing_class=tiny_tokenizer())


EXAMPLES = tiny_pairs(6, seed=4)


def trl_results(trainer, options):
    """Loss, gradients by name, metrics."""
    for name, value in {"loss_weights": [1.0] * len(options["loss_types"]), **options}.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer._compute_loss(trainer.model, trainer.data_collator(EXAMPLES), False)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.fixture(scope="module")
def packed(trainer):
    """The same policy and reference, packed: policy, batch, log-probs of the reference per token, token statistics."""
    models = []
    for model in (trainer.model, trainer.ref_model):
        fresh = tiny_model(num_hidden_layers=1)
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        models.append(attach_logprob_head(fresh))
    (batch,) = pack(EXAMPLES)
    statistics = MetricSums()
    with torch.no_grad():
        statistics.add_tokens(models[0](packed=batch, stats=TOKEN_STATISTICS), batch)
        return models[0], batch, models[1](packed=batch), statistics.means()


def our_results(packed, options):
    model, batch, ref_output, statistics = packed
    loss = PreferenceLoss(
        kind=options["loss_types"],
        weights=options.get("loss_weights"),
        beta=BETA,
        **{name: options[name] for name in ("label_smoothing", "f_divergence_type", "ld_alpha", "use_weighting")},
    )
    ref = None
    if loss.needs_reference:
        ref = sequence_logprobs(ref_output, batch)
        if loss.ld_alpha is not None:
            ref = pair_logprobs(ref_output.logps, batch.cu_targets, batch.pairs, ld_alpha=loss.ld_alpha)
    elif loss.ld_alpha is None:  # only reported
        ref = sequence_logprobs(ref_output, batch)
    model.zero_grad()
    output = model(packed=batch, preference=PackedPreference(ref, loss, batch.num_pairs))
    output.loss.backward()
    sums = MetricSums()
    sums.add_pairs(output, batch, BETA)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.loss.item(), gradients, {**sums.means(), **statistics}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_metrics_equal_trls(trainer, packed, name):
    loss, gradients, metrics = trl_results(trainer, CASES[name])
    our_loss, our_gradients, our_metrics = our_results(packed, CASES[name])
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert metrics.pop("num_tokens") == sum(
        2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in EXAMPLES
    )
    assert {name: our_metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[parameter], gradient, rtol=1e-5, atol=1e-5 * max(1.0, largest), msg=parameter
        )


def test_trl_ignores_label_smoothing_of_sigmoid(trainer, packed):
    smooth = {**CASES["sigmoid reverse_kl"], "label_smoothing": 0.2}
    assert trl_results(trainer, smooth)[0] == trl_results(trainer, CASES["sigmoid reverse_kl"])[0]
    assert abs(our_results(packed, smooth)[0] - our_results(packed, CASES["sigmoid reverse_kl"])[0]) > 1e-3


def test_trl_accepts_a_divergence_that_does_nothing(trainer, packed):
    odd = {**CASES["sft reverse_kl"], "f_divergence_type": "forward_kl"}
    assert trl_results(trainer, odd)[0] == trl_results(trainer, CASES["sft reverse_kl"])[0]
    with pytest.raises(ValueError, match="f_divergence_type='forward_kl': not for kind"):
        our_results(packed, odd)


@pytest.mark.parametrize(
    ("kind", "message"), [("sft", "single memory location"), ("hinge", "modified by an inplace operation")]
)
def test_trl_cannot_weight_some_kinds(trainer, packed, kind, message):
    weighted = {**CASES[f"{kind} reverse_kl"], "use_weighting": True}
    with pytest.raises(RuntimeError, match=message):
        trl_results(trainer, weighted)
    assert our_results(packed, weighted)[0] > 0
