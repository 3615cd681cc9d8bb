"""The tables of the documents are complete, and result tables equal the measurements."""

import re

import pytest

from tests.helpers.shipped import ROOT, SHIPPED

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md")
)


def tables_of(path: str) -> list[list[str]]:
    """Returns the Markdown tables of a file, each as its lines."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def columns(line: str) -> int:
    """Returns how many columns a line of a table has; a bar between back-ticks, or behind a backslash, ends none."""
    return re.sub(r"`[^`]*`|\\\|", "", line).count("|") - 1


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_table_row_has_the_columns_of_its_header(document):
    for table in tables_of(document):
        assert {columns(line) for line in table} == {columns(table[0])}, table[0]


@pytest.mark.parametrize(
    ("document", "result"),
    [
        ("docs/experiments.md", "demo_all_methods.md"),
        ("docs/experiments.md", "demo_clipspm_ablation.md"),
        ("docs/experiments.md", "demo_parts.md"),
        ("docs/experiments.md", "a2m2_parts.md"),
    ],
)
def test_documents_show_the_latest_measurements(document, result):
    shown = tables_of(document)
    measured = tables_of(f"benchmarks/results/{result}")
    assert measured
    for table in measured:
        assert table in shown, f"{document} does not show the table of {result}: {table[0]}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_are_valid(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for path, _, heading in (link.partition("#") for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text)):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_names_every_method_once():
    [table] = [table for table in tables_of("README.md") if "`MODEL.NAME`" in table[0]]

    assert sorted(re.findall(r"^\| `(\w+)` \|", "\n".join(table), re.MULTILINE)) == sorted(SHIPPED)
