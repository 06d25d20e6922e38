"""A table in every dress is read by one reader: where it is learned from, predicted, and handed in."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pandas as pd
import pytest

from mlkit.bundle.manifest import Column, TableInput
from mlkit.bundle.registry import Registry
from mlkit.config import load_settings
from mlkit.inference.batch import answers, open_model
from mlkit.inference.inputs import BatchError, Inputs
from mlkit.inference.predictor import Predictor
from mlkit.kaggle.competitions import shape_submission
from mlkit.preprocess.columns import read_table, type_of
from mlkit.preprocess.image_source import read_source
from mlkit.preprocess.source import DataError
from mlkit.preprocess.tabular_audit import audit
from mlkit.preprocess.text_audit import audit as audit_texts

SETTINGS = load_settings()
Rows = list[list[str]]


@pytest.fixture(scope="module")
def gems(past: Path) -> Rows:
    "Twenty rows that a bundle of the past was made of, with a word that needs an encoding and one of blanks around it."
    with open(past / "gems.csv", newline="", encoding="utf-8") as f:
        head, *rows = list(csv.reader(f))[:21]
    return [["id", *head, "näme"], *([f"r{i}", *row, f"Größe {i}"] for i, row in enumerate(rows))]


def as_text(rows: Rows, separator: str = ",", end: str = "\r\n") -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator, lineterminator=end).writerows(rows)
    return out.getvalue()


def as_lines(rows: Rows) -> bytes:
    return "".join(
        json.dumps(dict(zip(rows[0], map(value, r), strict=True))) + "\n" for r in rows[1:]
    ).encode()


def value(cell: str) -> object:
    try:
        return json.loads(cell.lower())
    except ValueError:
        return cell or None


def as_frame(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame([list(map(value, r)) for r in rows[1:]], columns=rows[0])


def as_arrow(write: str) -> Callable[[Rows], bytes]:
    def make(rows: Rows) -> bytes:
        out = io.BytesIO()
        getattr(as_frame(rows), write)(out)
        return out.getvalue()

    return make


def as_zip(rows: Rows) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("__MACOSX/._rows.csv", b"\0")
        archive.writestr("rows.csv", as_text(rows))
    return out.getvalue()


def as_workbook(rows: Rows) -> bytes:
    "A workbook as small as can be: numbers as numbers, the rest as text in the cells."
    cells = []
    for row in rows:
        cells.append("<row>")
        for cell in row:
            if isinstance(value(cell), int | float) and not isinstance(value(cell), bool):
                cells.append(f"<c><v>{cell}</v></c>")
            else:
                cells.append(f'<c t="inlineStr"><is><t>{escape(cell)}</t></is></c>')
        cells.append("</row>")
    main, office = "http://schemas.openxmlformats.org/", "officeDocument/2006/relationships"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{main}package/2006/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{main}package/2006/relationships"><Relationship Id="r1" Type="{main}{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}spreadsheetml/2006/main" xmlns:r="{main}{office}"><sheets><sheet name="rows" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{main}package/2006/relationships"><Relationship Id="r1" Type="{main}{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}spreadsheetml/2006/main"><sheetData>{"".join(cells)}</sheetData></worksheet>',
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>' + text)
    return out.getvalue()


DRESSES: dict[str, Callable[[Rows], bytes]] = {
    "rows.csv": lambda r: as_text(r).encode(),
    "mark.CSV": lambda r: as_text(r, end="\n").encode("utf-8-sig"),
    "semi.csv": lambda r: as_text(r, ";").encode(),
    "pipe.csv": lambda r: as_text(r, "|", "\n").encode(),
    "mac.csv": lambda r: as_text(r, ";", "\r").encode(),
    "padded.csv": lambda r: as_text([[f" {c}  " for c in row] for row in r]).encode(),
    "title.csv": lambda r: ("Gems of 2026;;\r\n\r\n" + as_text(r, ";")).encode(),
    "excel.csv": lambda r: ("sep=;\r\n" + as_text(r, ";") + ";" * (len(r[0]) - 1) + "\r\n").encode("cp1252"),
    "trailing.csv": lambda r: as_text([[*row, "", ""] for row in r], ";").encode(),
    "tabs.tsv": lambda r: as_text(r, "\t").encode(),
    "tabs.txt": lambda r: as_text(r, "\t").encode("cp1252"),
    "wide.csv": lambda r: as_text(r, "\t").encode("utf-16"),
    "wide.txt": lambda r: as_text(r, ";").encode("utf-16-be"),
    "latin.csv": lambda r: as_text(r).encode("latin-1"),
    "rows.csv.gz": lambda r: gzip.compress(as_text(r, ";").encode("cp1252")),
    "rows.csv.bz2": lambda r: bz2.compress(as_text(r).encode()),
    "rows.tsv.xz": lambda r: lzma.compress(as_text(r, "\t").encode()),
    "rows.zip": as_zip,
    "rows.jsonl": as_lines,
    "rows.ndjson.gz": lambda r: gzip.compress(as_lines(r)),
    "rows.json": lambda r: json.dumps([json.loads(line) for line in as_lines(r).splitlines()]).encode(),
    "rows.parquet": as_arrow("to_parquet"),
    "rows.feather": as_arrow("to_feather"),
    "rows.xlsx": as_workbook,
}  # fmt: skip


def dressed(name: str, rows: Rows, folder: Path) -> Path:
    if name.endswith(".xlsx"):
        try:
            import python_calamine  # noqa: F401
        except ModuleNotFoundError:
            pytest.importorskip("openpyxl", reason="no reader of workbooks is installed")
    path = folder / name
    path.write_bytes(DRESSES[name](rows))
    return path


@pytest.fixture(scope="module")
def model(past: Path) -> Predictor:
    return open_model(Registry(past / "models").resolve("table-label"), SETTINGS)


def asked(model: Predictor, path: Path) -> list[tuple]:
    inputs = Inputs([str(path)], model.manifest.input)
    assert not inputs.lacking
    rows = [one for chunk in answers(model, inputs) for one in chunk]
    return [
        (one.error, one.answer and one.answer.label, one.answer and one.answer.confidence)
        for one in rows
    ]


@pytest.mark.parametrize("name", DRESSES)
def test_what_trains_can_be_asked_and_handed_in(
    name: str, gems: Rows, model: Predictor, tmp_path: Path
) -> None:
    path, plain = dressed(name, gems, tmp_path), tmp_path / "plain.csv"
    plain.write_text(as_text(gems), encoding="utf-8")
    frame, wanted = read_table(str(path), SETTINGS), read_table(str(plain), SETTINGS)
    assert [type_of(frame[c]) for c in frame] == [type_of(wanted[c]) for c in wanted]
    pd.testing.assert_frame_equal(frame, wanted, check_dtype=False)
    said = asked(model, path)
    assert said == asked(model, plain) and not any(error for error, *_ in said)
    sample = dressed(name, [["id", "näme"], *([r[0], r[-1]] for r in gems[1:][::-1])], tmp_path)
    answered = [
        ["input", "id", "label"],
        *([str(path), r[0], label] for r, (_, label, _) in zip(gems[1:], said, strict=True)),
    ]
    (tmp_path / "out.csv").write_text(as_text(answered), encoding="utf-8")
    shape_submission(tmp_path / "out.csv", sample, tmp_path / "in.csv")
    with open(tmp_path / "in.csv", newline="", encoding="utf-8") as f:
        head, *rows = list(csv.reader(f))
    assert head == ["id", "näme"]
    assert rows == [[r[0], label] for r, (_, label, _) in zip(gems[1:], said, strict=True)][::-1]


def test_spam_in_latin_1_keeps_every_text(tmp_path: Path) -> None:
    texts = [
        (("ham", "spam")[i % 3 == 0], f"win a {'£' * (i % 3 == 0)}1000 prize number {i}")
        for i in range(90)
    ]
    lines = "".join(f'{label},"{text}",,,\r\n' for label, text in texts)
    (tmp_path / "spam.csv").write_bytes(f"v1,v2,,,\r\n{lines}".encode("latin-1"))
    found = audit_texts(str(tmp_path / "spam.csv"), load_settings("data.target=v1"))
    assert found.quarantine == {} and found.count() == {"ham": 60, "spam": 30}
    assert [p.text for p in found.records] == [text for _, text in texts]
    assert any("cp1252" in said for what, said in found.rows() if what == "note")


def test_texts_in_files_have_an_encoding_each(tmp_path: Path) -> None:
    for i, codec in enumerate(("utf-8", "utf-8-sig", "utf-16", "cp1252")):
        for label in "ab":
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.txt").write_bytes(f"Größe {label} {i}".encode(codec))
    (tmp_path / "a" / "9.txt").write_bytes("Привет".encode("cp1251"))
    found = audit_texts(str(tmp_path), SETTINGS)
    assert [p.text for p in found.readable] == [f"Größe {a} {i}" for a in "ab" for i in range(4)]
    assert list(found.quarantine) == ["a/9.txt"] and "data.encoding" in found.quarantine["a/9.txt"]


def test_an_encoding_is_said_set_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "rents.csv"
    path.write_bytes(("город;цена\n" + "Москва;3\nКазань;4\n" * 20).encode("cp1251"))
    with pytest.raises(
        DataError, match="neither UTF-8 nor cp1252.*data.encoding.*cp1251 for Russian"
    ):
        read_table(str(path), SETTINGS)
    given = load_settings("data.encoding=cp1251")
    assert read_table(str(path), given)["город"].unique().tolist() == ["Москва", "Казань"]
    with pytest.raises(DataError, match="is not utf-8-sig; set data.encoding"):
        read_table(str(path), load_settings("data.encoding=utf-8"))
    with pytest.raises(DataError, match="'klingon' is not an encoding"):
        read_table(str(path), load_settings("data.encoding=klingon"))


def test_the_audit_says_how_a_table_was_read(tmp_path: Path) -> None:
    path = tmp_path / "air.csv"
    rows = "".join(
        f"{i % 9 + 1:02}/03/2004;{i % 7};{'hot' if i % 2 else 'cold'};;\r\n" for i in range(80)
    )
    path.write_bytes(f"Luftgüte;;;;\r\nwhen;co;class;;\r\n{rows}{';;;;' * 1}\r\n".encode("cp1252"))
    found = audit(str(path), load_settings("data.keep=when,co"))
    said = [finding for what, finding in found.rows() if what == "note"]
    assert len(found.frame) == 80 and list(found.frame) == ["when", "co", "class"]
    assert said == list(found.to_dict()["notes"])
    assert "cp1252" in said[0] and said[1] == "separator: ;" and "'Luftgüte'" in said[2]


def test_a_line_break_in_a_head_is_part_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "break.csv"
    path.write_text('"Units\nsold",Price\r\n' + "3,4\r\n" * 9, newline="")
    assert list(read_table(str(path), SETTINGS)) == ["Units\nsold", "Price"]


def test_categories_of_whole_numbers_may_have_gaps(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "store": pd.Categorical([None if i % 20 == 0 else i % 5 for i in range(100)]),
            "tags": [["a", "b"][: i % 3] for i in range(100)],
            "y": ["p", "q"] * 50,
        }
    )
    frame.to_feather(tmp_path / "all.feather")
    frame.to_parquet(tmp_path / "all.parquet")
    for source in (str(tmp_path / "all.feather"), str(tmp_path / "all.parquet"), frame):
        read = read_table(source, SETTINGS)
        assert list(read) == ["store", "y"] and type_of(read["store"]) == "number"
        assert read["store"].isna().sum() == 5 and read["store"][1] == 1.0
        assert any("tags" in note and "left out" in note for note in read.attrs["read"]["notes"])


def test_ragged_rows_are_named_by_line(tmp_path: Path, model: Predictor) -> None:
    path = tmp_path / "long.csv"
    path.write_text('carat,cut,"x"\n0.5,Ideal,1\n\n"0,5",Fair,"a\nb"\n0,5,Fair,1\n0.5\n')
    with pytest.raises(
        DataError, match=r"long.csv.*cells than the 3 of the head: 2, in the lines 6 \(4\), 7 \(1\)"
    ):
        read_table(str(path), SETTINGS)
    wrong = [item.wrong for item in Inputs([str(path)], model.manifest.input)]
    assert wrong == ["", "", *(f"the row has {n} cells, and the table 3 columns" for n in (4, 1))]


@pytest.mark.parametrize(
    ("separator", "codec"), [(",", "utf-8"), (";", "utf-8"), ("\t", "cp1252"), (",", "utf-16")]
)
def test_a_list_of_images_is_a_table_too(separator: str, codec: str, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for i in range(6):
        (tmp_path / "img" / f"ä{i}.jpg").write_bytes(b"")
    rows = [["path", "label"], *([f"img\\ä{i}.jpg", "ab"[i % 2]] for i in range(6))]
    (tmp_path / "list.csv").write_bytes(as_text(rows, separator).encode(codec))
    found = read_source(str(tmp_path / "list.csv"), SETTINGS)
    assert found.task == "image-classification" and len(found.examples) == 6
    assert all(e.path.is_file() for e in found.examples)
    assert (separator == ",") == ("separator" not in " ".join(found.notes))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"%PDF-1.7", "not a table but a PDF"),
        ("a.csv", b"<!DOCTYPE html><html>", "a web page"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-9], "may be damaged"),
        ("a.parquet", b"PAR1" + bytes(50), "cannot be read"),
        ("a.jsonl", b'{"a": 1, "b": 2}\n{"a": \n', "1 lines are no rows: 2:"),
    ],
)  # fmt: skip
def test_what_is_no_table_says_what_it_is(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_table(str(tmp_path / name), SETTINGS)


def test_a_zip_with_several_tables_is_a_question(tmp_path: Path, model: Predictor) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("train.csv", "test.csv"):
            archive.writestr(name, "a,b\n1,2\n")
    for read, error in (
        (lambda: read_table(str(tmp_path / "two.zip"), SETTINGS), DataError),
        (lambda: Inputs([str(tmp_path / "two.zip")], model.manifest.input), BatchError),
    ):
        with pytest.raises(error, match=r"holds 2 tables \(train.csv, test.csv\)"):
            read()


def test_a_workbook_without_its_reader_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("python_calamine", "openpyxl"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "a.xlsx").write_bytes(as_workbook([["a", "b"], ["1", "x"]]))
    with pytest.raises(DataError, match="pip install python-calamine"):
        read_table(str(tmp_path / "a.xlsx"), SETTINGS)


def test_numbers_of_parquet_are_those_of_the_file(tmp_path: Path) -> None:
    kinds = {"carat": "number", "cut": "text"}
    spec = TableInput(columns=[Column(name=n, type=kind) for n, kind in kinds.items()])
    frame = pd.DataFrame(
        {"carat": np.array([0.1, 1 / 3, np.nan], "float32"), "cut": ["Ideal", None, " Fair"]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    rows = [item.content for item in Inputs([str(tmp_path / "a.parquet")], spec)]
    assert [np.float32(row["carat"]) for row in rows[:2]] == frame["carat"][:2].tolist()
    assert [row["cut"] for row in rows] == ["Ideal", "", "Fair"] and rows[2]["carat"] == ""
