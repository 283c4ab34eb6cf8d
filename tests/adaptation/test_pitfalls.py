"""The published mistakes of per-image test-time training, with the tests that catch each of them.

The tests of `PITFALLS` were found by making every mistake once in a copy of the code. This file has
the tests that are in no other file.
"""

import ast
import copy
import hashlib
import inspect
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.adaptation.test_normalisation import OneLayer, apply, batch_norm
from tests.evaluation.test_diagnosis import step_rows
from tests.helpers import contract, networks, trainings
from tests.helpers.contract import shifted
from tests.helpers.ready import lay_out
from tttlab.adaptation import curve as curves
from tttlab.adaptation import online, predicting
from tttlab.adaptation.adapter import adapt, adapt_together
from tttlab.adaptation.curve import Curve
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.method import Method
from tttlab.adaptation.online import Learner, adapt_stream
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop, Normalisation
from tttlab.config.params import Params, read_params
from tttlab.data.image_sets import ImageSet
from tttlab.data.views import log_mean_probabilities
from tttlab.errors import UserError
from tttlab.evaluation import diagnosis
from tttlab.experiments.adapting import Sweep, adapt_to_shifts
from tttlab.experiments.jobs import Experiment
from tttlab.methods.actmad import ActMAD
from tttlab.methods.mae import MAETraining
from tttlab.methods.simclr import SimCLRTraining
from tttlab.methods.tent import TENT
from tttlab.networks import checkpoints, source_statistics
from tttlab.networks.building import build_encoder
from tttlab.networks.network import Network
from tttlab.runtime import devices
from tttlab.runtime.group_size import GroupSize
from tttlab.runtime.resuming import Work
from tttlab.seeding import torch_generator
from tttlab.shifts.shift import list_shifts
from tttlab.shifts.streams import Stream

ROOT = Path(__file__).resolve().parents[2]
TESTS = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}

