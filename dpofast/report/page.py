"""Write report.html: a self-contained page about a run.

It has plots (figures.py), warnings (diagnosis.py), the held-out pairs with the largest and smallest margins, settings,
data and throughput. Text that comes from data (prompts, responses, file names) is escaped. Images of these prompts are
shown small, for which the page grows by at most 350 kB.
"""

from __future__ import annotations

import base64
import html
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from dpofast._version import __version__
from dpofast.common.memory import peak_memory
from dpofast.data.formats import ID_COLUMNS, RANK_COLUMN
from dpofast.data.images.columns import IMAGES
from dpofast.data.images.shown import text_of_prompt
from dpofast.evaluation.pair_records import KeptPair, ListTable, PairRecords, PairTable
from dpofast.evaluation.statistics import Estimate, mean, share
from dpofast.report.diagnosis import LEAST_PAIRS, Finding, Run, diagnose
from dpofast.report.figures import Picture, pictures
from dpofast.report.template import PAGE
from dpofast.report.thumbnails import row_of, thumbnails_html

# Characters of a prompt or response that are shown; the page must stay readable.
_MOST_TEXT = 2000
# Settings shown first; the others are in a collapsed section below.
_MAIN_SETTINGS = (
    *("loss_type", "beta", "label_smoothing", "ld_alpha", "rpo_alpha", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_length", "max_tokens"),
    *("optim", "weight_decay", "max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "seed"),
)


class ReportCallback(TrainerCallback):
    """Writes report.html when training ends: trainer.add_callback(ReportCallback(trainer, "report.html")).

    Args:
        trainer: the DPOTrainer to report on.
        path: the file to write.
    """

    def __init__(self, trainer: Any, path: str | os.PathLike[str]) -> None:
        """Keep both."""
        self.trainer, self.path = trainer, Path(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page on the first process; an error becomes a warning, so that the run ends as usual."""
        if not state.is_world_process_zero:
            return
        try:
            write_report(self.trainer, self.path)
        except Exception as error:
            warnings.warn(f"{self.path} could not be written: {type(error).__name__}: {error}", stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The title, the numbers and the tables of the page.

    title: the model's name; cards: (label, value, note) of each number at the top; data: rows of the table
    about the run; settings: every option by name.
    """

    title: str
    cards: Sequence[tuple[str, str, str]]
    data: Sequence[tuple[str, str]]
    settings: Mapping[str, Any]


def write_report(trainer: Any, path: str | os.PathLike[str]) -> Path:
    """Write the page about a DPOTrainer's run so far.

    Args:
        trainer: a DPOTrainer that has trained; pairs come from its last evaluation.
        path: the file.

    Returns:
        The path.
    """
    prefix, records = _last_evaluation(trainer)
    run = run_of(trainer, prefix, records)
    page = render(run, facts_of(trainer, run), _pairs_html(trainer, records))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def findings_of(trainer: Any) -> list[Finding]:
    """Returns the warnings about a DPOTrainer's run so far, those of its report."""
    return diagnose(run_of(trainer, *_last_evaluation(trainer)))


def _last_evaluation(trainer: Any) -> tuple[str, PairRecords | None]:
    return next(iter(trainer.pair_records.items()), ("eval", None))


def run_of(trainer: Any, prefix: str, records: PairRecords | None) -> Run:
    """Returns the input of diagnosis.py and figures.py.

    Args:
        trainer: a DPOTrainer.
        prefix: of the evaluation's metrics, "eval".
        records: of the last evaluation's pairs, or None.
    """
    args, report = trainer.args, trainer.data_reports.get("train")
    return Run(
        history=trainer.state.log_history,
        pairs=None if records is None else records.table(),
        with_reference=any(name.endswith("displacement") for entry in trainer.state.log_history for name in entry),
        per_token=trainer.loss.per_token,
        beta=args.beta,
        learning_rate=args.learning_rate,
        epochs=trainer.state.epoch or args.num_train_epochs,
        responses=_responses(trainer.train_dataset, report) if report else 0,
        truncated=report.truncated if report else 0,
        prefix=prefix,
    )


def _responses(dataset: Any, report: Any) -> int:
    """The responses trained on; 0, for not known, of lists that were streamed."""
    if report.example_kind == "pairs":
        return 2 * report.examples
    return sum(map(len, dataset[RANK_COLUMN])) if isinstance(dataset, Dataset) else 0


def facts_of(trainer: Any, run: Run) -> Facts:
    """Returns the numbers at the top of the page and the tables at its end."""
    model = getattr(trainer.model.config, "name_or_path", "") or type(trainer.model).__name__
    parameters = list(trainer.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    summary = next((entry for entry in reversed(run.history) if "train_runtime" in entry), {})
    bytes_, kind = peak_memory()
    data = [
        ("model", f"{model}: {sum(p.numel() for p in parameters):,} parameters, {trained:,} of them trained"),
        *((name, report.summary()) for name, report in trainer.data_reports.items()),
        ("steps", f"{trainer.state.global_step:,} optimizer steps, {trainer.state.epoch or 0:.2f} epochs"),
        ("time", f"{summary['train_runtime']:,.0f} s" if "train_runtime" in summary else "not known"),
        ("peak memory", f"{bytes_ / 2**30:.2f} GiB ({kind})"),
        ("device", str(trainer.args.device)),
        ("written", f"{time.strftime('%Y-%m-%d %H:%M')} by dpofast {__version__}"),
    ]
    return Facts(title=model, cards=_cards(run), data=data, settings=_settings(trainer.args))


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of each number: held-out ones, or those of training without an evaluation."""
    where = "held-out" if run.held_out() else "training"
    cards = []
    for label, name, form in (
        ("loss", "loss", "{:.3f}"),
        ("accuracy", "rewards/accuracies", "{:.0%}"),
        ("Kendall's τ", "rewards/kendall_tau", "{:+.2f}"),
        ("best of K", "rewards/best_of_k", "{:.0%}"),
        ("margin", "rewards/margins", "{:+.2f}"),
        ("chosen less likely", "displacement", "{:.0%}"),
        ("balanced accuracy", "length/accuracy_balanced", "{:.0%}"),
    ):
        value = run.last(name)
        if value is None or (name == "displacement" and not run.with_reference):
            continue
        note, first = where, (run.held_out(name) or run.trained(name))[0][1]
        if name == "rewards/accuracies" and run.pairs is not None and len(run.pairs):
            interval = _accuracy(run.pairs)
            note += f", {interval.low:.0%} to {interval.high:.0%} (95 %)"
        elif name in ("loss", "rewards/margins"):
            note += f", {form.format(first)} at first"
        cards.append((label, form.format(value), note))
    speeds = [value for _, value in run.trained("tokens_per_second")]
    if speeds:
        cards.append(("tokens a second", f"{sum(speeds) / len(speeds):,.0f}", "mean over training"))
    return cards


def _accuracy(pairs: PairTable) -> Estimate:
    """Accuracy: of lists the mean over lists of theirs."""
    if pairs.lists is None:
        return share(pairs.margins > 0)
    return mean(pairs.lists.accuracy[~np.isnan(pairs.lists.accuracy)])


def _settings(args: Any) -> dict[str, Any]:
    """Every option, from to_dict, which hides access tokens."""
    return {name: value for name, value in args.to_dict().items() if not name.startswith("_")}


def _pairs_html(trainer: Any, records: PairRecords | None) -> str:
    if records is None or not len(records.table()):
        return "<p>No held-out pairs were evaluated: pass --eval_data (eval_dataset) to see some here.</p>"
    table = records.table()
    report = next((r for name, r in trainer.data_reports.items() if name != "train"), None)
    unit = report.unit if report else "row"
    parts = [] if table.lists is None else [_lists_html(table.lists)]
    for title, kept in (("Ranked worst", records.worst()), ("Ranked best", records.best())):
        shown = "".join(_pair_html(pair, table, trainer, unit) for pair in kept)
        parts.append(f"<h3>{title}</h3>{shown}")
    return "".join(parts)


def _lists_html(lists: ListTable) -> str:
    """A table of how the rewards order the held-out lists, by their number of responses."""
    rows = []
    sizes = np.unique(lists.responses).tolist()
    for label, inside in [
        ("all", np.ones(len(lists.responses), bool)),
        *([(f"K = {size}", lists.responses == size) for size in sizes] if len(sizes) > 1 else []),
    ]:
        inside = inside & ~np.isnan(lists.accuracy)
        if not inside.any():
            continue
        values = (lists.kendall_tau, lists.ndcg, lists.best_of_k, lists.accuracy)
        means = "".join(f"<td>{each[inside].mean():.3f}</td>" for each in values)
        rows.append(f"<tr><th>{label}</th><td>{int(inside.sum()):,}</td>{means}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", "lists", "Kendall's τ", "NDCG", "best of K", "pair accuracy"))
    return (
        f'<div class="box"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
        "<p>Of a list, chosen and rejected below are its best and its worst response.</p>"
    )


def _pair_html(pair: KeptPair, table: Any, trainer: Any, unit: str) -> str:
    example, decode, row = pair.example, _decoder(trainer.processing_class), row_of(trainer, pair.example)
    prompt = _cut(text_of_prompt(row, example[ID_COLUMNS[0]], decode))
    chosen, rejected = (_cut(decode([int(token) for token in example[name]])) for name in ID_COLUMNS[1:])
    sides = "".join(
        f'<div class="side {side}"><h4>{side} <span>reward {table.rewards[pair.place, column]:+.2f}, '
        f"{table.lengths[pair.place, column]} tokens</span></h4><p>{html.escape(text)}</p></div>"
        for column, (side, text) in enumerate((("chosen", chosen), ("rejected", rejected)))
    )
    return (
        f'<article class="pair"><header>{unit} {table.rows[pair.place]}: margin <b>{pair.margin:+.2f}</b></header>'
        f'{thumbnails_html(row.get(IMAGES))}<p class="prompt">{html.escape(prompt)}</p>'
        f'<div class="sides">{sides}</div></article>'
    )


def _decoder(processing: Any) -> Callable[[list[int]], str]:
    """The text of token ids by a tokenizer or processor; without one, the ids."""
    if processing is None:
        return lambda ids: f"token ids {ids}"
    return lambda ids: str(processing.decode(ids))


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}… ({len(text):,} characters)"


def render(run: Run, facts: Facts, pairs: str) -> str:
    """Returns the page as HTML text; pairs is the HTML of the held-out pairs."""
    shown = pictures(run)
    settings = facts.settings
    main = [(name, settings[name]) for name in _MAIN_SETTINGS if name in settings]
    others = [(name, value) for name, value in sorted(settings.items()) if name not in _MAIN_SETTINGS]
    return PAGE.substitute(
        title=html.escape(facts.title),
        cards="".join(
            f'<div class="card"><span>{html.escape(label)}</span><b>{html.escape(value)}</b>'
            f"<small>{html.escape(note)}</small></div>"
            for label, value, note in facts.cards
        ),
        warnings=_warnings_html(diagnose(run), run),
        plots="".join(
            f'<section><h2>{html.escape(section)}</h2><div class="plots">'
            + "".join(_picture_html(picture) for picture in group)
            + "</div></section>"
            for section, group in groupby(shown, key=lambda picture: picture.section)
        ),
        pairs=pairs,
        data=_table_html(facts.data),
        settings=_table_html(main),
        others=_table_html(others),
    )


def _warnings_html(findings: Sequence[Finding], run: Run) -> str:
    unseen = ""
    if not run.held_out():
        unseen = "Without held-out pairs, overfitting and length bias cannot be seen."
    elif run.length is None:
        unseen = f"Length bias cannot be seen in fewer than {LEAST_PAIRS} held-out pairs."
    if not findings:
        return f'<p class="fine">Nothing conspicuous was found. {unseen}</p>'
    note = f"<p>{unseen}</p>" if unseen else ""
    return note + "".join(
        f'<article class="warning" id="{finding.name}"><h3>{html.escape(finding.title)}</h3>'
        f"<p>{html.escape(finding.text)}</p><p>What to try:</p>"
        f"<ul>{''.join(f'<li>{html.escape(advice)}</li>' for advice in finding.advice)}</ul></article>"
        for finding in findings
    )


def _picture_html(picture: Picture) -> str:
    # As a separate image, so that ids in one SVG cannot collide with those of another.
    data = base64.b64encode(picture.svg.encode()).decode()
    return (
        f'<figure><h3>{html.escape(picture.title)}</h3><img alt="{html.escape(picture.title)}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{html.escape(picture.caption)}</figcaption></figure>'
    )


def _table_html(rows: Iterable[tuple[str, Any]]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:g}" if math.isfinite(value) else str(value)
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(shown(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"
