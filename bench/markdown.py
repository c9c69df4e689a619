"""Tables in Markdown, made from the records of bench/results, for README.md and the docs (docs/generate.py).

Every function reads the records again and returns text; none of them runs a benchmark.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.cases import RANDOM_PROFILES, RESULTS

Record = dict[str, Any]
GIB, MIB = 2**30, 2**20


def records(name: str, results: Path = RESULTS) -> list[Record]:
    """The records of a benchmark, oldest first; none where the file is missing (gpu.jsonl until a GPU was measured)."""
    path = results / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def rows(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(record: Record) -> str:
    """The processor and the cores that were used: every record so far is of a CPU."""
    name = record["device"]["cpu"].replace("(R)", "").replace(" Processor", "")
    cores = record["device"]["cores"]
    return f"{name}, {cores} core{'s' if cores > 1 else ''}"


def _trained(record: Record) -> str:
    random = RANDOM_PROFILES.get(record["figures"]["profile"])
    model = "SmolLM2-135M" if random is None else f"small random Llama, V = {random.vocab_size:,}"
    lora = record["figures"].get("lora")
    return f"{model}, LoRA" if lora else model if "Llama" in model else f"{model}, all weights"


def _tokens(record: Record) -> str:
    tokens = record["figures"]["mean_tokens"]
    return f"{tokens['prompt']:.0f} / {(tokens['chosen'] + tokens['rejected']) / 2:.0f}"


def step_tables(results: Path = RESULTS) -> str:
    """Every recorded training step: a table for each way of training and machine, one row an engine."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records("step", results):
        groups.setdefault((_trained(record), machine(record)), []).append(record)
    return "\n\n".join(_step_table(*key, group) for key, group in groups.items())


def _step_table(trained: str, where: str, group: list[Record]) -> str:
    header = (
        "prompt / response tokens, pairs a step",
        "engine",
        "s a step",
        "trl's time over it",
        "peak, GiB",
        "of trl's",
        "positions",
        "GEMM work, GFLOP",
    )
    body = []
    for record in group:
        figures = record["figures"]
        base = figures["engines"]["trl"]
        case = f"{_tokens(record)}, {figures['pairs_per_step']}" + (", 3 epochs" if figures.get("epochs") == 3 else "")
        for engine, row in figures["engines"].items():
            work = row.get("work")
            body.append(
                (
                    case,
                    f"**{engine}**" if engine == "dpofast" else engine,
                    f"{row['step_s']['median']:.2f}",
                    f"{base['step_s']['median'] / row['step_s']['median']:.1f}x",
                    f"{row['peak_bytes'] / GIB:.1f}",
                    f"{row['peak_bytes'] / base['peak_bytes']:.0%}",
                    "-" if work is None else f"{work['positions']:,.0f}",
                    "-" if work is None else f"{work['gemm_gflops']:,.0f}",
                )
            )
            case = ""
    days = sorted({record["date"][:10] for record in group})
    losses = max(record["figures"]["loss_difference"] for record in group)
    title = f"**{trained}**, {where}, {' and '.join(days)}; losses differ by at most {losses:.0e}:"
    commands = "\n".join(dict.fromkeys(record["command"] for record in group))
    return f"{title}\n\n{rows(header, body)}\n\n```\n{commands}\n```"


HEAD_MODES = {"trained": "head trains", "frozen": "head frozen", "forward": "no gradient"}


def _whole_head_record(results: Path) -> Record:
    """The last record in which every mode was measured."""
    return [record for record in records("head", results) if set(record["figures"]["modes"]) == set(HEAD_MODES)][-1]


def head_table(results: Path = RESULTS) -> str:
    """The LM head against its peers: time over the bare matrix products of the same shapes, GEMMs and peak memory."""
    record = _whole_head_record(results)
    body = []
    for mode, title in HEAD_MODES.items():
        for name, row in record["figures"]["modes"][mode]["contenders"].items():
            units, counted = row["gemm_units"], row["counted_bytes"]
            body.append(
                (
                    title,
                    f"**{name}**" if name.startswith("dpofast") else name,
                    f"{row['floors']:.2f}",
                    "not counted" if units is None else f"{units:.2f}",
                    "not counted" if counted is None else f"{counted / MIB:,.0f}",
                )
            )
    shape = record["figures"]["shape"]
    title = (
        f"N = {shape['n']:,}, D = {shape['d']:,}, V = {shape['v']:,}, {record['figures']['dtype']}, {machine(record)}, "
        f"{record['date'][:10]}, `{record['command']}`:"
    )
    header = ("what gets a gradient", "contender", "time over the bare products", "GEMMs of 2·N·D·V", "peak, MiB")
    return f"{title}\n\n{rows(header, body)}"