# Number in the published list → the mistake and its tests.
PITFALLS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "NT-Xent on one image has no gradient",
        (
            "test_objectives.py::test_the_published_loss_has_no_gradient_on_one_image",
            "test_objectives.py::test_bank_contrast_equals_a_double_loop",
            "test_simsiam.py::test_one_image_has_a_gradient_at_the_first_step",
            "test_rotation.py::test_one_image_has_a_gradient_and_its_prediction_moves_through_the_"
            "shared_stages_alone",
            "test_contract.py::test_the_first_step_moves_every_image",
        ),
    ),
    2: (
        "ActMAD's variance over a batch of one image does not exist; "
        "source and test image need one estimator",
        (
            "test_methods.py::test_actmad_is_finite_on_one_image_and_equals_a_loop_over_layers",
            "test_methods.py::test_natural_discrepancy_by_hand",
            "test_taps.py::test_image_moments_equal_a_loop",
            "test_taps.py::test_the_batch_estimator_is_the_image_estimator_on_each_image",
            "test_normalisation.py::"
            "test_source_statistics_of_the_running_estimate_agree_with_what_batch_norm_learnt",
            "test_actmad_batch.py::test_a_batch_of_one_image_is_refused",
        ),
    ),
    3: (
        "BatchNorm in training mode replaces its running statistics, "
        "couples images and raises on one position",
        (
            "test_contract.py::test_the_network_is_left_as_it_was",
            "test_contract.py::test_results_depend_on_the_image_alone",
            "test_adapter.py::test_which_parameters_move",
            "test_contract.py::"
            "test_a_stream_depends_on_its_past_alone_and_leaves_the_network_as_it_was",
            "test_normalisation.py::test_images_are_normalised_one_by_one_under_vmap",
            "test_normalisation.py::test_mixed_is_the_weighted_mean_of_both_statistics",
            "test_pitfalls.py::TestOnePosition::test_its_own_statistics_leave_the_bias",
            "test_pitfalls.py::TestOnePosition::test_mixed_statistics_are_mostly_the_sources",
        ),
    ),
    4: (
        "Dropout stays on, the mode is not restored, or a view is classified in the image's place",
        (
            "test_pitfalls.py::TestMode::"
            "test_nothing_is_dropped_while_adapting_and_the_mode_comes_back",
            "test_pitfalls.py::TestMode::test_nothing_is_dropped_while_measuring_the_source",
            "test_networks.py::test_evaluating_restores_every_modules_mode",
            "test_contract.py::test_the_network_is_left_as_it_was",
            "test_contract.py::test_vectorised_equals_one_image_at_a_time",
        ),
    ),
    5: (
        "Weights or the optimiser's state of one image reach the next",
        (
            "test_contract.py::test_the_network_is_left_as_it_was",
            "test_contract.py::test_results_depend_on_the_image_alone",
            "test_adapter.py::test_adam_on_stacked_images_is_adam_on_each",
            "test_contract.py::test_a_curve_along_the_steps_is_what_shorter_adaptations_give",
            "test_engine.py::test_evaluation_is_the_adapter_and_leaves_the_network_as_it_was",
            "test_engine.py::test_the_state_is_the_networks_alone_however_often_it_adapted",
            "test_pitfalls.py::test_after_a_reset_a_stream_goes_on_as_one_that_begins",
        ),
    ),
    6: (
        "Images at once give other numbers than one at a time, or do not fit into memory",
        (
            "test_contract.py::test_vectorised_equals_one_image_at_a_time",
            "test_contract.py::test_vectorised_equals_one_image_at_a_time_in_single_precision",
            "test_adapter.py::test_no_gradient_reaches_a_frozen_parameter",
            "test_adapter.py::test_clipping_bounds_each_image_on_its_own",
            "test_per_image.py::test_a_layer_equals_a_loop_over_images",
            "test_group_size.py::test_out_of_memory_halves_the_group_and_changes_no_result",
            "test_group_size.py::test_it_does_not_grow_beyond_memory",
            "test_memory.py::test_four_times_the_images_take_little_more_than_a_group",
            "test_memory.py::test_a_group_takes_no_more_than_there_is",
            "test_pitfalls.py::test_a_loss_that_draws_its_own_random_numbers_is_refused",
        ),
    ),
    7: (
        "Views are made on the CPU and shipped at every step",
        ("test_pitfalls.py::test_views_are_made_where_the_image_lies",),
    ),
    8: (
        "An image's result depends on its batch mates or on the order",
        (
            "test_contract.py::test_results_depend_on_the_image_alone",
            "test_contract.py::test_vectorised_equals_one_image_at_a_time",
            "test_adapter.py::test_backbones_that_depend_on_batch_mates_are_refused",
            "test_engine.py::test_an_image_is_not_touched_by_the_others_of_its_batch",
            "test_backbones.py::"
            "test_every_method_moves_every_backbone_and_sees_one_image_at_a_time",
            "test_contract.py::"
            "test_a_stream_depends_on_its_past_alone_and_leaves_the_network_as_it_was",
            "test_backbones.py::test_every_stream_method_moves_every_backbone_and_knows_no_future",
        ),
    ),
    9: (
        "Random numbers depend on place, shard or a kill, or on no seed at all; "
        "the spread over seeds is not told",
        (
            "test_contract.py::test_results_depend_on_the_image_alone",
            "test_contract.py::test_vectorised_equals_one_image_at_a_time",
            "test_adapter.py::test_the_same_seed_gives_the_same_views_and_another_seed_others",
            "test_engine.py::"
            "test_random_views_are_fresh_for_every_image_and_the_same_for_the_same_seed",
            "test_views.py::test_views_depend_on_their_own_stream_alone",
            "test_corruptions.py::test_streams_differ_by_image_seed_and_severity",
            "test_adapting.py::test_a_killed_sweep_goes_on_where_it_was_with_the_same_numbers",
            "test_adapting.py::test_workers_change_nothing",
            "test_adapting.py::test_ranks_and_a_kill_change_no_bit",
            "test_loaders.py::test_a_view_depends_on_its_own_key_alone",
            "test_loaders.py::"
            "test_batches_do_not_depend_on_the_number_of_workers_and_every_epoch_has_its_own",
            "test_trainer.py::test_a_killed_training_goes_on_and_ends_with_the_same_numbers",
            "test_checkpoints.py::"
            "test_initial_weights_follow_the_seed_and_leave_the_global_stream_alone",
            "test_metrics.py::TestSeveralSeeds::test_counts_and_spread",
        ),
    ),
    10: (
        "Settings or steps are chosen with test labels",
        (
            "test_tuning.py::test_settings_are_judged_under_corruptions_that_no_test_may_use",
            "test_pipeline.py::test_neither_test_images_nor_their_labels_can_reach_tuning",
            "test_pipeline.py::test_what_was_tuned_is_what_adapt_used",
            "test_adapting.py::test_a_sweep_along_the_steps_has_a_row_per_image_and_step",
            "test_contract.py::test_a_curve_along_the_steps_is_what_shorter_adaptations_give",
            "test_diagnosis.py::test_the_oracle_is_the_best_of_all_and_the_tuned_setting_its_own",
            "test_page.py::TestTables::test_tuning_shows_every_choice_and_labels_the_oracle",
            "test_pitfalls.py::test_the_step_in_use_is_told_though_another_was_better",
        ),
    ),
    11: (
        "What is lost on clean images and under natural shifts is not measured, and "
        "nothing keeps it small",
        (
            "test_adapting.py::test_shifts_are_clean_first_then_every_pair",
            "test_shifted.py::"
            "test_the_clean_test_images_come_first_then_their_corruptions_then_the_sets",
            "test_shift_sets.py::test_cifar_10_1_has_versions_of_their_own_sizes_and_no_severity",
            "test_pipeline.py::"
            "test_images_that_come_shifted_go_all_the_way_with_and_without_labels",
            "test_metrics.py::TestSummarise::test_numbers_counted_by_hand",
            "test_tuning.py::test_a_setting_that_costs_clean_accuracy_loses_to_one_that_does_not",
            "test_gate.py::test_open_images_are_adapted_as_without_a_gate_and_shut_ones_not_at_all",
            "test_gate.py::test_the_chosen_gate_keeps_gains_and_avoids_harm",
        ),
    ),
    12: (
        "Minimising entropy collapses to one class",
        (
            "test_contract.py::test_results_depend_on_the_image_alone",
            "test_online.py::TestSAR::test_unreliable_images_teach_nothing",
            "test_online.py::TestSAR::test_the_source_weights_come_back_before_the_collapse",
            "test_online.py::test_a_batch_that_teaches_nothing_moves_nothing",
            "test_eata.py::TestFilters::test_at_first_the_reliable_ones_count_and_make_the_average",
            "test_eata.py::TestFilters::"
            "test_then_those_that_resemble_the_average_before_this_batch_are_left_out",
            "test_deyo.py::test_filters_and_weights_against_a_loop_over_images",
            "test_adacontrast.py::test_diversity_is_lowest_where_the_classes_are_equally_frequent",
        ),
    ),
    13: (
        "A gradient explodes, and the prediction is not the source network's, or is not counted",
        (
            "test_contract.py::test_vectorised_equals_one_image_at_a_time",
            "test_adapter.py::test_clipping_bounds_each_image_on_its_own",
            "test_adapter.py::test_divergence_is_a_loss_that_is_not_finite_or_has_exploded",
            "test_adapter.py::test_a_diverging_image_falls_back_alone",
            "test_adapter.py::test_an_image_that_diverges_on_the_way_falls_back_from_there_on",
            "test_adapter.py::test_a_gradient_that_is_not_finite_costs_its_image_the_adaptation",
            "test_pitfalls.py::"
            "test_a_prediction_that_is_no_number_is_the_source_networks_though_all_losses_are",
            "test_online.py::"
            "test_a_batch_with_a_loss_that_is_not_finite_gets_the_source_predictions",
            "test_online.py::test_a_batch_that_fails_on_the_way_keeps_its_losses_in_shape",
            "test_metrics.py::TestSummarise::test_numbers_counted_by_hand",
            "test_tracking.py::TestLogPredictions::test_agrees_with_the_evaluation",
        ),
    ),
    14: (
        "One learning rate for every loss, network and protocol",
        (
            "test_pitfalls.py::test_every_run_that_trains_has_its_learning_rate_chosen",
            "test_params.py::TestSearch::test_of_one_model_adds_to_that_of_the_run",
            "test_pipeline.py::test_what_was_tuned_is_what_adapt_used",
        ),
    ),
    15: (
        "The encoder moves away from its classifier, or the head does not fit the encoder",
        (
            "test_adapter.py::test_which_parameters_move",
            "test_params.py::test_the_settings_defaults_are_the_inner_loops",
            "test_training.py::test_joint_gradient_is_the_sum_of_both",
            "test_training.py::test_each_mode_changes_its_own_parts_only",
            "test_training.py::test_refitting_trains_the_head_alone",
        ),
    ),
    16: (
        "Statistics of another network or of other data are used",
        (
            "test_pitfalls.py::test_statistics_of_weights_that_have_changed_since_are_refused",
            "test_pipeline.py::test_statistics_of_another_checkpoint_are_refused",
            "test_checkpoints.py::"
            "test_a_checkpoint_that_is_missing_or_put_together_wrongly_is_refused",
            "test_adapter.py::test_missing_statistics_are_named",
            "test_resuming.py::test_key_follows_stage_settings_and_inputs",
        ),
    ),
    17: (
        "Which images, which severity and which versions is not recorded",
        (
            "test_pitfalls.py::test_the_hash_that_is_recorded_is_of_every_pixel",
            "test_pitfalls.py::test_a_network_says_which_versions_trained_it",
            "test_prepare.py::test_the_summary_counts_what_lies_on_disk",
            "test_prepare.py::test_sets_that_come_shifted_land_beside_the_three",
            "test_tracking.py::TestStartRun::test_what_is_logged_can_be_read_back",
            "test_packaging.py::test_uv_and_pip_get_the_same_versions",
            "test_shift_sets.py::test_cifar_c_gives_every_corruption_at_every_severity_as_it_is",
            "test_shifts.py::"
            "test_images_of_its_own_are_left_as_they_are_whatever_the_shift_is_called",
            "test_corruptions.py::test_jpeg_equals_pillow_at_that_quality",
            "test_metrics.py::TestGroups::test_corruption_and_severity_pool_the_right_rows",
            "test_report.py::TestAbout::test_says_what_was_tested_on_what",
        ),
    ),
    18: (
        "With and without are not compared image by image, "
        "or chance is not corrected for the number of shifts",
        (
            "test_pipeline.py::test_every_run_is_judged_on_the_same_images_and_checkpoint",
            "test_metrics.py::TestSummarise::test_numbers_counted_by_hand",
            "test_metrics.py::TestSummarise::test_shifts_are_counted_by_direction_after_holm",
            "test_metrics.py::TestSeveralSeeds::test_mcnemar_holds_in_every_seed",
            "test_metrics.py::TestGroups::test_by_shift_counted_by_hand",
            "test_metrics.py::TestGroups::test_mcnemar_per_shift_with_holm_over_all",
            "test_significance.py::TestMcNemar::test_against_statsmodels",
            "test_significance.py::TestMcNemar::test_several_seeds_take_the_weakest",
            "test_significance.py::TestHolm::test_against_statsmodels",
            "test_intervals.py::TestOneSeed::test_shifts_under_which_images_flip_alike_count_once",
        ),
    ),
    19: (
        "Labels reach what adapts",
        (
            "test_adapting.py::test_labels_change_no_prediction",
            "test_arrivals.py::TestOrder::test_shuffled_is_a_permutation_of_seed_and_name",
            "test_pitfalls.py::TestLabels::"
            "test_random_ones_change_no_prediction_of_a_stream_nor_of_its_gate",
            "test_pitfalls.py::TestLabels::test_nothing_that_adapts_takes_any",
        ),
    ),
    20: (
        "Cost is not told, not of what a GPU really did, "
        "or not beside what views give without training",
        (
            "test_pitfalls.py::TestCost::test_every_reading_of_the_clock_waits_for_the_device",
            "test_pitfalls.py::TestCost::test_waiting_is_for_what_a_gpu_was_given",
            "test_pitfalls.py::TestCost::"
            "test_the_views_of_an_average_are_on_the_clock_whoever_shares_the_weights",
            "test_pitfalls.py::TestCost::"
            "test_the_clock_stands_still_while_a_step_is_only_looked_at",
            "test_pitfalls.py::TestCost::test_the_peak_is_that_of_the_largest_group",
            "test_pitfalls.py::TestCost::test_where_the_peak_is_not_known_none_is_told",
            "test_pitfalls.py::test_views_without_training_are_as_many_as_training_sees",
            "test_metrics.py::TestSummarise::test_numbers_counted_by_hand",
            "test_metrics.py::TestSummarise::test_training_and_gate_counted_by_hand",
            "test_tracking.py::TestLogPredictions::test_agrees_with_the_evaluation",
        ),
    ),
    21: (
        "The controls are missing, or are not what they are called",
        (
            "test_pitfalls.py::test_every_file_compares_with_not_training",
            "test_contract.py::test_no_steps_is_the_source_prediction",
            "test_methods.py::test_view_average_is_the_mean_of_probabilities",
            "test_methods.py::test_the_list_of_methods_tells_what_each_file_says",
            "test_normalisation.py::test_image_is_batch_norm_in_training_mode_on_one_image",
            "test_online.py::test_tent_without_a_step_is_batch_statistics",
            "test_metrics.py::TestSummarise::test_training_and_gate_counted_by_hand",
            "test_diagnosis.py::test_the_oracle_is_the_best_of_all_and_the_tuned_setting_its_own",
        ),
    ),
    22: (
        "A kill loses what was done, or only means are kept",
        (
            "test_adapting.py::test_a_killed_sweep_goes_on_where_it_was_with_the_same_numbers",
            "test_adapting.py::test_ranks_and_a_kill_change_no_bit",
            "test_adapting.py::test_rows_are_those_of_the_adapter_on_the_corrupted_images",
            "test_tuning.py::test_a_killed_tuning_goes_on_where_it_was",
            "test_resuming.py::test_a_folder_survives_failure_and_goes_after_success",
            "test_resuming.py::test_a_kill_while_saving_leaves_the_state_before",
            "test_resuming.py::test_key_follows_stage_settings_and_inputs",
            "test_predictions.py::test_an_image_twice",
        ),
    ),
}


