"""What a reader finds in the report."""

from __future__ import annotations

import json

import pytest
from jax.sharding import PartitionSpec

from stages.core.common.paths import REPORT
from stages.core.records.generate import Generation
from stages.core.records.plan import RunKey
from stages.core.report import figures
from stages.core.report.plan_section import Training
from tests.support.pages import MINUS, Reader, edit, rendered, run_stage
from tests.support.report_outputs import plan, sharding, write_generations, write_json, write_outputs, write_samples
from tests.support.repository import ROOT


def test_the_headline_tells_perplexity_loss_and_accuracy_before_and_after_with_the_change(root):
    text = Reader(rendered(root)).text
    assert f"perplexity on 40 whole held-out reviews fell from 31.43 to 29.72 ({MINUS}5.5 %)." in text
    assert f"Perplexity 31.43→29.72 {MINUS}5.5 %, better" in text
    assert f"Loss nats per token 3.448→3.392 {MINUS}0.056 ± 0.006, better" in text
    assert "35.2 %→35.9 % +0.7 points ± 0.2, better" in text
    assert "Each held-out review is read whole, from its own beginning." in text


@pytest.mark.parametrize(
    "shown",
    [
        "Parameters268,365,440",
        "Trained parameters267,264 0.100 % of them",
        "Trained tokens per second131 tokens/s",
        "Step, median1.87 s",
        "Compilation21.6 s",
        "Peak host memory, tuning3.30 GiB",
        "Peak host memory, loading2.00 GiB",
        "train.sequences447",
        "positive_fraction51.5 %",
        "Measured on 13,642 predicted tokens.",
        "Versionspython 3.",
        "gemma3-270m-q4-k-m.gguf241 MiB",
    ],
)
def test_numbers_of_the_metrics_files_are_shown_with_their_units(root, shown):
    assert shown in Reader(rendered(root)).text


def test_the_settings_are_shown_as_they_were_set(root):
    assert "learning_rate0.00123" in Reader(rendered(root, "finetune.learning_rate=0.00123")).text


def test_each_further_variant_is_a_column_of_a_table_and_a_text_of_each_prompt(root):
    assert "All variants" not in rendered(root)
    task = {
        "reviews": 40,
        "accuracy": 0.6,
        "accuracy_low": 0.45,
        "accuracy_high": 0.73,
        "answered_positive_fraction": 1,
    }
    tuned = json.loads((root / "data/metrics/evaluate/tuned.json").read_text())
    scores = {"arc_easy": {"acc": 0.3125, "acc_stderr": 0.0123, "acc_norm": 0.5}}
    write_json(root / "data/metrics/evaluate/sample.json", tuned | {"loss": 3.2, "sentiment": task, "lm_eval": scores})
    compared = json.loads((root / "data/metrics/compare.json").read_text())
    edit(root, "data/metrics/compare.json", variants={"sample": compared | {"loss_difference": -0.2479}})
    write_generations(root, "sample", [("This movie was", "<i>mine</i>")])
    # Named like a part of what is shown beside it.
    text = Reader(rendered(root, "variants={sample: adapters/mine, prompt: adapters/other}")).text
    assert "All variants baselinetunedsampleprompt" in text
    assert "Loss, nats per token3.4483.3923.200\N{EN DASH}" in text
    assert f"Loss, minus baseline\N{EN DASH}{MINUS}0.056 ± 0.006{MINUS}0.248 ± 0.006\N{EN DASH}" in text
    assert "Sentiment right\N{EN DASH}\N{EN DASH}60.0 % (45.0 % to 73.0 %)\N{EN DASH}" in text
    assert "arc_easy, acc\N{EN DASH}\N{EN DASH}0.3125 ± 0.012\N{EN DASH}" in text
    assert "arc_easy, acc_norm\N{EN DASH}\N{EN DASH}0.5\N{EN DASH}" in text
    assert text.count("sample Not generated for this prompt.") == 2 and "sample <i>mine</i>" in text
    assert "python -m stages.evaluate --variant prompt writes it." in text


