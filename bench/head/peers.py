"""The contenders: dpofast's two functions, plain PyTorch, and the LM-head losses of public libraries."""

import torch
from torch import Tensor
from torch.nn import functional as F

import dpofast
from bench.head.problem import BETA, Head, Problem, per_token, plain_logps

# Rows of a chunk, of those that let us choose: enough for a GEMM's full speed.
CHUNK_ROWS = 512


def dpofast_logprobs(problem: Problem) -> Head:
    """dpofast.linear_logprobs: gradients of any function of the log-probs."""
    return per_token(problem, lambda h, w: dpofast.linear_logprobs(h, w, problem.targets).logps)


def dpofast_preference(problem: Problem) -> Head:
    """dpofast.linear_preference_loss: the pairs are known."""
    pairs = torch.arange(2 * problem.pairs, dtype=torch.int32).view(-1, 2)
    cu_targets = torch.arange(pairs.numel() + 1, dtype=torch.int32) * (len(problem.targets) // pairs.numel())
    no_reference = torch.zeros(pairs.numel(), device=problem.hidden.device)
    step = (problem.targets, cu_targets, pairs, no_reference)
    loss = dpofast.PreferenceLoss(beta=BETA)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        output = dpofast.linear_preference_loss(hidden, weight, *step, loss=loss)
        return output.logps, output.loss

    return head


def naive(problem: Problem) -> Head:
    """All logits, their log-softmax, a gather."""
    return per_token(problem, lambda h, w: plain_logps(h, w, problem.targets))


def compiled_naive(problem: Problem) -> Head:
    """plain_logps through torch.compile."""
    compiled = torch.compile(plain_logps, dynamic=False)
    return per_token(problem, lambda h, w: compiled(h, w, problem.targets))


def torch_chunked(problem: Problem) -> Head:
    """PyTorch's own linear_cross_entropy; its default chunks are of a few rows, and tens of times slower than these."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, problem.targets, reduction="none", options=options)

    return per_token(problem, logps)


def trl_chunked(problem: Problem) -> Head:
    """What trl's trainer calls, with its chunk size, but without the statistics that it always asks for."""
    from trl.trainer import utils

    chunk, function = utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._ChunkedLogProbFunction
    return per_token(problem, lambda h, w: function.apply(h, w, None, problem.targets, 1.0, chunk, None, 1.0, ())[0])


def liger_dpo(problem: Problem) -> Head:
    """Liger's fused DPO loss without a reference model; its torch.compile, on by default, makes it slower on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=problem.hidden.is_cuda)

    def chosen_first(x: Tensor) -> Tensor:
        """(N, ...) -> (sequences, length, ...): a copy, nothing beside the products."""
        return x.view(problem.pairs, 2, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

    targets = chosen_first(problem.targets)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        value, (chosen, rejected, *_) = loss(weight, chosen_first(hidden), targets)
        return torch.stack((chosen, rejected), dim=1).flatten(), value

    return head


def apple_cce(problem: Problem) -> Head:
    """cut-cross-entropy: its Triton kernels on a GPU, its torch.compile variant elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    return per_token(problem, lambda h, w: -linear_cross_entropy(h, w, problem.targets, reduction="none", impl=impl))


OURS = {"dpofast": dpofast_logprobs, "dpofast pairs": dpofast_preference}
PEERS = {
    "naive": naive,
    "naive compiled": compiled_naive,
    "torch chunked": torch_chunked,
    "trl": trl_chunked,
    "liger": liger_dpo,
    "cce": apple_cce,
}
# Not counted: under the counting dispatch mode these run uncompiled, not the code that is timed. On a GPU, liger too.
COMPILED = {"naive compiled", "cce"}


def build(problem: Problem, names: list[str]) -> tuple[dict[str, Head], dict[str, str]]:
    """The contenders by name, and the names of those that are not installed, with the reason."""
    heads, absent = {}, {}
    for name in names:
        try:
            heads[name] = (OURS | PEERS)[name](problem)
        except (ImportError, AttributeError) as error:
            if name in OURS:
                raise
            absent[name] = str(error)
    return heads, absent
