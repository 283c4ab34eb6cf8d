import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import linalg, stats
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline import distance
from tests.helpers import trainings
from tests.helpers.evaluated import write_sets
from tttlab.config.images import Shifts
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.evaluation import distances, shift_estimates
from tttlab.evaluation.distances import Gaussian
from tttlab.evaluation.shift_estimates import ESTIMATES, Reference, Sample
from tttlab.networks import checkpoints
from tttlab.workflow import places


def normal(*shape, seed=0, spread=1.0) -> np.ndarray:
    return spread * np.random.default_rng(seed).standard_normal(shape)


def covariance(size: int, seed: int) -> np.ndarray:
    root = normal(size, size + 2, seed=seed)
    return root @ root.T / size


def together(*samples) -> tuple[np.ndarray, np.ndarray]:
    """Two samples pooled, with 30 permutations of who is who."""
    return np.concatenate(samples), distances.divisions(
        *map(len, samples), 30, np.random.default_rng(9)
    )


def model_outputs(count: int, seed: int, shift: float = 0.0) -> tuple[Sample, np.ndarray]:
    """Features of three classes in six dimensions, the logits of a decent classifier, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=count)
    features = generator.standard_normal((count, 6)) + 2 * np.eye(6)[labels] + shift
    return Sample(features, 2 * features[:, :3]), labels


def reference(count: int = 80, seed: int = 0, **options) -> Reference:
    pool, labels = model_outputs(count, seed)
    return Reference(pool, np.arange(count // 2), labels, **options)


class TestDivisions:
    def test_the_true_one_first_then_permutations_of_it(self):
        members = distances.divisions(3, 5, 20, np.random.default_rng(0))
        assert members.shape == (21, 8)
        assert members[0].tolist() == [True] * 3 + [False] * 5
        assert (members.sum(axis=1) == 3).all()
        assert len(np.unique(members, axis=0)) > 10

    def test_p_counts_what_is_at_least_as_large_itself_included(self):
        assert distances.permutation_p(np.array([3.0, 1.0, 3.0 - 1e-12, 5.0, 2.0])) == 3 / 5
        assert distances.permutation_p(np.array([3.0, 1.0, 2.0, 0.0])) == 1 / 4
        assert math.isnan(distances.permutation_p(np.array([3.0])))


class TestGaussians:
    def test_kl_in_one_dimension(self):
        found = distances.kl_gaussians(
            Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.zeros(1), np.eye(1))
        )
        assert found == pytest.approx((4 + 1 - 1 - math.log(4)) / 2)

    def test_kl_is_torchs(self):
        ours = [Gaussian(normal(4, seed=seed), covariance(4, seed)) for seed in (1, 2)]
        theirs = [
            torch.distributions.MultivariateNormal(*map(torch.from_numpy, each)) for each in ours
        ]
        expected = torch.distributions.kl_divergence(*theirs).item()
        assert distances.kl_gaussians(*ours) == pytest.approx(expected)
        assert distances.kl_gaussians(ours[0], ours[0]) == pytest.approx(0, abs=1e-12)

    def test_frechet_of_independent_variables(self):
        first = Gaussian(np.array([0.0, 0.0]), np.diag([1.0, 9.0]))
        second = Gaussian(np.array([3.0, 4.0]), np.diag([4.0, 1.0]))
        assert distances.wasserstein_gaussians(first, second) == pytest.approx(
            math.sqrt(25 + 1 + 4)
        )

    def test_frechet_through_matrix_square_roots(self):
        first, second = (Gaussian(normal(5, seed=seed), covariance(5, seed)) for seed in (3, 4))
        common = np.trace(linalg.sqrtm(first.covariance @ second.covariance)).real
        squared = (
            np.sum((first.mean - second.mean) ** 2)
            + np.trace(first.covariance + second.covariance)
            - 2 * common
        )
        assert distances.wasserstein_gaussians(first, second) == pytest.approx(math.sqrt(squared))
        assert distances.wasserstein_gaussians(first, first) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("features", [5, 40])
    def test_fid_through_the_eigenvalues_of_the_product(self, features):
        one, other = normal(30, features, seed=5), normal(25, features, seed=6, spread=1.5) + 0.3
        first, second = np.cov(one.T), np.cov(other.T)
        common = np.sqrt(
            np.abs(linalg.eigvals(first @ second))
        ).sum()  # with 40 features all but 24 are zero
        expected = (
            np.sum((one.mean(0) - other.mean(0)) ** 2)
            + np.trace(first)
            + np.trace(second)
            - 2 * common
        )
        assert distances.fid(one, other) == pytest.approx(expected, rel=1e-5)
        if features == 5:
            assert common == pytest.approx(np.trace(linalg.sqrtm(first @ second)).real)

    def test_a_direction_for_every_eight_images(self):
        first, second = distances.fit_gaussians(normal(40, 30), normal(33, 30, seed=1))
        assert first.mean.shape == (4,)
        assert second.covariance.shape == (4, 4)
        assert first.mean == pytest.approx(np.zeros(4), abs=1e-9)
        assert distances.fit_gaussians(normal(40, 3), normal(40, 3))[0].mean.shape == (3,)

    def test_fits_many_images_as_they_are(self):
        truth, mixing = covariance(3, 7), np.linalg.cholesky(covariance(3, 7))
        samples = [normal(20_000, 3, seed=seed) @ mixing.T + seed for seed in (0, 1)]
        found = distances.kl_gaussians(*distances.fit_gaussians(*samples)[::-1])
        assert found == pytest.approx(np.ones(3) @ np.linalg.solve(truth, np.ones(3)) / 2, rel=0.05)

    def test_images_that_all_look_alike_are_far_not_infinitely_far(self):
        first, second = distances.fit_gaussians(normal(40, 6), np.ones((40, 6)))
        assert 10 < distances.kl_gaussians(second, first) < 1e3

    def test_a_silent_feature_does_not_drown_the_others(self):
        features = normal(50, 4) * np.array([1.0, 2.0, 0.0, 1e-6])
        scale = distances.feature_scale(features)
        assert scale[:2] == pytest.approx(features[:, :2].std(axis=0))
        assert (
            scale[2]
            == scale[3]
            == pytest.approx(0.1 * math.sqrt(np.mean(features.std(axis=0) ** 2)))
        )
        assert (distances.feature_scale(np.zeros((5, 3))) > 0).all()


class TestSlicedWasserstein:
    def test_on_a_line_it_is_scipys_for_every_division(self):
        pooled, members = together(normal(30, 1), normal(17, 1, seed=1) + 0.8)
        found = distances.sliced_wasserstein(pooled, members, np.ones((1, 1)))
        expected = [stats.wasserstein_distance(pooled[row, 0], pooled[~row, 0]) for row in members]
        assert found == pytest.approx(expected, rel=1e-5)

    def test_a_mere_shift_is_its_mean_length_along_the_directions(self):
        one, shift = normal(25, 3), np.array([3.0, 0.0, -4.0])
        directions = distances.draw_directions(3, 400, np.random.default_rng(0))
        pooled, members = together(one, one + shift)
        found = distances.sliced_wasserstein(pooled, members[:1], directions)[0]
        assert found == pytest.approx(np.abs(directions @ shift).mean(), rel=1e-5)
        assert found == pytest.approx(
            5 / 2, rel=0.1
        )  # a unit vector's mean length along an axis in three dimensions: 1/2
        assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(400))


def test_mmd_is_that_of_a_double_loop():
    pooled, members = together(normal(9, 4), normal(7, 4, seed=1, spread=2.0))
    lengths = [np.linalg.norm(pooled[i] - pooled[j]) for i in range(16) for j in range(i)]
    expected = []
    for row in members[:5]:
        sums = {"within": [], "beyond": [], "between": []}
        for i in range(16):
            for j in range(16):
                if i != j:
                    kernel = math.exp(
                        -np.sum((pooled[i] - pooled[j]) ** 2) / (2 * np.median(lengths) ** 2)
                    )
                    sums[
                        "between" if row[i] != row[j] else "within" if row[i] else "beyond"
                    ].append(kernel)
        expected.append(
            np.mean(sums["within"]) + np.mean(sums["beyond"]) - 2 * np.mean(sums["between"])
        )
    assert distances.mmd(pooled, members)[:5] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kl_of_labels_is_scipys_of_smoothed_marginals():
    probabilities = softmax(normal(20, 3, spread=2), axis=1)
    members = distances.divisions(12, 8, 4, np.random.default_rng(0))
    for row, found in zip(members, distances.kl_labels(probabilities, members), strict=True):
        counts = [probabilities[part].sum(axis=0) + 0.5 for part in (~row, row)]
        assert found == pytest.approx(stats.entropy(*counts))  # normalises both
    one_sided = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    expected = 3.5 / 4 * math.log(7) - 0.5 / 4 * math.log(7)
    assert distances.kl_labels(one_sided, distances.divisions(3, 3))[0] == pytest.approx(expected)


def test_confidence_drop_counted_by_hand():
    members = np.array([[True, True, False], [True, False, False]])
    assert distances.confidence_drop(np.array([1.0, 0.8, 0.5]), members) == pytest.approx(
        [0.4, 0.35]
    )


@pytest.mark.parametrize("features", [6, 90])
def test_the_classifier_is_the_plain_one_however_wide_the_network(features):
    one, other = normal(40, features), normal(40, features, seed=1) + 0.25
    plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000))
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    expected = cross_val_score(
        plain, np.concatenate([one, other]), np.repeat([0, 1], 40), cv=folds
    ).mean()
    found = distances.classifier_accuracy(one, other, 3)
    assert found == pytest.approx(
        expected, abs=0.026
    )  # here scaled before the folds: one image in 40 may differ
    assert distances.classifier_accuracy(one, one + 100, 3) == 1


class TestEstimatedAccuracy:
    # Confidences 0.9, 0.8, 0.7, 0.6 of two classes; the third is wrong.
    LOGITS = np.log([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    LABELS = np.array([0, 1, 1, 0])
    TARGET = np.log([[0.65, 0.35], [0.25, 0.75], [0.55, 0.45], [0.95, 0.05], [0.5, 0.5]])

    def test_difference_of_confidences(self):
        found = shift_estimates.estimate_accuracy(self.LOGITS, self.LABELS, self.TARGET)
        assert found == pytest.approx(0.75 - (0.75 - 0.68))
        sure = np.log([[1 - 1e-9, 1e-9]])
        assert shift_estimates.estimate_accuracy(self.LOGITS, np.array([0, 1, 0, 0]), sure) == 1

    def test_average_thresholded_confidence(self):
        # One of four is wrong: all but the least confident pass, from 0.7 on; 0.75 and 0.95 of the target do.
        assert shift_estimates.estimate_accuracy_atc(self.LOGITS, self.LABELS, self.TARGET) == 2 / 5
        assert shift_estimates.estimate_accuracy_atc(self.LOGITS, self.LABELS, self.LOGITS) == 3 / 4
        assert (
            shift_estimates.estimate_accuracy_atc(
                self.LOGITS, 1 - self.LOGITS.argmax(1), self.TARGET
            )
            == 0
        )
        assert (
            shift_estimates.estimate_accuracy_atc(self.LOGITS, self.LOGITS.argmax(1), self.TARGET)
            == 3 / 5
        )


class TestMeasure:
    def test_splits_share_no_image_and_are_balanced_as_the_targets(self):
        groups = np.repeat([0, 1, 2], [30, 20, 10])
        given = Reference(model_outputs(60, 0)[0], np.arange(20), None, groups)
        one, other = shift_estimates.split(given, np.random.default_rng(1))
        assert len(one) == len(other) == 20
        assert not set(one) & set(other)
        assert np.abs(np.bincount(groups[one]) - np.bincount(groups[other])).max() <= 1
        assert np.bincount(groups[np.concatenate([one, other])]).tolist() == [15, 15, 10]
        again, _ = shift_estimates.split(given._replace(groups=None), np.random.default_rng(2))
        assert len(set(again)) == 20

    def test_the_same_distribution_lies_at_the_floor(self):
        targets = {str(seed): model_outputs(40, seed)[0] for seed in range(1, 21)}
        found = shift_estimates.measure(reference(), targets, seed=0, permutations=19, splits=40)
        for metric, rows in found.groupby("metric"):
            floor, high = rows[["floor", "floor_high"]].iloc[0]
            margin = 2 * max(high - floor, rows["value"].std())
            assert abs(rows["value"].median() - floor) < margin, metric
            if metric not in ESTIMATES:
                assert (rows["value"] > high).mean() <= 0.45, (
                    metric
                )  # one sample of the reference is in all 20 rows

    def test_a_clear_shift_is_far_above_it(self):
        targets = {"near": model_outputs(40, 1)[0], "far": model_outputs(40, 2, shift=1.5)[0]}
        found = shift_estimates.measure(
            reference(), targets, seed=0, permutations=199, splits=39
        ).set_index(["target", "metric"])
        assert (found[["n_reference", "n_target"]] == 40).all(axis=None)
        far, near = found.loc["far"], found.loc["near"]
        for metric in ("kl_features", "wasserstein_gaussian", "wasserstein_sliced", "fid", "mmd"):
            floor, high = far.loc[metric, ["floor", "floor_high"]]
            assert far.loc[metric, "value"] > high + 3 * (high - floor), metric
            assert far.loc[metric, "value"] > 2 * near.loc[metric, "value"], metric
        assert far.loc[["mmd", "wasserstein_sliced"], "p"].tolist() == [1 / 200] * 2
        assert far.loc["classifier_accuracy", "p"] == 1 / 40
        assert (
            found["p"]
            .isna()
            .groupby("metric")
            .all()
            .loc[["kl_features", "fid", "wasserstein_gaussian", *ESTIMATES]]
            .all()
        )
        assert (near["p"].dropna() > 0.01).all()

    def test_p_is_uniform_without_a_shift(self):
        """Few images of many features: a scale taken from one of the two samples would give away which it is."""
        ps = []
        for trial in range(300):
            features, logits = normal(2, 20, 200, seed=trial), normal(2, 20, 3, seed=1000 + trial)
            samples = [Sample(*outputs) for outputs in zip(features, logits, strict=True)]
            found = shift_estimates.compare(*samples, seed=trial, permutations=39)
            ps.append({metric: p for metric, (_, p) in found.items() if not math.isnan(p)})
        table = pd.DataFrame(ps)
        assert set(table) == {"mmd", "wasserstein_sliced", "kl_labels", "confidence_drop"}
        jitter = np.random.default_rng(0).random(len(table)) / 40  # p has steps of 1/40
        for metric, column in table.items():
            # Four metrics, two bounds: a chance of 1 in 500 that a correct test fails, were it not seeded.
            assert stats.kstest(column - jitter, "uniform").pvalue > 0.00025, metric
            assert (column <= 0.051).sum() <= stats.binom.ppf(0.99975, len(table), 0.05), metric

    def test_depends_on_no_order(self):
        targets = {"a": model_outputs(40, 1)[0], "b": model_outputs(40, 2, shift=1.5)[0]}
        found = shift_estimates.measure(reference(), targets, seed=0, permutations=39, splits=9)
        other = shift_estimates.measure(
            reference(), dict(reversed(targets.items())), seed=0, permutations=39, splits=9
        )
        pd.testing.assert_frame_equal(
            other.sort_values("target", kind="stable", ignore_index=True), found
        )
        shuffled = {
            name: target.take(np.random.default_rng(0).permutation(40))
            for name, target in targets.items()
        }
        mixed = shift_estimates.measure(reference(), shuffled, seed=0, permutations=39, splits=9)
        exact = found["metric"] != "classifier_accuracy"  # its folds hold other images now
        assert mixed["value"][exact].to_numpy() == pytest.approx(
            found["value"][exact].to_numpy(), rel=1e-6, abs=1e-9
        )
        reseeded = shift_estimates.measure(reference(), targets, seed=1, permutations=39, splits=9)
        assert not reseeded["floor"].equals(found["floor"])
        sliced = found["metric"] == "wasserstein_sliced"
        assert reseeded["value"][sliced].to_numpy() == pytest.approx(
            found["value"][sliced].to_numpy(), rel=0.15
        )

    def test_without_labels_there_is_no_estimate(self):
        found = shift_estimates.measure(
            reference()._replace(labels=None),
            {"a": model_outputs(40, 1)[0]},
            seed=0,
            permutations=9,
            splits=3,
        )
        assert not set(found["metric"]) & set(ESTIMATES)
        assert len(found) == 8

    def test_a_broken_network_is_told(self):
        whole, broken = model_outputs(40, 1)[0], model_outputs(40, 1)[0]
        broken.features[3, 2] = np.nan
        with pytest.raises(UserError, match=r"expected finite features.*fog-1"):
            shift_estimates.measure(
                reference(), {"clean": whole, "fog-1": broken}, seed=0, permutations=9, splits=3
            )
        with pytest.raises(UserError, match=r"expected finite features.*the reference"):
            shift_estimates.measure(
                Reference(broken, np.arange(20)), {"clean": whole}, seed=0, permutations=9, splits=3
            )


class TestSampleSize:
    def test_is_the_largest_that_leaves_the_reference_a_second_sample(self):
        assert shift_estimates.sample_size(128, 100, 128, at_most=200) == 64
        assert shift_estimates.sample_size(807, 100, 128, at_most=200) == 100
        assert shift_estimates.sample_size(807, 300, at_most=200) == 200

    @pytest.mark.parametrize(
        ("pool", "target", "limit"), [(19, 50, 200), (50, 9, 200), (50, 50, 5)]
    )
    def test_too_few_images(self, pool, target, limit):
        with pytest.raises(
            UserError, match=rf"at least 20 reference images.* found {pool}, {target} and {limit}"
        ):
            shift_estimates.sample_size(pool, target, at_most=limit)


class TestStage:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(places, "OUTPUTS", tmp_path)
        monkeypatch.setattr(shift_estimates.measure, "__kwdefaults__", {"splits": 5})
        network, _ = trainings.build(trainings.SIMCLR)
        for seed in ("0", "1"):
            checkpoints.save(
                network,
                tmp_path / "finetuned" / "tiny" / seed,
                settings=trainings.SIMCLR,
                classes="abc",
                image_size=trainings.SIZE,
            )
        for name, count in (("unlabeled", 50), ("labeled_validation", 36), ("test", 18)):
            images = trainings.image_set(count, seed=count)
            unlabeled = ImageSet(images.pixels, np.full(count, -1), images.image_ids, ())
            (unlabeled if name == "unlabeled" else images).save(tmp_path / "data" / name)
        write_sets(tmp_path / "data" / "shifted", {})
        return tmp_path

    @staticmethod
    def measured(root, images: int = 200, shifts: Shifts | None = None) -> pd.DataFrame:
        params = SimpleNamespace(
            seed=0,
            seeds=(0, 1),
            machine=SimpleNamespace(device="cpu", precision="auto", images_per_step="auto"),
            distance=SimpleNamespace(images=images, permutations=19),
            shifts=shifts or Shifts(corruptions=("fog",), severities=(1, 5), images=None, sets={}),
            model_dump=lambda **_: [images, str(shifts)],
        )
        distance.run(params, ["tiny"])
        files = [root / "distances" / "tiny" / f"{seed}.csv" for seed in params.seeds]
        return pd.concat([pd.read_csv(file) for file in files], ignore_index=True)

    def test_writes_a_row_per_training_pair_and_metric(self, root):
        table = self.measured(root)
        assert table.columns.tolist() == [
            "model",
            "seed",
            "reference",
            "target",
            "corruption",
            "severity",
            "metric",
            "value",
            "floor",
            "floor_high",
            "p",
            "n_reference",
            "n_target",
        ]
        pairs = (
            table[["reference", "target", "corruption", "severity"]]
            .drop_duplicates()
            .to_numpy()
            .tolist()
        )
        shifts = [["clean", "none", 0], ["fog-1", "fog", 1], ["fog-5", "fog", 5]]
        assert pairs == [
            ["unlabeled", "labeled", "none", 0],
            *(["unlabeled", *shift] for shift in shifts),
            *(["labeled", *shift] for shift in shifts),
        ]
        assert len(table) == 2 * (4 * 8 + 3 * 10)
        first, second = (
            table[table["seed"] == seed].drop(columns="seed").reset_index(drop=True)
            for seed in (0, 1)
        )
        pd.testing.assert_frame_equal(first, second)  # the same network twice
        assert (table[["n_reference", "n_target"]] == 18).all(axis=None)
        foggy = table[(table["target"] == "fog-5") & (table["metric"] == "mmd")]
        assert (foggy["value"] > foggy["floor_high"]).all()

    def test_labels_of_the_test_images_change_nothing(self, root):
        expected = self.measured(root)
        images = ImageSet.load(root / "data" / "test").take(
            range(18)
        )  # the pixels off the disk, to write there
        images.labels[:] = np.random.default_rng(0).permutation(images.labels)
        images.save(root / "data" / "test")
        pd.testing.assert_frame_equal(self.measured(root), expected)

    def test_an_unlabeled_test_set_will_do(self, root):
        expected = self.measured(root)
        images = ImageSet.load(root / "data" / "test").take(
            range(18)
        )  # the pixels off the disk, to write there
        images.labels[:] = -1
        images.save(root / "data" / "test")
        found = self.measured(root)
        same = ["target", "metric", "value", "n_target"]
        pd.testing.assert_frame_equal(found[same], expected[same])

    def test_images_that_came_shifted_are_targets_and_the_fewest_are_the_number_for_all(self, root):
        shutil.rmtree(root / "data" / "shifted")
        photos = trainings.image_set(30, seed=7).take(range(14))
        bright = replace(
            photos,
            pixels=np.maximum(photos.pixels, 200),
            image_ids=tuple(f"b/{name}" for name in photos.image_ids),
        )
        write_sets(
            root / "data" / "shifted", {"photos/as they were": photos, "photos/bright": bright}
        )
        table = self.measured(root)
        home = table[
            (table["reference"] == "labeled") & (table["metric"] == "mmd") & (table["seed"] == 0)
        ].set_index("target")
        assert home[["corruption", "severity"]].to_numpy().tolist() == [
            ["none", 0],
            ["fog", 1],
            ["fog", 5],
            ["photos/as they were", 0],
            ["photos/bright", 0],
        ]
        assert (table[["n_reference", "n_target"]] == 14).all(axis=None)
        assert home.loc["photos/bright", "value"] > home.loc["photos/bright", "floor_high"]
        assert home.loc["photos/bright", "value"] > home.loc["photos/as they were", "value"]

    def test_test_images_that_are_themselves_shifted_take_the_place_of_clean_ones(self, root):
        shifts = Shifts(
            clean="validation", corruptions=("fog",), severities=(5,), images=None, sets={}
        )
        table = self.measured(root, shifts=shifts)
        assert table["target"].unique().tolist() == ["labeled", "test", "fog-5"]
        plain = self.measured(root).set_index(["seed", "reference", "target", "metric"])["value"]
        value = table.set_index(["seed", "reference", "target", "metric"])["value"]
        assert (
            value.xs("test", level="target").to_dict()
            == plain.xs("clean", level="target").to_dict()
        )

    def test_too_few_images_are_told_and_stop_nothing(self, root, capsys):
        table = self.measured(root, images=15)
        assert table.empty
        assert (
            "tiny: distances are left out: distance: expected at least 20 reference images"
            in capsys.readouterr().out
        )
