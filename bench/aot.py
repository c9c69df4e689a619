"""The kernels' specializations worth compiling ahead of time: what tests and reports read registers and spills from.

No GPU is needed; Triton's interpreter must be off in the process, since it leaves nothing to compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpofast.kernels import exp_gemm, exp_gemm_rows, exp_rows, gather_kv, linear_lse, preference, scale, token_logprobs
from dpofast.kernels.linear_tiles import guess_tile, linear_tile, takes_descriptors
from dpofast.kernels.row_parts import STATS
from dpofast.kernels.tiles import COMPILE_OPTIONS, row_tile

_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# The names are linear_tiles.ARCHITECTURES.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class AotCase:
    """One specialization of a kernel.

    Attributes:
        name: what the specialization is.
        kernel: the ``@triton.jit`` function.
        types: Triton type of each runtime argument: "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>" and so on.
        constants: value of each compile-time argument; arguments in neither mapping are None.
        unaligned: runtime arguments that 16 does not divide; it divides all other pointers (in bytes) and integers.
        num_warps: warps per program.
        num_stages: stages of the software pipeline; None: Triton's default.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    unaligned: tuple[str, ...]
    num_warps: int
    num_stages: int | None = None

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
                if kind != "fp32" and not kind.startswith("tensordesc") and name not in self.unaligned
            },
        )
        options = {"num_warps": self.num_warps, **COMPILE_OPTIONS}
        if self.num_stages is not None:
            options["num_stages"] = self.num_stages
        return triton.compile(source, target=target, options=options)


def aot_cases(architecture: str) -> list[AotCase]:
    """Every kernel at every tile of one of TARGETS, with the dtypes and options that change what it compiles to."""
    backend = TARGETS[architecture].backend
    return [
        *_row_cases(backend),
        *_scale_cases(backend),
        *_preference_cases(),
        *_linear_cases(architecture),
        *_gather_cases(),
    ]


def _row_cases(backend: str) -> list[AotCase]:
    integers = dict.fromkeys(("stride_logits_n", "stride_exp_n", "stride_out_n", "V", "ignore_index"), "i32")
    floats = dict.fromkeys(("scale", "cap", "grad_scale"), "fp32")
    vectors = dict.fromkeys(
        ("logps_ptr", "row_max_ptr", "shift_ptr", "sum_exp_ptr", "rescale_ptr", "grad_logps_ptr"), "*fp32"
    )
    stats = {f"{name}_ptr": "*i1" if name == "is_top1" else "*fp32" for name in STATS}

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
    one_read = exp_rows._exp_rows_kernel
    wide, mixed = {"logits_ptr": "*fp32"}, {"logits_ptr": "*fp32", "exp_ptr": "*bf16"}
    everything = {"bias_ptr": "*bf16", "exp_ptr": "*bf16", **stats}
    return [
        case(forward, "logps fp32", wide),
        case(forward, "logps fp16, E fp16", {"logits_ptr": "*fp16", "exp_ptr": "*fp16"}),
        case(forward, "logps fp32, E fp16", {"logits_ptr": "*fp32", "exp_ptr": "*fp16"}),
        case(forward, "logps fp32, E bf16", mixed),
        case(forward, "logps fp32, E bf16, ragged V", mixed, ragged=True),
        case(forward, "logps fp32, E bf16", mixed, V=100),
        case(forward, "logps fp32, all options", {**wide, **everything}, softcap=True),
        case(forward, "logps bf16, all options", {"logits_ptr": "*bf16", **everything}, softcap=True),
        case(one_read, "one read fp32, E bf16", mixed),
        case(one_read, "one read fp32, E bf16, ragged V", mixed, ragged=True),
        case(one_read, "one read fp32, E bf16", mixed, V=100),
        case(one_read, "one read fp32, all options", {**wide, **everything}, softcap=True),
        case(gradient, "gradient bf16", {"logits_ptr": "*bf16", "out_ptr": "*bf16"}),
        case(gradient, "gradient fp32", {**wide, "out_ptr": "*fp32"}),
        case(gradient, "gradient fp32, all options", {**wide, "out_ptr": "*fp16", "bias_ptr": "*fp16"}, softcap=True),
    ]


