"""Time `runs list`, planning and `runs watch` on a store of many runs, made by script.

python benchmarks/large_store.py --runs 20000 --json benchmarks/results/large_store.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import COHORT, Run, Store, digest
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.execution import plan, watching
from atdiag.reports import run_index

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=32, depth=12, heads=2, classes=10)


def spec(seed: int) -> RunSpec:
    """Return the spec of one run of the store."""
    recipe = Recipe(epochs=4, batch_size=32, warmup_epochs=0)
    return RunSpec(network=NETWORK, data=Data(train=2500), recipe=recipe, seed=Seed(data=seed, model=seed))


def fill(root: Path, runs: int, unfinished: int = 100) -> list[RunSpec]:
    """Write a store of so many runs, the last of which are unfinished, without what no table reads."""
    specs = [spec(seed) for seed in range(runs)]
    for index, one in enumerate(specs):
        folder = root / one.id
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(one.model_dump_json(indent=1))
        if index < runs - unfinished:
            document = {"id": one.id, "top1": 50.0 + index % 40, "seconds": 10.0, "environment": {"device": "cpu"}}
            (folder / "result.json").write_text(json.dumps({**document, "digest": digest(document)}, indent=1))
        else:
            (folder / "checkpoint").write_bytes(b"")
            report = {"host": "n", "process": 1, "device": "cuda", "job": None, "at": time.time(), "doing": "training"}
            report |= {"images_per_second": 900.0, "images_left": 10_000, "runs": {one.id: [1, 2]}}
            (folder / COHORT).write_text(json.dumps(report))
    return specs


def timed(what: str, function, out: dict[str, dict[str, float]]):  # type: ignore[no-untyped-def]
    """Call a function, and note and print how long it took."""
    begin, used = time.perf_counter(), time.process_time()
    value = function()
    out[what] = {"wall": round(time.perf_counter() - begin, 3), "processor": round(time.process_time() - used, 3)}
    print(f"{what:<40} {out[what]['wall']:8.2f} s, {out[what]['processor']:8.2f} s of processor time")
    return value


def main() -> None:
    """Fill a store and time what people do with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    seconds: dict[str, dict[str, float]] = {}
    options = ExecutionOptions(device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "runs")
        specs = timed(f"(making {given.runs:,} runs)", lambda: fill(store.root, given.runs), seconds)
        timed("list of the runs, oldest first", store.list, seconds)
        rows = timed("runs list, nothing kept", lambda: run_index.rows(store), seconds)
        assert len(rows) == given.runs, len(rows)
        again = timed("runs list again", lambda: run_index.rows(store), seconds)
        assert again == rows
        made = timed("planning all of them", lambda: plan.make(specs, store, options), seconds)
        assert len(made.todo) == 100
        view = timed("a look of runs watch", lambda: watching.look(store), seconds)
        assert view.states == {"finished": given.runs - 100, "interrupted": 100}, view.states
        first = Run(store.root / specs[0].id)
        timed("finding a run by its id", lambda: store.find(first.id[:12]), seconds)
    if given.json:
        import os
        import platform

        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
        document = {"benchmark": "large_store", "runs": given.runs, "machine": machine, "seconds": seconds}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
