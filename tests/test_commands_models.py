"""`flame models` in its three forms."""

from __future__ import annotations

import json

from flame import cli
from flame.models.registry import families, refused


def test_the_matrix_names_every_family_and_every_refusal(capsys) -> None:
    assert cli.run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1 : 1 + len(families())]]
    assert names == [family.name for family in families()]
    for name, reason in refused().items():
        assert f"  {name}: {reason}" in lines


def test_the_matrix_as_json_says_only_what_the_records_say(capsys) -> None:
    assert cli.run(["models", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["refused"] == refused()
    rows = {row["family"]: row for row in record["families"]}
    assert rows["gla"]["gpu"] == "yes"
    assert rows["kda"]["gpu"] == "not run yet"
    assert {row["tensor_parallel"] for row in rows.values()} == {"yes"}
    assert {name for name, row in rows.items() if row["gpu"] == "yes"} == {
        f.name for f in families() if f.gpu
    }


def test_json_and_markdown_exclude_each_other(capsys) -> None:
    try:
        code = cli.run(["models", "--json", "--markdown"])
    except SystemExit as error:
        code = error.code
    assert code == 2
