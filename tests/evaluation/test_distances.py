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
from tttlab.evaluation.shift_estimates import DIRECTIONS, ESTIMATES, Reference, Sample
from tttlab.networks import checkpoints
from tttlab.seeding import numpy_generator
from tttlab.workflow import places


def normal(*shape, seed=0, spread=1.0) -> np.ndarray:
    return spread * np.random.default_rng(seed).standard_normal(shape)


def covariance(size: int, seed: int) -> np.ndarray:
    root = normal(size, size + 2, seed=seed)
    return root @ root.T / size


def together(*samples) -> tuple[np.ndarray, np.ndarray]:
    """Two pooled samples with their true division and 30 permuted ones."""
    members = distances.divisions(*map(len, samples), 30, np.random.default_rng(9))
    return np.concatenate(samples), members


def model_outputs(count: int, seed: int, shift: float = 0.0) -> tuple[Sample, np.ndarray]:
    """Features of three classes in six dimensions, logits of a decent classifier, and labels."""
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
        divergence = distances.kl_gaussians(
            Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.zeros(1), np.eye(1))
        )
        assert divergence == pytest.approx((4 + 1 - 1 - math.log(4)) / 2)

    def test_kl_is_torchs(self):
        ours = [Gaussian(normal(4, seed=seed), covariance(4, seed)) for seed in (1, 2)]
        normals = [
            torch.distributions.MultivariateNormal(
                torch.from_numpy(gaussian.mean), torch.from_numpy(gaussian.covariance)
            )
            for gaussian in ours
        ]
        expected = torch.distributions.kl_divergence(*normals).item()
        assert distances.kl_gaussians(*ours) == pytest.approx(expected)
        assert distances.kl_gaussians(ours[0], ours[0]) == pytest.approx(0, abs=1e-12)

    def test_frechet_of_independent_variables(self):
        first = Gaussian(np.array([0.0, 0.0]), np.diag([1.0, 9.0]))
        second = Gaussian(np.array([3.0, 4.0]), np.diag([4.0, 1.0]))
        expected = math.sqrt(25 + 1 + 4)
        assert distances.wasserstein_gaussians(first, second) == pytest.approx(expected)

    def test_frechet_through_matrix_square_roots(self):
        first, second = (Gaussian(normal(5, seed=seed), covariance(5, seed)) for seed in (3, 4))
        common = np.trace(linalg.sqrtm(first.covariance @ second.covariance)).real
        traces = np.trace(first.covariance + second.covariance)
        squared = np.sum((first.mean - second.mean) ** 2) + traces - 2 * common
        assert distances.wasserstein_gaussians(first, second) == pytest.approx(math.sqrt(squared))
        assert distances.wasserstein_gaussians(first, first) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("features", [5, 40])
    def test_fid_through_the_eigenvalues_of_the_product(self, features):
        source = normal(30, features, seed=5)
        target = normal(25, features, seed=6, spread=1.5) + 0.3
        first, second = np.cov(source.T), np.cov(target.T)
        # With 40 features all but 24 eigenvalues are zero.
        common = np.sqrt(np.abs(linalg.eigvals(first @ second))).sum()
        means = np.sum((source.mean(0) - target.mean(0)) ** 2)
        expected = means + np.trace(first) + np.trace(second) - 2 * common
        assert distances.fid(source, target) == pytest.approx(expected, rel=1e-5)
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
        divergence = distances.kl_gaussians(*distances.fit_gaussians(*samples)[::-1])
        expected = np.ones(3) @ np.linalg.solve(truth, np.ones(3)) / 2
        assert divergence == pytest.approx(expected, rel=0.05)

    def test_images_that_all_look_alike_are_far_not_infinitely_far(self):
        first, second = distances.fit_gaussians(normal(40, 6), np.ones((40, 6)))
        assert 10 < distances.kl_gaussians(second, first) < 1e3

    def test_a_silent_feature_does_not_drown_the_others(self):
        features = normal(50, 4) * np.array([1.0, 2.0, 0.0, 1e-6])
        scale = distances.feature_scale(features)
        assert scale[:2] == pytest.approx(features[:, :2].std(axis=0))
        least = 0.1 * math.sqrt(np.mean(features.std(axis=0) ** 2))
        assert scale[2] == scale[3] == pytest.approx(least)
        assert (distances.feature_scale(np.zeros((5, 3))) > 0).all()


