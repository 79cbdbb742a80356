"""What surrounds an export: a Python in which ddlm is not installed, and a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

WITHOUT_DDLM = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
assert importlib.util.find_spec("ddlm") is None, "ddlm is installed here: the test would prove nothing"
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
folder = sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(json.loads(sys.argv[3]), return_tensors="pt", padding=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
hidden = model(**inputs).last_hidden_state
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
loss = classifier(**inputs, labels=torch.tensor([0, 2])).loss
loss.backward()
assert torch.isfinite(loss)
classifier.save_pretrained(sys.argv[4])
again = AutoModelForSequenceClassification.from_pretrained(sys.argv[4], trust_remote_code=True)
classifier.eval(), again.eval()
assert torch.equal(again(**inputs).logits, classifier(**inputs).logits)
print()
labels = AutoConfig.from_pretrained(sys.argv[4], trust_remote_code=True).num_labels
ids, mask = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
print(json.dumps({"ids": ids, "mask": mask, "hidden": hidden.tolist(), "labels": labels}))
"""


def read_without_ddlm(exported: Path, texts: list[str], place: Path) -> Any:
    """What transformers makes of an export where ddlm is not installed: ids, masks, hidden states, labels."""
    site = place / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():  # all that is installed, save ddlm
        if not entry.name.startswith(("ddlm", "__editable__")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    environment = {
        "HOME": str(place),
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    # -I and -S: no PYTHONPATH, no user site, no .pth file of an editable installation
    isolated = [sys.executable, "-I", "-S", "-c", WITHOUT_DDLM]
    run = subprocess.run(
        [*isolated, site, exported, json.dumps(texts), place / "tuned"],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(next(x for x in run.stdout.splitlines() if x.startswith("{")))


class Hub(BaseHTTPRequestHandler):
    """The requests an upload makes; everything is kept in ``server.seen``."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.path.endswith("/repos/create"):
            answer: Any = {"url": f"{self.server.address}/me/tiny", "name": "me/tiny"}
        elif "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                ]
            }
        elif "/commit/" in self.path:
            answer = {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.server.address}/me/tiny/commit/0",
            }
        else:
            answer = {}
        self._reply(answer)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization"), b""))
        files = [{"type": "file", "path": p, "oid": "0", "size": 1} for p in self.server.stored]
        about = {"id": "me/tiny", "sha": "0" * 40, "siblings": [], "private": False}
        self._reply(files if "/tree/" in self.path else about)

    def _reply(self, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


PUSH = """
import sys
from ddlm.integrations import export
from ddlm.integrations.export import push_model
from ddlm.types import ConfigError
export.SHARD_BYTES = int(sys.argv[2] or export.SHARD_BYTES)
try:
    print(push_model(sys.argv[1], "me/tiny", private=bool(sys.argv[3]), message="First weights"))
except ConfigError as error:
    print(error)
"""


def push(
    model: Path,
    place: Path,
    *,
    stored: Sequence[str] = (),
    shard_bytes: int | None = None,
    private: bool = False,
    address: str | None = None,
) -> tuple[str, list[tuple[str, str | None, bytes]]]:
    """Push a model to a hub that has the files ``stored``, or to another ``address``.

    Returns:
        What was printed, a refusal too, and the requests that the hub saw.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.stored = [], stored
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        run = subprocess.run(
            [sys.executable, "-c", PUSH, model, str(shard_bytes or ""), "yes" * private],
            env=os.environ
            | {
                "HF_ENDPOINT": address or server.address,
                "HF_TOKEN": "hf_secret",
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(place),
                "HF_HUB_DISABLE_XET": "1",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout, server.seen
