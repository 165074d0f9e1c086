"""Which test shows what: 45 things that five articles on learning-rate schedules name, 15 traps, and what always holds.

The articles are widely read; one of them is on Stable Diffusion LoRA. `unit/test_evidence.py` checks that every row is
there, that its tests exist and are collected, that its links lead somewhere, and that its commands run.
"""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """A row: the answer is a command (`schedules` is short for `lora-trainer schedules`) or a section of docs/."""

    id: str
    what: str
    answer: str
    tests: tuple[str, ...]
    """Node ids, from tests/."""


NAMED = (
    Claim(
        "S1",
        "the LR is a step size, changed by rule, larger first",
        "`schedules plot cosine --terminal`",
        (
            "unit/test_preview.py::test_previews_never_load_torch",
            "unit/test_schedule_properties.py::test_finite_between_nothing_and_the_base_and_clamped",
        ),
    ),
    Claim(
        "S2",
        "`linear`",
        "`schedules explain linear`",
        ("unit/test_classic_schedules.py::test_golden_values",),
    ),
    Claim(
        "S3",
        "`cosine`; needs the length of the run",
        "`schedules explain cosine`",
        (
            "unit/test_classic_schedules.py::test_golden_values",
            "unit/test_config.py::test_what_makes_no_sense_is_refused_with_a_fix",
        ),
    ),
    Claim(
        "S4",
        "`cosine_with_restarts`: one jump fewer than cycles",
        "`schedules plot cosine_with_restarts num_cycles=4`",
        (
            "unit/test_classic_schedules.py::test_golden_values",
            "unit/test_schedule_properties.py::test_restarts_jump_up_once_less_than_cycles_and_where_they_are_marked",
        ),
    ),
    Claim(
        "S5",
        "`polynomial`: the power sets the speed",
        "`schedules plot polynomial power=3`",
        ("unit/test_classic_schedules.py::test_polynomial_lies_on_linear_with_power_one_and_below_it_with_two",),
    ),
    Claim(
        "S6",
        "`constant`; a warm-up for it is refused",
        "`schedules plot constant warmup_steps=10`",
        (
            "unit/test_classic_schedules.py::test_golden_values",
            "unit/test_preview.py::test_what_cannot_be_previewed",
        ),
    ),
    Claim(
        "S7",
        "`constant_with_warmup`",
        "`schedules explain constant_with_warmup`",
        ("unit/test_classic_schedules.py::test_golden_values",),
    ),
    Claim(
        "S8",
        "one picture of the six",
        "`schedules plot -o six.png`",
        (
            "unit/test_preview.py::test_the_figure_of_the_six_has_six_curves_by_name",
            "unit/test_preview.py::test_the_default_preview_is_the_classic_six_over_one_run",
        ),
    ),
    Claim(
        "S9",
        "half every ten epochs",
        "`schedules plot step step_size=10ep gamma=0.5`",
        ("unit/test_schedules.py::test_step_every_ten_epochs",),
    ),
    Claim(
        "S10",
        "what each suits, and where it fails",
        "`schedules explain NAME`, [which schedule](learning_rates.md#which-schedule)",
        ("unit/test_preview.py::test_every_schedule_is_listed_shown_and_explained",),
    ),
    Claim(
        "S11",
        "0.99 per update",
        "`schedules plot exponential unit=step gamma=0.99 --steps 3000 --lr 5e-5`",
        ("unit/test_schedules.py::test_exponential_per_step_golden",),
    ),
    Claim(
        "S12",
        "torch's periodic cosine",
        "`schedules plot cosine_annealing t_max=1000 --steps 3000`",
        (
            "unit/test_schedules.py::test_cosine_annealing_golden",
            "unit/test_schedules.py::test_equals_torch_at_every_update",
        ),
    ),
    Claim(
        "S13",
        "a tenth every 500 updates",
        "`schedules plot step step_size=500 --steps 3000`",
        ("unit/test_schedules.py::test_step_and_multistep_golden",),
    ),
    Claim(
        "S14",
        "a tenth at two milestones",
        "`schedules plot multistep milestones=[1000,2000] --steps 3000`",
        ("unit/test_schedules.py::test_step_and_multistep_golden",),
    ),
    Claim(
        "S15",
        "polynomial of power 2 with a warm-up and an end",
        "`schedules plot polynomial power=2 warmup_steps=100 --steps 3000 --lr 5e-5`",
        ("unit/test_classic_schedules.py::test_polynomial_golden_values",),
    ),
    Claim(
        "S16",
        "the order of optimizer and scheduler",
        "nothing is stepped: the LR is written before the update",
        (
            "integration/test_invariance.py::test_the_lr_in_the_log_is_the_one_the_optimizer_used",
            "integration/test_groups.py::test_each_group_has_its_own_curve_and_the_optimizer_uses_it",
        ),
    ),
    Claim(
        "S17",
        "a large plot with axes, grid, legend, dashed marks",
        "`schedules plot linear warmup_steps=10% -o one.png`",
        (
            "unit/test_preview.py::test_legends_name_each_kind_of_mark_once",
            "unit/test_preview.py::test_a_plot_marks_what_happens",
            "unit/test_preview.py::test_a_picture_of_five_thousand_steps_with_each_label_once",
        ),
    ),
    Claim(
        "S18",
        "schedulers of torch and of transformers",
        "`schedules list`",
        (
            "unit/test_schedules.py::test_equals_torch_at_every_update",
            "unit/test_schedules.py::test_equals_transformers_at_every_update",
            "unit/test_schedules.py::test_torch_schedules_are_tabulated_with_the_runs_numbers",
        ),
    ),
    Claim(
        "S19",
        "five families and when to use them",
        "[which schedule](learning_rates.md#which-schedule), [gallery](schedules.md#all-of-them)",
        ("unit/test_shipped_files.py::test_every_schedule_has_its_picture_in_the_gallery",),
    ),
    Claim(
        "S20",
        "the LR is a length, not a frequency",
        "`lora-trainer plan --config F`, [what it is](learning_rates.md#what-a-learning-rate-is)",
        ("unit/test_plan.py::test_a_plan_is_explained_as_frequency_duration_and_intensity",),
    ),
    Claim(
        "S21",
        "new = old - LR x gradient",
        "[what it is](learning_rates.md#what-a-learning-rate-is)",
        ("integration/test_optimizers.py::test_sgd_moves_by_lr_times_gradient",),
    ),
    Claim(
        "S22",
        "steps per epoch",
        "`lora-trainer plan --config F`, [arithmetic](learning_rates.md#the-arithmetic-of-steps)",
        ("unit/test_plan.py::test_updates_per_epoch",),
    ),
    Claim(
        "S23",
        "too large swings or diverges, too small crawls",
        "[symptoms](learning_rates.md#symptoms), [real runs](diagnosis.md#how-it-was-judged)",
        (
            "integration/test_quadratic.py::test_above_two_over_the_curvature_it_diverges",
            "integration/test_quadratic.py::test_between_one_and_two_it_swings_and_settles",
            "integration/test_quadratic.py::test_below_one_it_falls_without_a_swing_and_ten_times_smaller_takes_ten_times_as_long",
        ),
    ),
    Claim(
        "S24",
        "a plan is frequency, duration, intensity",
        "`lora-trainer plan --config F`",
        ("unit/test_plan.py::test_a_plan_is_explained_as_frequency_duration_and_intensity",),
    ),
    Claim(
        "S25",
        "an LR lies between 0 and 1",
        "[usual ranges](learning_rates.md#usual-ranges)",
        (
            "unit/test_config.py::test_what_is_no_learning_rate",
            "integration/test_optimizers.py::test_pairs_that_make_no_sense_are_refused",
        ),
    ),
    Claim(
        "S26",
        "bands of too large, too small, moderate",
        "[usual ranges](learning_rates.md#usual-ranges), noted in the plan",
        ("unit/test_lr_notes.py::test_the_range_is_the_optimizers",),
    ),
    Claim(
        "S27",
        "recommended rates: general, conservative, full",
        "`lora-trainer presets`",
        ("unit/test_preview.py::test_the_recommended_learning_rates",),
    ),
    Claim(
        "S28",
        "1e-4 for LoRA, 5e-6 for all weights",
        "`lora-trainer presets lora`",
        (
            "unit/test_preview.py::test_the_recommended_learning_rates",
            "unit/test_config.py::test_defaults",
        ),
    ),
    Claim(
        "S29",
        "smaller rates for small sets",
        "`lora-trainer plan --config F`, [what moves it](learning_rates.md#what-moves-the-right-value)",
        ("unit/test_lr_notes.py::test_a_small_set_is_noted",),
    ),
    Claim(
        "S30",
        "warm-up k / W, never longer than the run",
        "`schedules plot linear warmup_steps=100%`",
        (
            "unit/test_classic_schedules.py::test_a_warmup_as_long_as_the_run_is_refused",
            "unit/test_schedule_properties.py::test_the_warmup_rises_to_the_top_without_a_jump",
        ),
    ),
    Claim(
        "S31",
        "cosine without a warm-up as a formula",
        "`schedules explain cosine`",
        ("unit/test_classic_schedules.py::test_cosine_without_warmup_is_half_a_wave",),
    ),
    Claim(
        "S32",
        "exponential per epoch",
        "`schedules explain exponential gamma=0.9 --epoch-steps 25`",
        (
            "unit/test_preview.py::test_the_epochs_of_a_preview_can_be_said",
            "unit/test_schedules.py::test_exponential_spellings_agree",
        ),
    ),
    Claim(
        "S33",
        "early signs: speed, steadiness, held-out loss in step",
        "[symptoms](learning_rates.md#symptoms), `validation` rows of `metrics.jsonl`",
        (
            "integration/test_validation.py::test_readings_are_relative_to_the_base_stratum_by_stratum",
            "integration/test_validation.py::test_pairing_lifts_the_signal_at_least_tenfold",
        ),
    ),
    Claim(
        "S34",
        "what to do when it swings, stalls or overfits",
        "[symptoms](learning_rates.md#symptoms), [the states](diagnosis.md#the-states), `lora-trainer diagnose RUN`",
        (
            "unit/test_diagnosis.py::test_each_state_is_found_in_runs_made_to_show_it",
            "unit/test_diagnosis.py::test_every_advised_setting_can_be_run",
            "unit/test_diagnosis_judged.py::test_what_was_judged_meets_the_goals",
        ),
    ),
    Claim(
        "S35",
        "AdamW, Lion, 8-bit Adam",
        "[starting points](learning_rates.md#starting-points)",
        (
            "integration/test_optimizers.py::test_equals_the_librarys_own",
            "integration/test_optimizers.py::test_an_absent_package_names_its_extra",
        ),
    ),
    Claim(
        "S36",
        "LR range test",
        "`lora-trainer find-lr --config F`",
        (
            "integration/test_find_lr.py::test_the_program_end_to_end",
            "integration/test_find_lr.py::test_the_optimizer_uses_the_ramps_rates_and_groups_keep_their_ratio",
        ),
    ),
    Claim(
        "S37",
        "in doubt the smaller rate",
        "`lora-trainer find-lr --config F --verify`, [verdicts](verdicts.md#the-rules)",
        (
            "unit/test_lr_finder.py::test_of_two_short_runs_that_overlap_the_smaller_is_chosen",
            "unit/test_verdict.py::test_the_sentence_of_a_tie_prefers_the_smaller_lr",
        ),
    ),
    Claim(
        "S38",
        "try, watch, adjust",
        "`lora-trainer plan`, `find-lr`, `train` with `validation`; [which schedule](learning_rates.md#which-schedule)",
        ("integration/test_validation.py::test_runs_that_differ_in_schedule_alone_see_the_same",),
    ),
    Claim(
        "S39",
        "a tenth every ten epochs",
        "`schedules plot step step_size=10ep --epoch-steps 10`",
        ("unit/test_schedules.py::test_step_every_ten_epochs",),
    ),
    Claim(
        "S40",
        "exponential as exp(-rate x epoch)",
        "`schedules plot exponential rate=0.01005`",
        ("unit/test_schedules.py::test_exponential_spellings_agree",),
    ),
    Claim(
        "S41",
        "a cosine that rises again at the end",
        "`schedules plot cosine_annealing t_max=600`",
        (
            "unit/test_schedules.py::test_cosine_annealing_golden",
            "unit/test_schedule_facts.py::test_warnings_fire",
        ),
    ),
    Claim(
        "S42",
        "AdaGrad, RMSprop, Adam",
        "`optimizer.type`",
        ("integration/test_optimizers.py::test_equals_the_librarys_own",),
    ),
    Claim(
        "S43",
        "BERT's recipe",
        "`lora-trainer presets bert`",
        ("unit/test_preview.py::test_the_bert_preset_warms_up_over_epochs_and_falls_straight",),
    ),
    Claim(
        "S44",
        "start simple, watch both losses",
        "[which schedule](learning_rates.md#which-schedule)",
        ("integration/test_validation.py::test_the_best_lora_is_kept_by_the_probe",),
    ),
    Claim(
        "S45",
        "a fixed rate never settles",
        "[symptoms](learning_rates.md#symptoms)",
        ("integration/test_quadratic.py::test_with_noise_a_fixed_rate_never_settles_and_a_decay_does",),
    ),
)
"""What the articles name."""