@cache
def declared_in(file: str) -> frozenset[str]:
    """List the functions of a test file, those of a class as ``Class::function``."""
    tree = ast.parse(TESTS[file].read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bodies = [("", tree.body), *((f"{node.name}::", node.body) for node in classes)]
    return frozenset(
        prefix + node.name
        for prefix, body in bodies
        for node in body
        if isinstance(node, ast.FunctionDef)
    )


def test_every_pitfall_has_its_tests_and_they_exist():
    assert list(PITFALLS) == list(range(1, 23))
    for number, (pitfall, names) in PITFALLS.items():
        assert names, pitfall
        for name in names:
            file, _, test = name.partition("::")
            assert test in declared_in(file), f"{number}: {name}"
            assert test.rpartition("::")[2].startswith("test_")


class TestOnePosition:
    """Pitfall 3: PyTorch's BatchNorm in training mode raises an error on a map of one position."""

    @pytest.fixture
    def pixel(self):
        return torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1)

    def test_its_own_statistics_leave_the_bias(self, pixel):
        layer = OneLayer().eval()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            OneLayer().train()(pixel)
        result = apply(layer, pixel, Normalisation("image")).flatten()
        torch.testing.assert_close(result, layer.encoder.norm.bias.detach())

    def test_mixed_statistics_are_mostly_the_sources(self, pixel):
        layer = OneLayer().eval()
        norm = layer.encoder.norm
        mean = 0.9 * norm.running_mean + 0.1 * pixel.flatten()
        variance = 0.9 * (norm.running_var + 1e-5) + 0.1 * 1e-5
        result = apply(layer, pixel, Normalisation("mixed", prior=0.1))
        torch.testing.assert_close(result, batch_norm(pixel, mean, variance, norm))


