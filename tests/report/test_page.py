"""report.html: it is complete, loads nothing from elsewhere, and escapes all data."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from datasets import Dataset

from dpofast import DPOConfig, DPOTrainer
from dpofast.evaluation.pair_records import ListTable, PairTable
from dpofast.report.diagnosis import Run
from dpofast.report.figures import pictures
from dpofast.report.page import ReportCallback, _lists_html, write_report
from tests.support.tiny import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = pytest.mark.slow(25)

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The page's elements, checked for balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.images = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def trainer_of(folder, evaluation=None, tokenizer="words", **options):
    rows = [{**pair, "row": i} for i, pair in enumerate(tiny_pairs(24, seed=2))]
    return DPOTrainer(
        tiny_model(),
        args=DPOConfig(
            output_dir=str(folder),
            **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
            **{"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1, **options},
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer() if tokenizer == "words" else tokenizer,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole run with held-out pairs; (page, trainer, path)."""
    folder = tmp_path_factory.mktemp("report")
    held_out = Dataset.from_list(tiny_pairs(30, seed=1))
    trainer = trainer_of(folder, held_out, num_train_epochs=3, eval_strategy="steps", eval_steps=4, eval_on_start=True)
    path = folder / "new" / "report.html"
    trainer.add_callback(ReportCallback(trainer, path))
    trainer.train()
    return Page(path.read_text("utf-8")), trainer, path


def test_the_page_has_every_part(report):
    page, trainer, _ = report
    titles = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert titles == [
        *("Loss", "Accuracy", "Margin", "Rewards", "Margins of the held-out pairs", "Gradient norm"),
        *("Log-probs against the reference", "Displacement", "Distance from the reference"),
        *("Accuracy by length", "Response lengths", "Margin and length difference"),
        *("Throughput", "Work avoided", "Learning rate"),
    ]
    for part in (
        "Warnings",
        "Held-out pairs",
        "Ranked worst",
        "Ranked best",
        "train data: 24 of 24 pairs kept",
        "beta",
    ):
        assert part in page.text
    assert "18 optimizer steps, 3.00 epochs" in page.text and "tokens a second" in page.text
    assert "peak memory" in page.text and "(95 %)" in page.text
    last = trainer.state.log_history[-2]
    assert f"{last['eval_rewards/accuracies']:.0%}" in page.text


def test_nothing_is_loaded_from_elsewhere(report):
    page, _, path = report
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes[name].startswith("data:") for name in ("src", "href") if name in attributes)
    text = path.read_text("utf-8")
    assert "url(" not in text and "@import" not in text and len(text) < 1_500_000
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_picture_is_an_svg_with_something_in_it(report):
    page, _, _ = report
    for tag, attributes in page.elements:
        if tag == "img":
            kind, _, data = attributes["src"].partition(";base64,")
            svg = base64.b64decode(data).decode()
            assert kind == "data:image/svg+xml" and ElementTree.fromstring(svg).tag.endswith("svg")
            assert "<script" not in svg and svg.count("<path") > 20, attributes["alt"]


def test_pairs_are_shown_with_text_row_and_margin_worst_first(report):
    page, trainer, _ = report
    table = trainer.pair_records["eval"].table()
    margins = [float(found) for found in re.findall(r"row \d+: margin ([+-][\d.]+)", page.text)]
    ranked = sorted(table.margins)
    assert margins[:5] == pytest.approx(ranked[:5], abs=6e-3) and margins[5:] == pytest.approx(ranked[:-6:-1], abs=6e-3)
    worst = trainer.pair_records["eval"].worst()[0]
    shown = " ".join(str(token) for token in worst.example["chosen_ids"])
    assert f"row {table.rows[worst.place]}: margin" in page.text and shown in page.text


class Hostile:
    """A tokenizer whose text is an attack; DPOTrainer only saves with it."""

    def decode(self, ids):
        return f"</p><script>alert({ids[0]})</script><img src=x onerror=alert(1)>"


