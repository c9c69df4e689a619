"""One attached model in several threads, and in a process that it was sent to."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpofast import PreferenceLoss, attach_logprob_head, pack
from dpofast.model.attach import PackedPreference
from tests.support.tiny import tiny_model, tiny_pairs

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("padded", [False, True])
def test_threads_get_what_one_caller_gets(padded):
    """Log-probs, the loss with its gradient, plain logits and generation at once, as a sampler beside training does."""
    model = attach_logprob_head(tiny_model(), padded=padded).eval()
    batches = [pack(tiny_pairs(3, seed))[0] for seed in range(4)]
    loss, ids = PreferenceLoss(kind="simpo"), torch.arange(3, 12)[None]

    def gradient(batch):
        output = model(packed=batch, preference=PackedPreference(None, loss, 3))
        return torch.autograd.grad(output.loss, model.model.layers[0].mlp.up_proj.weight)[0]

    def generated(length):
        return model.generate(ids[:, :length], max_new_tokens=3, do_sample=False, pad_token_id=0)

    calls = [(lambda batch: model(packed=batch).logps, batch) for batch in batches]
    calls += [(gradient, batch) for batch in batches] + [(generated, length) for length in (4, 7)]
    calls += [(lambda length: model(ids[:, :length]).logits, length) for length in (3, 5, 9)]
    alone = [call(argument) for call, argument in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda job: job[0](job[1]), calls * 4))
    finally:
        sys.setswitchinterval(interval)
    for value, expected in zip(together, alone * 4, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.slow(8)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_pickled_model_runs_where_only_dpofast_is_imported(adapted, tmp_path):
    model = attach_logprob_head(get_peft_model(tiny_model(), LORA) if adapted else tiny_model()).eval()
    (batch,) = pack(tiny_pairs())
    ids = torch.arange(3, 9)[None]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, batch, ids)))
    code = (
        "import pickle, sys, dpofast, torch; model, batch, ids = pickle.load(open(sys.argv[1], 'rb'));"
        "torch.save([model(packed=batch).logps, model(ids).logits], sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pkl", tmp_path / "results.pt"], check=True)
    logps, logits = torch.load(tmp_path / "results.pt")
    # another process may compute with another number of threads, which rounds differently
    torch.testing.assert_close(logps, model(packed=batch).logps, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-6, rtol=1e-6)
