"""A hub that answers with errors: one sentence, exit code 2, nothing left behind, nothing that paints the screen."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.paths import ROOT


class Hub(BaseHTTPRequestHandler):
    answer = "401"

    def do_GET(self):
        body = b"<html>\x1b[2J It holds </html>"
        if self.answer == "redirects":
            self.send_response(302)
            self.send_header("Location", self.path + "x")
        else:
            self.send_response(200 if self.answer == "a web page" else int(self.answer))
            self.send_header("X-Error-Message", "no \x1b[2J It holds")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "what"), [("401", "dataset"), ("redirects", "dataset"), ("a web page", "dataset"), ("a web page", "model")]
)
def test_an_error_of_the_hub_is_one_refusal(tmp_path, small_model, answer, what):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("AHub", (Hub,), {"answer": answer}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {"dataset": "owner/name", "model": small_model} if what == "dataset" else {"dataset": "demo", "model": "owner/name"}
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "TRL_CPO_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    command = ["train", "--model_name_or_path", names["model"], "--dataset_name", names["dataset"], "--output_dir", "out"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trl_cpo", *command, "--use_cpu", "--bf16", "False"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 2, done.stderr
    assert "owner/name" in done.stderr and "unexpected error" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr and not (tmp_path / "out").exists()
