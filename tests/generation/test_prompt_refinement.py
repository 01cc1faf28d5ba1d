"""`--refine prompt`: the real client and the whole command, against a stand-in for the models' server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from phantom.data.video import write_mp4
from phantom.errors import StageFailed, UserError
from phantom.force.prompt import ForcePrompt, Wind
from phantom.generation import chat, prompt_refinement
from phantom.generation.chat import Endpoint
from phantom.generation.generate import Generated
from phantom.generation.prompt_refinement import PromptRefinement, read_json, read_prompt, read_score, refine_prompt
from tests.generation.test_generate import run as command

KEY = "sk-not-for-logs"
ANSWERS = {
    "analysis": '<think>{"main_object": 1}</think>```\n{"main_object": "the ball", "physical_law": ["gravity"]}\n```',
    "caption": "The ball floats.",
    "score": '{"prompt": 4, "physics": 2}',
    "mismatch": f"It should fall. {KEY}",
    "rewriting": '**New prompt:** "The ball drops to the floor."',
}
REASONED = {"principles": ["gravity"], "roles": [], "phenomena": ["it falls", KEY], "prompt": "It falls down."}
MARKS = {  # by which the server knows what it is asked
    "analysis": "main_object",
    "caption": "how it moves",
    "score": "Grade from",
    "reasoning": "Reason about its physics",
    "mismatch": "where they disagree",
    "rewriting": "Write the prompt",
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, *shown = asked["messages"][0]["content"]
        (step,) = [name for name, mark in MARKS.items() if mark in text["text"]]
        self.server.asked.append(SimpleNamespace(step=step, text=text["text"], shown=len(shown), model=asked["model"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        answers = self.server.answers[step]
        answer = answers.pop(0) if isinstance(answers, list) else answers
        status = 200 if answer is not None else 500
        message = {"role": "assistant", "content": None if isinstance(answer, bytes) else answer}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "x", "usage": None}
        reply |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        error = {"error": {"message": f"out of memory, {self.server.padding}{KEY}"}}
        body = json.dumps(reply if status == 200 else error).encode()
        body = answer if isinstance(answer, bytes) else body
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Answers by step; a list is answered in turn, None is an error."""
    monkeypatch.setenv("REFINE_KEY", KEY)
    monkeypatch.setattr(chat, "RETRIES", 0)
    monkeypatch.chdir(tmp_path)
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked, found.answers, found.made, found.padding = [], dict(ANSWERS), [], ""
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()


def settings(server, **changes) -> PromptRefinement:
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "--endpoint", "REFINE_KEY", 30)
    return PromptRefinement(**{"endpoint": endpoint, "text_model": "words", "captioner": "eyes", "rounds": 2} | changes)


def run(server, **changes) -> Generated:
    def make(prompt: str, path: Path) -> Generated:
        server.made.append(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, np.full((5, 32, 32, 3), 40 * len(server.made), np.uint8), 4)
        filled = dict.fromkeys((field for field in Generated.__dataclass_fields__), None)
        return Generated(**{**filled, "out": str(path), "prompt": prompt, "seed": 42})

    return refine_prompt(make, "A ball is let go.", Path("out/ball.mp4"), settings(server, **changes))


def fail(prompt: str, path: Path) -> Generated:
    raise UserError("no model")


def log() -> dict:
    return json.loads(Path("out/ball.prompts.json").read_text())


