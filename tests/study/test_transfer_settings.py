"""Settings of the transfer."""

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
