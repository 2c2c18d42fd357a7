"""Per-layer accuracy: the features of a layer, what is fitted on them, and what never is."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler

from atdiag.analysis import images, probing, subjects
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Transfer
from atdiag.data import sources
from atdiag.data.decoding import BrokenImageError
from atdiag.networks.model import students
from atdiag.training import classifiers, evaluation
from atdiag.transfer import methods
from atdiag.transfer.observation import CaptureRequest, of_teacher

DATA = Data(name="digits", train=90, test_per_source=1, clutter=6)


def streams(subject, pictures):
    """The residual streams by our own module's observation, [L, n, N, C]."""
    pixels = next(pictures.batches(len(pictures))).pixels
    depth = subject.network.depth
    with torch.no_grad():
        seen = subject.module.observe(pixels, CaptureRequest(features=frozenset(range(depth))), subject.given(pixels))
    return torch.stack([seen.features[i] for i in range(depth)])


@pytest.mark.parametrize("fields", [{}, {"components": ("registers",), "registers": 2}, {"class_token": False}])
def test_features_are_class_token_and_mean_patch(subject, pictures, fields):
    one, other = subject(1, **fields), subject(2)
    some = pictures(one, 7)
    (found, _), places = probing.features([one, other], some, batch=3)
    expected = streams(one, some)
    patches = expected[:, :, one.network.prefix_tokens :].mean(2)
    torch.testing.assert_close(found.tokens["patch"], patches)
    assert patches.shape == (3, 7, 24) and places.tolist() == list(range(7))
    if one.network.class_token:
        torch.testing.assert_close(found.tokens["class"], expected[:, :, 0])
        both = torch.cat([expected[1, :, 0], patches[1]], -1)
        torch.testing.assert_close(found.of("both", 1), both)
    assert found.kinds == (("class", "patch", "both") if one.network.class_token else ("patch",))


def test_images_go_through_each_network_once(subject, pictures):
    one, other = subject(1), subject(2)
    train, test = pictures(one, 40), pictures(one, 12, seed=1)
    runs = []
    handles = [net.module.register_forward_pre_hook(lambda *_, net=net: runs.append(net.label)) for net in (one, other)]
    probing.probe([one, other], train, test, neighbours=5, batch=8)
    for handle in handles:
        handle.remove()
    assert runs.count("net 1") == runs.count("net 2") == 40 // 8 + 2


def test_accuracies_are_scikit_learns_on_the_same_features(subject, pictures):
    one = subject(4)
    train, test = pictures(one, 160), pictures(one, 80, seed=1)
    for some in (train, test):  # separable classes: by an image's brightness
        pixels = some.source.split.pixels
        pixels[:] = 0.3 * pixels + 17 * some.labels[:, None, None, None]
    (found,) = probing.probe([one], train, test, neighbours=5, penalties=(1.0, 0.01))
    held = classifiers.hold_out(np.arange(160), train.labels)
    streamed = [streams(one, some).numpy() for some in (train, test)]
    for tokens in ("class", "patch", "both"):
        for layer in range(3):
            x, z = (_tokens(of[layer], tokens) for of in streamed)
            scaler = StandardScaler().fit(x)
            x, z = scaler.transform(x), scaler.transform(z)
            # The penalty: the better one on the held-out training images, fitted on the others.
            scores = {
                penalty: LogisticRegression(C=1 / (penalty * (~held).sum()), tol=1e-8, max_iter=5000)
                .fit(x[~held], train.labels[~held])
                .score(x[held], train.labels[held])
                for penalty in (1.0, 0.01)
            }
            best = max(scores, key=lambda penalty: (scores[penalty], penalty))
            last = best * (~held).mean()  # the same C of more images
            assert found.penalties[tokens][layer] == pytest.approx(last)
            assert found.held_out == held.sum() == 32
            for name, model in (
                ("linear", LogisticRegression(C=1 / (last * 160), tol=1e-8, max_iter=5000)),
                ("knn", KNeighborsClassifier(5, metric="cosine")),
                ("centroid", NearestCentroid()),
            ):
                said = model.fit(x, train.labels).predict(z)
                assert (found.correct[name, tokens][layer] == (said == test.labels)).mean() > 0.98, (
                    name,
                    tokens,
                    layer,
                )
                if name != "knn":  # ties in distance are broken by rounding
                    expected = 100 * (said == test.labels).mean()
                    assert found.top1(name, tokens)[layer] == pytest.approx(expected, abs=1.26)  # one image of 80
    assert found.top1("linear", "both").max() > 40


def _tokens(stream, which):
    """The features of a stream [n, N, C], by numpy."""
    parts = {"class": stream[:, 0], "patch": stream[:, 1:].mean(1)}
    return np.concatenate(list(parts.values()), -1) if which == "both" else parts[which]


def test_batch_size_changes_nothing(subject, pictures):
    one = subject(4)
    train, test = pictures(one, 50), pictures(one, 31, seed=1)
    whole, parts = (probing.probe([one], train, test, neighbours=5, batch=size)[0] for size in (64, 7))
    assert whole.correct.keys() == parts.correct.keys()
    for key in whole.correct:
        assert np.mean(whole.correct[key] == parts.correct[key]) > 0.98  # rounding may turn a tie
    assert np.array_equal(whole.correct["head", ""], parts.correct["head", ""])


