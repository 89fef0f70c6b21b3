"""What a person sees of a run: the line while it works, and its page afterwards."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from itertools import combinations, product

import pytest
from programs import wait_for
from typer.testing import CliRunner

from pipeline import screen as screens
from pipeline.cli import app
from pipeline.errors import ExitCode, InputMissing, JobError
from pipeline.footer import Totals
from pipeline.job.jobfile import load_job, parse_job
from pipeline.nights.retried import Retried
from pipeline.report import Receipt, UnitTrouble, exit_code
from pipeline.screen import Screen


def screen(units: int = 4, **planned: object) -> Screen:
    """Of a run that has planned `units`."""
    shown = Screen()
    shown.observe("planned", {"run": "000001", "units": units, "done": 0, "todo_bytes": 10**6, **planned})
    return shown


def rows(shown: Screen, images: int, failed: int = 0) -> None:
    shown.observe("rows", {"images": images, "failed": failed})


def test_the_line_counts_images_and_estimates_the_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(screens.time, "monotonic", lambda: now[0])
    with screen() as shown:
        now[0] += 9
        assert shown._line() == "0 images, 9 s"
        rows(shown, 100, failed=2)
        now[0] += 10
        assert shown._line() == "100 images, 10 img/s, 2 failed, 0/4 units"
        shown.observe("commit", {"rows": 80})
        assert shown._line() == "100/~320 images, 10 img/s, 22 s left, 2 failed, 1/4 units"
        for _ in range(3):
            shown.observe("commit", {"rows": 80})
        rows(shown, 220)
        assert shown._line() == "320/320 images, 32 img/s, 0 s left, 2 failed, 4/4 units"


@pytest.mark.parametrize("event", ["trouble", "split"])
def test_what_is_dropped_is_taken_off_the_line(event, capsys, monkeypatch):
    monkeypatch.setattr(screens.time, "monotonic", lambda: 100.0)
    with screen() as shown:
        rows(shown, 100, failed=5)
        shown.observe(event, {"dropped": 30, "dropped_failed": 4, "error_class": "TAR_NO_EOF", "error": "in/a.tar: cut"})
        assert shown._line() == "70 images, 1 failed, 0/4 units", "no rate before there is one"
    assert ("TAR_NO_EOF: in/a.tar: cut" in capsys.readouterr().err) == (event == "trouble")


def test_what_comes_again_by_itself_is_not_shown_as_trouble(capsys):
    with screen() as shown:
        shown.observe("trouble", {"dropped": 0, "dropped_failed": 0, "error_class": "LOST", "error": "a worker died"})
    assert "LOST" not in capsys.readouterr().err


def test_what_is_wrong_with_a_unit_is_shown_once_and_again_only_in_other_words(capsys):
    with screen() as shown:
        for words in ("a.tar: not yours", "b.tar: cut", "a.tar: not yours", "b.tar: not a tar", "b.tar: cut"):
            name = "UNIDENTIFIED" if "yours" in words else "TAR_CORRUPT"
            shown.observe("trouble", {"unit": "u", "dropped": 1, "dropped_failed": 0, "error_class": name, "error": words})
        assert shown._images == -5, "each is counted"
    said = ["UNIDENTIFIED: a.tar: not yours", "TAR_CORRUPT: b.tar: cut", "TAR_CORRUPT: b.tar: not a tar"]
    assert capsys.readouterr().err.splitlines()[1:] == said


def test_the_receipt_has_a_sentence_once_with_the_units_that_it_is_said_of():
    def of(*units: str, error: str) -> tuple[UnitTrouble, ...]:
        return tuple(UnitTrouble(unit, ("in/a.tar",), "UNIDENTIFIED", error) for unit in units)

    trouble = (*of("", error="x: gone."), *of("0123456789ab", error="full."), *of("b" * 32, "c" * 32, error="expired."))
    left = [line for line in receipt(trouble=trouble, exit_code=3).lines() if line.startswith("left ")]
    assert left == [
        "left    UNIDENTIFIED: x: gone.",
        "left    01234567  UNIDENTIFIED: full.",
        "left    bbbbbbbb and 1 more  UNIDENTIFIED: expired.",
    ]


def test_a_resumed_run_counts_the_units_that_are_left_and_a_new_plan_more(capsys):
    with screen(10, done=6) as shown:
        rows(shown, 1)
        assert shown._line().endswith("0/4 units")
        shown.observe("replanned", {"before": 4, "units": 7})
        assert shown._line().endswith("0/7 units")
    assert "resuming: 6 of 10 units done" in capsys.readouterr().err


def test_one_unit_is_one(capsys):
    with screen(1) as shown:
        shown.observe("pass", {"number": 2, "units": 1, "careful": False})
    said = capsys.readouterr().err
    assert ": 1 unit to do, " in said
    assert "pass 2: 1 unit left\n" in said


def test_a_line_comes_by_and_by_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(screens, "EVERY_S", 0.01)
    with screen() as shown:
        rows(shown, 7)
        assert wait_for(lambda: "7 images" in capsys.readouterr().err)


EVIL = "a\x1b]0;owned\x07\n\x9b31m.jpg"
SPELT = r"a\x1b]0;owned\x07\n\x9b31m.jpg"


def test_no_name_of_a_file_is_obeyed_by_a_terminal(tmp_path, model, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / EVIL).write_bytes(b"")
    job = tmp_path / "job.yaml"
    paths = f"input: {{uri: {tmp_path}/in/, format: images}}\nmodel: {{uri: {model}}}\noutput: {{uri: {tmp_path}/out/}}\n"
    job.write_text(f"name: evil\n{paths}")
    planned = CliRunner().invoke(app, ["plan", str(job)])
    assert planned.exit_code == 0
    assert planned.output.count("\n") == 4
    assert f"/in/{SPELT}\n" in planned.output
    printed = CliRunner().invoke(app, ["plan", str(job), "--json"]).output
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f]", printed)
    assert json.loads(printed)["todo"][0]["inputs"] == [f"{tmp_path}/in/{EVIL}"]
    assert str(InputMissing(f"{EVIL}: gone", do="Run again")) == f"{SPELT}: gone. Run again."
    with screen() as shown:
        shown.observe("trouble", {"dropped": 0, "dropped_failed": 0, "error_class": "TAR_NO_EOF", "error": EVIL})
        shown.observe("missing", {"errors": {EVIL: f"{EVIL}: nothing there", "b": "b: nothing there"}})
    told = capsys.readouterr().err.splitlines()
    assert told[1:] == [f"TAR_NO_EOF: {SPELT}", f"missing: {SPELT}: nothing there", "missing: b: nothing there"]


def test_a_job_file_that_no_terminal_should_see_is_told_in_one_line(tmp_path):
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / EVIL)
    assert str(caught.value).startswith(f"{tmp_path}/{SPELT}: No such file or directory; required")
    with pytest.raises(JobError) as caught:
        parse_job(b"name: a\x01b", name="j")
    assert str(caught.value).startswith("j: unacceptable character #x0001: special characters are not allowed; required")


def receipt(**other: object) -> Receipt:
    said = {
        "job": "nightly",
        "where": "s3://b/labels/0123456789ab",
        "fingerprint": "0123456789ab",
        "artifact": "sha256:12",
        "precision": "int8",
        "run": "000007",
        "units": 3,
        "units_done": 3,
        "units_before": 1,
        "rows_in": 12345,
        "ok": 12340,
        "failed": 5,
        "failures": {"CORRUPT": 3, "TRUNCATED": 2},
        "labels": {"<b>cat</b> & dog": 9000, "tree": 3000},
        "labelled_now": 12000,
        "written": 2,
        "started": "2026-11-25T23:59:05Z",
        "ended": "2026-11-26T00:00:06Z",
        "seconds": 61.25,
        "first_seconds": 10.0,
        "images_per_second": 234.4,
        "seam_seconds": {"read": 1.5, "preprocess": 20.0, "predict": 90.0},
        "passes": 1,
    }
    return Receipt(**(said | other))  # type: ignore[arg-type]


def seen(page: bytes) -> str:
    """The text of a page, its markup and style taken off."""
    text = re.sub(r"<style>.*?</style>", "", page.decode(), flags=re.DOTALL)
    return unescape(" ".join(re.sub(r"<[^>]+>", " ", text).split()))


TROUBLE = {
    **{"CONFLICT": 6, "UNFIT": 2, "PERMISSION_DENIED": 77, "UNIDENTIFIED": 77},
    **{"TAR_TRUNCATED": 3, "PARQUET_CORRUPT": 3, "INPUT_CHANGED": 3, "INPUT_MISSING": 3, "INPUT_BROKEN": 3},
    **{"TEMPORARY": 75, "LOST": 5},
}


def test_the_gravest_trouble_is_the_exit_code():
    """Of every set of troubles; also of an input that is in no unit, when all of the units are done."""
    subsets = [names for count in range(len(TROUBLE) + 1) for names in combinations(TROUBLE, count)]
    for names, left, done in product(subsets, (0, 2), (0, 1)):
        trouble = tuple(UnitTrouble("u" if left else "", ("in/a.tar",), name, "broken.") for name in names)
        code = exit_code(trouble[::-1], Totals(units=done, rows_in=8 * done, failed=8 * done), left=left, limit=0.5)
        assert code == (TROUBLE[names[0]] if names else 5 if left else 4 if done else 0), (names, left, done)
    assert exit_code((), Totals(units=1), left=0, limit=1.0) == 3, "not one image in a unit that was read"


def test_the_receipt_names_ten_units_that_are_left_and_how_many_more():
    trouble = tuple(UnitTrouble("u", ("in/a.tar",), "TAR_NO_EOF", f"in/{number}.tar: cut.") for number in range(12))
    said = receipt(units_done=2, trouble=trouble, exit_code=3).lines()
    assert said[:2] == ["not finished: 12,345 in = 12,340 ok + 5 failed, 2 of 3 units", "failed  CORRUPT 3, TRUNCATED 2"]
    left = [f"left    u  TAR_NO_EOF: in/{number}.tar: cut." for number in range(10)]
    assert [line for line in said if line.startswith("left")] == [*left, "left    and 2 more units"]
    assert not any("more units" in line for line in receipt(trouble=trouble[:10], exit_code=3).lines())
    assert receipt(exit_code=4).lines()[0].startswith("done: "), "everything is committed"
    nothing = receipt(rows_in=0, ok=0, failed=0, failures={}, labels={}, exit_code=3)
    assert sum(line.startswith("empty ") for line in nothing.lines()) == 1
    assert not any(line.startswith("empty ") for line in replace(nothing, trouble=trouble).lines())


def test_the_page_of_a_run_says_what_the_receipt_says():
    page = receipt().page()
    text = seen(page)
    for said in (
        *("nightly, run 000007", "12,345 in = 12,340 ok + 5 failed", "s3://b/labels/0123456789ab", "sha256:12 , int8"),
        *(
            "3 of 3, 1 of them before this attempt",
            "when 2026-11-25 23:59:05 UTC to 2026-11-26 00:00:06 UTC took 61.2 s, 234 img/s",
            "CORRUPT 3 TRUNCATED 2",
            "<b>cat</b> & dog 9,000 tree 3,000",
        ),
        "read 1.5 s preprocess 20.0 s predict 90.0 s",
    ):
        assert said in text, said
    assert b"<b>cat" not in page, "a label is no markup"
    assert b"Units left" not in page
    assert not re.search(rb"(src|href)=|url\(|@import", page), "nothing is loaded from elsewhere"


def test_a_run_that_ends_with_4_says_why():
    over = "12.34% failed, more than limits.max_failed allows: exit code 4"
    counts = {"rows_in": 10000, "ok": 8766, "failed": 1234, "failures": {"CORRUPT": 1234}}
    too_many = counts | {"exit_code": ExitCode.TOO_MANY_FAILED}
    for run in ("000007", None):
        assert receipt(**too_many, run=run).lines()[1:3] == ["failed  CORRUPT 1,234", f"over    {over}"]
    assert over in seen(receipt(**too_many).page())
    assert "max_failed" not in "".join(receipt().lines()) + seen(receipt().page())


def test_of_many_units_that_are_left_ten_are_named_and_the_others_counted():
    trouble = tuple(UnitTrouble("u", (f"in/{n}.tar",), "TAR_NO_EOF", f"in/{n}.tar: is cut.") for n in range(1, 1013))
    for account in (receipt(trouble=trouble), Retried("x", "out/f", ("CORRUPT",), "", "", 1, units=1012, trouble=trouble)):
        left = [line for line in account.lines() if line.startswith("left ")]
        assert left[9:] == ["left    u  TAR_NO_EOF: in/10.tar: is cut.", "left    and 1,002 more units"]


def test_the_page_of_a_run_that_is_not_done_names_what_is_left():
    trouble = UnitTrouble("u", ("in/a.tar",), "TAR_NO_EOF", "in/a.tar: ends without its two zero blocks.")
    text = seen(receipt(units_done=2, trouble=(trouble,), labels={f"class {n}": n + 1 for n in range(40)}).page())
    assert "Units left TAR_NO_EOF in/a.tar: ends without its two zero blocks." in text
    assert "the 25 most frequent of 40" in text
    assert "class 15 16" in text
    assert "class 14 15" not in text
    assert "Time per seam" not in seen(receipt(seam_seconds={}).page()), "of an attempt without a pass"


def test_the_page_says_how_many_labels_another_decoding_left_as_they_were():
    assert "99.0% kept their label, of 200 labelled both ways" in seen(
        receipt(decode="fast", compared=200, same_label=198).page()
    )