class TestMode:
    """Pitfall 4: a network with dropout and stochastic depth, in training mode."""

    @pytest.fixture(params=["resnet", "vit"])
    def pair(self, request):
        """The same weights twice: without dropout, and with it in training mode."""
        plain, statistics = networks.source_statistics(request.param)
        drop = {"drop_rate": 0.4, "drop_path_rate": 0.4}
        if request.param == "vit":
            options = networks.VIT | drop | {"proj_drop_rate": 0.4, "attn_drop_rate": 0.4}
            encoder = build_encoder("vit_tiny_patch16_224", networks.SIZE, options=options)
        else:
            options = networks.RESNET | drop
            encoder = build_encoder("resnet18", networks.SIZE, stem="small", options=options)
        random = Network(encoder, networks.CLASSES, copy.deepcopy(plain.head)).double()
        random.load_state_dict(plain.state_dict())
        with torch.no_grad():
            trial = copy.deepcopy(random).train()
            assert not torch.allclose(trial(shifted(4)).logits, trial(shifted(4)).logits)
        return plain, random.train(), statistics

    @pytest.mark.parametrize("run", [adapt, adapt_stream])
    def test_nothing_is_dropped_while_adapting_and_the_mode_comes_back(self, pair, run):
        plain, random, statistics = pair
        kind = SimCLRTraining if hasattr(plain.head, "project") else MAETraining
        method, loop = kind(num_views=2), InnerLoop(steps=2, lr=1e-2, clip=1.0, average=2)
        before = copy.deepcopy(random.state_dict())
        expected = run(plain, shifted(4), method, loop, statistics=statistics)
        result = run(random, shifted(4), method, loop, statistics=statistics)
        for name in ("logits", "source_logits", "losses"):
            values = getattr(result, name), getattr(expected, name)
            torch.testing.assert_close(*values, atol=1e-9, rtol=1e-9)
        assert all(module.training for module in random.modules())
        assert all(torch.equal(value, before[key]) for key, value in random.state_dict().items())

    @pytest.mark.parametrize("name", [n for n in contract.names() if contract.load(n).needs])
    def test_nothing_is_dropped_while_measuring_the_source(self, pair, name):
        plain, random, _ = pair
        method, batches = contract.load(name), [networks.images(24, seed=7).double()]
        try:
            method.check(plain)
        except UserError:
            pytest.skip(f"{name} does not run on this network")

        def measure(network):
            statistics = dict(method.source_statistics(network, batches))
            statistics |= source_statistics.layer_statistics(network, batches)
            if hasattr(network.head, "project"):
                statistics |= source_statistics.projection_bank(network, batches, 8)
            return statistics

        torch.testing.assert_close(measure(random), measure(plain), atol=1e-9, rtol=1e-9)