def test_the_prompt_is_rewritten_from_what_is_seen_and_everything_is_kept(server):
    server.answers["rewriting"] = [ANSWERS["rewriting"], "It falls and bounces."]
    made = run(server)
    assert server.made == ["A ball is let go.", "The ball drops to the floor.", "It falls and bounces."]
    assert (made.out, made.prompt) == ("out/ball.mp4", "It falls and bounces.")
    a_round = ["caption", "score", "mismatch", "rewriting"]
    assert [one.step for one in server.asked] == ["analysis", *a_round, *a_round]
    assert {one.step for one in server.asked if one.model == "eyes"} == {"caption", "score"}
    assert {(one.model, one.shown) for one in server.asked} == {("words", 0), ("eyes", 5)}  # all frames, as pictures
    assert "what the ball does" in server.asked[1].text
    last = server.asked[-1].text
    for said in ("A ball is let go.", "gravity", "The ball drops to the floor.", "It should fall.", "0.50"):
        assert said in last

    files = sorted(str(path) for path in Path("out").rglob("*") if path.is_file())
    rounds = [f"out/ball-rounds/round-{i}.mp4" for i in range(3)]
    assert files == sorted([*rounds, "out/ball.mp4", "out/ball.prompts.json"])
    assert Path("out/ball.mp4").read_bytes() == Path(rounds[-1]).read_bytes() != Path(rounds[0]).read_bytes()
    found = log()
    assert [one["step"] for one in found["exchanges"]] == [one.step for one in server.asked]
    assert [one["asked"] for one in found["exchanges"]] == [one.text.replace(KEY, "***") for one in server.asked]
    assert [video["prompt"] for video in found["videos"]] == server.made and found["videos"][0]["score"] == 0.5
    assert found["ended"] == "all rounds are made" and {video["seed"] for video in found["videos"]} == {42}
    assert KEY not in Path("out/ball.prompts.json").read_text()  # which the model has said


@pytest.mark.parametrize(
    ("answers", "videos", "ended"),
    [
        ({"score": '{"prompt": 5, "physics": 5}'}, 1, "the score is 1"),
        ({"score": [ANSWERS["score"], "Prompt 5, physics: 4.8"]}, 2, "the score is 0.975"),
        ({"mismatch": "No."}, 1, "nothing disagrees with the prompt"),
        ({"rewriting": "A ball is let go."}, 1, "the prompt does not change"),
        ({"rewriting": "<think>What now?"}, 1, "no prompt in the answer"),
        ({}, 2, "the prompt does not change"),
    ],
)
def test_it_ends_where_nothing_is_left_to_correct(server, answers, videos, ended):
    server.answers |= answers
    run(server)
    assert len(server.made) == videos and log()["ended"] == ended


@pytest.mark.parametrize(
    ("answer", "prompt", "ended"),
    [
        (json.dumps(REASONED), "It falls down.", "the prompt is written once, before the video"),
        ('Prompt: "It falls down."', "It falls down.", "the prompt is written once, before the video"),
        ('{"phenomena": ["it falls"]}', "A ball is let go.", "no prompt in the answer"),
        ('{"phenomena": ["it falls"], "prompt": null}', "A ball is let go.", "no prompt in the answer"),
        ('{"phenomena": ["it falls"], "pro', "A ball is let go.", "no prompt in the answer"),
        ("", "A ball is let go.", "no prompt in the answer"),
    ],
)
def test_the_prompt_is_reasoned_out_once_before_the_video(server, answer, prompt, ended):
    server.answers["reasoning"] = answer
    made = run(server, template="diffphy")
    assert server.made == [prompt] == [made.prompt] and made.out == "out/ball.mp4"
    assert [(one.step, one.model, one.shown) for one in server.asked] == [("reasoning", "words", 0)]
    found = log()
    assert found["ended"] == ended and found["template"] == "diffphy" and len(found["videos"]) == 1
    assert KEY not in Path("out/ball.prompts.json").read_text()


def test_nonsense_is_survived(server, capsys):
    server.answers |= {
        "analysis": "I like balls.",
        "score": "Very nice!",
        "caption": "",
        "rewriting": ['{"prompt": [', ""],
    }
    run(server)
    assert "I like balls." in server.asked[4].text and "score, from 0 to 1: unknown" in server.asked[4].text
    assert "names no grades from 1 to 5; the loop goes on" in capsys.readouterr().err
    assert log()["videos"][0]["score"] is None and log()["ended"] == "no prompt in the answer"