def test_scores_of_the_harness_are_shown_before_and_after(root):
    for variant, accuracy in (("baseline", 0.25), ("tuned", 0.5)):
        edit(root, f"data/metrics/evaluate/{variant}.json", lm_eval={"it": {"acc": accuracy, "acc_stderr": 0.1}})
    text = Reader(rendered(root)).text
    assert "it, acc, baseline0.25 ± 0.1 lm-evaluation-harness" in text
    assert "it, acc, tuned0.5 ± 0.1 lm-evaluation-harness" in text


def test_a_tuning_that_made_things_worse_is_called_worse(root):
    edit(root, "data/metrics/evaluate/tuned.json", loss=4.1, perplexity=60.3, token_accuracy=0.3418)
    edit(root, "data/metrics/compare.json", loss_difference=0.6521, token_accuracy_difference=-0.01)
    text = Reader(rendered(root)).text
    assert "rose from 31.43 to 60.30 (+91.8 %)." in text
    assert "31.43→60.30 +91.8 %, worse" in text
    assert "+0.652 ± 0.006, worse" in text
    assert f"{MINUS}1.0 points ± 0.2, worse" in text


def test_a_difference_within_two_standard_errors_is_called_neither_better_nor_worse(root):
    edit(root, "data/metrics/compare.json", loss_difference_standard_error=0.03)
    text = Reader(rendered(root)).text
    chance = "within two standard errors of no change"
    assert f"fell from 31.43 to 29.72 ({MINUS}5.5 %), {chance}." in text
    assert f"31.43→29.72 {MINUS}5.5 %, {chance}" in text
    assert f"3.448→3.392 {MINUS}0.056 ± 0.030, {chance}" in text
    assert "+0.7 points ± 0.2, better" in text


def test_a_difference_without_its_standard_error_is_not_judged(root):
    edit(root, "data/metrics/compare.json", loss_difference_standard_error=None)
    text = Reader(rendered(root)).text
    assert f"31.43→29.72 {MINUS}5.5 % baseline: 31.43" in text
    assert "+0.7 points ± 0.2, better" in text
    (root / "data/metrics/compare.json").unlink()
    text = Reader(rendered(root)).text
    assert "better" not in text[text.index("Perplexity 31.43") : text.index("Baseline (grey")]
    assert "python -m stages.compare" in text


def test_reviews_that_are_longer_than_the_maximum_are_told(root):
    edit(root, "data/metrics/evaluate/tuned.json", reviews_cut=3)
    assert "from its own beginning; 3 that are longer than 8,192 tokens up to there." in Reader(rendered(root)).text


def test_measures_over_different_numbers_of_tokens_are_said_not_to_compare(root):
    edit(root, "data/metrics/evaluate/tuned.json", targets=99)
    assert (
        "different numbers of tokens (baseline: 13,642, tuned: 99), so they cannot be compared"
        in Reader(rendered(root)).text
    )


def test_full_parameter_tuning_is_not_called_lora(root):
    tuned = sharding(tuned=False)
    write_json(root / "data/sharding/tuned.json", tuned | {"by_kind": tuned["by_kind"] | {"optimizer": 2**28}})
    text = Reader(rendered(root, "finetune.rank=0")).text
    assert "After full-parameter tuning and 223 steps" in text
    assert "of weights and optimizer state." in text


def test_the_sharding_is_shown_as_it_is_written_in_jax(root):
    for spec in ([], [None], [None, "model", None], [["batch", "model"], None]):
        axes = (tuple(axis) if isinstance(axis, list) else axis for axis in spec)
        assert eval(figures.partition_spec(spec), {"PartitionSpec": PartitionSpec}) == PartitionSpec(*axes)
    assert "PartitionSpec(None, 'model', None)" in Reader(rendered(root)).text