def _scale_cases(backend: str) -> list[AotCase]:
    rows, tensor = scale._scale_rows_kernel, scale._scale_kernel
    integers = dict.fromkeys(("stride_out_n", "stride_rows_n", "D"), "i32")
    tile = row_tile(1 << 17, backend)
    block = {"BLOCK_D": tile.BLOCK_V}

    def case(name: str, x: str, out: str) -> AotCase:
        types = {"out_ptr": out, "rows_ptr": x, "coefficients_ptr": "*fp32", **integers}
        ordered = {argument: types[argument] for argument in rows.arg_names if argument in types}
        constants = {"stride_out_d": 1, "stride_rows_d": 1, **block}
        return AotCase(f"scale rows {name}", rows, ordered, constants, (), tile.num_warps)

    everything = {"values_ptr": "*bf16", "factor_ptr": "*fp32", "numel": "i32"}
    return [
        case("bf16", "*bf16", "*bf16"),
        case("fp32 to bf16", "*fp32", "*bf16"),
        AotCase("scale bf16", tensor, everything, block, (), tile.num_warps),
        AotCase("scale bf16, 2**31 elements", tensor, {**everything, "numel": "i64"}, block, (), tile.num_warps),
    ]


def _preference_cases() -> list[AotCase]:
    integers = ("cu_targets_ptr", "offsets_ptr", "entries_ptr", "positions_ptr")

    columns = ("weight_ptr", "margin_ptr", "beta_ptr", "smoothing_ptr", "token_weights_ptr")

    def case(
        name: str,
        kernel: Any,
        *,
        normalize: bool = False,
        without: tuple[str, ...] = (),
        with_columns: tuple[str, ...] = (),
    ) -> AotCase:
        absent = ("NORMALIZE", "BLOCK_N", *without, *(column for column in columns if column not in with_columns))
        arguments = [argument for argument in kernel.arg_names if argument not in absent]
        pointers = {argument: "*i32" if argument in integers else "*fp32" for argument in arguments}
        types = {argument: kind if argument.endswith("_ptr") else "fp32" for argument, kind in pointers.items()}
        constants = {"NORMALIZE": normalize, "BLOCK_N": preference.BLOCK_N}
        return AotCase(f"preference {name}", kernel, types, constants, (), 1)

    plain, weighted = preference._preference_sigmoid_kernel, preference._preference_sigmoid_ld_kernel
    return [
        case("sigmoid", plain, without=("lengths_ptr",)),
        case("sigmoid, no reference", plain, without=("lengths_ptr", "ref_logps_ptr")),
        case("sigmoid per token", plain, normalize=True),
        case("sigmoid with ld_alpha", weighted),
        case("sigmoid with ld_alpha per token", weighted, normalize=True),
        case("sigmoid, all columns", plain, without=("lengths_ptr",), with_columns=columns),
        case("sigmoid per token, all columns", plain, normalize=True, with_columns=columns),
        case("sigmoid, pair weights", plain, without=("lengths_ptr",), with_columns=("weight_ptr",)),
        case("sigmoid, token weights", plain, without=("lengths_ptr",), with_columns=("token_weights_ptr",)),
        case("sigmoid with ld_alpha, all columns", weighted, with_columns=columns),
    ]


