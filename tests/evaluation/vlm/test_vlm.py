"""A vision-language model as the judge: the real client, and a stand-in for the server, which sees how bright it is."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from phantom.data.video import write_mp4
from phantom.errors import StageFailed, UserError
from phantom.evaluation.compare import compare
from phantom.evaluation.vlm import judge
from phantom.evaluation.vlm.benchmark import VLM
from phantom.evaluation.vlm.questions import Question, read_questions
from phantom.generation import chat
from tests.plain import mini_params

KEY = "sk-not-for-logs"
QUESTIONS = """caption,question,answer,choices,category
A bright lamp,Is it bright?,,,SA
A bright lamp,Is it dark?,no,,SA
A bright lamp,How bright is it?,,0|1|2|3,PC
A dark room,Is it dark?,yes,,SA
"""


class Server(ThreadingHTTPServer):
    """Answers what it sees; `refuse` is sent instead, as (status, times)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.refuse: list[int] = []
        self.say = None
        self.kind = "application/json"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(asked | {"authorization": self.headers["Authorization"]})
        status = self.server.refuse.pop(0) if self.server.refuse else 200
        body = json.dumps(self._reply(asked) if status == 200 else {"error": {"message": f"no, {KEY}"}}).encode()
        body = b"<html></html>" if self.server.kind == "text/html" else body
        self.send_response(status)
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reply(self, asked: dict) -> dict:
        text, *pictures = asked["messages"][0]["content"]
        shades = []
        for picture in pictures:
            data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
            shades.append(float(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).mean()) / 255)
        bright = sum(shades) / len(shades)
        question = text["text"]
        if "How bright" in question:
            answer = f"I would say {round(3 * bright)}."
        else:
            answer = "**Yes**, it is" if (bright > 0.5) == ("Is it bright" in question) else "No"
        message = {"role": "assistant", "content": self.server.say or answer}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]} | {
            "usage": usage
        }

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Questions, and videos: of the lamp with two seeds, bright and dark, and of the room, dark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    Path("questions.csv").write_text(QUESTIONS)
    Path("videos").mkdir()
    for name, shade in {"0001-0": 250, "0001-1": 5, "0002-0": 9, "0002-1": 13}.items():
        write_mp4(Path(f"videos/{name}.mp4"), np.full((9, 64, 96, 3), shade, np.uint8), fps=4)
    return tmp_path


def settings(server, *overrides):
    own = (f"endpoint={server.url}", "model=eyes", "key=JUDGE_KEY", "questions=questions.csv", "frames=4", *overrides)
    return mini_params(Path("models/mini"), *(f"evaluate.vlm.{one}" for one in own))


def score(params, work="work"):
    options = {"generated": Path("videos"), "questions": None, "subset": False, "work": Path(work)}
    return VLM.score(lambda: params, **options)


def test_the_score_is_the_share_of_answers_as_they_should_be(server, place):
    found = score(settings(server))
    bright, dark, room = 1.0, 0.0, 1.0  # the lamp's three answers, right or wrong together; the room's one
    lamp = 100 * (bright + dark) / 2
    assert found["score"] == pytest.approx((lamp + 100 * room) / 2)
    assert found["categories"] == {"PC": {"score": 50.0}, "SA": {"score": 75.0}}
    rows = {row["prompt"]: row for row in found["per_prompt"]}
    assert rows["A bright lamp"]["seeds"] == {"0": 100.0, "1": 0.0} and rows["A dark room"]["value"] == 100
    assert (found["videos"], found["prompts"], found["answers"], found["unanswered"]) == (4, 2, 8, 0)
    assert found["tokens"] == {"in": 80, "out": 16} and found["protocol"].startswith("eyes, 4 frames, questions ")
    assert "comparable only" in VLM.as_text(found)
    asked = server.requests[0]
    assert asked["temperature"] == 0 and asked["authorization"] == f"Bearer {KEY}"
    assert len(asked["messages"][0]["content"]) == 1 + 4 and "4 frames" in asked["messages"][0]["content"][0]["text"]


def test_nothing_is_asked_twice_and_what_failed_is_asked_again(server, place, capsys, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 0)
    server.refuse = [200, 200, 200, 500]
    with pytest.raises(StageFailed, match=r"answers 500: .*\*\*\*"):
        score(settings(server, "workers=1"))
    (log,) = Path("work").glob("vlm-*.jsonl")
    kept = log.read_text()
    whole = kept.count("\n") - 1
    assert whole in (2, 3) and KEY not in kept + capsys.readouterr().err
    log.write_text(kept[:-20])  # as if the machine had failed while the last was written
    server.requests.clear()
    first = score(settings(server, "workers=1"))
    assert len(server.requests) == 8 - whole
    assert score(settings(server)) == first and len(server.requests) == 8 - whole
    score(settings(server, "frames=2"))  # other pictures are other questions
    assert len(server.requests) == 16 - whole


