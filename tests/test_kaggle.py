"""mlkit against a stand-in for Kaggle, through the official client and a real socket: every fault, and what is left of it."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["KAGGLE_API_ENVIRONMENT"] = "LOCALHOST"  # read when the client is imported

import nbformat
import pytest
from kaggle_server import KEY, TOKEN, USER, Standin

from mlkit import kaggle
from mlkit.config import MlkitError, Settings, load_settings
from mlkit.kaggle import Account, Busy, Datasets, KaggleError
from mlkit.notebook import NotebookError
from mlkit.registry import Registry
from mlkit.runs import Run, read_events, read_run

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "kernels/train/train.ipynb"
CELLS = [
    "words = 2\npause = 0.0\nfail = False\nsource = ''\nkey_word = ''",
    "import sys, time\nfrom mlkit.config import load_settings\nfrom mlkit.runs import Run\n"
    "run = Run.start(load_settings(source=source), kind='kernel')",
    "for i in range(words):\n"
    "    print(f'epoch {i + 1}/{words}  valid_loss 0.5', file=sys.stderr, flush=True)\n"
    "    time.sleep(pause)\n"
    "if fail:\n    raise ValueError('the data are bad')",
    "for i in range(4):\n    run.file(f'made/{i}.bin').write_bytes(bytes([i]) * 300_000)\n"
    "run.log('metrics', accuracy=words / 10)\nrun.write_outputs()",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with Standin(tmp_path_factory.mktemp("site")) as one:
        yield one


@pytest.fixture(autouse=True)
def _only_the_stand_in(
    site: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower() in ("no_proxy", "https_proxy") or name.startswith("KAGGLE_"):
            monkeypatch.delenv(name)
    for name, value in site.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    kept = dict(vars(site))
    yield
    site.faults.clear()
    for name in ("layout", "queue_seconds", "processing_seconds", "link_seconds", "lag_polls"):
        setattr(site, name, kept[name])
    site.gpu_sessions, site.gpu_used, site.page = 2, 0, 200
    site.session_variables = {}


@pytest.fixture
def settings(tmp_path: Path, site: Standin) -> Settings:
    made = load_settings(
        "kaggle.accelerator=cpu",
        "kaggle.poll_seconds=0.2",
        "kaggle.call_seconds=2",
        "kaggle.patience_minutes=0.5",
        f"paths.cache={site.folder / 'cache'}",  # the wheel is sent once
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.models={tmp_path / 'models'}",
    )
    assert Account(made.kaggle).endpoint.startswith("http://localhost")
    return made


@pytest.fixture
def account(settings: Settings) -> Account:
    return Account(settings.kaggle)


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[..., Path]:
    "`notebook('name', extra=…)`: a kernel that trains nothing, with kernel-metadata.json beside it."

    def make(name: str, cells: list[str] = CELLS, **metadata: Any) -> Path:
        nb = nbformat.v4.new_notebook()
        nb.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nb.cells = [nbformat.v4.new_markdown_cell("# A kernel"), *map(nbformat.v4.new_code_cell, cells)]
        nb.cells[1].metadata["tags"] = ["parameters"]
        path = tmp_path / "kernels" / name / f"{name}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(nb, path)
        about = {"id": f"INSERT_OWNER/{name}", "title": name, "code_file": path.name} | metadata
        (path.parent / "kernel-metadata.json").write_text(json.dumps(about))
        return path

    return make


def said(part: str, lines: list[str]) -> bool:
    return any(part in line for line in lines)


# ---------------------------------------------------------------- datasets


@pytest.fixture
def parcel(tmp_path: Path) -> kaggle.Parcel:
    files = {}
    for i in range(5):
        files[f"a/{i}.bin"] = tmp_path / f"{i}.bin"
        files[f"a/{i}.bin"].write_bytes(os.urandom(200_000))
    return kaggle.folder_parcel(files, tmp_path / "parcels")


def keep(account: Account, tmp_path: Path, name: str, parcel: kaggle.Parcel) -> str:
    return Datasets(account, tmp_path / "memory").keep(name, [parcel])


def held_there(site: Standin, ref: str) -> dict[str, int]:
    root = site.datasets[ref].versions[-1]
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["cut", "503", "429", "400", "reset", "silence", "expire"])
def test_upload_arrives_whole(
    kind: str, site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    site.fault("upload", kind, times=2)
    ref = keep(account, tmp_path, f"upload-{kind}", parcel)
    assert held_there(site, ref) == parcel.listed and len(site.datasets[ref].versions) == 1
    assert site.datasets[ref].private


def test_upload_goes_on_where_it_was_cut(
    site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    site.fault("upload", "cut")
    before = site.count("StartBlobUpload")
    ref = keep(account, tmp_path, "upload-goes-on", parcel)
    assert held_there(site, ref) == parcel.listed
    assert site.count("StartBlobUpload") == before + 1, "the same upload is gone on with"


@pytest.mark.parametrize("method", ["CreateDataset", "CreateDatasetVersion"])
@pytest.mark.parametrize("kind", ["reset-after", "reset", "500", "429", "silence"])
def test_a_dataset_is_made_once(
    method: str, kind: str, site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    name = f"made-{method[6:]}-{kind}".lower()
    versions = 1
    if method == "CreateDatasetVersion":
        site.add_dataset(f"{USER}/{name}", {"other.txt": b"1"})
        versions = 2
    site.fault(method, kind)
    ref = keep(account, tmp_path, name, parcel)
    assert held_there(site, ref) == parcel.listed
    assert len(site.datasets[ref].versions) == versions


def test_what_is_there_is_not_sent_again(
    site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    ref = keep(account, tmp_path, "kept-as-it-is", parcel)
    before = site.count("StartBlobUpload"), len(site.datasets[ref].versions)
    keep(account, tmp_path, "kept-as-it-is", parcel)
    assert (site.count("StartBlobUpload"), len(site.datasets[ref].versions)) == before
    changed = tmp_path / "more.txt"
    changed.write_text("more")
    Datasets(account, tmp_path / "memory").keep("kept-as-it-is", [parcel, kaggle.file_parcel(changed)])
    assert len(site.datasets[ref].versions) == 2


def test_a_version_that_lacks_a_file_is_made_again(
    site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    other = tmp_path / "weights.pth"
    other.write_bytes(b"w" * 1000)
    memory = tmp_path / "memory/uploads.json"
    memory.parent.mkdir()
    dead = {"token": "gone", "url": "http://localhost/upload/gone"}
    sent = kaggle.file_parcel(other)
    memory.write_text(json.dumps({f"{sent.name} 1000 http://localhost": dead}))
    ref = Datasets(account, tmp_path / "memory").keep("lacks-a-file", [parcel, sent])
    assert held_there(site, ref) == parcel.listed | sent.listed


def test_waits_until_it_is_processed(
    site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    site.processing_seconds = 2
    ref = keep(account, tmp_path, "slow-to-process", parcel)
    assert site.datasets[ref].status == "READY"
    account.settings.__dict__["processing_minutes"] = 0.01
    site.datasets[ref].ready = time.time() + 60
    with pytest.raises(KaggleError, match="still BLOBS_RECEIVED"):
        keep(account, tmp_path, "slow-to-process", parcel)


def test_a_listing_in_pages(
    site: Standin, account: Account, parcel: kaggle.Parcel, tmp_path: Path
) -> None:
    site.page = 2
    ref = keep(account, tmp_path, "many-pages", parcel)
    assert Datasets(account, tmp_path).listing(ref, 1) == parcel.listed


@pytest.mark.parametrize("kind", ["429", "500", "reset", "silence"])
def test_a_question_is_repeated(kind: str, site: Standin, account: Account, tmp_path: Path) -> None:
    site.add_dataset(f"{USER}/asked-{kind}", {"a.txt": b"1"})
    site.fault("GetDataset", kind, retry_after=1 if kind == "429" else None)
    began = time.monotonic()
    assert Datasets(account, tmp_path).version(f"{USER}/asked-{kind}") == 1
    assert time.monotonic() - began > (1 if kind == "429" else 0), "Retry-After is kept"


def test_silence_ends_at_the_deadline(
    site: Standin, settings: Settings, tmp_path: Path
) -> None:
    short = settings.kaggle.model_copy(update={"call_seconds": 0.5, "patience_minutes": 0.03})
    one = Account(short)
    site.fault("GetDataset", "silence", times=50)
    began = time.monotonic()
    with pytest.raises(KaggleError) as e:
        Datasets(one, tmp_path).version("tester/never-mind")
    assert e.value.passing and time.monotonic() - began < 10


# ---------------------------------------------------------------- what is refused before it costs anything


def prepared(path: Path, settings: Settings, account: Account, **values: Any) -> Run:
    return kaggle.begin(kaggle.prepare(path, values, settings, account), settings)


def test_absent_sources_are_named_before_the_push(
    site: Standin, account: Account, settings: Settings, notebook: Callable
) -> None:
    site.add_competition("closed-doors", {"train.csv": b"1"}, accepted=False)
    path = notebook(
        "absent-sources",
        dataset_sources=["someone/nothing-here"],
        competition_sources=["closed-doors"],
        kernel_sources=["tester/no-such-kernel"],
    )
    before = site.count("SaveKernel")
    with pytest.raises(KaggleError) as e:
        prepared(path, settings, account)
    for part in ("someone/nothing-here", "competitions/closed-doors/rules", "tester/no-such-kernel"):
        assert part in str(e.value)
    assert site.count("SaveKernel") == before


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"title": "Quite another"}, "leads to the slug 'quite-another'"),
        ({"id": "somebody/refused"}, "belongs to 'somebody'"),
        ({"machine_shape": "NvidiaTeslaP100"}, "refused"),
        ({"machine_shape": "TpuV5E8"}, "does not train on a TPU"),
        ({"enable_tpu": "true"}, "does not train on a TPU"),
        ({"language": "r"}, "only 'python'"),
        ({"id": "INSERT_OWNER/abc", "title": "abc"}, "5 to 50"),
        ({"model_sources": ["google/gemma"]}, "owner/model/framework/variation/version"),
    ],
)
def test_metadata_that_kaggle_would_take_otherwise(
    metadata: dict, part: str, notebook: Callable, settings: Settings, account: Account
) -> None:
    asked = settings.model_copy(
        update={"kaggle": settings.kaggle.model_copy(update={"accelerator": ""})}
    )
    with pytest.raises(KaggleError, match=re.escape(part)):
        prepared(notebook("refused", **metadata), asked, account)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"wrods": "2"}, "words"),
        ({"words": "two"}, "not of type int"),
        ({"key_word": "KGAT_0123456789abcdef0123"}, "looks like a secret"),
    ],
)
def test_parameters_are_strict(
    values: dict, part: str, site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    before = len(site.calls)
    with pytest.raises(NotebookError, match=part):
        prepared(notebook("strict-parameters"), settings, account, **values)
    assert len(site.calls) == before, "nothing was asked of Kaggle"


def test_a_notebook_with_the_key_in_it_stays_here(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    run = prepared(notebook("holds-the-key", [*CELLS, f"key = '{KEY}'"]), settings, account)
    before = site.count("SaveKernel")
    with pytest.raises(KaggleError, match="credential") as e:
        kaggle.push(run, account)
    assert KEY not in str(e.value) and site.count("SaveKernel") == before


def test_no_gpu_time_left(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    gpu = settings.model_copy(update={"kaggle": settings.kaggle.model_copy(update={"accelerator": "gpu"})})
    site.gpu_used = site.gpu_quota
    with pytest.raises(KaggleError, match=r"no GPU time is left this week; new time from 20\d\d-"):
        prepared(notebook("without-quota"), gpu, account)
    site.gpu_used = site.gpu_quota - 3600
    told: list[str] = []
    kaggle.prepare(notebook("little-quota"), {}, gpu, account, told.append)
    assert said("1.0 h of GPU time are left", told)


# ---------------------------------------------------------------- push


@pytest.mark.parametrize("kind", ["429", "500", "reset", "reset-after", "silence"])
def test_a_push_starts_one_run(
    kind: str, site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    name = f"pushed-{kind}"
    run = prepared(notebook(name), settings, account)
    site.fault("SaveKernel", kind)
    target = kaggle.push(run, account)
    assert len(site.kernels[f"{USER}/{name}"]) == 1
    assert (target.ref, target.version) == (f"{USER}/{name}", 1)
    again = prepared(ROOT / "x", settings, account) if False else kaggle.push(run, account)
    assert again == target and len(site.kernels[f"{USER}/{name}"]) == 1


def test_an_answer_lost_behind_newer_versions_is_found(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    path = notebook("lost-behind")
    run = prepared(path, settings, account)
    run.log("pushing", ref=f"{USER}/lost-behind")  # as if killed after the call, before its answer
    metadata = json.loads(run.file("kernel-metadata.json").read_text())
    kaggle._save(run, run.file("pushed.ipynb").read_text(), metadata, account)
    kaggle.push(prepared(path, settings, account, words="3"), account)
    assert kaggle.push(run, account).version == 1
    assert len(site.kernels[f"{USER}/lost-behind"]) == 2


def test_every_field_is_sent_and_the_users_keys_are_kept(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    site.add_dataset("someone/public-data", {"a.txt": b"1"})
    path = notebook(
        "every-field", id_no=77, my_note="mine", keywords=[], dataset_sources=["someone/public-data"]
    )
    gpu = settings.model_copy(update={"kaggle": settings.kaggle.model_copy(update={"accelerator": "gpu"})})
    run = prepared(path, gpu, account)
    kaggle.push(run, account)
    asked = next(a for m, a in reversed(site.calls) if m == "SaveKernel")
    assert "id" not in asked and asked["slug"] == f"{USER}/every-field"
    assert asked["isPrivate"] is True and asked["enableInternet"] is False
    assert asked["machineShape"] == "NvidiaTeslaT4" and asked["enableGpu"] is True
    assert asked["enableTpu"] is False and asked["sessionTimeoutSeconds"] == 9 * 3600
    assert asked["datasetDataSources"] == ["someone/public-data", f"{USER}/mlkit-baggage"]
    kept = json.loads(run.file("kernel-metadata.json").read_text())
    assert kept["my_note"] == "mine" and "id_no" not in kept
    sent = nbformat.reads(asked["text"], 4)
    assert run.id in sent.cells[0].source and sent.metadata.kernelspec.name == "python3"


def test_waits_for_a_free_gpu_session(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.gpu_sessions, site.queue_seconds = 0, 0.1
    gpu = settings.kaggle.model_copy(update={"accelerator": "gpu"})
    gpu = settings.model_copy(update={"kaggle": gpu})
    threading.Timer(4, lambda: setattr(site, "gpu_sessions", 2)).start()
    told: list[str] = []
    (record,) = kaggle.send(notebook("waits-for-gpu"), [{}], gpu, account, told.append)
    assert said("Maximum batch GPU session count of 0 reached", told)
    assert len(site.kernels[f"{USER}/waits-for-gpu"]) == 1
    # and there is no GPU here: the first cell says so, in seconds, before anything of the notebook has run
    assert record.status == "failed" and "sees no GPU here" in record.error
    assert "the first cell, mlkit's own," in record.error and "--accelerator cpu" in record.error
    assert "epoch 1/" not in (record.folder / "log.txt").read_text()


# ---------------------------------------------------------------- follow


def test_the_run_before_is_not_taken_for_this_one(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    path = notebook("status-lags")
    site.lag_polls = 3
    first, second = (kaggle.send(path, [{"words": w}], settings, account)[0] for w in (1, 2))
    assert (first.status, second.status) == ("done", "done")
    assert (first.metrics["accuracy"], second.metrics["accuracy"]) == (0.1, 0.2)
    assert json.loads((second.folder / "outputs.json").read_text())["run"] == second.id


@pytest.mark.parametrize("layout", ["old", "new"])
def test_survives_all_that_passes(
    layout: str, site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.layout, site.page = layout, 2
    for kind in ("429", "500", "reset", "503", "silence"):
        site.fault("GetKernelSessionStatus", kind, times=2 if kind != "silence" else 1)
        site.fault("ListKernelSessionOutput", kind)
    site.fault("stream", "cut", times=2)
    site.fault("stream", "500")
    told: list[str] = []
    path = notebook(f"survives-{layout}")
    (record,) = kaggle.send(path, [{"words": 4, "pause": 1.0}], settings, account, told.append)
    assert record.status == "done" and record.metrics["accuracy"] == 0.4
    epochs = [line.partition(": ")[2] for line in told if ": epoch " in line]
    assert epochs == [f"epoch {i}/4  valid_loss 0.5" for i in range(1, 5)], "each once, in order"
    made = {p.name: p.read_bytes() for p in (record.folder / "made").iterdir()}
    assert made == {f"{i}.bin": bytes([i]) * 300_000 for i in range(4)}
    assert "frozen modules" not in (record.folder / "log.txt").read_text()


def test_a_failure_names_the_cell(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    path = notebook("fails-in-a-cell")
    (record,) = kaggle.send(path, [{"fail": True}], settings, account)
    assert record.status == "failed" and record.failed_cell == 4
    assert "cell 4 failed with ValueError: the data are bad" in record.error
    assert "Traceback" in record.error and "frozen modules" not in record.error
    assert "epoch 2/2" in (record.folder / "log.txt").read_text()


def test_a_session_that_runs_out_of_time(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    short = settings.kaggle.model_copy(update={"session_hours": 12 / 3600})
    short = settings.model_copy(update={"kaggle": short})
    one = Account(short.kaggle)
    (record,) = kaggle.send(notebook("runs-too-long"), [{"pause": 60.0}], short, one)
    assert record.status == "failed" and "longer than its time limit" in record.error


def test_cancelled_on_the_site(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    run = prepared(notebook("cancelled-there"), settings, account)
    kaggle.push(run, account)
    site.kernels[f"{USER}/cancelled-there"][0].status = "CANCEL_ACKNOWLEDGED"
    record = kaggle.attach(run, settings, account)
    assert record.status == "failed" and "was cancelled on the site" in record.error


def test_waiting_ends_and_the_run_can_be_attached_to(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 4
    run = prepared(notebook("waits-too-long"), settings, account)
    kaggle.push(run, account)
    short = Account(settings.kaggle.model_copy(update={"wait_hours": 1 / 3600}))
    with pytest.raises(KaggleError, match=f"still queued.*mlkit kaggle attach {run.id}"):
        kaggle.attach(run, settings, short)
    with kaggle.held(run), pytest.raises(KaggleError, match="another process follows"):
        kaggle.attach(run, settings, account)
    assert kaggle.attach(run, settings, account).status == "done"


# ---------------------------------------------------------------- bring home


@pytest.fixture(scope="module")
def finished(site: Standin, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.fixture
def complete(
    finished: dict, site: Standin, notebook: Callable, settings: Settings, account: Account
) -> Run:
    "A run that is complete on Kaggle, and of which nothing is here yet."
    if not finished:
        run = prepared(notebook("to-be-fetched"), settings, account)
        kaggle.push(run, account)
        watch = kaggle.Watch(run, account, lambda text: None)
        while not watch.poll():
            time.sleep(0.1)
        finished["folder"] = Path(shutil.copytree(run.folder, site.folder / "finished" / run.id))
    folder = settings.paths.runs / finished["folder"].name
    shutil.rmtree(folder, ignore_errors=True)
    return Run(Path(shutil.copytree(finished["folder"], folder)))


def is_whole(run: Run) -> bool:
    told = json.loads(run.file("outputs.json").read_text())
    files = {f["name"]: f["sha256"] for f in told["files"]}
    assert len(files) >= 4 and told["run"] == run.id
    return all(hashlib.sha256((run.folder / n).read_bytes()).hexdigest() == h for n, h in files.items())


@pytest.mark.parametrize("what", ["outputs.json", "made/2.bin"])
@pytest.mark.parametrize("kind", ["500", "reset", "silence", "truncate", "short", "error-body", "expire"])
def test_what_comes_home_is_what_was_made(
    kind: str, what: str, complete: Run, site: Standin, account: Account
) -> None:
    site.fault("file", kind, times=2, match=what)
    kaggle.pull(complete, account)
    assert is_whole(complete) and not list(complete.folder.rglob("*.part"))


def test_a_download_goes_on_where_it_broke(complete: Run, site: Standin, account: Account) -> None:
    site.fault("file", "truncate", match="made/2.bin")
    asked: list[str] = []
    get = account.files.get
    account.files.get = lambda url, **o: (asked.append(o["headers"].get("Range", "")), get(url, **o))[1]
    kaggle.pull(complete, account)
    assert is_whole(complete) and [r for r in asked if r] == ["bytes=150000-"]


def test_nothing_wrong_is_kept(complete: Run, site: Standin, settings: Settings) -> None:
    short = Account(settings.kaggle.model_copy(update={"patience_minutes": 0.05}))
    site.fault("file", "error-body", times=99, match="made/2.bin")
    with pytest.raises(KaggleError, match="2.bin"):
        kaggle.pull(complete, short)
    assert not (complete.folder / "made/2.bin").exists()
    site.faults.clear()
    kaggle.pull(complete, short)
    assert is_whole(complete)


def test_outputs_of_another_run_are_refused(
    complete: Run, site: Standin, account: Account
) -> None:
    version = site.kernels[f"{USER}/to-be-fetched"][0]
    other = version.folder / "working" / "somebody-elses"
    shutil.copytree(version.folder / "working" / complete.id, other)
    try:
        renamed = Run(complete.folder.rename(complete.folder.with_name("somebody-elses")))
        with pytest.raises(KaggleError, match="nothing was taken"):
            kaggle.pull(renamed, account)
        assert not (renamed.folder / "made").exists() and not (renamed.folder / "outputs.json").exists()
    finally:
        shutil.rmtree(other)


def test_a_name_that_leads_outside_is_refused(
    complete: Run, site: Standin, account: Account
) -> None:
    path = site.kernels[f"{USER}/to-be-fetched"][0].folder / "working" / complete.id / "outputs.json"
    kept = path.read_text()
    told = json.loads(kept)
    told["files"].append({"name": "../../outside.bin", "bytes": 1, "sha256": "0" * 64})
    path.write_text(json.dumps(told))
    try:
        with pytest.raises(MlkitError, match="leads out"):
            kaggle.pull(complete, account)
    finally:
        path.write_text(kept)
    assert not (complete.folder.parent.parent / "outside.bin").exists()


def test_links_that_expire_are_asked_for_again(complete: Run, site: Standin, account: Account) -> None:
    site.link_seconds = 0.2
    real = kaggle._receive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kaggle, "_receive", lambda *a: (time.sleep(0.1), real(*a))[1])
        kaggle.pull(complete, account)
    assert is_whole(complete)
