"""Storage: a folder in a bucket is as good as one on a disk, and what goes wrong there is told in one line."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import emulator
import pytest
from helpers import exit_of

from fcvit_jax import export, predict, summary
from fcvit_jax.convert import convert
from fcvit_jax.data import classification
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """A folder of each kind, which does not exist yet."""
    if request.param == "disk":
        return storage.run_path(tmp_path / "run")
    return storage.run_path(request.getfixturevalue("bucket"))


def write(path, text=""):
    storage.make_folder(path.parent)
    storage.replace_text(path, text)


def test_that_others_looked_at_a_bucket_first_changes_nothing(monkeypatch):
    code = """
from etils import epath
import fcvit_jax
from fcvit_jax.devices import storage
find = epath.backend.fsspec_backend.fs
before = find(epath.Path("gs://bucket/data"))  # as TFDS may do
from fcvit_jax.devices import gcs
assert type(find(storage.as_path("gs://bucket/run"))) is type(gcs.file_system()) is not type(before)
"""
    emulator.use(monkeypatch, "http://localhost:1")  # else gcsfs would look for credentials on the network
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_bucket_answers_as_a_disk_does(folder):
    assert not storage.is_folder(folder) and storage.names(folder) == [] == storage.finished_saves(folder)
    storage.remove(folder)  # which need not be there
    for text in ("one", "two, which is longer", "3"):
        write(folder / "a/b.txt", text)
        assert storage.read_text(folder / "a/b.txt") == text
    write(folder / "bytes", "\u00e9")
    assert storage.names(folder) in (["a", "bytes"], ["bytes", "a"]) and storage.names(folder / "a") == ["b.txt"]
    assert storage.is_folder(folder / "a") and not storage.is_file(folder / "a")
    assert storage.is_file(folder / "a/b.txt") and not storage.is_folder(folder / "a/b.txt")
    assert not storage.is_file(folder / "a/c.txt") and not storage.is_folder(folder / "b")
    with pytest.raises(FileNotFoundError) as error:
        storage.read_text(folder / "a/c.txt")
    assert storage.words(error.value) == "No such file or directory"
    write(folder / "a/c/d", "deep")
    storage.make_folder(folder / "moved")
    storage.move(folder / "a", folder / "moved/a")
    assert sorted(storage.names(folder / "moved/a")) == ["b.txt", "c"] and not storage.is_folder(folder / "a")
    assert storage.read_text(folder / "moved/a/c/d") == "deep"
    storage.check_access(folder)
    storage.remove(folder / "bytes")
    storage.remove(folder / "moved/a")
    storage.remove(folder / "moved")
    assert storage.names(folder) == []


def test_a_save_in_a_bucket_is_finished_once_orbax_says_so(bucket):
    folder = storage.run_path(bucket)
    for name in ("2/variables/x", "2/commit_success.txt", "4/variables/x", "4/variables/commit_success.txt", "note"):
        write(folder / name)
    assert storage.finished_saves(folder) == [folder / "2"] and storage.unfinished_saves(folder) == [folder / "4"]


def test_files_that_grow_are_uploaded_whole_and_not_line_by_line(bucket, emulator_url, monkeypatch):
    from fcvit_jax.devices import gcs_run

    workdir = storage.run_path(bucket)
    write(workdir / "log", "old\n")
    uploads = []
    write_if = gcs_run.gcs.write_if

    def counted(path, *args):
        uploads.append(path.name)
        return write_if(path, *args)

    monkeypatch.setattr(gcs_run.gcs, "write_if", counted)
    files = storage.GrowingFiles(workdir)
    log = files.local("log").open("a")
    files.local("events").mkdir()
    (files.local("events") / "one").write_bytes(b"\0" * 1000)
    for number in range(100):
        print(number, file=log, flush=True)
    assert uploads == []
    files.keep()
    files.keep()
    assert uploads == ["one", "log"]
    assert storage.read_text(workdir / "log") == "old\n" + "".join(f"{number}\n" for number in range(100))
    print("last", file=log, flush=True)
    files.close()
    assert uploads == ["one", "log", "log"] and storage.read_text(workdir / "log").endswith("99\nlast\n")
    prefix = bucket.removeprefix(f"gs://{emulator.BUCKET}/")
    assert emulator.objects(emulator_url, f"{prefix}/events") == {f"{prefix}/events/one": 1000}

    monkeypatch.setattr(gcs_run, "RENEWAL", 0.05)
    files = storage.GrowingFiles(workdir)
    with files.local("log").open("a") as log:
        print("later", file=log)
    wait_for(lambda: storage.read_text(workdir / "log").endswith("later\n"))  # without `keep`
    write(workdir / "log", "of another run\n")
    files.local("log").write_text("of this run\n")
    with pytest.raises(UserError, match="log was changed by another run"):
        files.keep()
    with pytest.raises(UserError, match="log was changed by another run"):
        files.close()
    assert storage.read_text(workdir / "log") == "of another run\n" and not files._copies._folder.exists()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lock_that_is_held_is_refused_and_one_that_was_left_is_waited_out(bucket, monkeypatch, capsys):
    from fcvit_jax.devices import gcs_run

    workdir = storage.run_path(bucket)
    monkeypatch.setattr(gcs_run, "RENEWAL", 0.2)
    monkeypatch.setattr(gcs_run, "STALE", 60.0)  # a busy machine may renew late
    first = storage.Lock(workdir)
    with pytest.raises(UserError, match=r"Another run is under way in gs://.*, process \d+ on .*: stop it"):
        storage.Lock(workdir)
    first.check()
    first.close()
    assert not storage.is_file(workdir / ".lock")

    monkeypatch.setattr(gcs_run, "STALE", 2.5)  # the server's clock has whole seconds
    killed = storage.Lock(workdir)
    killed._lock._thread.close()  # it renews no more, as when its process was killed
    capsys.readouterr()
    begin = time.monotonic()
    second = storage.Lock(workdir)
    assert time.monotonic() > begin + 1
    assert "If that run was killed, this one goes on in" in capsys.readouterr().err
    # The first was not killed but only stopped for a while: it notices, and leaves the second's lock alone.
    killed._lock._renewed -= 10
    with pytest.raises(UserError, match="(?s)Another run has taken over gs://.*This run ends without saving"):
        killed.check()
    killed.close()
    second.check()
    assert storage.is_file(workdir / ".lock")
    second.close()


def test_of_two_that_wait_for_a_lock_one_gets_it(bucket, monkeypatch):
    from fcvit_jax.devices import gcs_run

    workdir = storage.run_path(bucket)
    monkeypatch.setattr(gcs_run, "RENEWAL", 0.2)
    monkeypatch.setattr(gcs_run, "STALE", 2.5)
    killed = storage.Lock(workdir)
    killed._lock._thread.close()
    got = []

    def take():
        try:
            got.append(storage.Lock(workdir))
        except UserError:
            got.append(None)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(got) == 2 and got.count(None) == 1
    next(lock for lock in got if lock).close()


def test_what_was_written_by_a_request_whose_answer_was_lost_counts_as_written(bucket):
    from fcvit_jax.devices import gcs

    path = storage.run_path(bucket) / "x"
    generation = gcs.write_if(path, b"one", "0")
    assert gcs.write_if(path, b"one", "0") == generation  # the same request once more
    with pytest.raises(FileExistsError):
        gcs.write_if(path, b"two", "0")
    gcs.write_if(path, b"two", generation)
    assert storage.read_text(path) == "two"


REFUSED = "me@x.iam.gserviceaccount.com does not have storage.{} access to the Google Cloud Storage bucket."


@pytest.mark.parametrize(
    "status, path, method, words",
    [
        (401, "", "", "No credentials for gs://b .*gcloud auth application-default login"),
        (403, "/o", "POST", "does not allow this: me@x.*Storage Object User .*Storage Legacy Bucket Reader"),
        (403, "/b/b", "GET", "does not allow this: me@x.*Storage Object User .*Storage Legacy Bucket Reader"),
        (403, "/o/", "DELETE", "does not allow this: me@x"),
        (404, "", "", "There is no bucket gs://b.$"),
        (400, "", "", "gs://b: what"),
    ],
)
def test_what_a_bucket_refuses_is_one_line_at_the_start(monkeypatch, status, path, method, words):
    """Each of the requests in turn, since roles differ in what they allow."""
    seen = []

    def respond(command, url):
        seen.append((command, url))
        if command == (method or command) and path in url:
            return status, {"error": {"code": status, "message": "what" if status == 400 else REFUSED.format(method)}}
        return 200, {"name": "run/x", "generation": "1", "size": "6", "prefixes": ["run/a/"]}

    with emulator.answering(respond) as url:
        emulator.use(monkeypatch, url)
        with pytest.raises((UserError, OSError), match=words) as error:
            storage.check_access(storage.run_path("gs://b/run"))
    if status == 400:
        assert storage.words(error.value) == "gs://b: what, 400"
    else:
        assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    assert len(seen) < 20  # nothing is repeated for long


def test_a_bucket_that_is_away_is_waited_for_and_then_given_up(monkeypatch, caplog):
    from fcvit_jax.devices import gcs

    monkeypatch.setattr(gcs, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(gcs, "_said", -1e9)
    answers = []

    def respond(command, url):
        answers.append(503 if len(answers) < away else 200)
        return answers[-1], {"prefixes": ["run/a/"], "items": []} if answers[-1] == 200 else {}

    with emulator.answering(respond) as url:
        emulator.use(monkeypatch, url)
        away = 3
        assert storage.names(storage.run_path("gs://b/run")) == ["a"]
        assert answers == [503, 503, 503, 200] and "gs://b does not answer" in caplog.text
        away = 10**6
        with pytest.raises(UserError, match="(?s)gs://b does not answer .*run the same command again"):
            storage.names(storage.run_path("gs://b/run"))
        count = len(answers)
        with pytest.raises(UserError, match="does not answer"):
            storage.names(storage.run_path("gs://b/run"))
        assert len(answers) == count + 1  # not repeated again: the run is about to end
        away = 0
        assert storage.names(storage.run_path("gs://b/run")) == ["a"]
    emulator.use(monkeypatch, "http://127.0.0.1:1")  # where nobody listens
    with pytest.raises(UserError, match="gs://b does not answer"):
        storage.names(storage.run_path("gs://b/run"))


@pytest.mark.parametrize(
    "path, words",
    [
        ("s3://bucket/run", "gs://BUCKET/FOLDER"),
        ("gs://bucket", "must be a folder in a bucket"),
        ("gs://", "must be a folder in a bucket"),
        ("gs://bucket/lr=[1e-3]", r"'\['"),
        ("gs://bucket/a/../b", "'/..'"),
    ],
)
def test_addresses_that_are_no_folders_are_refused(path, words):
    pytest.importorskip("gcsfs")
    with pytest.raises(UserError, match=words):
        storage.run_path(path)


def test_an_address_may_be_a_path():
    pytest.importorskip("gcsfs")
    assert (
        str(storage.run_path(Path("gs://bucket/run"))) == "gs://bucket/run" == str(storage.as_path("gs://bucket/run/"))
    )


def test_what_must_be_on_a_disk_says_how_to_copy_it(tmp_path):
    pytest.importorskip("gcsfs")
    copy = r"must be on a local disk.*gcloud storage cp -r"
    with pytest.raises(UserError, match=copy):
        classification.open_dataset(dataset="folder:gs://bucket/photos", batch_size=2)
    for call in (lambda to: convert("x.npz", to), lambda to: export.export("runs/x", to)):
        with pytest.raises(UserError, match=copy):
            call("gs://bucket/out")


def test_a_local_run_needs_no_gcsfs_and_without_it_a_bucket_is_refused():
    code = """
import sys
sys.modules["gcsfs"] = None  # as if it were not installed
from fcvit_jax import train, evaluate, predict, visualize, export
from fcvit_jax.devices import storage
storage.run_path("runs/a")
assert not {"fsspec", "aiohttp", "google.cloud.storage"} & set(sys.modules)
try:
    storage.run_path("gs://bucket/run")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout and done.stdout.count("\n") == 1


def test_tools_say_in_one_line_what_is_wrong_with_a_bucket(bucket, monkeypatch, capsys):
    assert "there is no such folder" in exit_of(summary.main, "--checkpoint", bucket)
    write(storage.run_path(bucket) / "w.npz")
    assert "must be on a local disk" in exit_of(summary.main, "--checkpoint", f"{bucket}/w.npz")
    error = {"error": {"code": 403, "message": REFUSED.format("objects.list")}}
    with emulator.answering(lambda *_: (403, error)) as url:
        emulator.use(monkeypatch, url)
        for main, argv in ((predict.main, [ROOT / "README.md"]), (summary.main, [])):
            said = exit_of(main, "--checkpoint", "gs://bucket/run", *argv)
            assert said.startswith("error: gs://bucket does not allow this") and "\n" not in said, said
