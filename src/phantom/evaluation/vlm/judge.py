"""Asks a vision-language model behind an OpenAI-compatible endpoint, and keeps every answer.

Each video is shown as evenly spaced frames. Answers are appended to a file as they come, and nothing is asked
twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from phantom.config import Vlm
from phantom.data.video import BadClip, read_frames
from phantom.errors import StageFailed, UserError
from phantom.evaluation.vlm.questions import Question
from phantom.progress import say, track

ASK = (
    "These are {frames} frames of one video, in order and evenly spaced in time.\n{question}\n"
    "Answer with one of these and nothing else: {choices}."
)
MAX_TOKENS = 2048  # of an answer: models that think aloud need room
RETRIES = 5  # by the client, with growing waits, where the endpoint is busy or fails
SETTING = "evaluate.vlm"


class Answer(NamedTuple):
    """What the model said, and the tokens that it read and wrote."""

    text: str
    tokens_in: int
    tokens_out: int


def ask_all(asked: Mapping[Path, Sequence[Question]], settings: Vlm, work: Path) -> dict[tuple[str, Question], Answer]:
    """The answer to each question of each video, by file name and question.

    work: where answers are kept, by what they depend on (frames, model, question). Raises UserError if the endpoint
    does not know us or the model, StageFailed if it cannot be reached; the answers that it gave are kept.
    """
    if settings.endpoint is None or settings.model is None:
        name = "endpoint" if settings.endpoint is None else "model"
        raise UserError(
            f"{SETTING}.{name}: null; accepted: that of an OpenAI-compatible server, such as vLLM or Ollama"
        )
    store = _Answers(work / f"vlm-{hashlib.sha256(settings.model.encode()).hexdigest()[:12]}.jsonl")
    shown = {path: _digest(path, settings) for path in asked}
    wanted = {  # once where videos are the same
        (shown[path], question.text, question.choices): (path, question)
        for path, questions in asked.items()
        for question in questions
    }
    if missing := [wanted[key] for key in wanted if key not in store.known]:
        _ask(missing, shown, settings, store)
    return {
        (path.name, question): store.known[shown[path], question.text, question.choices]
        for path, questions in asked.items()
        for question in questions
    }


def _ask(missing: Sequence[tuple[Path, Question]], shown: Mapping[Path, str], settings: Vlm, store: _Answers) -> None:
    client, total = _client(settings), len(missing)
    say(f"{SETTING}: {total} questions to {settings.model}; answers go to {store.path}")
    with ThreadPoolExecutor(settings.workers) as pool, track("judge", total, "answers") as bar:

        def one(path: Path, question: Question) -> None:
            store.add(
                (shown[path], question.text, question.choices), path.name, _answer(client, path, question, settings)
            )
            bar.advance(1)

        running = [pool.submit(one, *each) for each in missing]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
        finally:  # an interrupt too: what is left is not asked
            pool.shutdown(wait=False, cancel_futures=True)
        for each in done:
            each.result()


def _answer(client: Any, path: Path, question: Question, settings: Vlm) -> Answer:
    import openai

    pictures = list(_pictures(path, settings))
    text = ASK.format(frames=len(pictures), question=question.text, choices=", ".join(question.choices))
    content = [{"type": "text", "text": text}]
    content += [{"type": "image_url", "image_url": {"url": url}} for url in pictures]  # type: ignore[dict-item]
    try:
        reply = client.chat.completions.create(
            model=settings.model,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:  # its text may hold part of the key
        raise UserError(
            f"{SETTING}: {settings.endpoint} refuses us ({error.status_code}); it wants a key in the environment "
            f"variable {settings.key}"
        ) from None
    except openai.APIStatusError as error:
        kind = UserError if error.status_code in (400, 404, 413, 422) else StageFailed
        raise kind(f"{SETTING}: {settings.endpoint} answers {error.status_code}: {_said(error, settings)}") from None
    except openai.APIConnectionError as error:
        raise StageFailed(
            f"{SETTING}: {settings.endpoint} cannot be reached ({_said(error, settings)}); the answers so far are "
            "kept, run again to go on"
        ) from None
    if isinstance(reply, str):  # the client hands on what is no JSON
        raise UserError(
            f"{SETTING}.endpoint: {settings.endpoint} answers with a page; accepted: an address such as .../v1"
        )
    used, choices = reply.usage, reply.choices
    said = (choices[0].message.content if choices else None) or ""
    return Answer(said, used.prompt_tokens if used else 0, used.completion_tokens if used else 0)


def _client(settings: Vlm) -> Any:
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError(f"{SETTING}: the package openai is not installed; pip install '.[judges]' adds it") from None
    key = os.environ.get(settings.key) or "none"  # servers of one's own want none
    return openai.OpenAI(
        base_url=settings.endpoint, api_key=key, max_retries=RETRIES, timeout=float(settings.timeout_seconds)
    )


def _said(error: Exception, settings: Vlm) -> str:
    """The first line of an error, without the key."""
    said, key = (str(error).strip() or type(error).__name__).splitlines()[0][:200], os.environ.get(settings.key)
    return said.replace(key, "***") if key else said


def _pictures(path: Path, settings: Vlm) -> Iterator[str]:
    """The frames that the model sees, as data URIs of JPEGs."""
    try:
        frames = read_frames(path)[0]
    except BadClip as reason:
        raise UserError(f"{path}: {reason}") from None
    for index in np.linspace(0, len(frames) - 1, min(settings.frames, len(frames))).round().astype(int):
        frame = frames[index]
        if frame.shape[1] > settings.width:
            size = settings.width, round(frame.shape[0] * settings.width / frame.shape[1])
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        yield f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"


def _digest(path: Path, settings: Vlm) -> str:
    """What is shown of a video, and how it is asked about."""
    with path.open("rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()
    text = json.dumps([contents, settings.frames, settings.width, ASK])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class _Answers:
    """The answers of one model, kept in a file: a line of JSON for each. A line that was cut off is asked again."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.known: dict[tuple[str, str, tuple[str, ...]], Answer] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.is_cut = not text.endswith("\n") and text != ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
                answer = Answer(row["answer"], row["tokens_in"], row["tokens_out"])
                self.known[row["shown"], row["question"], tuple(row["choices"])] = answer
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: tuple[str, str, tuple[str, ...]], video: str, answer: Answer) -> None:
        """Keeps an answer, at once on disk. An empty one is asked again another time."""
        shown, question, choices = key
        row: dict[str, Any] = {"video": video, "question": question, "choices": choices, "shown": shown}
        row |= {"answer": answer.text, "tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
        with self.lock:
            self.known[key] = answer
            if not answer.text.strip():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self.is_cut else "") + json.dumps(row, ensure_ascii=False) + "\n")
            self.is_cut = False
