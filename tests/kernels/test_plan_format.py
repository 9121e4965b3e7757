"""The words of plans and results: the kernels' constants and docs/plan.md against the names in the
core.
"""

import re
from pathlib import Path

from octavo._core import PLAN_FORMAT
from octavo.kernels.step import plan_format

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()

# Section of the plan -> kind of record in it.
RECORDS = {
    "rows": "row",
    "blocks": "block",
    "enters": "enter",
    "copies": "copy",
    "bias": "bias",
    "penalty_tokens": "penalty",
    "prompt_targets": "target",
    "pools": "pool",
    "follow_rows": "follow",
}


def in_order(places: dict[str, int]) -> list[str]:
    """Names by place; every place from 0 on has one."""
    names = sorted(places, key=lambda name: places[name])
    assert [places[name] for name in names] == list(range(len(names)))
    return names


def table(first_column: str) -> list[list[str]]:
    """Cells of the page's table whose first column has this heading, without backquotes."""
    lines = PAGE.partition(f"| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_header_is_the_cores() -> None:
    names = in_order(PLAN_FORMAT["header"])
    assert list(plan_format.Plan._fields) == names
    assert [(int(word), name) for word, name, _ in table("word")] == list(enumerate(names))


def test_the_records_are_the_cores() -> None:
    cells = {section: (shape, words) for section, shape, words in table("section")}
    offsets = [name.removesuffix("_offset") for name in plan_format.Plan._fields if name.endswith("_offset")]
    assert list(cells) == offsets
    for section, record in RECORDS.items():
        names = in_order(PLAN_FORMAT[record])
        constants = [getattr(plan_format, f"{record}_{name}".upper()) for name in names]
        assert constants == list(range(len(names))), record
        shape, words = cells[section]
        assert words.split(", ") == names
        assert int(re.search(r"(\d+)\]$", shape)[1]) == len(names)
    sizes = [len(PLAN_FORMAT[record]) for record in RECORDS.values()]
    pair = plan_format.PAIR_WORDS
    own = [plan_format.ROW_WORDS, plan_format.BLOCK_WORDS, plan_format.ENTER_WORDS]
    assert sizes == [*own, pair, pair, pair, pair, plan_format.POOL_WORDS, plan_format.FOLLOW_WORDS]


def test_flags_statuses_and_results_are_the_cores() -> None:
    assert {name: getattr(plan_format, name.upper()) for name in PLAN_FORMAT["row_flag"]} == PLAN_FORMAT["row_flag"]
    assert {name: int(value) for name, value, _ in table("flag of a row")} == PLAN_FORMAT["row_flag"]
    statuses = PLAN_FORMAT["status"]
    assert {name: getattr(plan_format, f"STATUS_{name}".upper()) for name in statuses} == statuses
    assert {name: int(value) for name, value, _ in table("status")} == statuses
    names = in_order(PLAN_FORMAT["result"])
    assert [getattr(plan_format, f"RESULT_{name}".upper()) for name in names] == list(range(len(names)))
    assert [name for _, name, _ in table("words")][: len(names)] == names
    names = in_order(PLAN_FORMAT["target_result"])
    assert [getattr(plan_format, f"TARGET_RESULT_{name}".upper()) for name in names] == list(range(len(names)))
    assert [name for _, name, _ in table("target's words")][: len(names)] == names


def test_the_table_of_kinds_is_whole() -> None:
    assert set(PLAN_FORMAT) == {"header", "result", "target_result", "row_flag", "status", *RECORDS.values()}
