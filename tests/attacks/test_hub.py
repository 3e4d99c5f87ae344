"""A hub that answers with errors: one sentence, exit code 2, nothing left behind, nothing that paints the screen."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.paths import PROCESSES, ROOT

#: How the hub answers, by the owner's name in what is asked for.
ANSWERS = {"closed": "401", "circular": "redirects", "paper": "a web page"}
ASKED = [("closed/name", "dataset"), ("circular/name", "dataset"), ("paper/name", "dataset"), ("paper/weights", "model")]


class Hub(BaseHTTPRequestHandler):
    asked: set[str] = set()

    @property
    def answer(self) -> str:
        (owner,) = (owner for owner in ANSWERS if owner in self.path)
        self.asked.add(owner)
        return ANSWERS[owner]

    def do_GET(self):
        body = b"<html>\x1b[2J It holds </html>"
        answer = self.answer
        if answer == "redirects":
            self.send_response(302)
            self.send_header("Location", self.path + "x")
        else:
            self.send_response(200 if answer == "a web page" else int(answer))
            self.send_header("X-Error-Message", "no \x1b[2J It holds")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_an_error_of_the_hub_is_one_refusal(tmp_path, small_model):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "TRL_CPO_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    commands = []
    for name, what in ASKED:
        model, dataset = (small_model, name) if what == "dataset" else (name, "demo")
        command = ["train", "--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", "out"]
        commands.append([*command, "--use_cpu", "--bf16", "False"])
    try:
        done = subprocess.run(
            [sys.executable, str(PROCESSES / "commands_in_turn.py"), json.dumps(commands)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    said = [[(tmp_path / f"{number}.{name}").read_text() for name in ("out", "err")] for number in range(len(ASKED))]
    assert json.loads(done.stdout.splitlines()[-1]) == [2] * len(ASKED), said
    for (name, _), (out, err) in zip(ASKED, said, strict=True):
        assert name in err and "unexpected error" not in err and "\x1b" not in out + err, err
    assert not (tmp_path / "out").exists() and Hub.asked == set(ANSWERS)