TRAPS = (
    Claim(
        "X1",
        "two schedules called cosine",
        "`schedules plot cosine cosine_annealing t_max=600`",
        (
            "unit/test_schedule_facts.py::test_warnings_fire",
            "unit/test_schedule_facts.py::test_warnings_stay_silent_on_defaults",
        ),
    ),
    Claim(
        "X2",
        "restarts that never restart",
        "`schedules plot cosine_with_restarts num_cycles=1`",
        (
            "unit/test_schedule_facts.py::test_warnings_fire",
            "unit/test_schedule_properties.py::test_restarts_jump_up_once_less_than_cycles_and_where_they_are_marked",
        ),
    ),
    Claim(
        "X3",
        "the first update of a warm-up has LR 0",
        "`schedules plot linear warmup_steps=1`",
        (
            "unit/test_schedule_facts.py::test_warnings_fire",
            "integration/test_validation.py::test_the_ratio_to_the_base_is_exactly_one_before_b_moves",
        ),
    ),
    Claim(
        "X4",
        "plots shifted by one update",
        "`metrics.jsonl`",
        ("integration/test_invariance.py::test_the_lr_in_the_log_is_the_one_the_optimizer_used",),
    ),
    Claim(
        "X5",
        "bands without an optimizer",
        "[usual ranges](learning_rates.md#usual-ranges)",
        (
            "unit/test_lr_notes.py::test_what_adamw_could_not_use_suits_another_optimizer",
            "unit/test_lr_notes.py::test_the_defaults_are_usual",
        ),
    ),
    Claim(
        "X6",
        "small data, small rate",
        "[what moves it](learning_rates.md#what-moves-the-right-value)",
        ("unit/test_lr_notes.py::test_a_small_set_is_noted",),
    ),
    Claim(
        "X7",
        "a warm-up longer than the run",
        "`schedules plot linear warmup_steps=600`",
        (
            "unit/test_classic_schedules.py::test_a_warmup_as_long_as_the_run_is_refused",
            "unit/test_schedule_facts.py::test_warnings_fire",
        ),
    ),
    Claim(
        "X8",
        "0.99 per update is fast",
        "`schedules explain exponential unit=step gamma=0.99`",
        (
            "unit/test_schedule_facts.py::test_half_life_and_shrink",
            "unit/test_preview.py::test_an_example_gives_way_to_what_is_written",
        ),
    ),
    Claim(
        "X9",
        "decays that vanish",
        "`schedules plot step step_size=15%`",
        ("unit/test_schedule_facts.py::test_warnings_fire",),
    ),
    Claim(
        "X10",
        "an absolute end with several base rates",
        "`schedules explain polynomial lr_end=1e-6`",
        (
            "unit/test_classic_schedules.py::test_lr_end_is_the_same_absolute_rate_for_every_base",
            "unit/test_classic_schedules.py::test_polynomial_refuses_an_end_above_the_base",
        ),
    ),
    Claim(
        "X11",
        "polynomial of power 1",
        "`schedules show polynomial`",
        ("unit/test_classic_schedules.py::test_equals_diffusers_at_every_update",),
    ),
    Claim(
        "X12",
        "a range test that wrecks the model",
        "`lora-trainer find-lr --config F`",
        (
            "integration/test_find_lr.py::test_the_program_end_to_end",
            "integration/test_find_lr.py::test_the_ramp_is_a_group_of_one_that_is_validated_at_every_step_and_leaves_its_log_alone",
        ),
    ),
    Claim(
        "X13",
        "cosine and local minima",
        "[traps](learning_rates.md#traps)",
        ("unit/test_schedule_properties.py::test_smooth_curves_have_no_jump",),
    ),
    Claim(
        "X14",
        "images / batch is not steps per epoch",
        "`lora-trainer plan --config F --processes 4`",
        (
            "unit/test_plan.py::test_updates_per_epoch",
            "unit/test_plan.py::test_buckets_round_up_one_by_one",
        ),
    ),
    Claim(
        "X15",
        "weight decay against overfitting",
        "`schedules explain constant --steps 2000`, `lora-trainer plan --config F`",
        (
            "unit/test_schedule_facts.py::test_half_life_and_shrink",
            "unit/test_plan.py::test_the_shrink_by_weight_decay_is_that_of_the_runs_own_rates",
        ),
    ),
)
"""What they trip over; explained in docs/learning_rates.md#traps, in this order."""

