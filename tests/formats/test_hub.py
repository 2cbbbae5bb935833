"""Weights and card in the layout of the Hugging Face hub, from a folder and from a server on the loopback address."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from helpers import METADATA, TINY, exit_of, save_images, tiny_variables

from fcvit_jax import convert, create_model, export, predict
from fcvit_jax.errors import UserError
from fcvit_jax.formats import hub
from fcvit_jax.run import saved
from fcvit_jax.run.checkpoint import save_variables

EVALUATED = {"step": 70, "loss": 0.5, "top1": 0.8125, "top5": 1.0, "count": 16}
ABOUT = METADATA | {"exif": False}  # which checkpoints that do not say it are completed with
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    of_the_run = {"num_train": 1234, "num_eval": 16, "evaluated": EVALUATED, "best": EVALUATED}
    save_variables(folder / "run", tiny_variables(), METADATA | of_the_run)
    export.main(["--checkpoint", str(folder / "run"), str(folder / "out"), "--format", "hub"])
    return folder / "out"


def copy(folder, dest, **changed):
    dest.mkdir()
    for path in folder.iterdir():
        (dest / path.name).write_bytes(changed.get(path.name.partition(".")[0], path.read_bytes()))
    return dest


def assert_same(found, expected):
    found, expected = (traverse_util.flatten_dict(x, sep="/") for x in (found, expected))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x)


def test_a_folder_in_the_layout_loads_everywhere(folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    ]
    assert_same(convert.load_pretrained(folder, create_model(**TINY)), tiny_variables())
    network = saved.load(folder)
    assert network.metadata == ABOUT and network.model == create_model(**TINY)
    assert_same(network.variables, tiny_variables())
    assert convert.read_metadata(folder) == ABOUT
    # What people correct in config.json counts.
    names = {"class_names": ["dog", "eel", "fly"]}
    edited = copy(folder, tmp_path / "edited", config=json.dumps(ABOUT | names).encode())
    assert predict.load(edited)[2] == ABOUT | names
    # Others' weights have a config.json that is not ours.
    other = copy(folder, tmp_path / "other", config=b'{"architecture": "vit"}')
    assert predict.load(other)[2] == ABOUT


def test_changed_or_damaged_files_are_refused(folder, tmp_path):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    changed = copy(folder, tmp_path / "changed", model=bytes(weights))
    with pytest.raises(UserError, match="model.safetensors is not what was written"):
        saved.load(changed)
    for number, content in enumerate((b"{", b"[1]", b"[" * 10_000, json.dumps(METADATA | {"class_names": 3}).encode())):
        with pytest.raises(UserError, match="config.json is damaged"):
            saved.load(copy(folder, tmp_path / str(number), config=content))


def test_the_card_says_what_is_known(folder):
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    for line in ("library_name: fcvit-jax", "license: unknown", "pipeline_tag: image-classification", "- jax"):
        assert line in header.splitlines()
    for words in ("3: `ant`, `bee`, `cat`", "1,234 images", "16 images", "top-1 81.25%", "step 70", "40 x 40 pixels"):
        assert words in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    assert code.count("hf-hub:OWNER/NAME") == 1
    values = {}
    exec(code.replace("hf-hub:OWNER/NAME", str(folder)), values)
    assert values["metadata"] == ABOUT


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub for the repository ant/bee; of ant/slow it sends half a file and then nothing."""

    def do_HEAD(self):
        owner, name, _, revision, file = (self.path.strip("/").split("/", 4) + 4 * [""])[:5]
        path = self.server.folder / file
        known = (owner, name) in (("ant", "bee"), ("ant", "slow")) and revision in ("main", "v1", COMMIT)
        self.server.requests.append((self.command, revision, file))
        if not known or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET" and name == "slow":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.over.wait(60)
        elif self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.folder, server.requests, server.over = folder, [], threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


# Prints where weights are, or why they cannot be read.
LOCATE = """
import sys
from fcvit_jax.errors import UserError
from fcvit_jax.formats import hub
for name in sys.argv[1:]:
    try:
        print(hub.local(f"hf-hub:{name}"))
    except UserError as error:
        print(error)
"""


@pytest.fixture
def run(server, tmp_path):
    """Runs Python in a process of its own, since huggingface_hub reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub", reason="needs requirements/hub.txt")
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def run(*args, **more):
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(
            command, env=os.environ | settings | more, timeout=100, check=True, capture_output=True, text=True
        )
        return done.stdout

    return run


def test_predict_reads_from_the_hub_and_then_from_its_cache(folder, server, run, tmp_path):
    (image,) = save_images(tmp_path / "images", 1)
    printed = run("-m", "fcvit_jax.predict", "--checkpoint", "hf-hub:ant/bee@v1", "--json", image)
    model, variables, metadata = predict.load(folder)
    pixels = predict.read_image(Path(image), metadata)
    expected = np.asarray(predict.probabilities(model, variables, pixels[None])).max()
    first = json.loads(printed)["predictions"][0]
    np.testing.assert_allclose(first["probability"], expected, rtol=1e-5)
    assert first["class"] in METADATA["class_names"]
    # The other files are those of the commit that the first one was of.
    got = {(revision, file) for method, revision, file in server.requests if method == "GET" and file}
    assert got == {("v1", "config.json"), (COMMIT, "model.safetensors"), (COMMIT, "SHA256SUMS")}
    cached = run("-c", LOCATE, "ant/bee@v1", HF_HUB_OFFLINE="1").strip()
    assert cached.endswith(COMMIT) and hub.is_layout(Path(cached))


def test_what_the_hub_does_not_give_is_one_line(run):
    """Also where a server falls silent in the middle of a file, which would be waited for 60 seconds."""
    names = "ant/cat", "ant/bee@v2", "ant/slow"
    lines = run("-c", LOCATE, *names).splitlines()
    assert len(lines) == len(names)
    for name, reason, line in zip(names, ("404", "404", "timed out"), lines, strict=True):
        assert line.startswith(f"hf-hub:{name} cannot be read: ") and reason in line


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "fcvit-jax[hub]"' in exit_of(predict.main, "--checkpoint", "hf-hub:ant/bee", "image.png")


def test_a_name_needs_an_owner():
    for name in ("hf-hub:bee", "hf-hub:ant/bee/cat", "hf-hub:a nt/bee", "hf-hub:"):
        assert "must be hf-hub:OWNER/NAME" in exit_of(predict.main, "--checkpoint", name, "image.png")