def _whole_packing_record(results: Path) -> Record:
    """The last record that has more than what sharing is worth."""
    return [record for record in records("packing", results) if "collators" in record["figures"]][-1]


def sharing_table(results: Path = RESULTS) -> str:
    """What the last run said about sharing beginnings."""
    from bench.sharing import report

    record = [record for record in records("packing", results) if "sharing" in record["figures"]][-1]
    title = f"{machine(record)}, {record['date'][:10]}, `{record['command']}`"
    return "\n- ".join([f"{title}:\n", *report(record["figures"]["sharing"])])


def packing_table(results: Path = RESULTS) -> str:
    """The packer: planning by number of pairs, and collators."""
    record = _whole_packing_record(results)
    figures = record["figures"]
    planning = rows(
        ("pairs planned", "seconds", "micro-batches", "lower bound", "full"),
        (
            (
                f"{row['pairs']:,}",
                f"{row['seconds']['median']:.2g}",
                f"{row['micro_batches']:,}",
                f"{row['lower_bound']:,}",
                f"{row['full']:.3%}",
            )
            for row in figures["planning"]
        ),
    )
    collators = figures["collators"]
    filling = rows(
        ("collator", "seconds", "trl's time over it"),
        (
            (name, f"{seconds:.4f}", f"{collators['times_faster'][name]:.0f}x")
            for name, seconds in collators["seconds"].items()
        ),
    )
    return (
        f"{machine(record)}, {record['date'][:10]}, `{record['command']}`; micro-batches of {figures['max_tokens']:,} "
        f"tokens:\n\n{planning}\n\n{collators['pairs']:,} pairs, {collators['pairs_per_step']} a step, from Python "
        f"lists, NumPy arrays and Arrow columns:\n\n{filling}"
    )


def memory_table(results: Path = RESULTS) -> str:
    """Resident memory of a training run by size of its data."""
    body = []
    for record in records("memory", results):
        for row in record["figures"]["runs"].values():
            body.append(
                (
                    record["figures"]["form"],
                    f"{row['pairs']:,}",
                    f"{row['file_bytes'] / 1e6:.1f}",
                    f"{row['resident_bytes'] / 1e6:,.0f}",
                    f"{machine(record)}, {record['date'][:10]}",
                )
            )
    return rows(("file", "pairs", "file, MB", "peak resident memory, MB", "machine"), body)


def real_run_table(results: Path = RESULTS) -> str:
    """Held-out metrics of the recorded run on a real model."""
    record = records("real_run", results)[-1]
    body = [
        (
            str(row["step"]),
            f"{row['loss']:.3f}",
            f"{row['rewards/accuracies']:.2f}",
            f"{row['rewards/margins']:+.2f}",
            f"{row['displacement']:.2f}",
        )
        for row in record["figures"]["held_out"]
    ]
    title = (
        f"{machine(record)}, {record['date'][:10]}: {record['figures']['wall_s']:.0f} s, "
        f"{record['figures']['peak_rss_bytes'] / GIB:.1f} GiB."
    )
    return f"{title}\n\n{rows(('step', 'held-out loss', 'accuracy', 'margin', 'displacement'), body)}"


def lists_table(results: Path = RESULTS) -> str:
    """Every recorded run of bench.lists, one row an engine; or the sentence that there is none."""
    found = records("lists", results)
    if not found:
        return "No run is recorded yet."
    return "\n\n".join(map(_lists_table, found))


