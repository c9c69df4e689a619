"""Fingerprints of models that bitsandbytes has quantized count the scales, which it keeps beside the weights."""

import copy
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dpofast.scoring.fingerprints import model_fingerprint
from tests.support.tiny import tiny_model


class Scales:
    """What a layer of bitsandbytes with 4-bit weights keeps beside them."""

    def __init__(self, absmax):
        self.absmax = absmax

    def as_dict(self, packed):
        assert packed
        return {"absmax": self.absmax, "quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}


def test_scales_of_quantized_weights_count(tmp_path):
    model, plain = tiny_model(), model_fingerprint(tiny_model())
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state = layer.quant_state = Scales(torch.ones(8))
    ones = model_fingerprint(model)
    layer.weight.quant_state = layer.quant_state = Scales(torch.ones(8).index_fill(0, torch.tensor([5]), 1.5))
    other = model_fingerprint(model)
    assert len({plain, ones, other}) == 3
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    with peft.disable_adapter():
        assert model_fingerprint(peft) == other
    del layer.quant_state
    assert model_fingerprint(model) == other  # a checkpoint's weights may have it alone
    layer.quant_state = layer.weight.quant_state
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard = distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        layer.weight = torch.nn.Parameter(shard)
        assert model_fingerprint(model) == other
    finally:
        dist.destroy_process_group()


def test_scales_of_8_bit_weights_count():
    model = tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.SCB = torch.ones(4)
    before = model_fingerprint(model)
    assert before != model_fingerprint(tiny_model())
    layer.weight.SCB, layer.state = None, SimpleNamespace(SCB=torch.ones(4))  # as after a forward
    assert model_fingerprint(model) == before
    layer.state.SCB[1] = 2
    assert model_fingerprint(model) != before
