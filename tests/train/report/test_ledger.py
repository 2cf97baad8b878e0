"""The report tells what recovery has done, and survives a damaged ledger."""

from __future__ import annotations

import json

from tests.train.report.runs import make_run
from train.report.page import write_report
from train.report.run import RunData

LINE = {"time": 1.0, "run": "x", "attempt": "0", "step": 14, "event": "alarm", "detector": "loss", "verdict": None}
DOCUMENT = {"source": "<b>web", "start": 3245, "stop": 3287, "step": 12, "index": 3, "loss": "nan", "name": None}
LINES = [
    {**LINE, "statistics": {"value": 2681.8125, "limit": 8.31638}, "checkpoint": 10, "action": None},
    {**LINE, "event": "evidence", "trial": "rerun", "outcome": {"same": True}, "statistics": None, "action": None},
    {
        **LINE,
        "event": "action",
        "verdict": "data",
        "action": "rewind+skip",
        "documents": [DOCUMENT],
        "tokens_lost": 512,
    },
]


def test_the_report_shows_the_ledger(tmp_path):
    run = make_run(tmp_path / "run")
    write_report([run], run / "report.html")
    assert "recovery has done" not in (run / "report.html").read_text(), "control: without a ledger"
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (run / "recovery.jsonl").write_text(text + '{"step": ')
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "What recovery has done in run" in page and "recovery.jsonl" not in page.split("Repeat")[0]
    for shown in ("checkpoint 10, value 2682, limit 8.316", "rerun: same True", "data: rewind+skip", "512 tokens lost"):
        assert shown in page
    assert "tokens 3,245 to 3,287 of &lt;b&gt;web, read by step 12" in page


def test_damaged_lines_are_left_out_and_stop_ends_the_run(tmp_path):
    run = make_run(tmp_path / "run", steps=40)
    (run / "summary.json").unlink()
    good = json.dumps({**LINES[0], "event": "stop", "verdict": "it came again"})
    (run / "recovery.jsonl").write_text(f'{{"step": "x"}}\n[1]\n{good}\n')
    found = RunData(run)
    assert [row.event for row in found.recovery] == ["stop"] and found.gave_up and found.ended
    assert "recovery.jsonl: 2 of 3 lines are damaged and left out." in list(found.warnings())
    assert any("Recovery has stopped the run" in text for text in found.warnings())