def _lists_table(record: Record) -> str:
    figures, engines = record["figures"], record["figures"]["engines"]
    tokens = figures["mean_tokens"]
    vocab = RANDOM_PROFILES[figures["profile"]].vocab_size
    caption = (
        f"{figures['lists_per_step']} lists of {figures['responses']} a step, prompts of {tokens['prompt']:.0f} and "
        f"responses of {tokens['response']:.0f} tokens; small random Llama, V = {vocab:,}; {machine(record)}, "
        f"{record['date'][:10]}; `{record['command']}`:"
    )
    columns = {
        "positions": lambda row: row["work"]["positions"],
        "GEMM work, GFLOP": lambda row: row["work"]["gemm_gflops"],
        "CPU s a step": lambda row: row["step_cpu_s"]["median"],
        "s a step": lambda row: row["step_s"]["median"],
    }
    ours = engines["dpofast-lists"]
    body = []
    for name, row in engines.items():
        cells = [f"**{name}**" if row is ours else name]
        for value in columns.values():
            mine = value(row)
            cells.append(f"{mine:,.0f}" if mine >= 100 else f"{mine:.2f}")
            cells.append(f"{value(ours) / mine:.2f}x")
        body.append(cells)
    header = ["engine", *(title for column in columns for title in (column, "lists over it"))]
    return f"{caption}\n\n{rows(header, body)}"


def gpu_table(results: Path = RESULTS) -> str:
    """What was measured on GPUs, or the sentence that nothing was."""
    found = records("gpu", results)
    if not found:
        return "No run on a GPU is recorded: no GPU time, bandwidth or memory of dpofast is known."
    from bench.tables import TABLES

    return f"```text\n{TABLES['gpu'](found)}\n```"


def _step_evidence(results: Path) -> list[tuple[str, ...]]:
    """The last record of each model, way of training and length profile that was compared with trl."""
    last: dict[tuple[str, bool, str], Record] = {}
    for record in records("step", results):
        figures = record["figures"]
        if figures["model"] == "smollm2" or figures["profile"] == "ratio-10":
            last[figures["model"], bool(figures.get("lora")), figures["profile"]] = record
    body = []
    in_order = sorted(last.items(), key=lambda item: (item[0][0] != "smollm2", item[0][1], _tokens(item[1]).zfill(20)))
    for _, record in in_order:
        engines = record["figures"]["engines"]
        ours, trl = engines["dpofast"], engines["trl"]
        body.append(
            (
                f"training step, {_trained(record)}, {_tokens(record)} tokens, "
                f"{record['figures']['pairs_per_step']} pairs",
                f"{ours['step_s']['median']:.1f} s, {ours['peak_bytes'] / GIB:.1f} GiB",
                f"trl {record['versions']['trl']}: {trl['step_s']['median']:.1f} s, {trl['peak_bytes'] / GIB:.1f} GiB",
                f"{trl['step_s']['median'] / ours['step_s']['median']:.1f}x faster, "
                f"{ours['peak_bytes'] / trl['peak_bytes']:.0%} of the memory",
                machine(record),
            )
        )
    return body


def _head_evidence(results: Path) -> list[tuple[str, ...]]:
    record = _whole_head_record(results)
    shape = record["figures"]["shape"]
    body = []
    for mode, what in (("trained", "the loss and all gradients"), ("frozen", "log-probs, frozen head")):
        contenders = record["figures"]["modes"][mode]["contenders"]
        ours = contenders["dpofast pairs" if mode == "trained" else "dpofast"]
        naive = contenders["naive"]
        body.append(
            (
                f"LM head, {what}, V = {shape['v']:,}",
                f"{ours['floors']:.2f} of the bare products, {ours['counted_bytes'] / MIB:,.0f} MiB",
                f"logits built: {naive['floors']:.2f}, {naive['counted_bytes'] / MIB:,.0f} MiB",
                f"{naive['floors'] / ours['floors']:.1f}x faster, "
                f"{ours['counted_bytes'] / naive['counted_bytes']:.0%} of the memory",
                machine(record),
            )
        )
    return body


def summary(results: Path = RESULTS) -> str:
    """One sentence over every recorded step of SmolLM2: least and greatest saving against trl."""
    times, memory, losses = [], [], []
    for record in records("step", results):
        engines = record["figures"]["engines"]
        if record["figures"]["model"] != "smollm2":
            continue
        losses.append(record["figures"]["loss_difference"])
        for name in ("dpofast", "dpofast-live"):
            if name in engines:
                times.append(engines["trl"]["step_s"]["median"] / engines[name]["step_s"]["median"])
                memory.append(engines[name]["peak_bytes"] / engines["trl"]["peak_bytes"])
    faster, of_memory = f"{min(times):.1f} to {max(times):.1f}", f"{min(memory):.0%} to {max(memory):.0%}"
    return (
        f"**What it saves:** in {len(losses)} recorded runs against TRL 1.16, training SmolLM2-135M on two cores was\n"
        f"{faster} times faster a step and took {of_memory} of the memory (reference log-probs cached or\n"
        f"computed in every step), at losses that differ by at most {max(losses):.0e}."
    )


