"""What is seen of a store from its run directories alone."""

import json
import time

from atdiag.core.runs import COHORT, Store
from atdiag.execution import watching
from tests.studies import lab


def specs():
    study = lab("data.train=64", seeds=2)
    return study.baseline(study.teacher("deit_s")).specs


def report(runs, **changed) -> str:
    usual = {"host": "node1", "process": 1, "device": "cpu", "job": None, "at": time.time(), "doing": "training"}
    return json.dumps({**usual, "images_per_second": 50.0, "images_left": 1000, "runs": runs, **changed})


def test_states_and_failures_are_counted(tmp_path):
    store = Store(tmp_path / "runs")
    one, two = (store.create(spec) for spec in specs())
    one.write("predictions.npz", b"")
    one.finish({"top1": 50.0})
    two.fail(3, "the loss is not finite")
    seen = watching.look(store)
    assert seen.states == {"finished": 1, "failed": 1}
    assert seen.failures == ((two.id, "the loss is not finite"),)
    assert (seen.groups, seen.seconds_left) == ((), None)


def test_a_cohort_is_seen_with_its_rate_and_time_left(tmp_path):
    store = Store(tmp_path / "runs")
    one, two = (store.create(spec) for spec in specs())
    with one.lock(), two.lock():
        one.write(COHORT, report({one.id: [10, 40], two.id: [20, 40]}).encode())
        seen = watching.look(store)
        (group,) = seen.groups
        assert (set(group.runs), group.done, group.total) == ({one.id, two.id}, 30, 80)
        assert 19 < group.seconds_left <= 20
        assert not group.silent
        one.write(COHORT, report({one.id: [10, 40]}, at=time.time() - 90).encode())
        old, starting = sorted(watching.look(store).groups, key=lambda group: -group.age)
        assert old.silent
        assert (starting.runs, starting.doing) == ((two.id,), "starting"), "no report names it"
        one.write(COHORT, b"{torn")
        assert {group.doing for group in watching.look(store).groups} == {"starting"}
    assert watching.look(store).groups == (), "a report without a lock is what a kill leaves"


def test_an_older_report_does_not_claim_a_run_that_is_elsewhere_now(tmp_path):
    store = Store(tmp_path / "runs")
    one, two = (store.create(spec) for spec in specs())
    with one.lock(), two.lock():
        one.write(COHORT, report({one.id: [1, 4], two.id: [1, 4]}, host="before", at=time.time() - 30).encode())
        two.write(COHORT, report({two.id: [3, 4]}, host="now").encode())
        where = {group.host: group.runs for group in watching.look(store).groups}
    assert where == {"before": (one.id,), "now": (two.id,)}