class TestSlicedWasserstein:
    def test_on_a_line_it_is_scipys_for_every_division(self):
        pooled, members = together(normal(30, 1), normal(17, 1, seed=1) + 0.8)
        values = distances.sliced_wasserstein(pooled, members, np.ones((1, 1)))
        expected = [stats.wasserstein_distance(pooled[row, 0], pooled[~row, 0]) for row in members]
        assert values == pytest.approx(expected, rel=1e-5)

    def test_a_mere_shift_is_its_mean_length_along_the_directions(self):
        sample, shift = normal(25, 3), np.array([3.0, 0.0, -4.0])
        directions = distances.draw_directions(3, 400, np.random.default_rng(0))
        pooled, members = together(sample, sample + shift)
        value = distances.sliced_wasserstein(pooled, members[:1], directions)[0]
        assert value == pytest.approx(np.abs(directions @ shift).mean(), rel=1e-5)
        # In three dimensions, a unit vector's mean absolute component is 1/2.
        assert value == pytest.approx(5 / 2, rel=0.1)
        assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(400))


def test_mmd_is_that_of_a_double_loop():
    pooled, members = together(normal(9, 4), normal(7, 4, seed=1, spread=2.0))
    lengths = [np.linalg.norm(pooled[i] - pooled[j]) for i in range(16) for j in range(i)]
    width = 2 * np.median(lengths) ** 2
    expected = []
    for row in members[:5]:
        reference_kernels, target_kernels, mixed_kernels = [], [], []
        for i in range(16):
            for j in range(16):
                if i == j:
                    continue
                kernel = math.exp(-np.sum((pooled[i] - pooled[j]) ** 2) / width)
                if row[i] != row[j]:
                    mixed_kernels.append(kernel)
                else:
                    (reference_kernels if row[i] else target_kernels).append(kernel)
        within = np.mean(reference_kernels) + np.mean(target_kernels)
        expected.append(within - 2 * np.mean(mixed_kernels))
    assert distances.mmd(pooled, members)[:5] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kl_of_labels_is_scipys_of_smoothed_marginals():
    probabilities = softmax(normal(20, 3, spread=2), axis=1)
    members = distances.divisions(12, 8, 4, np.random.default_rng(0))
    for row, divergence in zip(members, distances.kl_labels(probabilities, members), strict=True):
        target, reference = (probabilities[rows].sum(axis=0) + 0.5 for rows in (~row, row))
        assert divergence == pytest.approx(stats.entropy(target, reference))  # normalises both
    one_sided = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    expected = 3.5 / 4 * math.log(7) - 0.5 / 4 * math.log(7)
    assert distances.kl_labels(one_sided, distances.divisions(3, 3))[0] == pytest.approx(expected)


def test_confidence_drop_counted_by_hand():
    members = np.array([[True, True, False], [True, False, False]])
    drops = distances.confidence_drop(np.array([1.0, 0.8, 0.5]), members)
    assert drops == pytest.approx([0.4, 0.35])


@pytest.mark.parametrize("features", [6, 90])
def test_the_classifier_is_the_plain_one_however_wide_the_network(features):
    sample, shifted = normal(40, features), normal(40, features, seed=1) + 0.25
    plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000))
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    pooled, domains = np.concatenate([sample, shifted]), np.repeat([0, 1], 40)
    expected = cross_val_score(plain, pooled, domains, cv=folds).mean()
    accuracy = distances.classifier_accuracy(sample, shifted, 3)
    # Ours scales the features before the folds: one image in 40 may differ.
    assert accuracy == pytest.approx(expected, abs=0.026)
    assert distances.classifier_accuracy(sample, sample + 100, 3) == 1