def test_the_last_early_exit_equals_the_network():
    teacher = subjects.find("deit_s")
    test = images.choose(64, DATA, teacher.network)
    train = probing.training_pictures(DATA, teacher.network)
    (found,) = probing.probe([teacher], train, test, layers=(3, 11), neighbours=5)
    assert np.array_equal(found.correct["head", ""][-1], found.itself)
    own = evaluation.predict([teacher.body], _Split(test), torch.device("cpu"))[0]
    assert np.array_equal(found.itself, own.prediction == own.label)
    exits = found.top1("head")
    assert exits[1] > exits[0] and found.layers == (3, 11)


class _Split:
    """Images as evaluation expects them."""

    def __init__(self, pictures):
        self.pictures, self.labels, self.clusters = pictures, pictures.labels, pictures.clusters

    def __len__(self):
        return len(self.pictures)

    def batch(self, start, stop):
        rows = range(start, min(stop, len(self)))
        return np.stack([self.pictures.source.read(i) for i in rows])


def test_nothing_is_chosen_on_the_test_images(subject, pictures):
    one = subject(4)
    train = pictures(one, 50)
    first, second = (probing.probe([one], train, pictures(one, 20, seed=s), neighbours=5)[0] for s in (1, 2))
    for tokens, penalties in first.penalties.items():
        assert np.array_equal(penalties, second.penalties[tokens])


def test_a_copy_student_is_probed_with_its_teachers_maps(subject, pictures):
    teacher = subject(1)
    body = students.build(teacher.network, 5).eval().requires_grad_(False)
    transfer = Transfer(method="copy", layers=(0, 1, 2))
    student = replace(subjects.of(body, "student"), body=evaluation.Predictor(body, transfer, teacher.module))
    some = pictures(teacher, 6)
    (found,), _ = probing.features([student], some)
    pixels = next(some.batches(6)).pixels
    with torch.no_grad():
        shown = teacher.module.observe(pixels, of_teacher([transfer]))
        given = methods.given(transfer, shown, teacher.network, pixels.device)
        expected = body.observe(pixels, CaptureRequest(features=frozenset({2})), given).features[2]
    torch.testing.assert_close(found.tokens["class"][2], expected[:, 0])

    alone = replace(student, body=evaluation.Predictor(body, transfer))
    with pytest.raises(ValueError, match=r"student copies blocks .* needs its teacher"):
        probing.features([alone], some)


def test_a_head_for_other_classes_has_no_early_exit(subject):
    one = subject(1, classes=7)
    train = probing.training_pictures(DATA, one.network)
    (found,) = probing.probe([one], train, images.choose(20, DATA, one.network), layers=(0,), neighbours=5)
    assert ("head", "") not in found.correct and found.itself is None
    assert found.correct["linear", "both"].shape == (1, 20)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beitv2_base_patch16_224", "vit_base_patch16_siglip_224"])
def test_early_exits_of_timms_networks_use_their_own_heads(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5, patch_size=16)
    one = subjects.of(model.eval(), name)
    rng = np.random.default_rng(0)
    some = images.from_arrays(rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8), rng.integers(0, 5, 6))
    (found,), _ = probing.features([one], some)  # which checks the last layer against the network's own output
    assert np.array_equal(found.early[-1], found.output)


def test_probe_scenes_are_in_no_runs_training_data_and_use_no_test_digit(subject):
    network = subject(1).network
    scenes = probing.training_pictures(DATA, network, 30)
    assert len(scenes) == 30
    own = sources.find(DATA).train_split(DATA.model_copy(update={"train": 30}), 0)
    assert not np.array_equal(scenes.source.read(0), own.pixels[0])
    again = probing.training_pictures(DATA, network, 30)
    assert np.array_equal(scenes.source.read(7), again.source.read(7))


def test_errors_name_the_problem(subject, pictures):
    one = subject(1)
    train, test = pictures(one, 30), pictures(one, 5, seed=1)
    with pytest.raises(UserError, match=r"layer 3 is out of range"):
        probing.probe([one], train, test, layers=(3,))
    with pytest.raises(UserError, match=r"`neighbours` 50 .* 30 training images"):
        probing.probe([one], train, test, neighbours=50)
    with pytest.raises(UserError, match="classes of these images are not known"):
        probing.probe([one], train, replace(test, labels=None))
    with pytest.raises(UserError, match=r"20 x 20 x 1, and the network sees 24 x 24"):
        probing.training_pictures(DATA, subject(1, image_size=24).network)
    with pytest.raises(UserError, match="`train` 0"):
        probing.training_pictures(DATA, one.network, 0)


def test_an_unreadable_image_is_left_out_with_its_label(subject, pictures):
    one = subject(1)
    train, test = pictures(one, 40), pictures(one, 6, seed=1)

    class Broken:
        def read(self, index):
            if index == 2:
                raise BrokenImageError("gone.png", "it is not an image")
            return test.source.read(index)

    bad = replace(test, source=Broken())
    with pytest.raises(UserError, match=r"gone\.png"):
        probing.probe([one], train, bad, neighbours=5)
    (found,) = probing.probe([one], train, replace(bad, skip_bad=True, skipped={}), neighbours=5)
    (whole,) = probing.probe([one], train, test, neighbours=5)
    for key, correct in whole.correct.items():
        assert np.array_equal(np.delete(correct, 2, axis=1), found.correct[key])
