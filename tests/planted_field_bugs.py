"""Faults that real files, models, tools and stops brought out, planted one at a time as the hazards are.

python tests/planted_field_bugs.py          all of them
python tests/planted_field_bugs.py photo    those with the word in their names
"""

from __future__ import annotations

import sys

from planted_bugs import Bug, try_all

FIELD_BUGS = {
    "two threads share a tokenizer": Bug(
        0,
        "evaluation/generation/generate.py",
        "free.put(copy.deepcopy(generator.processor))",
        "free.put(generator.processor)",
        "test_evaluation_threads.py::test_answers_read_ahead_beside_a_thread_that_tokenizes_without_padding",
    ),
    "a packed row mixes its records": Bug(
        0,
        "models/attention/probe.py",
        "if any(differ(part, of) for part, of in zip(parts, (*alone, alone[1]), strict=True)):",
        "if False:",
        "test_models_probe.py::test_a_model_that_mixes_packed_records_is_refused_by_name",
    ),
    "a model that sees later tokens": Bug(
        0,
        "models/attention/probe.py",
        "if differ(changed_BTD[0, : _LONG - 1], padded_BTD[0, : _LONG - 1]):",
        "if False:",
        "test_models_probe.py::test_a_model_that_sees_later_tokens_is_refused",
    ),
    "equal weights, other features": Bug(
        0,
        "models/towers/vision_tower.py",
        "json.dumps([pixels, choice, settings]",
        "json.dumps([pixels, choice]",
        "test_models_vision_tower.py::test_a_fingerprint_differs_when_anything_that_makes_features_does",
    ),
    "positions that turn with the batch": Bug(
        0,
        "models/attention/row_limits.py",
        "if max_length > original:",
        "if False:",
        "test_models_row_limits.py::test_what_is_too_long_is_refused",
    ),
    "scores of random weights": Bug(
        0,
        "models/reading.py",
        'if missing := sorted(info["missing_keys"]):',
        "if missing := sorted(set()):",
        "test_evaluation_bad_input.py::test_a_model_that_lacks_weights_answers_nothing",
    ),
    "adapters that are not merged": Bug(
        0,
        "models/lora.py",
        "whole.float() + scaling * (",
        "whole.float() + 0.0 * (",
        "test_models_lora_experts.py::test_what_was_put_in_is_merged_into_a_stock_model",
    ),
    "padding that the saved processor does not do": Bug(
        0,
        "assembly/parts/data.py",
        "do_pad=True,",
        "do_pad=False,",
        "test_models_served.py::test_a_padded_picture_is_seen_whole_where_the_processor_would_crop",
    ),
    "batches padded on the right": Bug(
        0,
        "models/files/served.py",
        'tokenizer.init_kwargs["padding_side"] = "left"',
        'tokenizer.init_kwargs["padding_side"] = "right"',
        "test_models_served.py::test_the_saved_ends_and_sides_are_those_of_the_template",
    ),
    "an end token that no answer has": Bug(
        0,
        "models/files/served.py",
        "if end is not None and end != tokenizer.eos_token_id:",
        "if False:",
        "test_models_served.py::test_the_saved_ends_and_sides_are_those_of_the_template",
    ),
    "a checkpoint's own prompt is lost": Bug(
        0,
        "data/text/template_choice.py",
        "if template is None and is_trained:",
        "if False:",
        "test_data_template_choice.py::test_a_template_that_is_none_of_ours_is_kept",
    ),
    "positions that transformers 4 does not find": Bug(
        0,
        "models/files/older_tools.py",
        "found = {key: flat[key] for key in apart if key in flat}",
        "found: dict = {}",
        "test_models_export.py::test_positions_stand_where_transformers_4_has_them",
    ),
    "files for their owner alone": Bug(
        0,
        "tensor_files.py",
        "path.chmod(mode)",
        "pass",
        "test_tensor_files.py::test_the_umask_says_who_reads_what_is_written",
    ),
    "a folder of the machine in a card": Bug(
        0,
        "models/files/card.py",
        "return path.parent.name if of_a_run else path.name",
        "return text",
        "test_models_export.py::test_a_setting_is_shown_by_name",
    ),
    "one record stops everything": Bug(
        0,
        "data/sources/conversation.py",
        "        return Record(id=_name(raw, position), images=(), turns=(), fault=str(error))",
        "        raise error",
        "test_data_records.py::test_unusable_record_keeps_its_place_and_is_named",
    ),
    "deep grey becomes white": Bug(
        0,
        "data/pixels/modes.py",
        'if image.mode.startswith("I;16") or (',
        "if False and (",
        "test_data_image_modes.py::test_deep_grey_keeps_its_high_bits",
    ),
    "a thin picture is made whole": Bug(
        0,
        "data/pixels/images.py",
        "return max(padded**2, rows * whole[1], whole[0] * whole[1]) > max(_MADE, 1.5 * height * width)",
        "return rows < 0",
        "test_data_thin_images.py::test_memory_of_a_thin_image_is_bounded",
    ),
    "a photo turned the other way": Bug(
        0,
        "data/pixels/orientation.py",
        "6: (True, False, True),",
        "6: (True, True, False),",
        "test_data_orientation.py::test_a_photo_is_turned_as_pillow_turns_it",
    ),
    "a damaged block is a bad picture": Bug(
        0,
        "data/pixels/images.py",
        "    except _PILLOW_ERRORS:\n        return AS_STORED",
        "    except KeyboardInterrupt:\n        return AS_STORED",
        "test_data_orientation.py::test_a_damaged_block_is_no_bad_picture_and_never_another_turn_than_pillows",
    ),
    "a device that turns nothing": Bug(
        0,
        "data/batches/micro_batches.py",
        "if not self._upright or orientation(",
        "if True or orientation(",
        "test_data_orientation.py::test_a_device_decodes_only_what_need_not_be_turned",
    ),
    "a run forgets that it turns": Bug(
        0,
        "data/batches/model_side.py",
        'turns = "\\0upright" if self.upright else ""',
        'turns = ""',
        "test_data_orientation.py::test_only_a_side_that_turns_has_another_fingerprint",
    ),
    "eval forgets that it turns": Bug(
        0,
        "evaluation/generation/generate.py",
        "upright = reads_upright(processor)",
        "upright = False",
        "test_assembly_orientation.py::test_eval_chat_and_slices_of_it_turn_photos_and_those_of_others_do_not",
    ),
    "a cache forgets that it turns": Bug(
        0,
        "assembly/parts/stored_teacher.py",
        '"apply" if reader.upright else "ignore"',
        '"ignore"',
        "test_assembly_orientation.py::test_a_cache_of_the_other_setting_is_refused_by_its_name",
    ),
    "a next stage forgets that it turns": Bug(
        0,
        "assembly/parts/data.py",
        'if config.exif == "ignore" and reads_upright(processor):',
        "if False:",
        "test_assembly_orientation.py::test_a_stage_that_would_forget_it_is_refused",
    ),
    "words that open a turn": Bug(
        0,
        "data/text/encoder.py",
        "covered = self._control.covered([(turn.text, record.has_places(turn)) for turn in record.turns])",
        "covered = None",
        "test_data_control_words.py::test_control_words_of_a_record_are_text",
    ),
    "a stop that reaches the workers": Bug(
        0,
        "data/batches/worker_processes.py",
        "_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)",
        "_STOPS = (signal.SIGHUP,)",
        "test_data_worker_processes.py::test_a_stop_of_the_whole_group_does_not_reach_the_workers",
    ),
    "a worker that nobody ends": Bug(
        0,
        "data/batches/worker_processes.py",
        "        os._exit(1)",
        "        return",
        "test_data_worker_processes.py::test_a_killed_trainer_leaves_no_worker_and_its_pipe_closes",
    ),
    "a traceback for what a user can mend": Bug(
        0,
        "data/batches/worker_processes.py",
        "except (ValueError, OSError) as error:",
        "except KeyboardInterrupt as error:",
        "test_data_worker_processes.py::test_what_a_user_can_mend_comes_without_a_traceback_and_a_fault_with_one",
    ),
    "a tracker that begins anew": Bug(
        0,
        "training/trackers.py",
        'if found["project"] == project:',
        "if False:",
        "test_training_metrics.py::test_a_run_that_goes_on_asks_wandb_for_the_same_id",
    ),
    "a damaged header ends a shard": Bug(
        0,
        "data/sources/tar_walk.py",
        "            _check_end(stream.fileno(), archive.offset, size)",
        "            pass",
        "test_data_tar_walk.py::test_every_flipped_bit_of_a_header_is_named",
    ),
    "a stop that another error replaces": Bug(
        0,
        "assembly/runs/stopping.py",
        "raise SystemExit(status_after(told[0])) from None",
        "raise",
        "test_cli_stop.py::test_a_library_that_stumbles_over_the_stop_does_not_make_a_failure_of_it",
    ),
    "a group that is left to the end of Python": Bug(
        0,
        "assembly/runs/ending.py",
        "dist.destroy_process_group()",
        "pass",
        "distributed/test_rank_ends.py::test_a_finished_command_leaves_the_group",
    ),
    "Python that ends beside a collective": Bug(
        0,
        "assembly/runs/ending.py",
        "os._exit(status)",
        "pass",
        "distributed/test_rank_ends.py::test_a_failed_command_ends_a_rank_at_once_beside_a_collective_that_never_ends",
    ),
    "a flipped bit of a checkpoint": Bug(
        0,
        "training/checkpoint.py",
        'if meta["checksum"] != meta_checksum(meta):',
        "if False:",
        "test_training_checkpoint.py::test_every_flipped_bit_of_trainer_json_is_harmless_or_passed_over_by_name",
    ),
    "a flipped bit of a teacher's head": Bug(
        0,
        "data/teacher_store/store.py",
        "if found != self.checksums[name]:",
        "if False:",
        "test_checksums.py::test_training_looks_at_the_head_and_the_index",
    ),
    "figures lost by a resume": Bug(
        0,
        "training/metrics.py",
        'write_text(self._path, "".join(f"{line}\\n" for line in kept))',
        'self._path.write_text("".join(f"{line}\\n" for line in kept))',
        "test_training_metrics.py::test_a_resume_that_cannot_write_keeps_every_line",
    ),
    "an export that does not know itself": Bug(
        0,
        "models/files/export.py",
        "if _request_of(out) != request:",
        "if _request_of(out) != 0:",
        "test_models_export.py::test_an_export_that_is_killed_leaves_nothing_and_the_same_command_makes_it",
    ),
    "a tied head written twice": Bug(
        0,
        "models/files/checkpoint.py",
        '    if stock.config.tie_word_embeddings:\n        del state["lm_head.weight"]',
        "    state = {name: tensor.clone() for name, tensor in state.items()}",
        "test_models_export.py::test_what_a_run_and_an_export_write_is_each_weight_once",
    ),
    "a space before every answer": Bug(
        0,
        "evaluation/generation/chat.py",
        "skip_special_tokens=True).lstrip()",
        "skip_special_tokens=True)",
        "test_evaluation_chat.py::test_the_space_before_an_answer_is_not_printed",
    ),
}


if __name__ == "__main__":
    word = " ".join(sys.argv[1:])
    sys.exit(try_all({name: bug for name, bug in FIELD_BUGS.items() if word in name}))