def test_fallbacks_are_shown_with_their_reasons_and_once(root):
    edit(root, "data/sharding/tuned.json", fallbacks=sharding(tuned=False)["fallbacks"])
    text = Reader(rendered(root)).text
    assert text.count("decoder_block_*/attention/query/kernel heads hidden") == 0
    assert text.count("4 heads do not split over 8 devices") == 1
    assert text.count("1 heads do not split over 8 devices") == 2


def test_without_fallbacks_the_page_says_so(root):
    edit(root, "data/sharding/base.json", fallbacks=[])
    assert "None: every weight is sharded as its rule says." in Reader(rendered(root)).text


def test_the_plan_tells_what_fits_what_does_not_and_by_how_much(root):
    text = Reader(rendered(root)).text
    assert "fits yes" in text
    sizes = "4.00 GiB 6.00 MiB 11.0 MiB 512 MiB 113 all-gather, 4 reduce-scatter 1.00 GiB"
    assert f"31.2 % 5.00 GiB 16.0 GiB 29.5 ms (memory) {sizes}" in text and "lower bound" in text
    assert "too large no" in text and "156.2 % 25.0 GiB 16.0 GiB" in text
    assert "3.00 GiB f32[512,128,24576] jit(step)/gelu" in text


def test_the_plan_of_this_run_stands_beside_what_the_run_measured(root):
    held = "State per device: 976 B planned, 976 B measured (to the byte)."
    grown = "Temporaries of all 8 simulated devices: 80.0 MiB planned, 100 MiB measured (\u221220.0 %)."
    edit(root, "data/metrics/finetune.json", state_bytes_per_device=976, step_growth_bytes=100 * 2**20)
    assert f"This run, planned and measured: {held} {grown}" in Reader(rendered(root)).text
    assert "planned and measured" not in Reader(rendered(root, "finetune.batch_size=4")).text, "that is another run"
    here = plan()["targets"]["here"]
    elsewhere = {**here, "topology": "v5e:2x4", "argument_bytes_per_device": 2000}
    edit(root, "data/sharding/plan.json", targets={"here": here, "elsewhere": elsewhere})
    text = Reader(rendered(root)).text
    assert f"This run, planned and measured: {held} {grown}" in text and text.count("State per device") == 1


def test_time_is_planned_and_measured_too(root):
    """On simulated devices at least what all their products take at the rate that the run measured."""
    here = plan()["targets"]["here"] | {"flops_per_step": 10**9}
    edit(root, "data/sharding/plan.json", targets={"here": here})
    edit(root, "data/metrics/finetune.json", flops_per_second_of_matrix_product=10**11, step_seconds_median=0.1)
    assert "Time per step: at least 80.0 ms planned, 100 ms measured (\u221220.0 %)." in Reader(rendered(root)).text


def test_a_plan_for_other_chips_than_the_run_had_is_not_beside_it(root):
    here = plan()["targets"]["here"]
    edit(root, "data/sharding/plan.json", targets={"here": {**here, "device_kind": "another"}})
    edit(root, "data/metrics/finetune.json", device_kind="cpu")
    assert "planned and measured" not in Reader(rendered(root)).text


def test_the_plan_tells_how_long_a_step_takes_by_what_and_what_the_training_costs(root):
    text = Reader(rendered(root, "finetune.steps=9000")).text
    parts = "25.0 ms 5.00 ms 0.00 ms 0.00 ms 0.00 ms 0.00 ms 10.0 ms"
    # 9,000 steps of 40 ms on four chips at 2.00 an hour.
    assert f"fits 29.5 ms (memory) 40.0 ms 50.0 % {parts} 9,000 6 min 0 s 0.80" in text


def test_without_a_number_of_steps_a_target_takes_as_many_as_pass_the_same_positions():
    target = RunKey(batch_size=4, length=128)
    assert Training(positions=100 * 256, batches_per_step=1, steps=None).steps_of(target) == 50
    assert Training(positions=100 * 256, batches_per_step=2, steps=None).steps_of(target) == 25
    assert Training(positions=None, batches_per_step=1, steps=None).steps_of(target) is None


