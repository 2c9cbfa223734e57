"""Makes bench/results/TABLES.md (and tables.json, which `leap report bench/results` shows) from the rows that are there.

    python bench/tables.py

One function per table in bench/table_readers, a row of the bench that it reads per cell: INTRO says how they are to be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from leap_serve.files import write_bytes, write_json
from leap_serve.provenance import made_by

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from table_readers.lexi import lexi_claims, lexi_quality, lexi_sensitivity, memory, skipping
from table_readers.methods import agent_effect, comparison, llama4_methods, llama4_scaling
from table_readers.rows import Rows, Table
from table_readers.tuning import curve, labels_needed, parts, rivals, scaling

RESULTS = Path(__file__).parent / "results"
INTRO = """\
# Tables

Made by `python bench/tables.py`. Our cells come from rows of bench/results/*.jsonl alone: the median over seeds, in
brackets the 95 % t-interval of their mean within the score's bounds (of two seeds both values), then in parentheses how many
seeds. It is of seeds alone, not of the drawing of test items; of one seed, and of seeds that all came to one
plan, the brackets hold the bootstrap interval over test items, where the row has one. Methods that draw nothing have one row. Weights, FLOPs and their shares are computed from the checkpoints' headers. Ratios of times are medians of interleaved pairs, in brackets
order-statistic intervals of 96 – 98 %, which each row states. A cell that no
row fills is empty, and its reason stands below the table. What a paper claims stands in columns named «paper's claim»: of
other models on other hardware, copied from the paper, not measured here.
"""
TABLES: tuple[Callable[[Rows], Table], ...] = (
    scaling, comparison, llama4_scaling, llama4_methods, agent_effect, labels_needed, curve, parts, rivals,
    lexi_quality, lexi_claims, lexi_sensitivity, skipping, memory,
)  # fmt: skip


def main() -> None:
    """Read all rows, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows, and of what is written")
    args = parser.parse_args()
    rows = Rows(args.results)
    made = [table(rows) for table in TABLES]
    write_bytes(args.results / "TABLES.md", "\n".join([INTRO, *(table.markdown() for table in made)]).encode())
    write_json(args.results / "tables.json", {"tables": [asdict(table) for table in made], "made_by": made_by()})
    print(f"{len(made)} tables of {sum(map(len, rows.of.values()))} rows → {args.results / 'TABLES.md'}")


if __name__ == "__main__":
    main()