_LINEAR_TYPES = {
    **dict.fromkeys(("N", "V", "D", "samples", "stride_hidden_n", "stride_weight_v", "stride_sample_v"), "i32"),
    **dict.fromkeys(("stride_exp_n", "splits", "slots", "ignore_index"), "i32"),
    **dict.fromkeys(("scale", "grad_scale", "least", "most", "raised", "log2_e"), "fp32"),
    **dict.fromkeys(("row_max_ptr", "sum_exp_ptr", "guess_ptr", "target_logit_ptr"), "*fp32"),
    **dict.fromkeys(("logps_ptr", "lse_ptr", "rescale_ptr"), "*fp32"),
    **dict.fromkeys(("flags_ptr", "again_ptr"), "*i8"),
    "targets_ptr": "*i64",
}
# What 16 does not divide where nothing is aligned on purpose; rows of hidden states, head and E start aligned.
_UNALIGNED = ("N", "V", "samples", "splits", "slots", "ignore_index", "flags_ptr", "again_ptr")
_SLOTS = 8


def _linear_types(kernel: Any, pointers: dict[str, str], bias: bool, softcap: bool) -> dict[str, str]:
    types = {**_LINEAR_TYPES, **pointers}
    types |= {"bias_ptr": "*bf16", "sample_bias_ptr": "*bf16"} if bias else {}
    types |= {"cap": "fp32"} if softcap else {}
    return {name: types[name] for name in kernel.arg_names if name in types}


def _linear_cases(architecture: str) -> list[AotCase]:
    def gemm(
        dtype: torch.dtype,
        *,
        stores: bool = True,
        exp: torch.dtype | None = None,
        bias: bool = False,
        softcap: bool = False,
        odd_depth: bool = False,
        aligned: bool = False,
        again: bool = False,
    ) -> AotCase:
        """Without odd_depth, rows are aligned and D is whole blocks. aligned: V too. again: by running maxima."""
        out = _TRITON_NAMES[exp or dtype]
        descriptors = takes_descriptors(architecture, dtype) and not odd_depth and exp is None
        tile = linear_tile(
            architecture, dtype, softcap=softcap, descriptors=descriptors, stores=stores, even=not odd_depth
        )
        kind = _TRITON_NAMES[dtype]
        pointers = {"hidden": f"*{kind}", "weight": f"*{kind}", "exp": f"*{out}"}
        if descriptors:
            pointers = {
                "hidden": f"tensordesc<{kind}[{tile.BLOCK_N}, {tile.BLOCK_D}]>",
                "weight": f"tensordesc<{kind}[{tile.BLOCK_V}, {tile.BLOCK_D}]>",
                "exp": f"tensordesc<{out}[{tile.BLOCK_N}, {tile.BLOCK_V}]>",
            }
        if not stores:
            del pointers["exp"]
        kernel = linear_lse.linear_lse_kernel if again else exp_gemm._exp_gemm_kernel
        constants = {"DESCRIPTORS": descriptors, "EVEN_D": not odd_depth, "BLOCK_N": tile.BLOCK_N}
        constants |= {"BLOCK_V": tile.BLOCK_V, "BLOCK_D": tile.BLOCK_D}
        if not again:
            constants |= {"BLOCK_G": _SLOTS}
        types = _linear_types(kernel, pointers, bias, softcap)
        parts = [f"linear {kind}", "running maxima" if again else f"E {out}" if stores else "no E"]
        parts += ["all options"] if softcap else ["bias"] if bias else []
        parts += ["odd D"] if odd_depth else ["V of 16s"] if aligned else []
        unaligned = [name for name in _UNALIGNED if name in types and not (aligned and name == "V")]
        unaligned += ["D", "stride_hidden_n", "stride_weight_v"] if odd_depth else []
        return AotCase(
            f"{', '.join(parts)} {tile.BLOCK_N}x{tile.BLOCK_V}x{tile.BLOCK_D}",
            kernel,
            types,
            constants,
            tuple(unaligned),
            tile.num_warps,
            tile.num_stages,
        )

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        gemm(bf16),
        gemm(bf16, aligned=True),
        gemm(bf16, bias=True),
        gemm(bf16, bias=True, odd_depth=True),
        gemm(bf16, bias=True, softcap=True, odd_depth=True),
        gemm(bf16, stores=False),
        gemm(bf16, stores=False, bias=True, odd_depth=True),
        gemm(bf16, stores=False, bias=True, softcap=True),
        gemm(bf16, stores=False, bias=True, softcap=True, odd_depth=True),
        gemm(fp16, bias=True, softcap=True),
        gemm(fp16, exp=fp32),
        gemm(fp32),
        gemm(fp32, bias=True, softcap=True, odd_depth=True),
        gemm(bf16, stores=False, again=True),
        gemm(fp16, bias=True, softcap=True, again=True),
        gemm(bf16, bias=True, softcap=True, odd_depth=True, again=True),
        gemm(fp32, bias=True, softcap=True, odd_depth=True, again=True),
        *_linear_row_cases(architecture),
    ]