@dataclass(frozen=True)
class Growing(Method):
    """The loss is the mean square of the logits; the state counts the steps."""

    protocols = ("online",)
    whole_batch = True

    def init_state(self):
        return torch.zeros(())

    def loss(self, net, views, statistics, state):
        return net(views).logits.square().mean(), state + 1


@dataclass(frozen=True)
class Returning(Growing):
    """Goes back to the source weights once, after the first step."""

    def after_step(self, parameters, source, state, generator):
        return (source if state == 1 else parameters), state


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
def test_after_a_reset_a_stream_goes_on_as_one_that_begins(optimizer, momentum):
    """Pitfall 5: the optimiser's state belongs to the weights before the reset."""
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e-2, optimizer=optimizer, momentum=momentum)
    result = adapt_stream(network, shifted(6), Returning(), loop, batch_size=2)
    assert torch.equal(result.logits[:2], result.source_logits[:2])
    begun = adapt_stream(network, shifted(6)[2:], Growing(), loop, batch_size=2)
    torch.testing.assert_close(result.logits[2:], begun.logits, atol=1e-12, rtol=1e-12)
    assert (begun.logits - begun.source_logits).abs().max() > 1e-3


def test_a_loss_that_draws_its_own_random_numbers_is_refused():
    """Pitfall 6: under ``vmap`` they would not be those that an image gets on its own."""

    class Dropping(ActMAD):
        def loss(self, net, views, statistics, state):
            return super().loss(net, torch.nn.functional.dropout(views, 0.5), statistics, state)

    network, statistics = networks.source_statistics("resnet")
    with pytest.raises(RuntimeError, match="randomness"):
        adapt(network, shifted(4), Dropping(), statistics=statistics)


