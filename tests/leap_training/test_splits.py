"""No test item enters a pool, and the three parts of validation never meet."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import SPLITS, Item, fingerprint
from leap_serve.tasks.registry import TASKS, load_task
from leap_training.splits import PARTS, part, refuse_test_items, validation_part


@pytest.mark.parametrize("name", TASKS)
def test_splits_of_generated_tasks_share_no_fingerprint(name: str) -> None:
    task = load_task(name)
    seen = [{fingerprint(item) for seed in (0, 1) for item in task.items(split, 200, seed)} for split in SPLITS]
    assert all(len(keys) > 200 for keys in seen)
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_a_test_item_in_the_pool_is_refused_and_named() -> None:
    task = load_task("toy-gsm")
    train, test = task.items("train", 30), task.items("test", 30)
    refuse_test_items(train, test)
    refuse_test_items(test, [])
    disguised = replace(test[7], id="row 12", prompt=f"  {test[7].prompt.upper()}\n", answer=f"{test[7].answer} ")
    with pytest.raises(LeapError, match=r"pool item 'row 12': is test item 'toy-gsm/.*the same prompt and answer; "):
        refuse_test_items([*train, disguised, test[3]], test)
    # Another answer makes another item: this is what the fingerprint is taken of.
    refuse_test_items([*train, replace(test[7], answer=" 1+1=2\n#### 2")], test)


def test_parts_divide_validation() -> None:
    items = load_task("toy-xsum").items("validation", 600)
    parts = {name: part(items, name) for name in PARTS}
    keys = {name: {fingerprint(item) for item in found} for name, found in parts.items()}
    assert sum(len(found) for found in parts.values()) == 600
    assert len(set.union(*keys.values())) == 600
    assert all(len(found) > 150 for found in parts.values())
    # The part is the item's own: order and company do not matter.
    assert part(list(reversed(items))[:300], "search") == [i for i in reversed(items[300:]) if i in parts["search"]]
    with pytest.raises(UsageError, match=r"is 'testing'; choose one of search, stopping, router"):
        part(items, "testing")  # type: ignore[arg-type]


def test_validation_part_draws_until_it_has_enough() -> None:
    task = load_task("toy-code")
    drawn = {name: validation_part(task, name, 50) for name in PARTS}
    assert [len(found) for found in drawn.values()] == [50, 50, 50]
    assert all(part(found, name) == found for name, found in drawn.items())
    assert validation_part(task, "router", 20) == drawn["router"][:20]
    assert validation_part(task, "router", 20, seed=1) != drawn["router"][:20]


def test_a_small_validation_split_gives_what_it_has() -> None:
    class Five:
        name, metric, max_tokens = "five", "exact match", 1
        stop: tuple[str, ...] = ()

        def items(self, split: str, limit: int | None = None, seed: int = 0) -> list[Item]:
            return [Item(str(i), f"{i}?", str(i)) for i in range(5)][:limit]

        def score(self, items: object, completions: object) -> list[float]:
            raise AssertionError("not asked")

    found = [validation_part(Five(), name, 5) for name in PARTS]
    assert sum(map(len, found)) == 5


def test_splits_load_no_torch() -> None:
    code = "import sys, leap_training.splits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