def _linear_row_cases(architecture: str) -> list[AotCase]:
    tile, large = guess_tile(torch.bfloat16), row_tile(1 << 17, TARGETS[architecture].backend)
    guess, patch, reshift = exp_gemm_rows.guess_kernel, exp_gemm_rows.patch_kernel, exp_gemm_rows.reshift_kernel
    rows = dict.fromkeys(("hidden_ptr", "sample_ptr", "weight_ptr"), "*bf16")
    blocks = {"BLOCK_N": tile.BLOCK_N, "BLOCK_V": tile.BLOCK_V, "BLOCK_D": tile.BLOCK_D}

    def case(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> AotCase:
        unaligned = tuple(name for name in _UNALIGNED if name in types)
        return AotCase(f"linear {name}", kernel, types, constants, unaligned, warps)

    small = guess_tile(torch.float32)
    narrow = {"BLOCK_N": small.BLOCK_N, "BLOCK_V": small.BLOCK_V, "BLOCK_D": small.BLOCK_D, "EVEN_D": False}
    return [
        case(
            "guess fp32, all options, odd D",
            guess,
            _linear_types(guess, dict.fromkeys(rows, "*fp32"), True, True),
            narrow,
            small.num_warps,
        ),
        case("guess bf16", guess, _linear_types(guess, rows, False, False), {**blocks, "EVEN_D": True}, tile.num_warps),
        case(
            "guess bf16, all options, odd D",
            guess,
            _linear_types(guess, rows, True, True),
            {**blocks, "EVEN_D": False},
            tile.num_warps,
        ),
        case(
            "patch bf16, all options",
            patch,
            _linear_types(patch, {"exp_ptr": "*bf16"}, True, True),
            {"BLOCK_N": 128, "BLOCK_G": _SLOTS, "BLOCK_S": 8, "BLOCK_V": large.BLOCK_V},
            exp_gemm.ROW_WARPS,
        ),
        case(
            "second shift",
            reshift,
            _linear_types(reshift, {}, False, False),
            {"BLOCK_S": 8, "BLOCK_G": _SLOTS},
            exp_gemm.ROW_WARPS,
        ),
    ]


def _gather_cases() -> list[AotCase]:
    def case(name: str, kernel: Any, kind: str, width: int) -> AotCase:
        indices = ("rows_ptr", "offsets_ptr", "copies_ptr")
        pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
        strides = [argument for argument in kernel.arg_names if argument.startswith("stride")]
        count = "K" if "K" in kernel.arg_names else "T"
        rows, columns = gather_kv.tile(width)
        return AotCase(
            f"{name} {kind} x{width}",
            kernel,
            {p: "*i32" if p in indices else f"*{kind}" for p in pointers} | dict.fromkeys([*strides, count], "i32"),
            {"H": 8, "D": width, f"BLOCK_{count}": rows, "BLOCK_D": columns},
            (count,),
            gather_kv.WARPS,
        )

    return [
        case(name, kernel, kind, width)
        for name, kernel in (("gather", gather_kv._gather_kv_kernel), ("gather backward", gather_kv._sum_kv_kernel))
        for kind, width in (("bf16", 64), ("fp16", 80), ("bf16", 128), ("bf16", 256))
    ]
