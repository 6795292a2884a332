"""The README's comparison is that of docs/comparison.json, to the digit."""

import json
from pathlib import Path

from speechalign.evaluation.comparison import Compared, comparison_rows

COLUMNS = ("system", "WER %", "SIM", "DistillMOS", "WER against the first")


def test_every_row_of_the_committed_comparison_is_in_the_readme_and_in_the_docs():
    readme, document = Path("README.md").read_text(), Path("docs/comparison.md").read_text()
    header, *rows = json.loads(Path("docs/comparison.json").read_text())["table"]
    places = [header.index(name) for name in COLUMNS]
    assert rows
    for row in rows:
        assert "| " + " | ".join(row[place] for place in places) + " |" in readme
        assert "| " + " | ".join(row) + " |" in document


def test_the_committed_cells_are_those_of_the_committed_rows():
    committed = json.loads(Path("docs/comparison.json").read_text())
    compared = [Compared.from_json(row) for row in committed["rows"]]
    assert comparison_rows(compared) == committed["table"]
    assert [one.to_json() for one in compared] == committed["rows"]