def evidence_table(results: Path = RESULTS) -> str:
    """The README's one table: what was measured, against what, and on which machine."""
    packing = _whole_packing_record(results)
    collators = packing["figures"]["collators"]
    memory = next(record for record in records("memory", results) if record["figures"]["form"] == "text")
    few, many = (memory["figures"]["runs"][name] for name in ("few", "many"))
    run = records("real_run", results)[-1]
    before, after = run["figures"]["held_out"][0], run["figures"]["held_out"][-1]
    body = [
        *_step_evidence(results),
        *_head_evidence(results),
        (
            f"packing, {collators['pairs']:,} pairs from Python lists",
            f"{collators['seconds']['lists']:.3f} s",
            f"trl's collator: {collators['seconds']['trl, lists']:.3f} s",
            f"{collators['times_faster']['lists']:.0f}x faster",
            machine(packing),
        ),
        (
            f"memory of a run, {many['pairs']:,} pairs of text",
            f"{many['resident_bytes'] / 1e6:.0f} MB resident",
            f"{few['pairs']:,} pairs: {few['resident_bytes'] / 1e6:.0f} MB",
            f"{memory['figures']['above_bytes']['resident'] / 1e6:.0f} MB more",
            machine(memory),
        ),
        (
            "one epoch of DPO, SmolLM2-135M, 320 pairs of film reviews",
            f"held-out loss {after['loss']:.3f}, accuracy {after['rewards/accuracies']:.2f}",
            f"before: loss {before['loss']:.3f}, no margin",
            f"{run['figures']['wall_s']:.0f} s, {run['figures']['peak_rss_bytes'] / GIB:.1f} GiB",
            machine(run),
        ),
    ]
    return rows(("measured", "dpofast", "compared with", "result", "CPU"), body)


def families_table(results: Path = RESULTS) -> str:
    """The last record of bench.families: the model types that run packed, those over padded rows, and the others."""
    record = records("families", results)[-1]
    groups: dict[str, dict[str, list[str]]] = {"packed": {}, "padded": {}, "refused": {}, "not built": {}}
    for name, ways in record["figures"].items():
        packed, padded = ways["packed"], ways["padded"]
        if packed["verdict"] == "right":
            group, why = "packed", ""
        elif padded["verdict"] == "right":
            group, why = "padded", _why_not_packed(packed["message"])
        else:
            group, why = "not built" if padded["verdict"] == "not built" else "refused", _why_refused(padded["message"])
        groups[group].setdefault(why, []).append(f"`{name}`")

    def table(group: str) -> str:
        order = sorted(groups[group].items(), key=lambda item: -len(item[1]))
        return rows(("model types", "why"), [(", ".join(names), why) for why, names in order])

    size = {group: sum(map(len, reasons.values())) for group, reasons in groups.items()}
    parts = [
        f"transformers {record['versions']['transformers']}, {record['date'][:10]}, `{record['command']}`:",
        f"**Packed** ({size['packed']}): {', '.join(groups['packed'].get('', []))}.",
        f"**Over padded rows only** ({size['padded']}):",
        table("padded"),
        f"**Refused** ({size['refused']}):",
        table("refused"),
    ]
    if size["not built"]:
        parts += [f"**Not tried** ({size['not built']}), because no tiny one can be made here:", table("not built")]
    return "\n\n".join(parts)


def _why_not_packed(message: str) -> str:
    why = message.partition("cannot run packed: ")[2].partition(". Padded rows")[0]
    return why.partition(", DogeAttention")[0].partition(" (")[0]  # without what is said of one family


def _why_refused(message: str) -> str:
    message = " ".join(message.split())
    why = message.partition("those of its own logits: ")[2] or message.partition(": ")[2].partition(". ")[0]
    if "log-probs in train mode" in why:
        return "its forward in train mode is random with all dropout off"
    # the message says before what "they" and "the two" are
    return why.replace("they depend", "its logits depend").replace("between the two", "between backbone and head")