def test_what_was_made_stays_where_the_endpoint_goes_down(server, capsys):
    server.answers["mismatch"] = [ANSWERS["mismatch"], None]
    with pytest.raises(StageFailed) as error:
        run(server)
    said = str(error.value)
    assert "\n" not in said and KEY not in said + capsys.readouterr().err + Path("out/ball.prompts.json").read_text()
    assert "answers 500: " in said and "kept: out/ball.mp4, 2 videos in out/ball-rounds" in said
    assert Path("out/ball.mp4").read_bytes() == Path("out/ball-rounds/round-1.mp4").read_bytes()
    assert "answers 500" in log()["ended"] and len(log()["exchanges"]) == 7
    server.answers["analysis"] = [None]
    server.made.clear()
    with pytest.raises(StageFailed, match=r"answers 500: .*\*\*\*"):
        run(server)
    assert not server.made  # nothing is computed before anybody answers
    assert "answers 500" in log()["ended"] and len(log()["exchanges"]) == 7  # the earlier call's, as its videos
    server.answers |= {"analysis": ANSWERS["analysis"], "score": '{"prompt": 5, "physics": 5}'}
    with pytest.raises(UserError, match="no model"):
        refine_prompt(fail, "A ball is let go.", Path("out/ball.mp4"), settings(server))
    assert len([*Path("out/ball-rounds").iterdir()]) == 2 and len(log()["exchanges"]) == 7
    run(server)
    assert [path.name for path in Path("out/ball-rounds").iterdir()] == ["round-0.mp4"] and len(log()["videos"]) == 1
    assert not [*Path("out").glob(".*")]


def test_no_part_of_the_key_is_left_where_an_error_is_cut_short(server):
    server.answers["analysis"] = [None]
    server.padding = "x" * 160  # so that the key begins within what is shown, and ends behind it
    with pytest.raises(StageFailed, match=r"answers 500: .*xxx\*+$") as error:
        run(server)
    assert KEY[:3] not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "raised", "said"),
    [
        (b"{damaged", StageFailed, r"answers with damaged JSON; kept: out/ball\.mp4, 1 videos"),
        (b"[]", StageFailed, r"answers with a page; accepted: .*; kept: out/ball\.mp4, 1 videos"),
        (b'{"choices": [{"message": null}], "usage": {}}', None, ""),
    ],
)
def test_an_answer_that_is_none_is_one_line_or_an_empty_text(server, answer, raised, said):
    server.answers["caption"] = answer
    if raised:
        with pytest.raises(raised, match=said):
            run(server, rounds=1)
    else:
        run(server, rounds=1)
        caption = next(one for one in log()["exchanges"] if one["step"] == "caption")
        assert (caption["answer"], caption["tokens_in"], caption["tokens_out"]) == ("", 0, 0)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('Sure: {"prompt": "a {b}", "n": 1} done', {"prompt": "a {b}", "n": 1}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ("{x} {} none", {}),
        ('[{"a": 1}]', {"a": 1}),
        ("", {}),
    ],
)
def test_json_is_found_in_an_answer(answer, found):
    assert read_json(answer) == found


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"prompt": 1, "physics": "5"}', 0.5),
        ('{"prompt": "4/5", "physics": "3 of 5"}', 0.625),
        ("Prompt: 2\nPhysics: 2", 0.25),
        ("I give it 17 points", None),
        ('{"prompt": 3}', None),
    ],
)
def test_grades_are_read_from_an_answer(answer, score):
    assert read_score(answer) == score


@pytest.mark.parametrize(
    "answer",
    [
        "A ball falls.",
        '"A ball falls."',
        "```text\nA ball\nfalls.\n```",
        "**Rewritten prompt:** A ball falls.",
        '{"prompt": "A ball falls."}',
        "<think>Prompt: no</think>\nPrompt: “A ball falls.”",
    ],
)
def test_a_prompt_is_read_from_an_answer(answer):
    assert read_prompt(answer) == "A ball falls."


