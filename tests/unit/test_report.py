"""The report: it says what the run directories say, and the page stands alone, is accessible and tells no secrets."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from run_directories import STEPS, write_run, write_sweep

from lora_trainer.cli.report import report
from lora_trainer.errors import ConfigError
from lora_trainer.evidence.statistics.verdict import Rules
from lora_trainer.report.page import build_page, render, write_report
from lora_trainer.report.plots import Line, line_plot
from lora_trainer.report.runs import arms, incompatibilities, pairing_notes, read_run, read_runs
from lora_trainer.report.tables import without_paths

SPREAD = (0.0, 0.001, -0.0005)
HOSTILE = """a <script>alert(1)</script> & "quoted" 'cat' {{ 7 * 7 }}"""


def three_seeds(root: Path, **means: float) -> list[Path]:
    """Three runs of each schedule named, with one prompt."""
    return [
        write_run(
            root / f"{name}-{seed}",
            schedule=name,
            loss=mean + SPREAD[seed] * (1 + 0.1 * number),
            seed=seed,
            prompts=[HOSTILE],
        )
        for number, (name, mean) in enumerate(means.items())
        for seed in range(3)
    ]


@pytest.fixture
def compared(tmp_path: Path) -> list[Path]:
    return three_seeds(tmp_path / "runs", constant=0.97, cosine=0.94)


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def page_of(folders: list[Path], output: Path) -> str:
    write_report(folders, output)
    return output.read_text()


@pytest.fixture(params=["one run", "several"])
def html(request: pytest.FixtureRequest, compared: list[Path], tmp_path: Path) -> str:
    return page_of(compared[:1] if request.param == "one run" else compared, tmp_path / "report.html")


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    outline = Outline(html)
    assert "http:" not in html
    assert "https:" not in html
    assert not outline.all("script", "iframe", "object", "base", "form")
    for tag, attributes in outline.tags:
        for key in ("src", "href", "xlink:href", "action", "data", "poster"):
            target = attributes.get(key)
            assert target is None or target.startswith(("data:", "#")), (tag, target)
    assert not re.findall(r"url\((?!#)", html)
    assert "@import" not in html


def test_ids_are_unique_and_references_lead_somewhere(html: str) -> None:
    outline = Outline(html)
    ids = Counter(attributes["id"] for _, attributes in outline.tags if "id" in attributes)
    assert max(ids.values()) == 1
    references = [a["href"] for a in outline.all("a", "use") if "href" in a]
    references += [a["xlink:href"] for a in outline.all("use") if "xlink:href" in a]
    references += [f"#{a['aria-labelledby']}" for _, a in outline.tags if "aria-labelledby" in a]
    references += [f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", html)]
    assert len(references) > 8
    assert [r for r in references if str(r).removeprefix("#") not in ids] == []


def test_the_page_can_be_read_without_seeing_it(html: str) -> None:
    outline = Outline(html)
    assert outline.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    images = outline.all("img")
    assert images
    assert all(image["alt"] for image in images)
    plots = [a for a in outline.all("svg") if a.get("class") == "plot"]
    assert len(plots) >= 6
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 40 for plot in plots)
    assert len(outline.all("table")) == len(outline.all("caption"))
    assert all(a.get("scope") in ("col", "row") for a in outline.all("th"))
    assert outline.tags[[tag for tag, _ in outline.tags].index("body") + 1] == ("a", {"class": "skip", "href": "#main"})
    assert all("tabindex" in a and a["aria-label"] for a in outline.all("div") if a.get("class") == "scroll")


def test_what_others_wrote_is_escaped(html: str) -> None:
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in html
    assert "{{ 7 * 7 }}" in html


def test_no_path_user_or_host_is_told(tmp_path: Path, private_names: tuple[str, str]) -> None:
    message = f"no such file {tmp_path}/secret/base.safetensors (at /home/someone/x.png)"
    run = write_run(
        tmp_path / "runs" / "a",
        done=20,
        status=(6, "numeric stop", message),
        adapter__targets=["attn2.to_k", "/srv/weights/list"],
    )
    html = page_of([run], tmp_path / "report.html")
    assert "…/base.safetensors (at …/x.png)" in html
    assert "…/list" in html
    for told in (str(tmp_path), "/home/someone", "/srv/weights", *private_names):
        assert told not in html


def test_paths_are_cut_and_fractions_are_not() -> None:
    assert without_paths("see /a/b/c.txt, ~/x/y and ../z/w") == "see …/c.txt, …/y and ../z/w"
    assert without_paths("alpha / rank, 3/4 images/s") == "alpha / rank, 3/4 images/s"


def test_the_head_says_the_verdict_and_the_tables_its_numbers(compared: list[Path], tmp_path: Path) -> None:
    page = build_page(read_runs(compared), Rules())
    sentence = (
        "On 3 paired seeds (held-out loss, same peak LR 0.001, one pair): cosine is better than constant; the same "
        "seeds chose and judged, so the size of a difference is to be confirmed on fresh ones."
    )
    assert page.headline == sentence
    assert write_report(compared, tmp_path / "r.html") == sentence
    (verdict,) = page.verdicts
    assert verdict.arms.rows[0][:5] == ("cosine", "0.001", "0.50", "3", "0.9402")
    assert verdict.arms.rows[0][-1] == "unbeaten"
    assert verdict.arms.rows[1][-1] == "beaten by 1"
    assert verdict.pairs is not None
    (pair,) = verdict.pairs.rows
    assert pair[:2] == ("cosine − constant", "-2.998 %")  # 0.94 + 0.00055 / 3 minus 0.97 - 0.0005 / 3
    assert pair[-1] == "better"
    assert verdict.plot is not None
    assert verdict.plot.numbers.rows == (("cosine − constant", "-3.000", "-2.990", "-3.005"),)


def test_a_plots_numbers_are_the_logs(compared: list[Path]) -> None:
    page = build_page(read_runs(compared[:1]), Rules())
    by_title = {plot.title: plot for plot in page.curves}
    rates = by_title["Learning rate"].numbers
    assert rates.rows[0] == ("1", f"{1e-3 * (1 - 1 / STEPS):.3g}")
    assert rates.rows[-1] == (str(STEPS), "0")
    held_out = by_title["Held-out loss, relative to the base"].numbers
    assert [row[0] for row in held_out.rows] == ["0", "10", "20", "30", "40"]
    assert held_out.rows[2][1] == "0.985"
    assert "Last values: constant-0 0.97" in by_title["Held-out loss, relative to the base"].summary


@pytest.mark.parametrize(("lowest", "labels"), [(0.06, ["0.1", "0.2", "0.5"]), (1e-4, ["0.001", "0.01", "0.1"])])
def test_a_log_axis_has_plain_numbers(lowest: float, labels: list[str]) -> None:
    values = np.geomspace(lowest, 0.7, 20).tolist()
    plot = line_plot("loss", "Loss", "loss", [Line("a", (0, 0), range(20), values)])
    texts = re.findall(r">\s*([^<>]+?)\s*</text>", plot.svg)
    assert set(labels) < set(texts)
    assert not [text for text in texts if re.search(r"[$\\{}^]", text)]


def test_what_is_a_tenth_of_the_rest_but_for_rounding_needs_no_log_axis() -> None:
    curves = [[1e-3, 1e-4 * (1 + rounding)] for rounding in (-1e-15, 0.0, 1e-15)]
    plots = [line_plot("lr", "LR", "LR", [Line("a", (0, 0), [1, 2], values)]).svg for values in curves]
    assert len(set(plots)) == 1


def test_a_single_run_claims_nothing_about_seeds(compared: list[Path]) -> None:
    assert build_page(read_runs(compared[:1]), Rules()).headline == (
        "After 40 updates the held-out loss is 0.9700 of the base's; the standard error of 0.0020 is this run's "
        "precision over its 3 images and says nothing about another seed."
    )
    seeds = build_page(read_runs(compared[:3]), Rules())
    assert seeds.headline == "One setting on 3 seeds: nothing was compared."


def test_runs_that_measured_different_things_are_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", schedule="rex")
    two = write_run(tmp_path / "two", validation_content="other", **{"validation content": "other"})
    blind = write_run(tmp_path / "blind", schedule="linear", probes=())
    assert incompatibilities(read_runs([one, two])) == [
        "they differ in validation content, so their held-out losses do not measure the same thing"
    ]
    page = build_page(read_runs([one, blind]), Rules())
    assert page.headline == "Not compared: held-out loss was not measured in blind (no `validation` section)."
    assert page.verdicts == ()
    alone = build_page(read_runs([blind]), Rules())
    assert alone.headline.endswith("the held-out loss at the end was not measured.")
    assert alone.runs.rows[0][3:] == ("not measured",) * 5
    assert "Held-out loss by timestep: not measured" in render(alone)


def test_failed_runs_rank_last_and_unfinished_ones_wait(tmp_path: Path) -> None:
    runs = three_seeds(tmp_path, constant=0.97, cosine=0.94)
    stop = (6, "numeric stop", "3 updates in a row had a loss that is not finite")
    runs.append(write_run(tmp_path / "hot", schedule="rex", seed=0, done=20, status=stop))
    runs.append(write_run(tmp_path / "late", schedule="linear", seed=0, done=30))
    page = build_page(read_runs(runs), Rules())
    assert page.headline.startswith("On 3 paired seeds (held-out loss, same peak LR 0.001, 6 pairs corrected")
    assert "cosine is better than constant; not tested: " in page.headline
    assert "rex failed on seed 0" in page.headline
    assert page.verdicts[0].arms.rows[-1][-1] in ("failed on seed 0", "not tested")
    assert page.notes == ("unfinished, not in any verdict: late",)
    status = {row[0]: row[2] for row in page.runs.rows}
    assert status["rex"] == "failed at step 20: 3 updates in a row had a loss that is not finite"
    assert status["linear"] == "unfinished: step 30 of 40"


def test_an_arm_does_not_win_on_the_seeds_that_it_survived(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"steady-{seed}", loss=0.9 + 0.001 * seed, seed=seed) for seed in range(5)]
    reason = "sweep.prune.diverged: held-out loss 3 times the base's, 2 allowed"
    for seed in range(5):
        own = {"loss": 0.3} if seed > 1 else {"loss": 3.0, "done": 10, "ending": ("stopped", reason)}
        runs.append(write_run(tmp_path / f"reckless-{seed}", schedule="rex", seed=seed, **own))
    page = build_page(read_runs(runs), Rules())
    assert page.headline == "Not tested: rex failed on seed 0, 1."
    (verdict,) = page.verdicts
    assert [(row[0], row[-1]) for row in verdict.arms.rows] == [
        ("cosine", "not tested"),
        ("rex", "failed on seed 0, 1"),
    ]
    assert page.notes == ("stopped early, which counts as failed: reckless-0, reckless-1",)
    assert page.runs.rows[5][:4] == ("rex, seed 0", "0", f"stopped at step 10: {reason}", "not measured")


def test_a_run_whose_probe_was_not_finite_has_failed(tmp_path: Path) -> None:
    """As `tracking.metrics.finite` writes them."""
    fields = {"relative": "nan", "se": "nan", "bands": ["nan"] * 4, "items": ["nan"] * 3}
    ends = [{"event": "validation", "step": STEPS, "probe": probe, **fields} for probe in ("held_out", "train")]
    lost = write_run(tmp_path / "lost", schedule="rex", events=ends)
    blind = write_run(tmp_path / "blind", events=ends[1:])  # of the training images alone
    page = build_page(read_runs([lost, blind]), Rules())
    assert page.headline == "Not tested: rex failed on seed 1."
    assert [row[0] for row in page.verdicts[0].arms.rows] == ["cosine", "rex"]
    assert page.runs.rows[0][2:4] == ("failed at step 40: the held-out loss at step 40 is nan", "not measured")
    assert page.runs.rows[1][3:] == ("0.9500", "0.0020", "0.9500", "40", "not measured")


def test_arms_are_named_by_what_differs(tmp_path: Path) -> None:
    def names(*runs: Path) -> list[str]:
        return [group.name for group in arms(read_runs(runs))]

    cosine, rex = write_run(tmp_path / "a"), write_run(tmp_path / "b", schedule="rex", lr_scheduler__d=0.9)
    assert names(cosine, rex) == ["cosine", "rex"]
    high = write_run(tmp_path / "c", lr=3e-3)
    assert names(cosine, high) == ["cosine, LR 0.001", "cosine, LR 0.003"]
    sharp = write_run(tmp_path / "d", schedule="rex", lr_scheduler__d=0.5)
    assert names(cosine, rex, sharp) == ["cosine", "rex, d 0.9", "rex, d 0.5"]
    ranks = [write_run(tmp_path / f"rank{rank}", adapter__rank=rank) for rank in (4, 8)]
    assert names(*ranks) == ["rank 4", "rank 8"]


def test_two_runs_of_one_setting_and_seed_are_refused(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    with pytest.raises(ConfigError, match="same settings and seed 1"):
        arms(read_runs([one, two]))


def test_unequal_batches_of_a_seed_are_pointed_out(tmp_path: Path) -> None:
    runs = read_runs(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", schedule="rex", draws="other")],
    )
    assert pairing_notes(arms(runs)) == ["the runs of seed 1 did not see the same batches: pairing helps them less"]


def test_folders_that_are_no_runs_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_runs([tmp_path / "x", tmp_path / "y"])
    assert [problem.where for problem in caught.value.problems] == [str(tmp_path / "x"), str(tmp_path / "y")]


def test_a_run_can_be_read_while_it_trains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", done=17)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "tri')
    record = read_run(run)
    assert (record.step, record.final, record.is_finished) == (17, None, False)
    empty = write_run(tmp_path / "b", done=0)
    assert "0 of 40 updates are done" in build_page([read_run(empty)], Rules()).headline


def test_the_command_writes_into_the_run_and_replaces_no_other_file(
    compared: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(compared[:1], None, 0.01)
    report(compared[:1], None, 0.01)
    assert (compared[0] / "report.html").is_file()
    assert "wrote" in capsys.readouterr().out
    mine = tmp_path / "mine.html"
    mine.write_text("my page")
    with pytest.raises(ConfigError, match="no file of ours"):
        report(compared, mine, 0.01)
    assert mine.read_text() == "my page"


def test_the_smallest_effect_can_be_set(compared: list[Path], tmp_path: Path) -> None:
    assert "no difference shown" in write_report(compared, tmp_path / "r.html", rules=Rules(min_effect=0.9))


def test_a_sweep_is_read_by_its_own_names_and_what_was_stopped_says_why(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"constant": 0.97, "cosine": 0.94}, (1, 2, 3))
    names = [record.name for record in read_runs([sweep])]
    assert names == [f"{arm}-seed{seed}" for arm in ("constant", "cosine") for seed in (1, 2, 3)]
    trials = sweep / "trials"
    write_run(trials / "later", schedule="rex", seed=1, done=20, ending=("stopped", "clearly worse than rex-lr1e-4"))
    page = build_page(read_runs([sweep]), Rules())
    assert page.title == "sweep"
    assert page.headline.startswith("On 3 paired seeds (held-out loss, same peak LR 0.001, 3 pairs corrected")
    assert page.runs.rows[-1][:3] == ("later", "1", "stopped at step 20: clearly worse than rex-lr1e-4")
    assert page.notes == ("stopped early, which counts as failed: later",)
    assert page.commands == ("lora-trainer sweep --config sweep/config.yaml", "lora-trainer report sweep")


def test_a_trial_that_failed_in_a_sweep_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", done=7, ending=("failed", "loss is not finite"))
    assert read_run(run).status == "failed at step 7: loss is not finite"


def test_fresh_seeds_confirm_and_used_ones_are_refused(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"constant": 0.97, "cosine": 0.94, "rex": 0.95}, (1, 2, 3))
    fresh = write_sweep(tmp_path / "fresh", {"cosine": 0.945, "rex": 0.95}, (11, 12, 13, 14))
    chosen = write_report([sweep], tmp_path / "chosen.html")
    assert "to be confirmed on fresh ones" in chosen
    sentence = write_report([sweep], tmp_path / "both.html", confirm=[fresh])
    assert (
        sentence == "On 4 fresh paired seeds (held-out loss, same peak LR 0.001, one pair): cosine is better than rex."
    )
    html = (tmp_path / "both.html").read_text()
    assert "<h1>sweep</h1>" in html
    assert "Confirmation on fresh seeds: same peak LR 0.001" in html
    assert chosen.replace("'", "&#39;") in html
    assert "lora-trainer report sweep --confirm fresh" in html
    used = write_sweep(tmp_path / "used", {"cosine": 0.94, "rex": 0.95}, (3, 11, 12))
    with pytest.raises(ConfigError, match="seed 3 took part in choosing"):
        write_report([sweep], tmp_path / "r.html", confirm=[used])


def test_the_diagnosis_last_told_stands_with_its_advice(tmp_path: Path) -> None:
    def event(step: int, state: str) -> dict[str, object]:
        advice = [{"text": "lower the LR", "key": "optimizer.lr", "value": 3e-4}]
        finding = {"state": state, "confidence": "high", "evidence": f"{state} it is", "advice": advice}
        return {"event": "diagnosis", "step": step, "trial": "t", "findings": [finding]}

    told = write_run(tmp_path / "told", events=[event(10, "stagnant"), event(30, "oscillating")])
    quiet = write_run(tmp_path / "quiet", schedule="rex", events=[{"event": "early_report", "step": 4}])
    blind = write_run(tmp_path / "blind", schedule="linear")
    page = build_page(read_runs([told, quiet, blind]), Rules())
    assert page.diagnosis is not None
    advice = "lower the LR (optimizer.lr: 0.0003)"
    assert page.diagnosis.rows[0] == ("cosine", "oscillating", "high", "step 30: oscillating it is", advice)
    assert [row[:2] for row in page.diagnosis.rows[1:]] == [("rex", "no fault told"), ("linear", "not measured")]
    assert "<p>Diagnosis: not measured.</p>" in render(build_page(read_runs([blind]), Rules()))


@pytest.mark.parametrize("rounding", [-1e-10, 0.0, 1e-10])
def test_runs_that_differ_by_rounding_stand_in_their_order(tmp_path: Path, rounding: float) -> None:
    losses = {"b": 0.95 + rounding, "a": 0.95 - rounding, "c": 0.96}
    runs = [write_run(tmp_path / name, schedule=name, loss=loss) for name, loss in losses.items()]
    page = build_page(read_runs(runs), Rules())
    assert page.items is not None and page.bands is not None
    assert [row[0] for row in page.items.rows] == ["b − a", "b − c"]
    assert page.items.rows[0][3] == "0.000 %"
    assert re.search(r"least noise: b; less noise: b;", page.bands.summary)
    flat = {"event": "validation", "probe": "held_out", "se": 0.002, "bands": [0.9] * 4, "items": [0.9] * 3}
    probes = [{**flat, "step": 20, "relative": 0.9}, {**flat, "step": STEPS, "relative": 0.9 + rounding}]
    alone = build_page(read_runs([write_run(tmp_path / "alone", probes=(), events=probes)]), Rules())
    assert alone.headline.startswith("After 40 updates the held-out loss is 0.9000 of the base's; the standard error")


def test_the_precision_of_single_runs_is_shown_as_that(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", loss=0.94), write_run(tmp_path / "b", loss=0.97, schedule="rex")]
    page = build_page(read_runs(runs), Rules())
    assert page.headline == "Not tested: 1 seed in common, and a verdict takes 3 at least."
    assert page.items is not None
    assert page.items.caption.endswith("the precision of these runs alone, no evidence about their settings")
    assert page.items.rows == (("cosine − rex", "1", "3", "-3.000 %", "0.000"),)