class TestEstimatedAccuracy:
    # Confidences 0.9, 0.8, 0.7, 0.6 of two classes; the third is wrong.
    LOGITS = np.log([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    LABELS = np.array([0, 1, 1, 0])
    TARGET = np.log([[0.65, 0.35], [0.25, 0.75], [0.55, 0.45], [0.95, 0.05], [0.5, 0.5]])

    def test_difference_of_confidences(self):
        estimate = shift_estimates.estimate_accuracy(self.LOGITS, self.LABELS, self.TARGET)
        assert estimate == pytest.approx(0.75 - (0.75 - 0.68))
        sure = np.log([[1 - 1e-9, 1e-9]])
        assert shift_estimates.estimate_accuracy(self.LOGITS, np.array([0, 1, 0, 0]), sure) == 1

    def test_average_thresholded_confidence(self):
        # One of four is wrong. So the threshold is 0.7, the second lowest confidence. In the
        # target, 0.75 and 0.95 are above it.
        estimate, right = shift_estimates.estimate_accuracy_atc, self.LOGITS.argmax(1)
        assert estimate(self.LOGITS, self.LABELS, self.TARGET) == 2 / 5
        assert estimate(self.LOGITS, self.LABELS, self.LOGITS) == 3 / 4
        assert estimate(self.LOGITS, 1 - right, self.TARGET) == 0
        assert estimate(self.LOGITS, right, self.TARGET) == 3 / 5


class TestMeasure:
    def test_splits_share_no_image_and_are_balanced_as_the_targets(self):
        groups = np.repeat([0, 1, 2], [30, 20, 10])
        reference = Reference(model_outputs(60, 0)[0], np.arange(20), None, groups)
        first, second = shift_estimates.split(reference, np.random.default_rng(1))
        assert len(first) == len(second) == 20
        assert not set(first) & set(second)
        assert np.abs(np.bincount(groups[first]) - np.bincount(groups[second])).max() <= 1
        assert np.bincount(groups[np.concatenate([first, second])]).tolist() == [15, 15, 10]
        again, _ = shift_estimates.split(reference._replace(groups=None), np.random.default_rng(2))
        assert len(set(again)) == 20

    def test_the_same_distribution_lies_at_the_floor(self):
        targets = {str(seed): model_outputs(40, seed)[0] for seed in range(1, 21)}
        table = shift_estimates.measure_shifts(
            reference(), targets, seed=0, permutations=19, splits=40
        )
        for metric, rows in table.groupby("metric"):
            floor, high = rows[["floor", "floor_high"]].iloc[0]
            margin = 2 * max(high - floor, rows["value"].std())
            assert abs(rows["value"].median() - floor) < margin, metric
            # All 20 rows have the same sample of the reference.
            if metric not in ESTIMATES:
                assert (rows["value"] > high).mean() <= 0.45, metric

    def test_a_clear_shift_is_far_above_it(self):
        targets = {"near": model_outputs(40, 1)[0], "far": model_outputs(40, 2, shift=1.5)[0]}
        table = shift_estimates.measure_shifts(
            reference(), targets, seed=0, permutations=199, splits=39
        )
        table = table.set_index(["target", "metric"])
        assert (table[["n_reference", "n_target"]] == 40).all(axis=None)
        far, near = table.loc["far"], table.loc["near"]
        for metric in ("kl_features", "wasserstein_gaussian", "wasserstein_sliced", "fid", "mmd"):
            floor, high = far.loc[metric, ["floor", "floor_high"]]
            assert far.loc[metric, "value"] > high + 3 * (high - floor), metric
            assert far.loc[metric, "value"] > 2 * near.loc[metric, "value"], metric
        assert far.loc[["mmd", "wasserstein_sliced"], "p"].tolist() == [1 / 200] * 2
        assert far.loc["classifier_accuracy", "p"] == 1 / 40
        without_test = ["kl_features", "fid", "wasserstein_gaussian", *ESTIMATES]
        assert table["p"].isna().groupby("metric").all().loc[without_test].all()
        assert (near["p"].dropna() > 0.01).all()

    def test_all_distances_written_out(self):
        """In units of the reference, from it to the target."""
        spread = np.array([1.0, 10.0, 0.3, 1.0, 3.0, 1.0])
        first, target = (
            Sample(sample.features * spread, sample.logits)
            for sample in (model_outputs(40, 1)[0], model_outputs(40, 2, shift=1.5)[0])
        )
        measured = shift_estimates.compare(first, target, seed=4)
        scale = distances.feature_scale(first.features)
        scaled = first.features / scale, target.features / scale
        source, shifted = distances.fit_gaussians(*scaled)
        generator = numpy_generator(4, "distance", "directions")
        directions = distances.draw_directions(6, DIRECTIONS, generator)
        sliced = [
            stats.wasserstein_distance(*(features @ direction for features in scaled))
            for direction in directions
        ]
        before, after = (softmax(sample.logits, axis=1) for sample in (first, target))
        expected = {
            "kl_features": distances.kl_gaussians(shifted, source),
            "wasserstein_gaussian": distances.wasserstein_gaussians(source, shifted),
            "wasserstein_sliced": np.mean(sliced),
            "kl_labels": stats.entropy(after.sum(0) + 0.5, before.sum(0) + 0.5),
            "confidence_drop": before.max(1).mean() - after.max(1).mean(),
        }
        found = {name: measured[name][0] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5)

    def test_the_high_floor_is_exceeded_by_one_split_in_twenty(self):
        table = shift_estimates.measure_shifts(
            reference(), {"near": model_outputs(40, 1)[0]}, seed=0, permutations=9, splits=7
        )
        floors = shift_estimates.measure_floors(reference(), 0, 7)
        for row in table.itertuples():
            assert row.floor == pytest.approx(floors[row.metric].mean())
            assert row.floor_high == pytest.approx(np.quantile(floors[row.metric], 0.95))

    def test_there_are_as_many_splits_as_permutations_and_no_more_than_99(self, monkeypatch):
        real, asked = shift_estimates.measure_floors, []

        def measure_floors(reference, seed, splits):
            asked.append(splits)
            return real(reference, seed, 2)

        monkeypatch.setattr(shift_estimates, "measure_floors", measure_floors)
        targets = {"clean": model_outputs(40, 1)[0]}
        for permutations in (19, 99, 199):
            shift_estimates.measure_shifts(reference(), targets, seed=0, permutations=permutations)
        assert asked == [19, 99, 99]

    @pytest.mark.slow
    def test_p_is_uniform_without_a_shift(self):
        """With few images of many features, a scale from one sample would give it away."""
        ps = []
        for trial in range(300):
            features, logits = normal(2, 20, 200, seed=trial), normal(2, 20, 3, seed=1000 + trial)
            samples = [Sample(*outputs) for outputs in zip(features, logits, strict=True)]
            measured = shift_estimates.compare(*samples, seed=trial, permutations=39)
            ps.append({metric: p for metric, (_, p) in measured.items() if not math.isnan(p)})
        table = pd.DataFrame(ps)
        assert set(table) == {"mmd", "wasserstein_sliced", "kl_labels", "confidence_drop"}
        jitter = np.random.default_rng(0).random(len(table)) / 40  # p has steps of 1/40
        for metric, column in table.items():
            # Without the seed, these eight bounds would fail a correct test once in 500 times.
            assert stats.kstest(column - jitter, "uniform").pvalue > 0.00025, metric
            assert (column <= 0.051).sum() <= stats.binom.ppf(0.99975, len(table), 0.05), metric

    def test_depends_on_no_order(self):
        targets = {"a": model_outputs(40, 1)[0], "b": model_outputs(40, 2, shift=1.5)[0]}
        table = shift_estimates.measure_shifts(
            reference(), targets, seed=0, permutations=39, splits=9
        )
        reversed_targets = dict(reversed(targets.items()))
        again = shift_estimates.measure_shifts(
            reference(), reversed_targets, seed=0, permutations=39, splits=9
        )
        again = again.sort_values("target", kind="stable", ignore_index=True)
        pd.testing.assert_frame_equal(again, table)
        shuffled = {
            name: target.take(np.random.default_rng(0).permutation(40))
            for name, target in targets.items()
        }
        again = shift_estimates.measure_shifts(
            reference(), shuffled, seed=0, permutations=39, splits=9
        )
        exact = table["metric"] != "classifier_accuracy"  # its folds hold other images now
        expected = table["value"][exact].to_numpy()
        assert again["value"][exact].to_numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        reseeded = shift_estimates.measure_shifts(
            reference(), targets, seed=1, permutations=39, splits=9
        )
        assert not reseeded["floor"].equals(table["floor"])
        sliced = table["metric"] == "wasserstein_sliced"
        expected = table["value"][sliced].to_numpy()
        assert reseeded["value"][sliced].to_numpy() == pytest.approx(expected, rel=0.15)

    def test_without_labels_there_is_no_estimate(self):
        unlabeled, targets = reference()._replace(labels=None), {"a": model_outputs(40, 1)[0]}
        table = shift_estimates.measure_shifts(unlabeled, targets, seed=0, permutations=9, splits=3)
        assert not set(table["metric"]) & set(ESTIMATES)
        assert len(table) == 8

    def test_a_broken_network_is_told(self):
        finite, broken = model_outputs(40, 1)[0], model_outputs(40, 1)[0]
        broken.features[3, 2] = np.nan
        options = {"seed": 0, "permutations": 9, "splits": 3}
        targets = {"clean": finite, "fog-1": broken}
        with pytest.raises(UserError, match=r"expected finite features.*fog-1"):
            shift_estimates.measure_shifts(reference(), targets, **options)
        broken_reference = Reference(broken, np.arange(20))
        with pytest.raises(UserError, match=r"expected finite features.*the reference"):
            shift_estimates.measure_shifts(broken_reference, {"clean": finite}, **options)


class TestSampleSize:
    def test_is_the_largest_that_leaves_the_reference_a_second_sample(self):
        assert shift_estimates.sample_size(128, 100, 128, at_most=200) == 64
        assert shift_estimates.sample_size(807, 100, 128, at_most=200) == 100
        assert shift_estimates.sample_size(807, 300, at_most=200) == 200

    @pytest.mark.parametrize(
        ("pool", "target", "limit"), [(19, 50, 200), (50, 9, 200), (50, 50, 5)]
    )
    def test_too_few_images(self, pool, target, limit):
        message = rf"at least 20 reference images.* found {pool}, {target} and {limit}"
        with pytest.raises(UserError, match=message):
            shift_estimates.sample_size(pool, target, at_most=limit)


class TestStage:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(places, "OUTPUTS", tmp_path)
        monkeypatch.setattr(shift_estimates.measure_shifts, "__kwdefaults__", {"splits": 5})
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
            models=("tiny",),
            machine=SimpleNamespace(
                device="cpu", precision="auto", images_per_step="auto", workers=2
            ),
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
        pairs = table[["reference", "target", "corruption", "severity"]].drop_duplicates()
        shifts = [["clean", "none", 0], ["fog-1", "fog", 1], ["fog-5", "fog", 5]]
        assert pairs.to_numpy().tolist() == [
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
        # `take` reads the pixels, so that their file can be overwritten.
        images = ImageSet.load(root / "data" / "test").take(range(18))
        images.labels[:] = np.random.default_rng(0).permutation(images.labels)
        images.save(root / "data" / "test")
        pd.testing.assert_frame_equal(self.measured(root), expected)

    def test_an_unlabeled_test_set_will_do(self, root):
        expected = self.measured(root)
        # `take` reads the pixels, so that their file can be overwritten.
        images = ImageSet.load(root / "data" / "test").take(range(18))
        images.labels[:] = -1
        images.save(root / "data" / "test")
        table = self.measured(root)
        columns = ["target", "metric", "value", "n_target"]
        pd.testing.assert_frame_equal(table[columns], expected[columns])

    def test_images_that_came_shifted_are_targets_and_the_fewest_are_the_number_for_all(self, root):
        shutil.rmtree(root / "data" / "shifted")
        photos = trainings.image_set(30, seed=7).take(range(14))
        bright_ids = tuple(f"b/{name}" for name in photos.image_ids)
        bright = replace(photos, pixels=np.maximum(photos.pixels, 200), image_ids=bright_ids)
        sets = {"photos/as they were": photos, "photos/bright": bright}
        write_sets(root / "data" / "shifted", sets)
        table = self.measured(root)
        from_labeled = (table["reference"] == "labeled") & (table["seed"] == 0)
        rows = table[from_labeled & (table["metric"] == "mmd")].set_index("target")
        assert rows[["corruption", "severity"]].to_numpy().tolist() == [
            ["none", 0],
            ["fog", 1],
            ["fog", 5],
            ["photos/as they were", 0],
            ["photos/bright", 0],
        ]
        assert (table[["n_reference", "n_target"]] == 14).all(axis=None)
        assert rows.loc["photos/bright", "value"] > rows.loc["photos/bright", "floor_high"]
        assert rows.loc["photos/bright", "value"] > rows.loc["photos/as they were", "value"]

    def test_test_images_that_are_themselves_shifted_take_the_place_of_clean_ones(self, root):
        shifts = Shifts(
            clean="validation", corruptions=("fog",), severities=(5,), images=None, sets={}
        )
        table = self.measured(root, shifts=shifts)
        assert table["target"].unique().tolist() == ["labeled", "test", "fog-5"]
        keys = ["seed", "reference", "target", "metric"]
        plain = self.measured(root).set_index(keys)["value"].xs("clean", level="target")
        values = table.set_index(keys)["value"].xs("test", level="target")
        assert values.to_dict() == plain.to_dict()

    def test_too_few_images_are_told_and_stop_nothing(self, root, capfd):
        table = self.measured(root, images=15)
        message = "tiny: distances are left out: distance: expected at least 20 reference images"
        assert table.empty
        assert message in capfd.readouterr().out