def test_text_of_the_data_cannot_leave_its_place(report, tmp_path):
    _, trainer, _ = report
    before = trainer.processing_class
    trainer.processing_class = Hostile()
    trainer.model.config.name_or_path = 'evil"><script>alert(2)</script>'
    try:
        page = Page(write_report(trainer, tmp_path / "report.html").read_text("utf-8"))
    finally:
        trainer.processing_class = before
    assert "<script>alert(" in page.text, "shown as text"
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any("onerror" in attributes for _, attributes in page.elements)


def test_long_text_is_cut(report, tmp_path):
    _, trainer, _ = report
    before = trainer.processing_class
    trainer.processing_class = type("Long", (), {"decode": lambda self, ids: "x" * 5000})()
    try:
        text = write_report(trainer, tmp_path / "report.html").read_text("utf-8")
    finally:
        trainer.processing_class = before
    assert "x" * 2000 + "… (5,000 characters)" in text and "x" * 2001 not in text


def test_without_held_out_pairs_the_page_says_so(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3, tokenizer=None)
    trainer.train()
    page = Page(write_report(trainer, tmp_path / "report.html").read_text("utf-8"))
    assert "No held-out pairs were evaluated" in page.text and "Accuracy by length" not in page.text
    assert "Without held-out pairs, overfitting and length bias cannot be seen" in page.text


def test_a_loss_without_reference_shows_none(tmp_path):
    trainer = trainer_of(
        tmp_path, Dataset.from_list(tiny_pairs(30, seed=1)), max_steps=3, loss_type="simpo", tokenizer=None
    )
    trainer.train()
    trainer.evaluate()
    page = Page(write_report(trainer, tmp_path / "report.html").read_text("utf-8"))
    assert "Against the reference" not in page.text and "Displacement" not in page.text
    assert "token ids [" in page.text, "what is shown without a tokenizer"


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = trainer_of(tmp_path / "out", max_steps=1)
    trainer.add_callback(ReportCallback(trainer, tmp_path / "file" / "report.html"))
    with pytest.warns(UserWarning, match="report.html could not be written: "):
        trainer.train()
    assert trainer.state.global_step == 1


def test_several_held_out_sets_show_the_first(tmp_path):
    sets = {name: Dataset.from_list(tiny_pairs(25, seed=seed)) for seed, name in ((5, "a"), (6, "b"))}
    trainer = trainer_of(tmp_path, sets, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    page = Page(write_report(trainer, tmp_path / "report.html").read_text("utf-8"))
    assert (
        "Accuracy by length" in page.text
        and "held-out" in page.text
        and set(trainer.pair_records) == {"eval_a", "eval_b"}
    )


def test_a_history_without_numbers_has_no_pictures():
    assert pictures(Run(history=[])) == []
    assert pictures(Run(history=[{"step": 1, "loss": float("nan")}, {"train_runtime": 2.0}])) == []


def test_lists_have_a_figure_and_a_table_that_pairs_do_not_have():
    margins = np.linspace(-1.0, 1.0, 12)
    rewards = np.stack([margins / 2, -margins / 2], axis=1)
    plain = PairTable(np.arange(12), rewards, rewards, np.full((12, 2), 3), np.ones(12))
    sizes, tau = np.array([2, 3, 4] * 4), np.linspace(-1, 1, 12)
    tau[0] = np.nan
    lists = ListTable(sizes, (tau + 1) / 2, np.zeros(12), tau, (tau + 2) / 3, (tau > 0).astype(float))
    for table, shown in ((plain, False), (replace(plain, lists=lists), True)):
        titles = [picture.title for picture in pictures(Run(history=[], pairs=table))]
        assert ("Kendall's \u03c4 of the held-out lists" in titles) == shown
    page = Page(f"<main>{_lists_html(lists)}</main>")
    words = page.text
    assert "all 11" in words and "K = 4 4" in words and "NDCG" in words
    own = tau[sizes == 4].mean()
    assert f"K = 4 4 {own:.3f} {(own + 2) / 3:.3f}" in words
