"""The page: what is in it, what it leaves out, and that a browser shows it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.config.values import yaml_line
from rlinf.data.records import Status
from rlinf.errors import UserError
from rlinf.report import page as report_page
from rlinf.report.page import MAX_BYTES, fill, summary, thinned, to_json, write_report
from rlinf.report.parts import MAX_TEXT_STEPS, TEXTS_A_STEP, Parts, choose_files
from rlinf.report.run_data import SampleFile, open_run, read_config, read_origins
from rlinf.run_paths import RunPaths
from tests.chromium import BINARY, Page, chromium
from tests.run_folders import BEHAVIOURS, HEALTHY, Answer, Behaviour, make_run

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>&quot;]]><!-- \\boxed{</textarea>}\u2028"
needs_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


def part(html: str, name: str) -> object:
    found = re.search(rf'<script type="text/plain" id="{re.escape(name)}">([A-Za-z0-9+/=]*)</script>', html)
    assert found is not None, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def data(html: str) -> dict:
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def test_every_sample_has_its_header_and_some_their_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, HEALTHY, steps=4)
    html = write_report(run).read_text()
    names = [x["id"] for step in range(1, 5) for g in part(html, f"h-step_{step:06d}") for x in g["samples"]]
    rows = [json.loads(line) for step in range(1, 5) for line in (run / "samples" / f"step_{step:06d}.jsonl").open()]
    assert sorted(names) == sorted(row["sample_id"] for row in rows) and len(names) == 4 * 32
    told = [g for g in part(html, "h-step_000002") for g in g["samples"] if f'id="t-step_000002-{g["line"]}"' in html]
    assert 3 <= len(told) <= TEXTS_A_STEP
    for x in told:
        line = json.loads((run / "samples" / "step_000002.jsonl").read_text().splitlines()[x["line"] - 1])
        text = part(html, f"t-step_000002-{x['line']}")
        assert line["sample_id"] == x["id"] and "".join(text["pieces"]) == line["response"] and text["reason"] == line["reason"]
    advantages = [x["advantage"] for g in part(html, "h-step_000002") for x in g["samples"]]
    assert {max(advantages), min(advantages)} <= {x["advantage"] for x in told}


def test_the_page_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, HEALTHY, steps=80, prompts=2, group_size=2)
    html = write_report(run).read_text()
    said = data(html)["leftOut"]
    assert (
        f"from {MAX_TEXT_STEPS} of 80 sample files" in said[0]
        and "of 320 samples is here" in said[0]
        and "samples/step_NNNNNN.jsonl" in said[0]
    )
    fixed = len(html.encode()) - sum(len(t) for t in re.findall(r'<script type="text/plain".*', html))
    monkeypatch.setattr(report_page, "MAX_BYTES", fixed + 60_000)
    small = write_report(run, tmp_path / "small.html")
    assert small.stat().st_size <= fixed + 60_000
    assert "did not fit" in data(small.read_text())["leftOut"][1] and not (run / "small.html").exists()
    assert part(small.read_text(), "h-step_000001") and part(small.read_text(), "h-step_000080")


def test_lists_of_samples_that_are_too_large_by_themselves_go_with_their_texts(tmp_path: Path) -> None:
    """60 steps of 8,192 samples have lists of 23 MB."""
    chosen = [SampleFile(RunPaths(tmp_path), i, False) for i in range(1, 61)]
    parts = Parts()
    for file in chosen:
        parts.headers[file.label] = "h" * 384_000
        for rank in range(TEXTS_A_STEP):
            parts.texts[file.label, rank], parts.ranks[file.label, rank] = "t" * 5_000, rank
    parts.fit(MAX_BYTES, chosen)
    assert sum(map(len, [*parts.headers.values(), *parts.texts.values()])) < MAX_BYTES
    assert {chosen[0].label, chosen[-1].label} <= parts.headers.keys() and len(parts.headers) == 30 + 1
    assert {label for label, _ in parts.texts} == parts.headers.keys()
    assert len(parts.texts) == TEXTS_A_STEP * len(parts.headers) == TEXTS_A_STEP * 60 - parts.dropped_texts


def test_the_tiles_are_of_all_steps_of_a_long_run() -> None:
    metrics = [{"step": i, "time/step": 10.0, "rollout/rewards": float(i), "eval/accuracy": float("nan")} for i in range(4000)]
    found = summary(metrics)
    assert found["seconds"] == [40_000.0, 4000] and found["ends"]["rollout/rewards"] == [1.0, 3997.0]
    assert found["held"] is None and found["speed"] is None and "eval/accuracy" not in found["ends"]


def test_flagged_first_and_last_steps_have_texts(tmp_path: Path) -> None:
    files = [SampleFile(RunPaths(tmp_path), i, False) for i in range(1, 501)] + [
        SampleFile(RunPaths(tmp_path), i, True) for i in (0, 250, 500)
    ]
    chosen = choose_files(files, {77, 313})
    steps = {f.step for f in chosen if not f.validation}
    assert len(chosen) <= MAX_TEXT_STEPS and {1, 77, 313, 500} <= steps and {f.step for f in chosen if f.validation} == {0, 500}
    assert max(b - a for a, b in zip(sorted(steps), sorted(steps)[1:])) <= 12
    assert choose_files(files[:1], set()) == files[:1] and choose_files([], set()) == []


def test_what_a_model_writes_cannot_leave_its_place(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        Behaviour(lambda *_: Answer(HOSTILE, "</script>", Status.WRONG), prompt=HOSTILE.replace("{", "{{").replace("}", "}}") + "{}"),
        steps=2,
    )
    html = write_report(run).read_text()
    assert "hacked" not in html and html.count("<script>") == 1 and "<img" not in html
    assert part(html, "h-step_000001")[0]["samples"][0]["extracted"] == "</script>"
    assert json.loads(to_json(HOSTILE)) == HOSTILE and "<" not in to_json(HOSTILE)
    assert fill("@A@ @B@", {"A": "@B@", "B": "x"}) == "@B@ x"


def test_settings_come_with_who_set_them(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        'runner:\n  experiment_name: "a # \\\\${b}"     # command line\n  logger:\n    logger_backends: []   # x.yaml:3\n'
        "data:\n  seed: 3 # default\n"
    )
    keys = ["runner.experiment_name", "runner.logger.logger_backends", "data.seed"]
    assert read_config(file) == dict(zip(keys, ["a # \\${b}", [], 3]))
    assert [yaml_line(value) for value in read_config(file).values()] == ['"a # \\\\${b}"', "[]", "3"]  # as they are written
    assert read_origins(file) == dict(zip(keys, ["command line", "x.yaml:3", "default"]))
    run = make_run(tmp_path, HEALTHY, steps=2)
    assert ["actor.optim.lr", "1e-06"] in [row[:2] for row in data(write_report(run).read_text())["settings"]]


def test_a_run_that_died_while_it_wrote_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, HEALTHY, steps=3)
    for name in ("metrics.jsonl", "samples/step_000003.jsonl", "samples/tokens_000003.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "torn')
    assert data(write_report(run).read_text())["step"] == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, HEALTHY, steps=1)
    assert main(["report", str(run)]) == 0 and capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(tmp_path)]) == 2 and "no metrics.jsonl here" in capsys.readouterr().err
    for command in (["report"], ["replay", "--step=1"], ["compare", str(run)]):
        assert main([*command, str(tmp_path / "none")]) == 2
        assert f"{tmp_path / 'none'}: there is no such folder; give the folder of a run" in capsys.readouterr().err


def test_a_metric_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, HEALTHY, steps=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a\\ud83d\\ude00": 1}\n{"step": 3, "a\\ud800": 1}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line [0-9]: half a surrogate pair"):
        write_report(run)


def test_long_curves_keep_ends_and_flagged_steps() -> None:
    lines = [{"step": float(i)} for i in range(10_000)]
    kept = [m["step"] for m in thinned(lines, {777})]
    assert kept[0] == 0 and kept[-1] == 9999 and 777 in kept and len(kept) <= 2001
    assert thinned(lines[:5], set()) == lines[:5]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@needs_browser
def test_a_browser_shows_it_without_errors_or_requests(tmp_path: Path, browser: Page) -> None:
    file = write_report(make_run(tmp_path, BEHAVIOURS["entropy-collapse"]))
    browser.open(file)
    browser.wait("document.querySelector('#sample .text span') !== null")
    assert browser.problems == [] and [url for url in browser.requests if not url.startswith("file:")] == [] and len(browser.requests) == 1
    assert "Entropy collapse" in browser.run("document.querySelector('.card h3').textContent")
    assert browser.run("document.querySelectorAll('.chart').length") >= 10
    assert browser.run("document.querySelectorAll('.chip').length") == 32


@needs_browser
def test_it_is_used_from_the_keyboard(tmp_path: Path, browser: Page) -> None:
    browser.open(write_report(make_run(tmp_path, HEALTHY)))
    browser.run("document.querySelector('.plot').focus()")
    for _ in range(3):
        browser.press("ArrowLeft")
    assert browser.run("document.querySelector('.plot').getAttribute('aria-valuetext')").startswith("step 27: mean ")
    browser.press("Enter")
    browser.wait("document.getElementById('step').value === 'step_000027'")
    browser.wait("document.getElementById('sample').textContent.includes('step_000027.jsonl:')")
    browser.run("document.querySelector('.chip:not(.full)').focus()")
    browser.press("Enter")
    browser.wait("document.getElementById('sample').textContent.includes('The text of this sample is not in this page: line ')")
    unnamed = (
        "[...document.querySelectorAll('button, select, input, [role]')]"
        ".filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.closest('label'))).length"
    )
    assert browser.run(unnamed) == 0
    assert browser.problems == []


@needs_browser
def test_who_is_faster_than_the_page_sees_what_was_asked_for_last(tmp_path: Path, browser: Page) -> None:
    """Steps and samples are unpacked while the reader goes on."""
    browser.open(write_report(make_run(tmp_path, HEALTHY)))
    browser.wait("document.querySelector('#sample .text span') !== null")
    browser.run(
        "const whole = blob, late = [400, 0];"
        "blob = async (id) => { const found = await whole(id); await new Promise((r) => setTimeout(r, late.shift() || 0)); return found; };"
        "document.getElementById('previous').click(); document.getElementById('previous').click();"
    )
    browser.wait("document.getElementById('sample').textContent.includes(document.getElementById('step').value + '.jsonl:')")
    time.sleep(0.6)
    assert browser.run("document.getElementById('sample').textContent.includes(document.getElementById('step').value + '.jsonl:')")
    browser.run("late.push(400, 0); document.querySelector('.chip.full').click(); document.querySelector('.chip:not(.full)').click();")
    time.sleep(0.6)
    assert browser.run("document.getElementById('sample').textContent.includes('The text of this sample is not in this page')")


@needs_browser
def test_what_a_reward_was_the_sum_of_is_shown_with_its_sample(tmp_path: Path, browser: Page) -> None:
    run = make_run(tmp_path, HEALTHY, steps=2)
    for file in (run / "samples").glob("step_*.jsonl"):
        rows = [json.loads(line) | {"parts": {"format": 1.0, "own/<b>": -0.5}} for line in file.open()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.open(write_report(run))
    browser.wait("document.querySelector('#sample .text span') !== null")
    shown = browser.run("document.querySelector('#sample .verdict').textContent")
    assert " · of the reward: format 1, own/<b> " in shown and shown.endswith("0.5")


@needs_browser
def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, browser: Page) -> None:
    hostile = Behaviour(lambda *_: Answer(HOSTILE, "</script>", Status.WRONG), prompt=HOSTILE.replace("{", "{{").replace("}", "}}") + "{}")
    browser.open(write_report(make_run(tmp_path, hostile, steps=2)))
    browser.wait("document.querySelector('#sample .text span') !== null")
    assert browser.run("window.hacked === undefined") and browser.problems == []
    assert browser.run("[...document.querySelectorAll('#sample .text')].pop().textContent") == HOSTILE


@needs_browser
@pytest.mark.slow
def test_500_steps_of_128_samples_are_ready_in_three_seconds(tmp_path: Path, browser: Page) -> None:
    run = make_run(tmp_path, HEALTHY, steps=500, prompts=16, group_size=8, words=400)
    file = write_report(run)
    assert file.stat().st_size < MAX_BYTES
    seconds = [browser.open(file) for _ in range(5)]
    assert statistics.median(seconds) < 3, seconds
    assert len(open_run(run).files) == 500 and browser.problems == []