def test_each_line_of_prompts_is_refined_with_its_own_force(server, monkeypatch, capsys):
    def make(model, prompt: str, path: Path, **options) -> Generated:
        server.made.append((prompt, options["force"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, np.zeros((5, 32, 32, 3), np.uint8), 4)
        return Generated(**{**dict.fromkeys(Generated.__dataclass_fields__), "out": str(path), "prompt": prompt})

    monkeypatch.setattr(prompt_refinement, "generate", make)
    server.answers["score"] = '{"prompt": 5, "physics": 5}'
    Path("prompts.txt").write_text("A ball.\nA lamp.\n")
    winds = [ForcePrompt(wind=Wind(angle, 1)) for angle in (0, 90)]
    Path("forces.json").write_text(json.dumps([wind.to_dict() for wind in winds]))
    address = f"http://127.0.0.1:{server.server_port}/v1"
    asked = ["--refine", "prompt", "--endpoint", address, "--text-model", "words", "--endpoint-key", "REFINE_KEY"]
    call = ["--model", "x", "--prompts", "prompts.txt", "--out", "many", "--force", "forces.json", *asked]
    assert command(monkeypatch, *call) == 0
    assert server.made == [("A ball.", winds[0]), ("A lamp.", winds[1])]
    Path("prompts.txt").write_text("A ball.\nA lamp.\nA cup.\n")
    assert command(monkeypatch, *call) == 2
    assert "force: found 2 for 3 prompt(s); accepted: one, or one for each" in capsys.readouterr().err


def test_the_command_refines_a_models_own_video(server, export, monkeypatch, capsys):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    asked = ["--refine", "prompt", "--endpoint", address, "--text-model", "words", "--endpoint-key", "REFINE_KEY"]
    call = ["--model", export, "--steps", 1, "--frames", 5, "--refine-rounds", 1, "--json", *asked]
    assert command(monkeypatch, *call, "--prompt", "A ball is let go.", "--out", "out/ball.mp4") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["prompt"] == "The ball drops to the floor." and {one.model for one in server.asked} == {"words"}
    assert Path("out/ball.mp4").is_file() and len(log()["videos"]) == 2 and log()["ended"] == "all rounds are made"
    Path("prompts.txt").write_text("A ball is let go.\nA lamp.\n")
    assert command(monkeypatch, *call, "--prompts", "prompts.txt", "--out", "many", "--seed", 7) == 0
    assert [one["seed"] for one in json.loads(capsys.readouterr().out)] == [7, 8]
    assert {path.name for path in Path("many").iterdir()} == {
        *(f"000{i}{end}" for i in range(2) for end in (".mp4", ".prompts.json", "-rounds"))
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--refine", "prompt"], "--endpoint: missing; accepted with --refine prompt: an address such as"),
        (["--refine", "prompt", "--endpoint", "http://x/v1"], "--text-model: missing; accepted"),
        (["--refine", "self", "--endpoint", "http://x/v1"], "--endpoint: found without --refine prompt"),
        (["--refine", "prompt", "--refine-until", "0.2"], "--refine-until: found without --refine self"),
        (
            ["--refine", "prompt", "--endpoint", "x/v1", "--text-model", "a"],
            "--endpoint: found 'x/v1'; accepted: an address such as http://localhost:8000/v1",
        ),
        (
            ["--refine", "prompt", "--endpoint", "http://x", "--text-model", "a", "--stop-score", "0"],
            "stop-score: found 0; accepted: above 0, at most 1",
        ),
        (
            ["--refine", "prompt", "--endpoint", "http://x", "--text-model", "a", "--template", "x"],
            "template: found 'x'; accepted: phyt2v, diffphy",
        ),
        (
            [
                "--refine",
                "prompt",
                "--endpoint",
                "http://x",
                "--text-model",
                "a",
                "--template",
                "diffphy",
                "--captioner",
                "b",
            ],
            "--captioner: found with --template diffphy, which looks at no video; accepted: without",
        ),
        (["--refine", "prompts"], "--refine: found 'prompts'; accepted: self, prompt, none"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, options, said):
    assert command(monkeypatch, "--model", tmp_path, "--prompt", "x", "--out", tmp_path / "x.mp4", *options) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ["--refine", "prompt", "--endpoint", "http://x/v1", "--text-model", "a"]
    assert command(monkeypatch, "--model", tmp_path, "--prompt", "x", "--out", tmp_path / "x.mp4", *asked) == 2
    assert (
        "--refine prompt: found 2 processes, which may be answered differently; accepted: 1" in capsys.readouterr().err
    )


def test_an_endpoint_that_is_not_there_is_one_line(server, export, monkeypatch):
    refinement = settings(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(StageFailed, match=r"--endpoint: http://.* cannot be reached \(Connection error\.\)$"):
        refine_prompt(lambda *_: pytest.fail("made"), "x", Path("out/x.mp4"), refinement)
    with pytest.raises(UserError, match=r"refine-rounds: found 0"):
        settings(server, rounds=0)
