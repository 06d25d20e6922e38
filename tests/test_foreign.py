"""Learners of other people: made by plain fastai in a process that never imports mlkit, and some made to harm."""

import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import cloudpickle
import httpx
import pytest
import torch
import warm
from conftest import running
from fastcore.xtras import run

from mlkit.bundle.registry import Registry
from mlkit.convert.import_learner import ForeignError, import_learner
from mlkit.convert.pickle_scan import PickleError
from mlkit.convert.sandbox import missing

MAKER = """
import json, sys, warnings
from pathlib import Path
import numpy as np, pandas as pd
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *

warnings.simplefilter("ignore")
set_seed(7)
chance = np.random.default_rng(7)
for name, shade in (("dark", 60), ("light", 190)):
    (folder := Path("pictures") / name).mkdir(parents=True)
    for i in range(6):
        pixels = np.clip(chance.normal(shade, 40, (40, 50, 3)), 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{i}.png")


def fit(learn, file):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    learn.export(Path(file).absolute())
    return learn.no_bar()


answers = {}
dls = ImageDataLoaders.from_folder(
    "pictures", valid_pct=0.25, seed=1, item_tfms=Resize(32), batch_tfms=aug_transforms(), bs=3, num_workers=1
)
learn = vision_learner(dls, "test_resnet", pretrained=False, metrics=accuracy)
with fit(learn, "picture.pkl"):
    asked = sorted(Path("pictures").rglob("*.png"))[::5]
    answers["picture"] = {str(p): dict(zip(dls.vocab, learn.predict(p)[2].tolist())) for p in asked}

n = 60
table = pd.DataFrame({"age": chance.normal(40, 9, n).round(2), "size": chance.normal(size=n), "kind": chance.choice([*"xyz"], n)})
table.loc[::7, "age"] = np.nan
table["well"] = np.where(table["size"] > 0, "yes", "no")
table["price"] = 300 + 50 * table["size"]
table[["age", "size", "kind"]].head(12).to_csv("rows.csv", index=False)
for target, block in (("well", CategoryBlock()), ("price", RegressionBlock())):
    rows = TabularPandas(
        table, [Categorify, FillMissing, Normalize], ["kind"], ["age", "size"], target, block, splits=RandomSplitter(seed=1)(table)
    )
    learn = tabular_learner(rows.dataloaders(bs=16), layers=[8])
    with fit(learn, f"{target}.pkl"):
        answers[target] = [learn.predict(row)[2].tolist() for _, row in pd.read_csv("rows.csv").head(8).iterrows()]
said = {"sea": "The harbour isn't far: tide, mast & ANCHOR!", "sky": "A comet (so so so so far) and its U.S. telescope..."}
rows = [(" ".join(chance.permutation(text.split())), topic) for topic, text in said.items() for _ in range(20)]
texts = pd.DataFrame(rows, columns=["text", "topic"])
texts.text.iloc[::4].to_csv("texts.csv", index=False)
dls = TextDataLoaders.from_df(texts, text_col="text", label_col="topic", bs=8, seed=1)
learn = text_classifier_learner(
    dls, AWD_LSTM, config={"emb_sz": 8, "n_hid": 12, "n_layers": 2}, pretrained=False, metrics=accuracy, lin_ftrs=[6]
)
with fit(learn, "text.pkl"):
    asked = [*texts.text[::7], "Nothing of THAT was there :)"]
    answers["text"] = {text: dict(zip(dls.vocab[1], learn.predict(text)[2].tolist())) for text in asked}
Path("answers.json").write_text(json.dumps(answers))
assert not any(m.partition(".")[0] == "mlkit" for m in sys.modules)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with exports of plain fastai, what they were trained on, and what they answer."
    folder = tmp_path_factory.mktemp("made")
    done = warm.run([sys.executable, "-c", MAKER], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return folder


def mlkit(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mlkit", *map(str, words)]
    return warm.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


# 65 s with what is made: four conversions, each in a sandbox that imports fastai and exports
@pytest.fixture(scope="module")
def served(made: Path, tmp_path_factory: pytest.TempPathFactory):
    "A server of all that was imported."
    models = tmp_path_factory.mktemp("models")
    exports = {"picture": "pictures", "well": "rows.csv", "price": "rows.csv", "text": "texts.csv"}
    for name, inputs in exports.items():
        done = mlkit(
            "models", "import", f"{name}.pkl", "--trust", "--inputs", inputs, "--set", f"paths.models={models}", cwd=made
        )  # fmt: skip
        assert not done.returncode, done.stderr
        Registry(models).promote(f"{name}@1")
    for pickled in made.glob("*.pkl"):
        pickled.unlink()
    assert not [p for p in models.rglob("*") if p.suffix in (".pkl", ".pth")]
    with running(models, tmp_path_factory.mktemp("server")) as server:
        yield server


def test_pictures_are_answered_as_by_their_own_learner(made: Path, served) -> None:
    for file, theirs in json.loads((made / "answers.json").read_text())["picture"].items():
        reply = httpx.post(
            f"{served.url}/v1/models/picture/predict",
            content=(made / file).read_bytes(),
            headers={"content-type": "image/png"},
        ).json()
        ours = reply["predictions"][0]["probabilities"]
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_texts_are_answered_as_by_their_own_learner(made: Path, served) -> None:
    theirs = json.loads((made / "answers.json").read_text())["text"]
    reply = httpx.post(
        f"{served.url}/v1/models/text/predict", json={"instances": [{"text": t} for t in theirs]}
    ).json()
    for ours, expected in zip(reply["predictions"], theirs.values(), strict=True):
        assert ours["probabilities"] == pytest.approx(expected, abs=1e-5)


def test_a_table_shows_an_example_that_it_takes(served) -> None:
    columns = httpx.get(f"{served.url}/v1/models/price").json()["input"]["columns"]
    row = {c["name"]: c["example"] for c in columns}
    assert None not in row.values()
    reply = httpx.post(f"{served.url}/v1/models/price/predict", json={"instances": [row]})
    assert reply.is_success, reply.text


@pytest.mark.parametrize("target", ["well", "price"])
def test_rows_are_answered_as_by_their_own_learner(made: Path, served, target: str) -> None:
    import csv

    with open(made / "rows.csv", newline="") as f:
        rows = [
            {k: v if k == "kind" else float(v) for k, v in row.items() if v}
            for row in csv.DictReader(f)
        ]
    theirs = json.loads((made / "answers.json").read_text())[target]
    reply = httpx.post(
        f"{served.url}/v1/models/{target}/predict", json={"instances": rows[: len(theirs)]}
    ).json()
    for one, expected in zip(reply["predictions"], theirs, strict=True):
        numbers = one["probabilities"] if target == "well" else one["values"]
        assert list(numbers.values()) == pytest.approx(expected, rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- made to harm


class Calls:
    "Pickled, it is a call."

    def __init__(self, function: object, *args: object):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def zipped(program: bytes) -> bytes:
    "What torch.save writes since 1.6."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("export/data.pkl", program)
        archive.writestr("export/version", "3\n")
    return out.getvalue()


def saved(what: object, zip: bool) -> bytes:
    out = io.BytesIO()
    torch.save(what, out, _use_new_zipfile_serialization=zip)
    return out.getvalue()


def by_memo(command: str) -> bytes:
    "The name is put together out of strings that were noted before something else was done."
    text = command.encode()
    said = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940\x8c\x01x0h\x00h\x01\x93X"
    return said + len(text).to_bytes(4, "little") + text + b"\x85R."


HARM = {
    "system, protocol 0": lambda c: (pickle.dumps(Calls(os.system, c), 0), "posix.system('touch "),
    "system, protocol 5": lambda c: (pickle.dumps(Calls(os.system, c), 5), "posix.system('touch "),
    "system, by INST": lambda c: (f"(S'{c}'\nios\nsystem\n.".encode(), "os.system('touch "),
    "system, out of the memo": lambda c: (by_memo(c), "posix.system('touch "),
    "run of fastcore": lambda c: (
        pickle.dumps([1, Calls(run, c)]),
        "fastcore.xtras.run('touch ",
    ),
    "exec": lambda c: (
        pickle.dumps(Calls(exec, f"import os; os.system({c!r})"), 2),
        'builtins.exec("import os; os.system(',
    ),
    "in a zip of torch": lambda c: (saved(Calls(os.system, c), True), "posix.system('touch "),
    "in a zip by hand": lambda c: (zipped(by_memo(c)), "posix.system('touch "),
    "in the old form of torch": lambda c: (saved(Calls(os.system, c), False), "posix.system"),
    "behind getattr": lambda c: (
        cloudpickle.dumps(Calls(getattr, os, "system"))[:-1] + cloudpickle.dumps(c)[2:-1] + b"\x85R.",
        "getattr(cloudpickle.cloudpickle.subimport('os'), 'system')('touch ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", HARM)
def test_without_trust_nothing_is_opened_and_the_call_is_named(how: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "export.pkl"
    data, named = HARM[how](f"touch {mark}")
    file.write_bytes(data)
    with pytest.raises(ForeignError) as refusal:
        import_learner(file, tmp_path / "bundle", [file], name="harm")
    assert named in str(refusal.value) and "was not opened" in str(refusal.value)
    assert not mark.exists() and not (tmp_path / "bundle").exists()
    try:  # it is what it was taken for
        torch.load(file, weights_only=False)
    except Exception:  # noqa: S110  after the deed it fails as it likes
        pass
    assert mark.exists()


def test_the_command_refuses_with_the_call_the_checksum_and_what_to_do(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "export.pkl"
    file.write_bytes(saved(Calls(run, f"touch {mark}"), True))
    done = mlkit("models", "import", file, cwd=tmp_path)
    assert done.returncode == 1 and not mark.exists()
    for said in ("fastcore.xtras.run('touch ", "--trust --sha256", "without network"):
        assert said in done.stderr
    wrong = mlkit("models", "import", file, "--trust", "--sha256", "f00d", cwd=tmp_path)
    assert wrong.returncode == 1 and "another file than you mean" in wrong.stderr


def test_what_nobody_can_look_into_is_not_opened_even_with_trust(tmp_path: Path) -> None:
    file = tmp_path / "export.pkl"
    out = io.BytesIO(zipped(pickle.dumps(1)))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(Calls(os.system, "touch mark")))
    for data in (out.getvalue(), b"PK\x03\x04 and no more", b"\x80\x04\xff", b""):
        file.write_bytes(data)
        with pytest.raises(PickleError):
            import_learner(file, tmp_path / "bundle", [file], name="harm", trust=True)


def test_errors_name_the_file_as_it_was_typed(tmp_path: Path) -> None:
    (tmp_path / "bears.pkl").write_bytes(b"")
    (tmp_path / "cats.pkl").write_bytes(zipped(b"."))
    with zipfile.ZipFile(tmp_path / "cats.pkl", "a") as archive:
        archive.writestr("other/data.pkl", b".")
    for typed, said in {
        "bear.pkl": "error: 'bear.pkl' is not a file; .* did you mean 'bears.pkl'",
        "bears.pkl": "error: bears.pkl is not a file, or is empty",
        "cats.pkl": "error: cats.pkl is a zip with other pickles",
    }.items():
        done = mlkit("models", "import", typed, "--trust", "--inputs", ".", cwd=tmp_path)
        assert done.returncode == 1 and re.match(said, done.stderr), done.stderr
        assert "export.pkl" not in done.stderr


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"cfastcore.transform\nPipeline\n.", "older than 2.8"),
        (b"c__main__\nget_y\n.", "get_y of the notebook"),
        (b"cfastai.basic_train\nLearner\n.", "not installed here: fastai.basic_train"),
        (b"csomebodys.library\nTransform\n.", "not installed here: somebodys.library"),
    ],
)
def test_versions_that_do_not_fit_are_told_before_opening(
    data: bytes, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "export.pkl"
    file.write_bytes(data)
    with pytest.raises(ForeignError, match=why):
        import_learner(file, tmp_path / "bundle", [file], name="old", trust=True)


def probe(port: int, folder: str) -> None:
    "Try what is not allowed, and tell by an error, which is the way out of the box."
    import os
    import socket
    import subprocess
    from pathlib import Path

    found = []
    for what, one in {
        "network": lambda: socket.create_connection(("127.0.0.1", port), 2),
        "read": lambda: Path(folder, "secret").read_text(),
        "write": lambda: Path(folder, "mark").write_text("x"),
        "program": lambda: subprocess.run(["/bin/true"]),
        "own": lambda: Path("mine").write_text("x"),
    }.items():
        try:
            one()
            found.append(what)
        except OSError:
            pass
    raise RuntimeError(f"could: {found}; knows the key: {'MLKIT_TEST_KEY' in os.environ}")


def test_trusted_it_runs_in_a_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not missing(), "this machine has no box; see mlkit.convert.sandbox"
    monkeypatch.setenv("MLKIT_TEST_KEY", "s3cret")
    (tmp_path / "secret").write_text("s3cret")
    file = tmp_path / "export.pkl"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        port = listener.getsockname()[1]
        file.write_bytes(cloudpickle.dumps(Calls(probe, port, str(tmp_path))))
        with pytest.raises(ForeignError, match=r"could: \['own'\]; knows the key: False"):
            import_learner(file, tmp_path / "bundle", [file], name="harm", trust=True)
    assert not (tmp_path / "mark").exists() and not (tmp_path / "bundle").exists()