def test_the_client_waits_for_a_busy_server(server, place):
    server.refuse = [429, 503]
    assert score(settings(server))["unanswered"] == 0


def test_an_answer_that_names_no_choice_counts_as_wrong(server, place, capsys):
    server.say = " "
    assert score(settings(server))["unanswered"] == 8 and len(server.requests) == 8
    server.say = "I cannot tell."
    found = score(settings(server))
    assert len(server.requests) == 16  # what was empty is asked again
    assert found["score"] == 0 and found["unanswered"] == 8
    assert "8 of 8 answers name none of the choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("Yes.", "yes"), ("**no**, it", "no"), ("Nothing, yes", "yes"), ("", None), ("yesterday", None), ("NO", "no")],
)
def test_a_choice_is_a_whole_word(answer, choice):
    assert Question("?", ("yes", "no"), "yes", "").choice(answer) == choice


def test_numbers_are_a_scale():
    question = Question("?", ("1", "2", "5"), "", "")
    assert [question.value(question.choice(text)) for text in ("1", "Rating: 2", "5/5", "2.5", "25")] == [
        0,
        0.25,
        1,
        0,
        0,
    ]


def test_videos_are_sampled_for_each_caption_once_per_seed(server, place):
    found = VLM.videos(settings(server, "samples=2"), place)["vlm"]
    assert [r.file for r in found.requests] == ["0001-0.mp4", "0001-1.mp4", "0002-0.mp4", "0002-1.mp4"]
    assert [work.items for work in VLM.workload(settings(server, "samples=2"), place)] == [4]


def test_scores_of_other_judges_are_in_other_tables(server, place):
    for name, overrides in {"a": (), "b": (), "c": ("frames=2",)}.items():
        Path(f"{name}.json").write_text(json.dumps(score(settings(server, *overrides))))
    found = compare(["a.json", "b.json", "c.json"], Path("out"))
    assert len(found.gains) == 2
    assert "VLM judge, eyes, 4 frames" in Path("out/index.html").read_text()


def test_wrong_input_is_one_line(server, place, monkeypatch):
    for overrides, message in (
        (("endpoint=null",), "evaluate.vlm.endpoint: null"),
        (("model=null",), "evaluate.vlm.model: null"),
        (("questions=null",), "evaluate.vlm.questions: null"),
        (("questions=none.csv",), "none.csv: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            score(settings(server, *overrides))
    with pytest.raises(UserError, match=r"evaluate\.vlm\.endpoint"):
        settings(server, "endpoint=localhost:8000")
    for status, message in (
        (401, "wants a key in the environment variable JUDGE_KEY"),
        (404, r"answers 404: .*\*\*\*"),
    ):
        server.refuse = [status] * 8
        with pytest.raises(UserError, match=message) as caught:
            score(settings(server))
        assert KEY not in str(caught.value)
    monkeypatch.setattr(chat, "RETRIES", 0)
    server.shutdown()
    server.server_close()
    with pytest.raises(StageFailed, match="cannot be reached"):
        score(settings(server))
    for text, message in (
        ("caption\nx\n", "expected caption and question"),
        ("caption,question\nx,\n", "line 2: caption or question is empty"),
        ("caption,question,answer\nx,y?,maybe\n", "answer 'maybe', accepted: one of yes, no"),
        ("caption,question,choices\nx,y?,yes\n", "choices 'yes', accepted: two or more"),
        ("caption,question,choices\nx,y?,1|1.0\n", "accepted: two or more different numbers"),
        ("caption,question\n", "no question in it"),
    ):
        Path("questions.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_questions(Path("questions.csv"))


def test_an_interrupt_asks_nothing_more(server, place, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(judge, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(settings(server, "workers=1"))
    assert len(server.requests) <= 1


def test_what_is_thought_aloud_is_no_answer():
    question = Question("Is it bright?", ("yes", "no"), "yes", "")
    assert question.choice("<think>No lamp? But no, it is there.</think>Yes") == "yes"
    assert question.choice("No lamp? But it is there.</think>\n\nyes.") == "yes"
    assert question.choice("<think>Yes or no? I cannot") is None


def test_an_address_that_answers_with_a_page_is_one_line(server, place):
    server.kind = "text/html"
    with pytest.raises(UserError, match=r"evaluate.vlm.endpoint: .* answers with a page; accepted: an address such as"):
        score(settings(server))