class Transfers(TorchDispatchMode):
    """Counts the bytes that go from the CPU to the device ``meta``, which stands in for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            *_, source = (value for value in args if isinstance(value, Tensor))
            if (source.device.type, result.device.type) == ("cpu", "meta"):
                self.bytes += source.nbytes
        return result


@pytest.mark.parametrize("name", contract.names())
def test_views_are_made_where_the_image_lies(name):
    """Pitfall 7: TTT-MAE makes them on the CPU and sends 77 MB per step.

    Only the random numbers may be drawn on the CPU and sent. What is sent before the first step and
    kept is no cost of a step.
    """
    method = contract.load(name)
    if any(field.name == "num_views" for field in fields(method)):
        method = replace(method, num_views=6)
    for kind in networks.KINDS:
        network, _ = networks.source_statistics(kind)
        try:
            method.check(network)
            break
        except UserError:
            continue
    images = networks.images(3).to("meta")
    generators = [torch_generator(0, "views", number) for number in range(3)]
    method.views(network, images, generators)
    with Transfers() as transfers:
        views = method.views(network, images, generators)
    assert {leaf.device.type for leaf in tree_leaves(views)} == {"meta"}
    assert transfers.bytes < 0.1 * getattr(method, "num_views", 1) * images.nbytes


def test_a_prediction_that_is_no_number_is_the_source_networks_though_all_losses_are():
    """Pitfall 13: only the classifier breaks, which the loss reads before the first step alone."""

    class Breaking(ActMAD):
        def init_state(self):
            return torch.zeros((), dtype=torch.float64)

        def loss(self, net, views, statistics, state):
            loss, _ = super().loss(net, views, statistics, ())
            root = torch.where(views.mean() > 0.99, 0.0, 1.0)  # √ has an infinite slope at 0
            broken = (net.trained["classifier.weight"].sum() * 0 + root).sqrt() * 0
            return loss + torch.where(state > 0, 0.0, broken), state + 1

    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e-4, trainable=("encoder.layer1", "classifier"))
    images = shifted(4)
    images[2] = 1.0
    result = adapt(network, images, Breaking(), loop, statistics=statistics, record=(1,))
    assert result.losses.isfinite().all()
    assert result.fell_back.tolist() == [False, False, True, False]
    for logits in (result.logits, result.logits_at[:, 0]):
        assert torch.equal(logits[2], result.source_logits[2])
        assert (logits != result.source_logits).any(1).tolist() == [True, True, False, True]


def test_the_step_in_use_is_told_though_another_was_better():
    """Pitfall 10: ActMAD's code reports the best of all iterations, which we call the oracle."""
    table = diagnosis.choices(step_rows().assign(used_step=0)).set_index("choice")
    assert table["step"].to_dict() == {"none": 0, "default": 0, "tuned": 0, "oracle": 1}
    assert table["accuracy"].to_dict() == {"none": 0.0, "default": 0.0, "tuned": 0.0, "oracle": 1.0}


READY = [ROOT / "params.yaml", *sorted((ROOT / "settings").glob("*.yaml"))]


@pytest.fixture(params=READY, ids=lambda file: file.stem)
def params(request, tmp_path) -> Params:
    return read_params(request.param, base=lay_out(tmp_path))


def runs_of(params: Params):
    """Every run of a file for each of its models: name, settings and method."""
    for name in params.adapt.runs:
        for model in params.models_of(name):
            run = params.run_settings(name, model)
            objective = params.models[model].objective.model_dump()
            yield name, run, load_method(run.method, run.settings, objective=objective)


