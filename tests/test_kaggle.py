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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ["KAGGLE_API_ENVIRONMENT"] = "LOCALHOST"  # read when the client is imported

import httpx
import nbformat
import numpy as np
import pytest
import timm
import warm
from conftest import make_bundle, running
from kaggle_server import KEY, TOKEN, USER, Standin
from PIL import Image
from safetensors.torch import save_file

from mlkit.bundle.registry import Registry
from mlkit.client import Client
from mlkit.config import MlkitError, Settings, load_settings
from mlkit.kaggle import (
    client,
    competitions,
    doctor,
    download,
    dry_run,
    grid,
    pull,
    push,
    session,
    transfer,
)
from mlkit.kaggle.client import Account, KaggleError
from mlkit.kaggle.datasets import Datasets
from mlkit.runs.execute import NotebookError
from mlkit.runs.record import Run, read_events, read_run

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "kernels/train/train.ipynb"
CELLS = [
    "words = 2\npause = 0.0\nfail = False\nsource = ''\nkey_word = ''",
    "import sys, time\nfrom mlkit.config import load_settings\nfrom mlkit.runs.record import Run\n"
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
    site.gpu_sessions, site.gpu_used, site.gpu_quota, site.page = 2, 0, 30 * 3600, 200
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
        nb.metadata.kernelspec = {
            "name": "python3",
            "language": "python",
            "display_name": "Python 3",
        }
        nb.cells = [
            nbformat.v4.new_markdown_cell("# A kernel"),
            *map(nbformat.v4.new_code_cell, cells),
        ]
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
def parcel(tmp_path: Path) -> transfer.Upload:
    files = {}
    for i in range(5):
        files[f"a/{i}.bin"] = tmp_path / f"{i}.bin"
        files[f"a/{i}.bin"].write_bytes(os.urandom(200_000))
    return transfer.folder_upload(files, tmp_path / "parcels")


def keep(account: Account, tmp_path: Path, name: str, parcel: transfer.Upload) -> str:
    return Datasets(account, tmp_path / "memory").keep(name, [parcel])


def held_there(site: Standin, ref: str) -> dict[str, int]:
    root = site.datasets[ref].versions[-1]
    return {
        p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("kind", ["cut", "503", "429", "400", "reset", "silence", "expire"])
def test_upload_arrives_whole(
    kind: str, site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
) -> None:
    site.fault("upload", kind, times=2)
    ref = keep(account, tmp_path, f"upload-{kind}", parcel)
    assert held_there(site, ref) == parcel.listed and len(site.datasets[ref].versions) == 1
    assert site.datasets[ref].private


def test_upload_goes_on_where_it_was_cut(
    site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
) -> None:
    site.fault("upload", "cut")
    before = site.count("StartBlobUpload")
    ref = keep(account, tmp_path, "upload-goes-on", parcel)
    assert held_there(site, ref) == parcel.listed
    assert site.count("StartBlobUpload") == before + 1, "the same upload is gone on with"


@pytest.mark.parametrize("method", ["CreateDataset", "CreateDatasetVersion"])
@pytest.mark.parametrize("kind", ["reset-after", "reset", "500", "429", "silence"])
def test_a_dataset_is_made_once(
    method: str,
    kind: str,
    site: Standin,
    account: Account,
    parcel: transfer.Upload,
    tmp_path: Path,
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


def test_a_large_file_shows_its_progress(site: Standin, account: Account, tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(1 << 16) * 320)  # 20 MiB
    told: list[str] = []
    datasets = Datasets(account, tmp_path / "memory", told.append)
    ref = datasets.keep("large-enough", [transfer.file_upload(large)])
    tenths = [f"large.bin: {n} %" for n in range(10, 100, 10)]
    assert [line for line in told if line.endswith(" %")] == tenths
    told.clear()
    (path,) = download.get(account, ref, tmp_path / "back", told.append)
    assert path.read_bytes() == large.read_bytes()
    assert [line.partition(": ")[2] for line in told if line.endswith(" %")] == [
        line.partition(": ")[2] for line in tenths
    ]


def test_what_is_there_is_not_sent_again(
    site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
) -> None:
    ref = keep(account, tmp_path, "kept-as-it-is", parcel)
    before = site.count("StartBlobUpload"), len(site.datasets[ref].versions)
    keep(account, tmp_path, "kept-as-it-is", parcel)
    assert (site.count("StartBlobUpload"), len(site.datasets[ref].versions)) == before
    changed = tmp_path / "more.txt"
    changed.write_text("more")
    Datasets(account, tmp_path / "memory").keep(
        "kept-as-it-is", [parcel, transfer.file_upload(changed)]
    )
    assert len(site.datasets[ref].versions) == 2


def test_a_version_that_lacks_a_file_is_made_again(
    site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
) -> None:
    other = tmp_path / "weights.pth"
    other.write_bytes(b"w" * 1000)
    memory = tmp_path / "memory/uploads.json"
    memory.parent.mkdir()
    dead = {"token": "gone", "url": "http://localhost/upload/gone"}
    sent = transfer.file_upload(other)
    memory.write_text(json.dumps({f"{sent.name} 1000 http://localhost": dead}))
    ref = Datasets(account, tmp_path / "memory").keep("lacks-a-file", [parcel, sent])
    assert held_there(site, ref) == parcel.listed | sent.listed


def test_a_version_that_lost_a_file_there_is_made_again(
    site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
) -> None:
    other = tmp_path / "weights.pth"
    other.write_bytes(b"v" * 1000)
    sent = [parcel, transfer.file_upload(other)]
    site.drop_files = 1
    ref = Datasets(account, tmp_path / "memory").keep("lost-a-file", sent)
    assert held_there(site, ref) == parcel.listed | sent[1].listed
    assert len(site.datasets[ref].versions) == 2
    site.drop_files = 2
    other.write_bytes(b"u" * 1000)
    with pytest.raises(KaggleError, match="lacks 1 of 6 files: weights-"):
        sent = [parcel, transfer.file_upload(other)]
        Datasets(account, tmp_path / "memory").keep("lost-a-file", sent)


def test_waits_until_it_is_processed(
    site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
) -> None:
    site.processing_seconds = 2
    ref = keep(account, tmp_path, "slow-to-process", parcel)
    assert site.datasets[ref].status == "READY"
    account.settings.__dict__["processing_minutes"] = 0.01
    site.datasets[ref].ready = time.time() + 60
    with pytest.raises(KaggleError, match="still BLOBS_RECEIVED"):
        keep(account, tmp_path, "slow-to-process", parcel)


def test_a_listing_in_pages(
    site: Standin, account: Account, parcel: transfer.Upload, tmp_path: Path
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


def test_silence_ends_at_the_deadline(site: Standin, settings: Settings, tmp_path: Path) -> None:
    short = settings.kaggle.model_copy(update={"call_seconds": 0.5, "patience_minutes": 0.03})
    one = Account(short)
    site.fault("GetDataset", "silence", times=50)
    began = time.monotonic()
    with pytest.raises(KaggleError) as e:
        Datasets(one, tmp_path).version("tester/never-mind")
    assert e.value.passing and time.monotonic() - began < 10


# ---------------------------------------------------------------- what is refused before it costs anything


def prepared(path: Path, settings: Settings, account: Account, **values: Any) -> Run:
    return push.begin(push.prepare(path, values, settings, account), settings)


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
    for part in (
        "someone/nothing-here",
        "competitions/closed-doors/rules",
        "tester/no-such-kernel",
    ):
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
        push.push(run, account)
    assert KEY not in str(e.value) and site.count("SaveKernel") == before


def test_no_gpu_time_left(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    gpu = settings.model_copy(
        update={"kaggle": settings.kaggle.model_copy(update={"accelerator": "gpu"})}
    )
    site.gpu_used = site.gpu_quota
    with pytest.raises(KaggleError, match=r"no GPU time is left this week; new time from 20\d\d-"):
        prepared(notebook("without-quota"), gpu, account)
    site.gpu_used = site.gpu_quota - 3600
    told: list[str] = []
    push.prepare(notebook("little-quota"), {}, gpu, account, told.append)
    assert said("1.0 h of GPU time are left", told)
    site.gpu_quota = 0
    push.prepare(notebook("no-quota-named"), {}, gpu, account, told.append)
    assert said("not verified by phone", told)


# ---------------------------------------------------------------- push


@pytest.mark.parametrize("kind", ["429", "500", "reset", "reset-after", "silence", "silence-after"])
def test_a_push_starts_one_run(
    kind: str, site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    name = f"pushed-{kind}"
    run = prepared(notebook(name), settings, account)
    site.fault("SaveKernel", kind)
    target = push.push(run, account)
    assert len(site.kernels[f"{USER}/{name}"]) == 1
    assert (target.ref, target.version) == (f"{USER}/{name}", 1)
    assert push.push(run, account) == target and len(site.kernels[f"{USER}/{name}"]) == 1


def test_an_answer_lost_behind_newer_versions_is_found(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    path = notebook("lost-behind")
    run = prepared(path, settings, account)
    run.log("pushing", ref=f"{USER}/lost-behind")  # as if killed after the call, before its answer
    metadata = json.loads(run.file("kernel-metadata.json").read_text())
    push._save(run, run.file("pushed.ipynb").read_text(), metadata, account)
    push.push(prepared(path, settings, account, words="3"), account)
    assert push.push(run, account).version == 1
    assert len(site.kernels[f"{USER}/lost-behind"]) == 2


def test_every_field_is_sent_and_the_users_keys_are_kept(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    site.add_dataset("someone/public-data", {"a.txt": b"1"})
    path = notebook(
        "every-field",
        id_no=77,
        my_note="mine",
        keywords=[],
        dataset_sources=["someone/public-data"],
    )
    gpu = settings.model_copy(
        update={"kaggle": settings.kaggle.model_copy(update={"accelerator": "gpu"})}
    )
    run = prepared(path, gpu, account)
    push.push(run, account)
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


def test_sources_that_kaggle_left_out_are_an_error(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    run = prepared(notebook("left-out-there"), settings, account)
    metadata = json.loads(run.file("kernel-metadata.json").read_text())
    metadata["dataset_sources"].append("someone/gone-since")  # after the check before the push
    run.file("kernel-metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(KaggleError, match="left out the data sources someone/gone-since"):
        push.push(run, account)
    assert read_run(run.folder).status == "failed"


def test_waits_for_a_free_gpu_session(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.gpu_sessions, site.queue_seconds = 0, 0.1
    gpu = settings.kaggle.model_copy(update={"accelerator": "gpu"})
    gpu = settings.model_copy(update={"kaggle": gpu})
    threading.Timer(4, lambda: setattr(site, "gpu_sessions", 2)).start()
    told: list[str] = []
    (record,) = grid.send(notebook("waits-for-gpu"), [{}], gpu, account, told.append)
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
    first, second = (grid.send(path, [{"words": w}], settings, account)[0] for w in (1, 2))
    assert (first.status, second.status) == ("done", "done")
    asked = ("GetKernelSessionStatus", "ListKernelSessionOutput")
    labels = [a.get("versionLabel") for m, a in site.calls if m in asked and "lags" in str(a)]
    assert labels == sorted(labels) and set(labels) == {"v1", "v2"}, "each asks for its own version"
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
    told: list[str] = []
    path = notebook(f"survives-{layout}")
    (record,) = grid.send(path, [{"words": 4}], settings, account, told.append)
    assert record.status == "done" and record.metrics["accuracy"] == 0.4
    epochs = [line.partition(": ")[2] for line in told if ": epoch " in line]
    assert epochs == [f"epoch {i}/4  valid_loss 0.5" for i in range(1, 5)], "told when it is over"
    made = {p.name: p.read_bytes() for p in (record.folder / "made").iterdir()}
    assert made == {f"{i}.bin": bytes([i]) * 300_000 for i in range(4)}
    assert "frozen modules" not in (record.folder / "log.txt").read_text()


def test_the_status_is_not_asked_before_it_may_be(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    run = prepared(notebook("asked-too-often"), settings, account)
    push.push(run, account)
    watch = session.Watch(run, account, lambda text: None)
    site.fault("GetKernelSessionStatus", "429", retry_after=40)
    watch.poll()
    assert 30 < watch.next - time.monotonic() < 41, "Retry-After is kept"
    watch.next = 0.0
    pauses = []
    for _ in range(12):
        watch.poll()
        pauses.append(watch.next - time.monotonic())
        watch.next = 0.0
    assert pauses[0] < 0.5 and 2 < pauses[-1] < 2.5, "from poll_seconds to twelve times that"


def test_a_log_that_breaks_off_is_not_repeated(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.fault("stream", "cut", times=2)
    site.fault("stream", "500")
    told: list[str] = []
    times: list[float] = []

    def tell(line: str) -> None:
        told.append(line)
        times.append(time.monotonic())

    grid.send(notebook("log-breaks-off"), [{"words": 4, "pause": 1.5}], settings, account, tell)
    lines = [(line.partition(": ")[2], at) for line, at in zip(told, times, strict=True)]
    epochs = [line for line in lines if line[0].startswith("epoch ")]
    assert [e[0] for e in epochs] == [f"epoch {i}/4  valid_loss 0.5" for i in range(1, 5)]
    assert not any(f.times for f in site.faults), "the stream did break off"
    assert epochs[-1][1] - epochs[0][1] > 1, "they come while it runs"


def test_a_failure_names_the_cell(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    path = notebook("fails-in-a-cell")
    (record,) = grid.send(path, [{"fail": True}], settings, account)
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
    (record,) = grid.send(notebook("runs-too-long"), [{"pause": 60.0}], short, one)
    assert record.status == "failed" and "longer than its time limit" in record.error


def test_cancelled_on_the_site(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 3600
    run = prepared(notebook("cancelled-there"), settings, account)
    push.push(run, account)
    site.kernels[f"{USER}/cancelled-there"][0].status = "CANCEL_ACKNOWLEDGED"
    record = session.attach(run, settings, account)
    assert record.status == "failed" and "was cancelled on the site" in record.error


def test_waiting_ends_and_the_run_can_be_attached_to(
    site: Standin, notebook: Callable, settings: Settings, account: Account
) -> None:
    site.queue_seconds = 4
    run = prepared(notebook("waits-too-long"), settings, account)
    push.push(run, account)
    short = Account(settings.kaggle.model_copy(update={"wait_hours": 1 / 3600}))
    with pytest.raises(KaggleError, match=f"still queued.*mlkit kaggle attach {run.id}"):
        session.attach(run, settings, short)
    with session.held(run), pytest.raises(KaggleError, match="another process follows"):
        session.attach(run, settings, account)
    assert session.attach(run, settings, account).status == "done"


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
        push.push(run, account)
        watch = session.Watch(run, account, lambda text: None)
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
    return all(
        hashlib.sha256((run.folder / n).read_bytes()).hexdigest() == h for n, h in files.items()
    )


@pytest.mark.parametrize("what", ["outputs.json", "made/2.bin"])
@pytest.mark.parametrize(
    "kind", ["500", "reset", "silence", "truncate", "short", "flip", "error-body", "expire"]
)
def test_what_comes_home_is_what_was_made(
    kind: str, what: str, complete: Run, site: Standin, account: Account
) -> None:
    site.fault("file", kind, times=2, match=what)
    pull.pull(complete, account)
    assert is_whole(complete) and not list(complete.folder.rglob("*.part"))


def test_a_download_goes_on_where_it_broke(complete: Run, site: Standin, account: Account) -> None:
    site.fault("file", "truncate", match="made/2.bin")
    asked: list[str] = []
    get = account.files.get
    account.files.get = lambda url, **o: (
        asked.append(o["headers"].get("Range", "")),
        get(url, **o),
    )[1]
    pull.pull(complete, account)
    assert is_whole(complete) and [r for r in asked if r] == ["bytes=131072-"]


def test_nothing_wrong_is_kept(complete: Run, site: Standin, settings: Settings) -> None:
    short = Account(settings.kaggle.model_copy(update={"patience_minutes": 0.05}))
    site.fault("file", "error-body", times=99, match="made/2.bin")
    with pytest.raises(KaggleError, match="2.bin"):
        pull.pull(complete, short)
    assert not (complete.folder / "made/2.bin").exists()
    site.faults.clear()
    pull.pull(complete, short)
    assert is_whole(complete)


def test_outputs_of_another_run_are_refused(complete: Run, site: Standin, account: Account) -> None:
    version = site.kernels[f"{USER}/to-be-fetched"][0]
    other = version.folder / "working" / "somebody-elses"
    shutil.copytree(version.folder / "working" / complete.id, other)
    try:
        renamed = Run(complete.folder.rename(complete.folder.with_name("somebody-elses")))
        with pytest.raises(KaggleError, match="nothing was taken"):
            pull.pull(renamed, account)
        assert (
            not (renamed.folder / "made").exists()
            and not (renamed.folder / "outputs.json").exists()
        )
    finally:
        shutil.rmtree(other)


def test_a_name_that_leads_outside_is_refused(
    complete: Run, site: Standin, account: Account
) -> None:
    path = (
        site.kernels[f"{USER}/to-be-fetched"][0].folder / "working" / complete.id / "outputs.json"
    )
    kept = path.read_text()
    told = json.loads(kept)
    told["files"].append({"name": "../../outside.bin", "bytes": 1, "sha256": "0" * 64})
    path.write_text(json.dumps(told))
    try:
        with pytest.raises(MlkitError, match="leads out"):
            pull.pull(complete, account)
    finally:
        path.write_text(kept)
    assert not (complete.folder.parent.parent / "outside.bin").exists()


def test_links_that_expire_are_asked_for_again(
    complete: Run, site: Standin, account: Account
) -> None:
    site.link_seconds = 0.2
    real = transfer._receive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_receive", lambda *a: (time.sleep(0.1), real(*a))[1])
        pull.pull(complete, account)
    assert is_whole(complete)


# ---------------------------------------------------------------- what the image lacks


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    "A package index with one small wheel, tinypkg, and what it was asked for."
    wheel = tmp_path / "tinypkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinypkg.py", "answer = 42\n")
        info = "tinypkg-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            page = f"<a href='/{wheel.name}'>{wheel.name}</a>".encode()
            known = {"/simple/tinypkg/": page, f"/{wheel.name}": wheel.read_bytes()}
            self.send_response(200 if self.path in known else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(known.get(self.path, b""))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/", asked
        server.shutdown()


@pytest.mark.parametrize("internet", [False, True])
def test_what_the_image_lacks_comes_along(
    internet: bool,
    site: Standin,
    index: tuple[str, list[str]],
    notebook: Callable,
    settings: Settings,
    account: Account,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    url, asked = index
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # for pip, which would ask the stand-in
    monkeypatch.setattr(push, "_needs", lambda: ["numpy>=1", "tinypkg>=1.0"])
    site.session_variables = {"PIP_INDEX_URL": url}
    fresh = settings.paths.model_copy(update={"cache": tmp_path / "cache"})
    fresh = settings.model_copy(update={"paths": fresh})
    cells = [*CELLS, "import tinypkg\nassert tinypkg.answer == 42"]
    told: list[str] = []
    path = notebook(f"image-lacks-{internet}".lower(), cells, enable_internet=internet)
    (record,) = grid.send(path, [{}], fresh, account, told.append)
    assert record.status == "done", record.error
    versions = site.kernels[f"{USER}/image-lacks-{internet}".lower()]
    assert len(versions) == (1 if internet else 2)
    assert said("lacks tinypkg>=1.0: wheels are sent", told) is not internet
    assert asked and not [a for a in asked if "mlkit" in a], "no index is ever asked for mlkit"


# ---------------------------------------------------------------- a dry run, competitions, the doctor


def test_a_dry_run_finds_what_would_fail(
    notebook: Callable, settings: Settings, site: Standin, tmp_path: Path
) -> None:
    before = len(site.calls)
    told: list[str] = []
    done = dry_run.dry_run(notebook("dry-run-good"), {"words": 1}, settings, told.append)
    assert done["run"] == "dry-run" and len(done["files"]) >= 4
    assert said("mlkit_nb-", told) and not said("cannot be taken away", told)
    # a file of this machine, the network, and an import that is only here: none of them is there
    (tmp_path / "mine.txt").write_text("here")
    for line, part in (
        (f"open({str(tmp_path / 'x' / '..' / 'absent.txt')!r})", "FileNotFoundError"),
        (f"import socket\nsocket.create_connection(('127.0.0.1', {site.port}), 2)", "Error"),
    ):
        name = f"dry-run-{part.lower()}"
        with pytest.raises(KaggleError, match=f"(?s)would fail on Kaggle: cell 6 failed.*{part}"):
            dry_run.dry_run(notebook(name, [*CELLS, line]), {}, settings)
    with pytest.raises(KaggleError, match="without outputs.json"):
        dry_run.dry_run(notebook("dry-run-mute", CELLS[:2]), {}, settings)
    assert len(site.calls) == before, "Kaggle was not asked"


@pytest.mark.parametrize("kind", ["", "truncate", "short", "error-body", "500", "expire"])
def test_competition_data(kind: str, site: Standin, account: Account, tmp_path: Path) -> None:
    files = {"train.csv": os.urandom(100_000), "sample.csv": b"id,label\n7,\n"}
    name = f"getting-{kind or 'well'}"
    site.add_competition(name, files)
    if kind:
        site.fault("file", kind, times=2, match="train.csv")
    paths = download.get(account, name, tmp_path / "data")
    assert {p.name: p.read_bytes() for p in paths} == files
    assert not list((tmp_path / "data").rglob("*.part"))


def test_a_file_that_the_storage_holds_zipped(
    site: Standin, account: Account, tmp_path: Path
) -> None:
    site.add_competition("zipped-there", {"train.csv": b"id,label\n" * 1000})
    folder = site.competitions["zipped-there"].folder
    with zipfile.ZipFile(site.folder / "train.csv.zip", "w") as archive:
        archive.write(folder / "train.csv", "train.csv")
    sign = site._sign
    site._sign = lambda path, base: sign(site.folder / "train.csv.zip", base)
    try:
        (path,) = download.get(account, "zipped-there", tmp_path / "data")
    finally:
        del site._sign
    assert path.read_bytes() == (folder / "train.csv").read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["train.csv"]


def test_a_dataset_comes_home_too(site: Standin, account: Account, tmp_path: Path) -> None:
    files = {"a/1.bin": os.urandom(1000), "b.txt": b"b", "empty.txt": b""}
    site.add_dataset("someone/pictures", files)
    download.get(account, "someone/pictures", tmp_path / "data")
    assert {n: (tmp_path / "data" / n).read_bytes() for n in files} == files


def test_rules_not_accepted(site: Standin, account: Account, tmp_path: Path) -> None:
    site.add_competition("not-accepted", {"a.csv": b"1"}, accepted=False)
    with pytest.raises(KaggleError, match="https://www.kaggle.com/competitions/not-accepted/rules"):
        download.get(account, "not-accepted", tmp_path)
    (tmp_path / "s.csv").write_text("id,label\n1,2\n")
    with pytest.raises(KaggleError, match="https://www.kaggle.com/competitions/not-accepted/rules"):
        competitions.submit(account, "not-accepted", tmp_path / "s.csv", "m")


@pytest.mark.parametrize("kind", ["", "reset-after", "429"])
def test_a_submission_is_made_once_and_scored(
    kind: str, site: Standin, account: Account, tmp_path: Path
) -> None:
    name = f"handed-in-{kind or 'well'}"
    site.add_competition(name, {"sample.csv": b"id,label\n10,\n7,\n"})
    predicted = tmp_path / "predicted.csv"
    predicted.write_text("input,label,confidence,error\nx/7.png,seven,0.9,\nx/10.png,ten,0.8,\n")
    sample = site.competitions[name].folder / "sample.csv"
    file = competitions.shape_submission(predicted, sample, tmp_path / "submission.csv")
    assert file.read_text().split() == ["id,label", "10,ten", "7,seven"]
    if kind:
        site.fault("CreateSubmission", kind)
    told = competitions.submit(account, name, file, "first try")
    assert told["public"] == "0.87500" and len(site.competitions[name].submissions) == 1
    sent = [b for b in site.blobs.values() if b.name == "submission.csv"][-1]
    assert sent.path.read_bytes() == file.read_bytes()


def test_a_code_submission_names_the_version(site: Standin, account: Account) -> None:
    site.add_competition("runs-code", {"a.csv": b"1"})
    target = client.Target(f"{USER}/some-kernel", 3)
    competitions.submit(account, "runs-code", Path("submission.csv"), "m", kernel=target)
    asked = next(a for m, a in reversed(site.calls) if m == "CreateCodeSubmission")
    assert (asked["kernelSlug"], asked["kernelVersion"]) == ("some-kernel", 3)


def test_identifiers_without_a_prediction(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("input,label\n1.png,a\n")
    (tmp_path / "s.csv").write_text("id,label\n1,\n2,\n")
    with pytest.raises(KaggleError, match="nothing for 1 of 2 identifiers .*: 2"):
        competitions.shape_submission(tmp_path / "p.csv", tmp_path / "s.csv", tmp_path / "o.csv")


def test_the_doctor_names_what_is_used_and_tells_no_secret(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "home/.kaggle"
    folder.mkdir(parents=True)
    (folder / "kaggle.json").write_text(json.dumps({"username": "old", "key": "f" * 32}))
    (folder / "kaggle.json").chmod(0o600)
    rows = {what: (found, well) for what, found, well in doctor.diagnose(settings)}
    assert rows["account"] == (f"{USER}, by KAGGLE_USERNAME and KAGGLE_KEY", True)
    assert "kaggle.json" in rows["not used"][0] and rows["GPU time left"][1]
    monkeypatch.setenv(
        "KAGGLE_API_TOKEN", "KGAT_stale"
    )  # known to nobody; it must not be sent along
    stale = doctor.diagnose(settings)
    assert all(well for *_, well in stale), "the calls are made with the key"
    assert rows["account"] in [(found, well) for _, found, well in stale]
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    used = doctor.diagnose(settings)
    assert (f"{USER}, by KAGGLE_API_TOKEN") in [found for _, found, _ in used]
    told = json.dumps([list(rows.items()), stale, used], default=str)
    assert KEY not in told and TOKEN not in told and "f" * 32 not in told and "KGAT" not in told


def test_the_client_prints_nothing(
    site: Standin, account: Account, tmp_path: Path, capfd: Any
) -> None:
    site.add_dataset(f"{USER}/quiet-please", {"a.txt": b"1"})
    assert Datasets(account, tmp_path).version(f"{USER}/quiet-please") == 1
    assert capfd.readouterr() == ("", ""), "not even that there is a newer one"


def test_no_credentials(settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(KaggleError, match="no credentials for Kaggle were found"):
        Account(settings.kaggle)
    assert capfd.readouterr() == ("", ""), "the client's own advice is not printed"


# ---------------------------------------------------------------- the command line, all the way


@pytest.fixture
def variables(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    "The settings of these tests, for commands."
    chosen = {
        "MLKIT_KAGGLE__ACCELERATOR": "cpu",
        "MLKIT_KAGGLE__POLL_SECONDS": "0.2",
        "MLKIT_KAGGLE__CALL_SECONDS": "20",
        "MLKIT_PATHS__CACHE": str(settings.paths.cache),
        "MLKIT_PATHS__RUNS": str(settings.paths.runs),
        "MLKIT_PATHS__MODELS": str(settings.paths.models),
        "PYTHONWARNINGS": "ignore",
    }
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    return chosen


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "mlkit", *map(str, words)]


def mlkit(*words: Any, code: int = 0, run: Callable = warm.run) -> subprocess.CompletedProcess:
    done = run(command(*words), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    "Three classes of small pictures, told apart by their colour."
    noise = np.random.default_rng(0)
    for c, name in enumerate(("red", "green", "blue")):
        for i in range(12):
            pixels = noise.integers(0, 80, (32, 32, 3), dtype=np.uint8)
            pixels[..., c] += 150
            path = tmp_path / "pictures" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


# 35 s: trains, exports and serves, with the process that a person begins
def test_from_a_folder_to_an_answer_by_way_of_kaggle(
    site: Standin,
    settings: Settings,
    variables: dict[str, str],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = tmp_path / "body.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    words = [
        "pipeline",
        pictures,
        "--name",
        "colours",
        "--on",
        "kaggle",
        "--weights",
        weights,
        "--json",
    ]
    words += ["--set", "model.arch=test_resnet", "--set", "data.size=32", "--set", "train.epochs=2"]
    seen: set[str] = set()  # the command line of every process
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for p in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(p.read_text(errors="replace"))

    before = len(site.kernels.get(f"{USER}/mlkit-train", []))
    threading.Thread(target=look, daemon=True).start()
    done = mlkit(*words, run=subprocess.run)
    over.set()
    told = json.loads(done.stdout)
    run = Run(Path(told["folder"]))
    version = Registry(settings.paths.models).resolve("colours")
    lineage = version.manifest.lineage
    assert version.production and lineage["run"] == run.id == told["id"]
    assert is_whole(run) and told["metrics"]["accuracy"] == version.manifest.metrics["accuracy"]
    asked = next(a for m, a in reversed(site.calls) if m == "SaveKernel")
    assert not asked["enableInternet"], "the network was really absent"
    assert {"mlkit-baggage", "mlkit-data-pictures", "mlkit-weights-body"} == {
        d.partition("/")[2] for d in asked["datasetDataSources"]
    }
    assert any(e.get("docker_image", "").startswith("gcr.io/") for e in read_events(run.folder))
    assert lineage["environment"]["place"] == "kaggle" and "accelerators" in lineage["environment"]
    assert re.search(r"epoch 2/2 .*accuracy \d\.\d+", done.stderr)

    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name)
    with running(settings.paths.models, tmp_path) as server:
        with Client(server.url, model="colours") as client:
            client.wait_ready(60)
            (answer,) = client.predict([next((pictures / "red").iterdir())])
            assert set(answer["probabilities"]) == {"red", "green", "blue"}
        about = httpx.get(f"{server.url}/v1/models/colours").json()
        assert about["lineage"]["run"] == run.id, "what is served is this push's"

    # no secret anywhere: files, requests, output, process list
    files = [p for top in (tmp_path, site.folder) for p in top.rglob("*") if p.is_file()]
    assert len(files) > 100 and run.file("log.txt") in files
    assert not [p for p in files if KEY.encode() in p.read_bytes()]
    assert any("mlkit" in line for line in seen)
    assert not [line for line in seen if KEY in line]
    assert KEY not in done.stdout + done.stderr + json.dumps(site.calls)

    # killed after the registry took it and before that was noted: the same version is found again
    events = run.file("events.jsonl")
    lines = events.read_text().splitlines()
    first = json.loads(lines[0]) | {"pid": 2**22 - 3}
    kept = [line for line in lines[1:] if json.loads(line)["event"] not in ("packed", "end")]
    events.write_text("\n".join([json.dumps(first), *kept]) + "\n")
    assert read_run(run.folder).status == "remote"
    for name, value in site.variables.items():
        monkeypatch.setenv(name, value)
    again = json.loads(mlkit(*words).stdout)
    assert (again["id"], again["version"]) == (run.id, version.version)
    assert len(site.kernels[f"{USER}/mlkit-train"]) == before + 1
    assert [v.version for v in Registry(settings.paths.models).versions("colours")] == [1]


@pytest.mark.parametrize(
    ("phase", "fault"),
    [
        ("upload", ("upload", "silence", "data-")),
        ("push", ("SaveKernel", "silence", "")),
        ("answer", ("SaveKernel", "silence-after", "")),
        ("run", ("", "", "")),
        ("download", ("file", "silence", "made/2.bin")),
    ],
)
def test_killed_and_typed_again(
    phase: str,
    fault: tuple[str, str, str],
    site: Standin,
    notebook: Callable,
    variables: dict[str, str],
    settings: Settings,
    pictures: Path,
    tmp_path: Path,
) -> None:
    method, kind, match = fault
    (pictures / "red/extra.png").write_bytes((pictures / "red/0.png").read_bytes() + phase.encode())
    renamed = pictures.rename(tmp_path / f"pictures-{phase}")
    path = notebook(f"killed-in-{phase}")
    pause = 2.5 if phase == "run" else 0
    words = ["run", path, "-p", f"source={renamed}", "-p", f"pause={pause}"]
    words += "--on", "kaggle", "--json"
    if method:
        site.fault(method, kind, match=match)
    before = [a["name"] for m, a in site.calls if m == "StartBlobUpload"]

    def reached() -> bool:
        if phase == "run":
            versions = site.kernels.get(f"{USER}/killed-in-run", [])
            return bool(versions) and any("epoch 1" in e["data"] for e in versions[0].log)
        return not any(f.method == method and f.times for f in site.faults)

    process = warm.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < until and process.poll() is None, "it did not get that far"
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.poll() is None, "it was done before it could be killed"
    process.kill()
    process.wait()
    (told,) = json.loads(mlkit(*words).stdout)
    run = Run(Path(told["folder"]))
    assert told["status"] == "done" and is_whole(run)
    assert len(site.kernels[f"{USER}/killed-in-{phase}"]) == 1, "one run, adopted"
    assert len(list(settings.paths.runs.iterdir())) == 1
    sent = [a["name"] for m, a in site.calls if m == "StartBlobUpload"][len(before) :]
    assert len(sent) == len(set(sent)), "nothing is uploaded twice"


def test_ctrl_c_detaches(
    site: Standin, notebook: Callable, variables: dict[str, str], settings: Settings
) -> None:
    path = notebook("detached-from")
    words = ["run", path, "-p", "pause=2", "--on", "kaggle"]
    process = warm.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    ref = f"{USER}/detached-from"
    while not any("epoch 1" in e["data"] for v in site.kernels.get(ref, []) for e in v.log):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    (folder,) = settings.paths.runs.iterdir()
    assert process.returncode == 1 and f"mlkit kaggle attach {folder.name}" in errors
    assert "Traceback" not in errors and "kaggle.com/code" in errors
    assert read_run(folder).status == "remote"
    assert "running" in mlkit("kaggle", "status").stdout
    followed = mlkit("kaggle", "logs", "--follow").stdout
    assert followed.count("epoch 1/2") == followed.count("epoch 2/2") == 1
    assert "Trained on Kaggle: version 1" in mlkit("kaggle", "attach", folder.name).stdout
    assert is_whole(Run(folder)) and read_run(folder).status == "done"
    shutil.rmtree(folder / "made")
    mlkit("kaggle", "pull", folder.name)
    assert is_whole(Run(folder))


def test_a_failed_kernel_is_a_failed_command(notebook: Callable, variables: dict[str, str]) -> None:
    path = notebook("fails-aloud")
    done = mlkit("kaggle", "push", path, "-p", "fail", "true")
    attached = mlkit("kaggle", "wait", code=1)
    assert "cell 4 failed with ValueError: the data are bad" in attached.stderr
    assert "kaggle attach" in done.stdout and "kaggle.com/code" in done.stdout


# 40 s: four kernels train, evaluate and export
def test_the_same_grid_gives_the_same_table(
    site: Standin, variables: dict[str, str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["run", TRAIN, "-p", "arch=test_resnet", "-p", "epochs=1", "-p", "lr=0.01"]
    words += ["--grid", "seed=1,2", "--jobs", "2", "--json"]
    here = json.loads(mlkit(*words).stdout)
    there = json.loads(mlkit(*words, "--on", "kaggle").stdout)
    table = [
        [(r["parameters"]["seed"], r["metrics"], r["fingerprint"]) for r in t]
        for t in (here, there)
    ]
    assert table[0] == table[1] and len(table[0]) == 2
    assert table[0][0][1] != table[0][1][1], "the seeds make a difference"
    before = site.count("SaveKernel")
    again = json.loads(mlkit(*words, "--on", "kaggle").stdout)
    assert [r["id"] for r in again] == [r["id"] for r in there]
    assert site.count("SaveKernel") == before, "finished runs are not done again"


def test_one_that_fails_stops_no_other_and_a_killed_grid_goes_on(
    site: Standin, notebook: Callable, variables: dict[str, str], settings: Settings
) -> None:
    path, ref = notebook("grid-of-four"), f"{USER}/grid-of-four"
    words = ["run", path, "-p", "pause=1", "--grid", "words=1,2", "--grid", "fail=false,true"]
    words += ["--jobs", "2", "--on", "kaggle", "--json"]
    process = warm.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(site.kernels.get(ref, [])) < 3:  # two are over or nearly so, a third is begun
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    ended = {r.id: r.status for r in map(read_run, settings.paths.runs.iterdir()) if r.ended}
    told = json.loads(mlkit(*words, code=1).stdout)
    table = [(r["parameters"]["words"], r["parameters"]["fail"], r["status"]) for r in told]
    assert table == [
        (1, False, "done"),
        (1, True, "failed"),
        (2, False, "done"),
        (2, True, "failed"),
    ]
    assert {i for i, s in ended.items() if s == "done"} <= {r["id"] for r in told}
    assert all("the data are bad" in r["error"] for r in told if r["status"] == "failed")
    again = sum(s == "failed" for s in ended.values())  # what had failed is tried again
    assert len(site.kernels[ref]) == 4 + again


# 55 s: two sessions train, evaluate and export, and a bundle is made of each
def test_a_time_budget_stops_and_the_next_push_goes_on(
    site: Standin, variables: dict[str, str], settings: Settings
) -> None:
    words = ["pipeline", "sklearn:digits", "--name", "in-time", "--on", "kaggle"]
    for setting in ("model.arch=test_resnet", "model.pretrained=false", "data.size=32"):
        words += ["--set", setting]
    words += ["--set", "train.epochs=2", "--set", "train.minutes=0.0001", "--set", "train.lr=0.01"]
    stopped = mlkit(*words, code=1)
    assert "stopped at a checkpoint by its time budget" in stopped.stderr
    done = mlkit(*words, "--json")
    told = json.loads(done.stdout)
    assert "goes on from its checkpoint" in done.stderr and told["status"] == "done"
    epochs = [e["epoch"] for e in read_events(Path(told["folder"])) if e["event"] == "epoch"]
    assert epochs == [1, 2]
    manifest = Registry(settings.paths.models).resolve("in-time").manifest
    assert manifest.lineage["run"] == told["id"] and manifest.lineage["fit"]["epochs"] == 2


def test_data_go_and_predictions_are_handed_in(
    site: Standin, variables: dict[str, str], settings: Settings, pictures: Path, tmp_path: Path
) -> None:
    out = mlkit("kaggle", "data", pictures, "--name", "my-colours").stdout
    assert f"kaggle:{USER}/my-colours/data-" in out
    assert site.datasets[f"{USER}/my-colours"].private
    (tmp_path / "one/only").mkdir(parents=True)
    assert "class" in mlkit("kaggle", "data", tmp_path / "one", code=1).stderr
    registry = Registry(settings.paths.models)
    registry.promote(registry.add(make_bundle(tmp_path / "b" / "color"), name="color").ref)
    mlkit("predict", "color", pictures / "red", "--out", tmp_path / "predicted.csv")
    ids = "".join(f"{i},\n" for i in range(12))
    site.add_competition("colours", {"sample.csv": f"id,label\n{ids}".encode()})
    mlkit("kaggle", "get", "colours", "--to", tmp_path / "data")
    sample = tmp_path / "data/sample.csv"
    said_so = mlkit(
        "kaggle", "submit", "colours", tmp_path / "predicted.csv", "--sample", sample
    ).stdout
    assert "score 0.87500" in said_so
    assert (tmp_path / "submission.csv").read_text().splitlines()[1] == "0,red"
    assert "0.1" not in mlkit("kaggle", "doctor").stderr