ALWAYS = (
    Claim(
        "A1",
        "1, 2 and 4 real processes x accumulation 1 and 4: one LR curve, one gradient",
        "",
        ("integration/test_worlds.py::test_worlds_and_accumulation_change_neither_lr_nor_gradients",),
    ),
    Claim(
        "A2",
        "a resume after every update of a run: the bytes of the run without a stop",
        "",
        ("integration/test_resume.py::test_a_resume_after_every_update_of_twenty_is_byte_identical",),
    ),
    Claim(
        "A3",
        "every schedule resumes to the byte",
        "",
        ("integration/test_resume.py::test_every_schedule_resumes",),
    ),
    Claim(
        "A4",
        "a skipped update moves neither the LR nor the length of the run",
        "",
        ("integration/test_numeric_guards.py::test_a_skipped_update_changes_nothing_and_the_next_is_the_one_after_it",),
    ),
    Claim(
        "A5",
        "a loss that is not finite on one process stops all in the same update",
        "",
        ("integration/test_worlds.py::test_a_loss_that_is_not_finite_on_one_rank_stops_all_in_the_same_update",),
    ),
    Claim(
        "A6",
        "the classic names are diffusers' at every update, also in the log of a run",
        "",
        (
            "unit/test_classic_schedules.py::test_equals_diffusers_at_every_update",
            "integration/test_invariance.py::test_the_lr_in_the_log_is_diffusers_lr_at_every_step",
        ),
    ),
)
"""What holds whatever the machine does."""

CLAIMS = (*NAMED, *TRAPS, *ALWAYS)
