"""Settings of the transfer."""

from pathlib import Path

import pytest

from atdiag.core.errors import UserError
from atdiag.study.settings import resolve
from atdiag.study.transfer_settings import TransferSettings


def test_each_method_keeps_only_its_own_fields():
    form = TransferSettings(layers="top:2", heads="0", tensor="q", temperature=2.0)
    assert form.transfer("none", 12, 3).method == "none"
    copy, distill = form.transfer("copy", 12, 3), form.transfer("distill", 12, 3)
    assert (copy.layers, copy.heads, copy.tensor, copy.weight) == ((10, 11), (0,), "q", None)
    assert (distill.loss, distill.weight) == ("mse", 3.0)
    assert form.transfer("logits", 12, 3).temperature == 2.0
    assert form.transfer("features", 12, 3).layers == (10, 11)
    assert form.transfer("copy", 12, 3, layers=(0,)).layers == (0,)


def test_a_teacher_shares_its_students_drop_path_in_every_transfer():
    form = TransferSettings(shared_drop_path=True)
    for method in ("copy", "distill", "logits", "features"):
        assert form.transfer(method, 12, 3).shared_drop_path


def test_a_teacher_can_drop_only_branches_that_students_drop():
    def mini(*sets):
        return resolve(
            "mini", sets=("transfer.shared_drop_path=true", *sets), environment={}, folder=Path("/nonexistent")
        )

    with pytest.raises(UserError, match="no student drops a branch that its teacher could drop: add"):
        mini()
    assert mini("recipe.distill.drop_path=0.1").profile.transfer.shared_drop_path
