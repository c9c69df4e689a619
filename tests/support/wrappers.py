"""What other libraries leave on a model's instance: mixed precision, device hooks, a fused head."""

import contextlib

from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from trl.trainer.utils import add_fused_lm_head


@contextlib.contextmanager
def mixed_precision():
    """An accelerator that trains in bfloat16, whatever others in this process do before and after."""
    AcceleratorState._reset_state()
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state()


def autocast(model):
    with mixed_precision() as accelerator:
        return accelerator.prepare(model)


def liger_head(model):
    _apply_liger_kernel_to_instance(model, rope=False, rms_norm=False, swiglu=False)
    return model


def trl_head(model):
    add_fused_lm_head(model)
    return model


def hooked(model):
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def unwrapped(model):
    """accelerate's unwrapping binds the innermost function of the class's forward to the instance."""
    with mixed_precision() as accelerator:
        return accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)


WRAPPERS = {
    "autocast": [autocast],
    "liger": [liger_head],
    "trl": [trl_head],
    "hooks": [hooked],
    "unwrapped": [unwrapped],
    "trl-twice": [trl_head, trl_head],
    "sft": [trl_head, autocast],
    "sft-liger": [liger_head, trl_head, autocast],
    "hooks-sft": [hooked, trl_head, autocast],
}
