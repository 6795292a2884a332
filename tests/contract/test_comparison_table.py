"""The README's comparison is that of docs/comparison.json, to the digit."""

import json
from pathlib import Path

COLUMNS = ("system", "WER %", "SIM", "DistillMOS", "WER against the first")


def test_every_row_of_the_committed_comparison_is_in_the_readme_and_in_the_docs():
    readme, document = Path("README.md").read_text(), Path("docs/comparison.md").read_text()
    header, *rows = json.loads(Path("docs/comparison.json").read_text())["table"]
    places = [header.index(name) for name in COLUMNS]
    assert rows
    for row in rows:
        assert "| " + " | ".join(row[place] for place in places) + " |" in readme
        assert "| " + " | ".join(row) + " |" in document
