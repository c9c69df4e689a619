"""Memory that a process takes for itself while FSDP2 shards a model that it loads by name from bfloat16 files.

    python -m bench.scale.loading

Two processes on this machine's processors load a small Llama for float32 training, in the dtype of its files, which
stay mapped and are shared (dpofast.model.parallel.mapped), and converted as they load. Linux counts what is a process's
own (Anonymous in /proc/self/smaps_rollup); files that are mapped are not.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.cases import RESULTS, SEED, UNATTENDED
from bench.markdown import rows as markdown_rows
from bench.random_pairs import word_tokenizer
from bench.record import command_line, write_record
from bench.scale.rank import become_rank, processors_as_gpus, start
from dpofast import DPOConfig, DPOTrainer
from dpofast.model.load import load_causal_lm
from dpofast.training import prepare, trainer

PACKAGES = ("torch", "transformers", "accelerate", "safetensors")
RANKS = 2
WAYS = ("mapped", "converted as they load")
STAGES = {"loaded": (prepare, "attach_logprob_head"), "sharded": (trainer, "check_where_it_runs")}
MODEL = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14, "num_attention_heads": 8},
    **{"vocab_size": 100, "eos_token_id": 0, "pad_token_id": 1},
}


def own_bytes() -> int:
    """Bytes of memory that belong to this process alone and to no file."""
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(rank: int, port: int, folder: str, way: str) -> None:
    """Build a trainer as one rank, and write what it takes beyond what it had at first."""
    become_rank(rank, RANKS, port)
    processors_as_gpus()
    before, figures = own_bytes(), dict[str, int]()

    def counted(stage: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            figures.setdefault(stage, own_bytes() - before)
            return function(*args, **kwargs)

        return counting

    rows = [{"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6, 7]}] * 4
    options = {"fsdp": True, "fsdp_config": {"version": 2}, "output_dir": f"{folder}/output", "ddp_backend": "gloo"}
    with mock.patch.object(prepare, "load_to_shard", prepare.load_to_shard if way == "mapped" else load_causal_lm):
        for stage, (module, name) in STAGES.items():
            setattr(module, name, counted(stage, getattr(module, name)))
        built = DPOTrainer(
            f"{folder}/model",
            args=DPOConfig(**UNATTENDED | options),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast.from_pretrained(f"{folder}/model"),
        )
    figures["reference log-probs computed"] = own_bytes() - before
    figures["its float32 share"] = sum(4 * p.to_local().numel() for p in built.model.parameters())  # type: ignore[operator]
    torch.save(figures, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when recorded."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale.loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="of 16.8 million weights")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "loading.jsonl", help="file the record is appended to"
    )
    args = parser.parse_args(arguments)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, and is counted no more
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(LlamaConfig(**{**MODEL, "num_hidden_layers": args.layers}))
        model.bfloat16().save_pretrained(f"{folder}/model")
        word_tokenizer(MODEL["vocab_size"]).save_pretrained(f"{folder}/model")
        weights = sum(p.numel() for p in model.parameters())
        del model
        for way in WAYS:
            start(measure, (folder, way), RANKS)
            ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]
            figures[way] = {stage: max(rank[stage] for rank in ranks) for stage in ranks[0]}
    lines = [[way, *(f"{value / 1e6:,.0f}" for value in found.values())] for way, found in figures.items()]
    print(f"{weights / 1e6:,.0f} million weights, MB of a process's own:\n")
    print(markdown_rows(["weights", *figures[WAYS[0]]], lines))
    record = {"model": {**MODEL, "num_hidden_layers": args.layers}, "ranks": RANKS, "bytes": figures}
    write_record(
        args.results, "loading", record, command=command_line("bench.scale.loading", arguments), packages=PACKAGES
    )
    print(f"recorded in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
