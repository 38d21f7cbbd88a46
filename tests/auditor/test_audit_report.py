"""A report as JSON, as Markdown, and as the table of who trains what."""

from __future__ import annotations

import csv
import io
import json

from localize.auditor import audit, ownership, ownership_csv, static, to_dict, to_markdown
from tests.auditor.audit_nets import batch, make


def test_json_holds_every_check() -> None:
    report = audit(make("dcl"), batch())

    data = json.loads(json.dumps(to_dict(report)))

    assert data["ok"] is True
    assert [check["id"] for check in data["checks"]] == [check.id for check in report.checks]
    assert set(data["checks"][0]) == {"id", "ok", "claim", "evidence"}


def test_markdown_says_first_whether_all_checks_hold() -> None:
    text = to_markdown(static(make("dcl")))

    assert text.splitlines()[2] == "All 14 checks hold."
    assert "| static.reach | yes |" in text


def test_markdown_of_a_failed_audit_quotes_the_evidence_before_the_table() -> None:
    local = make("dcl")
    text = to_markdown(static(local.with_source(local.source.replace("h_0.detach()", "h_0"))))

    assert "of 14 checks fail." in text.splitlines()[2]
    assert text.index("leak: loss_1 trains") < text.index("| check | holds |")
    assert "| static.reach | **no** |" in text


def test_ownership_tells_overlap_from_leak() -> None:
    local = make("dcl")
    leaking = local.with_source(local.source.replace("h_0.detach()", "h_0"))

    honest = {row[0]: row for row in ownership(local)}
    leaked = {row[0]: row for row in ownership(leaking)}

    dictionary = "heads.dictionary.weight"
    assert honest[dictionary] == (dictionary, "dictionary", 30, *["loss_0;loss_1;loss_2"] * 2, "overlap")
    assert honest["trunk.fc.weight"] == ("trunk.fc.weight", "segment_3", 30, "loss_3", "loss_3", "own")
    assert leaked["trunk.stem.weight"][3:] == ("loss_0;loss_1", "loss_0", "leak")


def test_ownership_names_what_nothing_trains() -> None:
    static_dictionary = {row[0]: row[-1] for row in ownership(make("dcl-static"))}
    cut = make("auglocal")
    cut = cut.with_source(cut.source.replace("heads.head_0(h_0)", "heads.head_0(h_0.detach())"))

    assert static_dictionary["heads.dictionary.weight"] == "frozen"
    assert {row[0]: row[-1] for row in ownership(cut)}["trunk.stem.weight"] == "dead"


def test_the_ownership_table_is_csv_with_one_row_for_each_parameter() -> None:
    local = make("auglocal")

    header, *rows = csv.reader(io.StringIO(ownership_csv(local)))

    assert header == ["parameter", "block", "elements", "trained_by", "declared_by", "status"]
    assert [row[0] for row in rows] == [name for name, _ in local.named_parameters()]