def test_every_run_that_trains_has_its_learning_rate_chosen(params):
    """Pitfall 14: published rates lie between 1e-5 and 1e-1, each for one loss and one network.

    Larger is only the rate of a step that a network was trained through, MT3's.
    """
    inner = [model.finetune.inner for model in params.models.values() if not model.whole]
    largest = max([1e-1, *(step.lr for step in inner if step)])
    for name, run, _ in runs_of(params):
        rates = run.search.get("lr", ())
        takes_steps = run.trains and run.loop.steps
        assert not takes_steps or (params.tune.enabled and max(rates) > 2 * min(rates)), name
        assert all(1e-5 <= rate <= largest for rate in rates), name


def test_every_file_compares_with_not_training(params):
    """Pitfall 21: with the source network, with other statistics and with averaged views."""
    runs = [run for _, run, _ in runs_of(params) if not run.trains and run.protocol == "episodic"]
    sources = [run for run in runs if run.method == "none" and not run.loop.average]
    assert "source" in {run.loop.normalisation for run in sources}
    assert {"mixed", "image"} & {run.loop.normalisation for run in runs}
    assert any(run.loop.average or run.method == "views" for run in runs)


@pytest.mark.parametrize("params", READY, ids=[file.stem for file in READY], indirect=True)
def test_views_without_training_are_as_many_as_training_sees(params):
    """Pitfall 20: averaging over more views might gain what training on more views gains."""
    runs = [(run, getattr(method, "num_views", None) or 1) for _, run, method in runs_of(params)]
    averaged = max(max(run.loop.average, views) for run, views in runs if not run.trains)
    assert averaged >= max(views for run, views in runs if run.trains)


def test_statistics_of_weights_that_have_changed_since_are_refused(tmp_path):
    """Pitfall 16: even if nothing but the weights differs."""
    network, _ = trainings.build(trainings.SIMCLR)
    about = {"settings": trainings.SIMCLR, "classes": ("a", "b", "c"), "image_size": trainings.SIZE}
    before = checkpoints.save(network, tmp_path / "network", **about)["sha256"]
    measured = {"layer.mean_center": torch.arange(3.0)}
    source_statistics.save(measured, tmp_path / "statistics", checkpoint=before, images=20)
    checkpoint = checkpoints.load(tmp_path / "network")[1]["sha256"]
    loaded = source_statistics.load(tmp_path / "statistics", checkpoint)
    assert torch.equal(loaded["layer.mean_center"], measured["layer.mean_center"])
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-6
    after = checkpoints.save(network, tmp_path / "network", **about)["sha256"]
    message = f"expected statistics of checkpoint {after[:12]}, found those of {before[:12]}"
    with pytest.raises(UserError, match=message):
        source_statistics.load(tmp_path / "statistics", after)


def test_a_network_says_which_versions_trained_it(tmp_path):
    """Pitfall 17: numbers depend on the code, the libraries and the weights."""
    network, _ = trainings.build(trainings.SIMCLR)
    about = {"settings": trainings.SIMCLR, "classes": ("a", "b", "c"), "image_size": trainings.SIZE}
    checkpoints.save(network, tmp_path, **about)
    libraries = {name: version(name) for name in ("torch", "timm", "lightly")}
    _, loaded = checkpoints.load(tmp_path)
    assert loaded["versions"] == libraries | {"tttlab": version("ttt-lab")}


def test_the_hash_that_is_recorded_is_of_every_pixel():
    """Pitfall 17: another release of a shifted set moves the source network's error by a point."""
    pixels = np.random.default_rng(0).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    images = ImageSet(pixels, np.zeros(3, int), ("a", "b", "c"), ("k",), source="made")
    assert images.digest() == hashlib.sha256(pixels.tobytes()).hexdigest()
    other = pixels.copy()
    other[2, 15, 15, 2] ^= 1
    assert replace(images, pixels=other).digest() != images.digest()


class TestLabels:
    """Pitfall 19: labels do not reach the code that adapts."""

    @pytest.mark.parametrize("shifts", ["separate", "continual", "mixed"])
    def test_random_ones_change_no_prediction_of_a_stream_nor_of_its_gate(self, shifts, tmp_path):
        network, statistics = networks.source_statistics("resnet", torch.float32)
        pixels = (networks.images(6, seed=40).permute(0, 2, 3, 1) * 255).byte().numpy()
        image_ids = tuple(f"img-{i}" for i in range(6))
        loop, tables = InnerLoop(steps=1, lr=1e-2, clip=1.0, trainable="norm"), []
        random = np.random.default_rng(0).integers(networks.CLASSES, size=6)
        for labels in (np.arange(6) % networks.CLASSES, random):
            images = ImageSet(pixels, labels, image_ids, tuple("abcd"), source="made")
            with Work(tmp_path / str(len(tables))) as work:
                task = Task(network, TENT(), loop, statistics, seed=3)
                stream, gate = Stream(4, shifts=shifts), Gate("distance", 1.0)
                experiment = Experiment(task, images, stream, gate)
                shown = list_shifts(["fog", "contrast"], [2, 5])
                table, _ = adapt_to_shifts(Sweep(experiment, shown, work, "model"))
            tables.append(table)
        assert (tables[0]["label"] != tables[1]["label"]).any()
        different = ["label", "milliseconds", "gate_milliseconds"]
        first, second = (table.drop(columns=different) for table in tables)
        pd.testing.assert_frame_equal(first, second)

    def test_nothing_that_adapts_takes_any(self):
        hooks = [value for value in vars(Method).values() if inspect.isfunction(value)]
        functions = [
            adapt,
            adapt_stream,
            adapt_together,
            online.learning,
            Learner.__init__,
            Learner.adapt,
            *hooks,
        ]
        for function in functions:
            names = " ".join(inspect.signature(function).parameters)
            labels = [word for word in ("label", "target", "truth", "class") if word in names]
            assert not labels, function


