"""The rows of checks that are tests: which tests, and which of them take the guard off and see the row fail."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """what: in a few words. tests: node ids, whole files among them. unguarded: node ids, of other tests or of these.

    Tests named unguarded pass where the row fails without its guard; their names say what happens then.
    """

    what: str
    tests: list[str]
    unguarded: tuple[str, ...] = ()


LOOP, RESUME = "tests/pretrain/test_loop.py::test_", "tests/pretrain/test_resume.py::test_"
SAVED, BATCHES = "tests/pretrain/test_checkpoint.py::test_", "tests/pretrain/test_batches.py::test_"
RANKS, PAIRS = "tests/pretrain/test_parallel.py::test_", "tests/pretrain/test_pairs.py::test_"
MASKS, NATIVE = "tests/pretrain/test_masking.py::test_", "tests/encoder/test_native.py::test_"
MODEL, HOOKS = "tests/encoder/test_model.py::test_", "tests/encoder/test_attention_interface.py::test_"
ATTENTION, LOSS = "tests/kernels/test_attention.py::test_", "tests/kernels/test_loss.py::test_"
HERE = "tests/reliability/test_"
SAVING, DRIFT, HOSTILE = f"{HERE}saving.py::test_", f"{HERE}drift.py::test_", f"{HERE}hostile_files.py::test_"

TESTS: dict[str, Row] = {
    "1": Row("stop and resume at five points", [f"{RESUME}resumed_run_equals_uninterrupted_run"]),
    "3": Row("two resumes; an epoch's edge", [
        f"{RESUME}dropout_and_two_resumes_change_nothing",
        f"{RESUME}a_resume_at_the_edge_of_an_epoch_repeats_and_loses_no_row"]),
    "4": Row("loader workers 0 to 4 across a resume", [
        f"{BATCHES}loader_workers_change_nothing_and_resume_in_the_middle", f"{LOOP}workers_change_nothing"]),
    "5": Row("ranks 2, 1, 2", [f"{RANKS}a_run_goes_from_two_ranks_to_one_to_two"]),
    "6": Row("a state file missing", [
        f"{SAVED}damaged_file_is_named_and_the_one_before_is_used",
        f"{RESUME}resume_refuses_to_start_over_when_every_checkpoint_is_damaged"]),
    "8": Row("each file missing, cut, empty, zeroed", [f"{SAVED}damaged_file_is_named_and_the_one_before_is_used"],
             (f"{SAVED}damage_passes_unseen_without_verification",)),
    "9": Row("200 of 200 bit flips", [f"{SAVED}200_bit_flips_are_found"],
             (f"{SAVED}bit_flips_pass_unseen_without_checksums",)),
    "10": Row("the two newest damaged", [f"{SAVED}two_newest_damaged_and_the_third_loads"],
              (f"{SAVED}without_verification_the_newest_is_taken_though_damaged",)),
    "11": Row("retention", [
        f"{SAVED}retention_counts_whole_ones_only", f"{SAVING}the_best_stays_beside_the_newest",
        f"{SAVING}a_run_keeps_the_checkpoint_with_the_lowest_held_out_loss"],
        (f"{SAVED}without_the_rule_of_retention_fewer_than_two_whole_ones_stay",)),
    "12": Row("full disk during a save", [
        f"{SAVED}full_disk_is_a_clear_error_and_the_old_one_stays",
        f"{SAVING}a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room"],
        (f"{SAVING}a_save_in_place_lists_a_part_when_the_disk_is_full",)),
    "13 c": Row("asynchronous: order, errors, slow disk", [f"{HERE}saving.py"], (
        f"{SAVING}without_a_copy_later_steps_would_be_in_the_checkpoint",
        f"{SAVING}without_waiting_for_the_one_before_commits_lose_their_order")),
    "14 c": Row("signals, one process", [f"{HERE}stopping.py"], (
        f"{HERE}stopping.py::test_without_the_handler_a_signal_loses_the_steps_since_the_last_checkpoint",)),
    "16 c": Row("not finite: nothing applied, rows told", [
        f"{LOOP}not_finite_gradient_stops_before_any_update",
        f"{LOOP}a_device_that_is_not_waited_for_skips_a_bad_step_and_tells_it_at_the_next_line"]),
    "17 c": Row("a loss a hundred times as large", [f"{HERE}spikes.py"],
                (f"{HERE}spikes.py::test_without_the_guard_the_spike_moves_the_weights",)),
    "18": Row("loader worker killed, hung", [
        f"{BATCHES}a_killed_worker_is_an_error_within_seconds",
        f"{BATCHES}a_hanging_worker_is_an_error_after_the_timeout"],
        (f"{BATCHES}without_the_timeout_a_hanging_worker_is_waited_for",)),
    "21": Row("out of memory names the settings", [
        f"{SAVING}out_of_memory_names_the_settings_to_change_and_they_keep_the_batch"]),
    "22": Row("settings changed on resume", [f"{HERE}drift.py"],
              (f"{DRIFT}without_the_comparison_a_changed_seed_gives_other_weights_silently",)),
    "23": Row("corpus changed by a byte", [f"{RESUME}resume_refuses_another_corpus_at_the_same_place"],
              (f"{DRIFT}a_corpus_changed_by_a_byte_is_refused_and_without_checksums_it_is_not",)),
    "25": Row("logits against transformers", [
        f"{NATIVE}saved_folder_gives_transformers_logits",
        f"{NATIVE}transformers_checkpoint_loads_with_equal_logits"]),
    "26": Row("gradients against transformers", [
        f"{NATIVE}gradients_equal_transformers", f"{NATIVE}gradients_in_bf16_are_near_those_of_transformers"]),
    "27": Row("backends against the float64 reference", [
        f"{ATTENTION}torch_equals_float64_reference",
        f"{ATTENTION}bf16_error_is_at_most_twice_that_of_eager_bf16",
        f"{HOOKS}sequence_of_padding_alone_gives_zeros_and_finite_gradients"]),
    "28": Row("packed, padded, one by one", [
        f"{MODEL}packed_equals_one_by_one", f"{MODEL}nothing_leaks_between_packed_sequences",
        f"{ATTENTION}packed_equals_one_by_one", f"{ATTENTION}nothing_leaks_between_packed_sequences",
        f"{HOOKS}equals_unpadded_attention_in_float64"]),
    "29": Row("masked-only loss against full-logit loss", [
        f"{MODEL}loss_at_masked_positions_equals_full_logit_loss", f"{LOSS}equals_full_logits_in_float64"]),
    "30": Row("accumulation and ranks", [
        f"{LOOP}one_step_of_uneven_micro_batches_has_the_gradients_of_one_batch",
        f"{LOOP}micro_batches_change_only_the_order_of_summation", f"{LOOP}two_processes_learn_what_one_learns",
        f"{RANKS}one_step_of_two_ranks_has_the_gradients_of_one"]),
    "31": Row("loss at step 0; one batch learned by heart", [
        f"{MODEL}first_loss_is_that_of_a_uniform_guess", f"{MODEL}overfits_one_batch"]),
    "32": Row("masking", [
        f"{MASKS}rate_and_split_are_within_four_sigma_on_240k_tokens",
        f"{MASKS}special_ids_are_never_selected_nor_inserted_and_each_piece_has_a_target",
        f"{MASKS}words_are_masked_whole", f"{MASKS}seed_and_epoch_give_other_masks"]),
    "33": Row("next sentences", [
        f"{PAIRS}half_of_the_pairs_are_changed_within_four_sigma",
        f"{PAIRS}parts_are_whole_sentences_and_replacements_are_of_other_documents",
        f"{PAIRS}a_corpus_without_pairs_is_refused"]),
    "34": Row("golden loss curve", [f"{LOOP}losses_are_the_golden_ones"]),
    "35": Row("fp32 weights under bf16", [
        f"{SAVING}weights_are_fp32_under_bf16_and_bf16_weights_would_freeze"], (
        f"{SAVING}weights_are_fp32_under_bf16_and_bf16_weights_would_freeze",)),
    "36": Row("strangers' files; 37: archives and bombs", [f"{HERE}hostile_files.py", f"{HERE}hostile_corpora.py"], (
        f"{HOSTILE}pickles_are_not_run", f"{HOSTILE}code_in_the_folder_is_not_run",
        f"{HOSTILE}other_folders_are_not_read", f"{HERE}hostile_corpora.py::test_bombs_stay_within_memory")),
    "38": Row("planted secrets", [f"{HERE}secrets.py"], (f"{HERE}secrets.py::test_tracebacks_hold_no_secret",)),
    "39": Row("bad inputs", [f"{HERE}bad_inputs.py"]),
    "40": Row("properties of order, packing, masking, manifest, settings", [
        "tests/pretrain/test_order.py", "tests/pretrain/test_batch_properties.py", "tests/pretrain/test_masking.py",
        "tests/encoder/test_packing.py", "tests/pretrain/test_selection.py",
        "tests/pretrain/test_prepare_properties.py",
        "tests/pretrain/test_command_line.py::test_written_settings_read_back_equal",
        "tests/pretrain/test_command_line.py::test_any_recipe_reads_back_equal"]),
}  # fmt: skip


def missing(rows: Iterable[str] = TESTS) -> list[str]:
    """Node ids of these rows that name no test; nothing is imported."""
    nodes = dict.fromkeys(node for row in rows for node in (*TESTS[row].tests, *TESTS[row].unguarded))
    return [node for node in nodes if not _exists(*node.partition("::")[::2])]


def _exists(file: str, test: str) -> bool:
    path = ROOT / file
    if not path.is_file():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return not test or any(isinstance(part, ast.FunctionDef) and part.name == test for part in tree.body)
