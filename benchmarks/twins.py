"""Whether near-copies are found: LC25000's turned and mirrored pictures of training tiles, planted as a test.

    python benchmarks/twins.py FOLDER

FOLDER has a table labels.csv (file, label, split, group), whose split "twin" holds further pictures of training groups.
Results go to benchmarks/results/twins.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from histill.data.check import check
from histill.data.images import COLUMNS, Images
from histill.files import write_json


def main(root: Path) -> None:
    table = pd.read_csv(root / "labels.csv", dtype=str)
    frame = pd.DataFrame({"path": table["file"], "label": table["label"], "content": table["sha256"]})
    frame["split"] = table["split"].replace({"twin": "test"})
    images = Images(frame.reindex(columns=list(COLUMNS), fill_value=""), root, tuple(sorted(set(table["label"]))))
    found = check(images).summary
    group = dict(zip(table["file"], table["group"], strict=True))
    pairs = [pair["paths"] for kind in ("copies", "near_copies") for pair in found[kind]]
    right = sum(group[a] == group[b] for a, b in pairs)
    counts = {"pictures": len(table), "twins": int((table["split"] == "twin").sum()), "pairs_named": len(pairs)}
    write_json(Path(__file__).parent / "results/twins.json", counts | {"pairs_of_one_tile": right})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
