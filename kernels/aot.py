"""The kernels' specializations worth compiling ahead of time: what tests and reports read registers and spills from.

No GPU is needed; Triton's interpreter must be off in the process, since it leaves nothing to compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import preference, token_logprobs
from .tiles import COMPILE_OPTIONS, row_tile


@dataclass(frozen=True)
class AotCase:
    """One specialization of a kernel.

    Attributes:
        name: what the specialization is.
        kernel: the ``@triton.jit`` function.
        types: Triton type of each runtime argument: "*bf16", "i32", "fp32" and so on.
        constants: value of each compile-time argument; arguments in neither mapping are None.
        unaligned: runtime arguments that 16 does not divide; it divides all other pointers (in bytes) and integers.
        num_warps: warps per program.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    unaligned: tuple[str, ...]
    num_warps: int

    def compile(self, target: GPUTarget) -> Any:
        """Triton's compiled kernel, its assembly under ``.asm``."""
        names = self.kernel.arg_names
        source = ASTSource(
            self.kernel,
            {name: self.types.get(name, "constexpr") for name in names},
            {name: self.constants.get(name) for name in names if name not in self.types},
            {
                (names.index(name),): [["tt.divisibility", 16]]
                for name, kind in self.types.items()
                if kind != "fp32" and name not in self.unaligned
            },
        )
        return triton.compile(source, target=target, options={"num_warps": self.num_warps, **COMPILE_OPTIONS})


def aot_cases(backend: str = "cuda") -> list[AotCase]:
    """Every kernel at every tile, with the dtypes and options that change what it compiles to ("cuda" or "hip")."""
    return [*_row_cases(backend), *_preference_cases()]


def _row_cases(backend: str) -> list[AotCase]:
    integers = dict.fromkeys(("stride_logits_n", "stride_exp_n", "stride_out_n", "V", "ignore_index"), "i32")
    floats = dict.fromkeys(("scale", "cap", "exp_scale", "grad_scale"), "fp32")
    vectors = dict.fromkeys(("logps_ptr", "row_max_ptr", "sum_exp_ptr", "grad_logps_ptr"), "*fp32")
    stats = {f"{name}_ptr": "*i1" if name == "is_top1" else "*fp32" for name in token_logprobs.STATS}

    def case(
        kernel: Any, name: str, pointers: dict[str, str], softcap: bool = False, ragged: bool = False, V: int = 1 << 17
    ) -> AotCase:
        tile = row_tile(V, backend)
        types = {"targets_ptr": "*i64", **integers, **floats, **vectors, **pointers}
        if not softcap:
            del types["cap"]
        constants = dict.fromkeys(("stride_logits_v", "stride_exp_v", "stride_out_v"), 1)
        return AotCase(
            f"{name} x{tile.BLOCK_V}",
            kernel,
            {name: types[name] for name in kernel.arg_names if name in types},
            {**constants, "BLOCK_V": tile.BLOCK_V},
            ("ignore_index", "V") if ragged else ("ignore_index",),
            tile.num_warps,
        )

    forward, gradient = token_logprobs._token_logprobs_kernel, token_logprobs._token_logprobs_grad_kernel
    wide, mixed = {"logits_ptr": "*fp32"}, {"logits_ptr": "*fp32", "exp_ptr": "*bf16"}
    everything = {"bias_ptr": "*bf16", "exp_ptr": "*bf16", **stats}
    return [
        case(forward, "logps fp32", wide),
        case(forward, "logps fp16, E fp16", {"logits_ptr": "*fp16", "exp_ptr": "*fp16"}),
        case(forward, "logps fp32, E bf16", mixed),
        case(forward, "logps fp32, E bf16, ragged V", mixed, ragged=True),
        case(forward, "logps fp32, E bf16", mixed, V=100),
        case(forward, "logps fp32, all options", {**wide, **everything}, softcap=True),
        case(forward, "logps bf16, all options", {"logits_ptr": "*bf16", **everything}, softcap=True),
        case(gradient, "gradient bf16", {"logits_ptr": "*bf16", "out_ptr": "*bf16"}),
        case(gradient, "gradient fp32", {**wide, "out_ptr": "*fp32"}),
        case(gradient, "gradient fp32, all options", {**wide, "out_ptr": "*fp16", "bias_ptr": "*fp16"}, softcap=True),
    ]


def _preference_cases() -> list[AotCase]:
    kernel = preference._preference_sigmoid_kernel
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("cu_targets_ptr", "offsets_ptr", "entries_ptr"), "*i32")
    types |= dict.fromkeys(("beta", "label_smoothing"), "fp32")
    reference_free = {name: kind for name, kind in types.items() if name != "ref_logps_ptr"}
    constants = {"BLOCK_N": preference.BLOCK_N}
    return [
        AotCase("preference sigmoid", kernel, types, constants, (), 1),
        AotCase("preference sigmoid, no reference", kernel, reference_free, constants, (), 1),
    ]