def test_the_search_marks_the_best_and_says_which_figures_are_compiled(root):
    text = Reader(rendered(root)).text
    assert "(1, 8) auto best 8 compiled 10.0 GiB 80.0 ms (compute) \u2013 \u2264 51,200" in text
    assert "(2, 4) auto 4 extrapolated 6.00 GiB" in text
    assert "(8, 1) auto \u2013 no" in text
    assert "v5p:256 256 32 \u00d7 8 256 yes" in text


def test_a_plan_without_search_and_scaling_has_no_empty_tables(root):
    edit(root, "data/sharding/plan.json", search=None, scaling=None)
    text = Reader(rendered(root)).text
    assert "Does it fit?" in text and "Search " not in text.partition("Plan Whole")[2].partition("Numbers and")[0]


def test_each_prompt_stands_with_both_continuations_in_order(root):
    text = Reader(rendered(root)).text
    places = [
        text.index(part.strip()[:30].strip()) for part in ("1. The Big", "I have seen", "released in", "so bad that")
    ]
    assert places == sorted(places)


def test_samples_taken_while_training_stand_in_order_beside_their_steps(root):
    page = rendered(root)
    text = Reader(page).text
    places = [text.index(part) for part in ("After step", "60are the ones", "1,200are a")]
    assert places == sorted(places)
    assert page.count(">are a\nwaste of time<") == 1, "line breaks are kept"


def test_without_samples_the_page_has_no_table_for_them(root):
    write_samples(root, [])
    text = Reader(rendered(root)).text
    assert "Samples during training" not in text
    assert "samples.jsonl" not in text


def test_a_prompt_given_twice_keeps_its_continuations_apart():
    def both(*texts):
        return [Generation(prompt="p", text=text) for text in texts]

    rows = figures.pairs({"baseline": both("b1", "b2"), "tuned": both("t1", "t2", "t3")})
    assert [tuple(row["texts"].values()) for row in rows] == [("b1", "t1"), ("b2", "t2"), (None, "t3")]


def test_several_samples_of_a_prompt_are_shown_with_their_numbers(root):
    for variant in ("baseline", "tuned"):
        lines = [{"prompt": "This was", "sample": number, "text": f"{variant} {number}"} for number in (0, 1)]
        path = root / f"data/generated/{variant}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changed = ("generate.samples=2", "generate.temperature=0.7", "generate.top_p=0.9", "generate.min_p=0.05")
    text = " ".join(Reader(rendered(root, *changed, "generate.repetition_penalty=1.1")).text.split())
    assert "top-p 0.9, min-p 0.05, seed 0, repetition penalty 1.1" in text
    places = [text.index(each) for each in ("sample 1", "baseline 0", "tuned 0", "sample 2", "baseline 1", "tuned 1")]
    assert places == sorted(places)


def test_an_empty_continuation_is_said_to_be_one(root):
    write_generations(root, "tuned", [("This movie was", "")])
    text = Reader(rendered(root)).text
    assert "No text: the model ended immediately." in text
    assert "Not generated for this prompt." in text


def test_a_line_separator_in_a_text_does_not_cut_the_line_of_jsonl(root):
    path = root / "data/generated/tuned.jsonl"
    path.write_text(json.dumps({"prompt": "p", "text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "a\u2028b" in rendered(root)


def test_same_inputs_give_the_same_bytes_in_another_folder(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_outputs(other)
    for folder in (root, other):
        assert run_stage(folder).returncode == 0
    assert (root / REPORT).read_bytes() == (other / REPORT).read_bytes()


def test_help_says_what_is_written():
    assert "Write one self-contained HTML page" in run_stage(ROOT, "--help").stdout


def test_a_trial_with_out_root_leaves_the_pipelines_report_alone(root, tmp_path_factory):
    trial = tmp_path_factory.mktemp("trial")
    result = run_stage(root, "--out-root", str(trial))
    assert result.returncode == 0, result.stderr
    assert (trial / REPORT).exists()
    assert not (root / REPORT).exists()
    assert not list((trial / REPORT).parent.glob(".*"))
