"""The SQL judge: equal queries, equal rows, rows in order, queries that do not run or do not end."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from mlx_specstream.convert.pytorch.sql_task import Judgement, judge, normalized
from mlx_specstream.errors import DataError

SCHEMA = (
    "CREATE TABLE city (id NUMERIC, name TEXT, size NUMERIC, PRIMARY KEY (id));\n"
    "CREATE TABLE shop (id NUMERIC, city_id NUMERIC, colour TEXT);"
)
GOLD = "SELECT name FROM city WHERE size > 100"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("select  name from CITY where size > 100;", Judgement(True, True, True)),
        ("SELECT T.name FROM city AS T WHERE NOT T.size <= 100", Judgement(False, True, True)),
        ("SELECT name FROM city WHERE size >= 100", Judgement(False, True, False)),
        ("SELECT name FROM city", Judgement(False, True, False)),
        ("SELECT nam FROM city", Judgement(False, False, False)),
        ("There are three cities.", Judgement(False, False, False)),
        ("SELECT 1; SELECT 2", Judgement(False, False, False)),
    ],
)
def test_an_answer_is_judged_by_text_and_by_rows(answer, verdict):
    assert judge(SCHEMA, GOLD, answer) == verdict


def test_order_counts_where_the_gold_query_orders():
    gold = "SELECT id FROM city ORDER BY id"
    assert judge(SCHEMA, gold, "SELECT id FROM city ORDER BY id DESC").right is False
    assert judge(SCHEMA, "SELECT id FROM city", "SELECT id FROM city ORDER BY id DESC").right


def test_strings_keep_their_case():
    assert normalized('WHERE a = "Red" ') == normalized("where A='Red'")
    assert normalized("WHERE a = 'Red'") != normalized("WHERE a = 'red'")


def test_a_query_without_end_does_not_run():
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )
    assert judge(SCHEMA, GOLD, endless).runs is False


def test_a_schema_that_is_no_sql_is_named():
    with pytest.raises(DataError, match="CREATE TABLE"):
        judge("two tables", GOLD, GOLD)