class TestCost:
    """Pitfall 20: the time includes the GPU's work but no recording; the memory is the largest."""

    def test_every_reading_of_the_clock_waits_for_the_device(self, monkeypatch):
        network, statistics = networks.source_statistics("resnet")
        events = []

        def read() -> float:
            events.append("read")
            return float(len(events))

        monkeypatch.setattr(curves, "time", SimpleNamespace(perf_counter=read))
        monkeypatch.setattr(curves, "wait_for", lambda _device: events.append("wait"))
        loop = InnerLoop(steps=1, trainable="norm")
        for run in (adapt, adapt_stream):
            events.clear()
            run(network, shifted(4), TENT(), loop, statistics=statistics, record=(0, 1))
            assert events[:2] == ["wait", "read"]
            reads = [position for position, event in enumerate(events) if event == "read"]
            assert all(events[position - 1] == "wait" for position in reads)

    def test_waiting_is_for_what_a_gpu_was_given(self, monkeypatch):
        waited = []
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        devices.wait_for(torch.device("cpu"))
        devices.wait_for(torch.device("cuda", 0))
        assert waited == [torch.device("cuda", 0)]

    @pytest.mark.parametrize("run", [adapt, adapt_stream])
    def test_the_views_of_an_average_are_on_the_clock_whoever_shares_the_weights(
        self, run, monkeypatch
    ):
        """Drawing takes 2 s and a prediction 3 s; that of the source weights does not count."""
        network, statistics = networks.source_statistics("resnet")
        now, draw, average = [0.0], predicting.random_views, log_mean_probabilities
        monkeypatch.setattr(curves, "time", SimpleNamespace(perf_counter=lambda: now[0]))

        def costly(seconds, function):
            def call(*arguments):
                now[0] += seconds
                return function(*arguments)

            return call

        monkeypatch.setattr(predicting, "random_views", costly(2.0, draw))
        for module in (predicting, online):
            monkeypatch.setattr(module, "log_mean_probabilities", costly(3.0, average))
        loop = InnerLoop(steps=1, lr=1e-3, trainable="norm", average=3)
        result = run(network, shifted(4), TENT(), loop, statistics=statistics, record=(0, 1))
        assert result.milliseconds.tolist() == [5000 / 4] * 4
        assert result.milliseconds_at.tolist() == [[5000 / 4] * 2] * 4

    def test_the_clock_stands_still_while_a_step_is_only_looked_at(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(curves, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        curve = Curve((1, 2), torch.device("cpu"))

        def look() -> Tensor:
            now[0] += 5.0
            return torch.zeros(2, 3)

        for step in (1, 2):
            now[0] += 1.0
            curve.note(step, look)
        assert curve.spent() == 2000.0
        _, milliseconds = curve.collect(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
        # The time of that many steps and of one prediction, which takes 5 s for two images.
        assert milliseconds.tolist() == [[(1000 + 5000) / 2, (2000 + 5000) / 2]] * 2

    def test_the_peak_is_that_of_the_largest_group(self, monkeypatch):
        device, peak = torch.device("cuda"), [0]
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
        monkeypatch.setattr(
            torch.cuda, "reset_peak_memory_stats", lambda _device: peak.__setitem__(0, 0)
        )
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: peak[0])
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**30, 2**30))
        devices.forget_peak(device)
        # `auto` measures the peak of every size on its own.
        for groups in (GroupSize(8), GroupSize("auto"), GroupSize("auto", timed=False)):
            for size in (8, 8, 1):
                with groups.open(size, device):
                    peak[0] = max(peak[0], (size if groups.growing else 3 * size) * 2**20)
        assert devices.peak_memory(device) == 24.0
        devices.forget_peak(device)
        assert devices.peak_memory(device) == 0.0

    def test_where_the_peak_is_not_known_none_is_told(self):
        """On a CPU it would be the peak since the process began, and each worker has its own."""
        devices.forget_peak(torch.device("cpu"))
        assert devices.peak_memory(torch.device("cpu")) is None
