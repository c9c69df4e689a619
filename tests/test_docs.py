"""README and docs: links and file names exist, generated text is fresh, and what is generated covers the code."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "bench" / "paper" / "README.md"])
# Folders whose files the docs name from the root; a name may end in a folder's slash.
_FILE = re.compile(r"`((?:\.ci|bench|csrc|docs|dpofast|examples|kernels|tests)/[\w/.-]*)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generate():
    """docs/generate.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page):
    """A page's text without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def heading_ids(page):
    """The anchors that GitHub and mkdocs give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in heading_ids(target), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    not_yet = {"bench/results/gpu.jsonl"}  # of the first run on a GPU
    missing = [name for name in _FILE.findall(prose(page)) if name not in not_yet and not (ROOT / name).exists()]
    assert missing == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_generated_text_and_figures_are_fresh(generate):
    stale = [str(path.relative_to(ROOT)) for path in generate.stale()]
    assert stale == [], "run: python docs/generate.py"


@pytest.mark.parametrize("text", ["<!-- generated: flags -->\n", "<!-- end of generated -->\n"])
def test_a_block_without_its_other_mark_is_refused(generate, text):
    with pytest.raises(ValueError, match="page.md: expected blocks of <!-- generated: name --> and"):
        generate.refreshed(text, "page.md")


def test_a_block_of_an_unknown_name_is_refused(generate):
    with pytest.raises(ValueError, match="page.md: expected a block's name to be one of .*got 'nothing'"):
        generate.refreshed("<!-- generated: nothing -->\n<!-- end of generated -->", "page.md")


def test_a_block_is_replaced_whole(generate):
    stale = "before\n<!-- generated: supported -->\nold\n<!-- end of generated -->\nafter"
    fresh = generate.refreshed(stale, "page.md")
    assert "old" not in fresh and generate.supported() in fresh
    assert fresh.startswith("before\n<!--") and fresh.endswith("-->\nafter")
    assert generate.refreshed(fresh, "page.md") == fresh


def test_check_writes_nothing_and_names_what_is_stale(generate, monkeypatch, capsys):
    page = DOCS / "support.md"
    before = page.read_text("utf-8")
    monkeypatch.setattr(generate, "stale", lambda: {page: "other"})
    assert generate.main(["--check"]) == 1
    assert "docs/support.md is stale: python docs/generate.py" in capsys.readouterr().err
    assert page.read_text("utf-8") == before
    monkeypatch.setattr(generate, "stale", dict)
    assert generate.main(["--check"]) == 0


def test_everything_that_is_generated_is_shown(generate):
    text = "".join(page.read_text("utf-8") for page in generate.pages())
    assert set(re.findall(r"^<!-- generated: (\w+) -->$", text, flags=re.MULTILINE)) == set(generate.TEXTS)
    drawn = set(generate.figures.FIGURES)
    assert {path.stem for path in (DOCS / "figures").iterdir()} == drawn
    assert set(re.findall(r"\(figures/(\w+)\.svg\)", text)) == drawn


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    assert set(re.findall(r"(\w+\.md)", navigation)) == {page.name for page in DOCS.glob("*.md")}


def test_every_flag_of_dpofast_is_documented(generate):
    from transformers import TrainingArguments

    from dpofast import DPOConfig
    from dpofast.cli.train import TrainArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(DPOConfig)} - theirs
    text = generate.flags() + generate.train_flags()
    for name in own | {field.name for field in dataclasses.fields(TrainArguments)}:
        assert f"| `--{name}` |" in text
    assert all(field.metadata.get("help") for field in generate.own_flags())


def test_every_loss_has_a_formula(generate):
    from dpofast.losses.kinds import KINDS

    formulas = (DOCS / "losses.md").read_text("utf-8").partition("## Formulas")[2].partition("<!-- generated")[0]
    assert re.findall(r"^\| `(\w+)` \|", formulas, flags=re.MULTILINE) == list(KINDS)
    for name in KINDS:
        assert f"\n| `{name}` |" in generate.kinds() and f"\n| `{name}` |" in generate.formulas()


def test_the_messages_of_the_troubleshooting_page_are_the_codes_own(generate):
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    headings = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    raised = [message.text for message in generate.messages()] + [(ROOT / "setup.py").read_text("utf-8")]
    unknown = [text for text in headings if not any(text in message for message in raised)]
    assert headings and unknown == []


def test_every_public_name_is_in_the_reference(generate):
    import dpofast

    entries = set(re.findall(r"^::: [\w.]+\.(\w+)$", generate.public_names(), flags=re.MULTILINE))
    assert entries == set(dpofast.__all__) - {"__version__"}


def test_every_layer_is_drawn(generate):
    drawing = generate.figures.layers()
    for names in generate.figures.layer_table():
        assert all(f">{name}<" in drawing for name in names)
