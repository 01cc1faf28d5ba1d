"""Asks a vision-language model behind an OpenAI-compatible endpoint, and keeps every answer.

Each video is shown as evenly spaced frames. Answers are appended to a file as they come, and nothing is asked
twice.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from phantom.config import Vlm
from phantom.data.video import BadClip, read_frames
from phantom.errors import UserError
from phantom.evaluation.vlm.questions import Question
from phantom.generation.chat import Answer, Chat, Endpoint, pictures
from phantom.progress import say, track

ASK = (
    "These are {frames} frames of one video, in order and evenly spaced in time.\n{question}\n"
    "Answer with one of these and nothing else: {choices}."
)
SETTING = "evaluate.vlm"


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
    endpoint = Endpoint(settings.endpoint or "", f"{SETTING}.endpoint", settings.key, settings.timeout_seconds)
    chat, total = Chat(endpoint, kept="the answers so far are kept, run again to go on"), len(missing)
    say(f"{SETTING}: {total} questions to {settings.model}; answers go to {store.path}")
    with ThreadPoolExecutor(settings.workers) as pool, track("judge", total, "answers") as bar:

        def one(path: Path, question: Question) -> None:
            store.add(
                (shown[path], question.text, question.choices), path.name, _answer(chat, path, question, settings)
            )
            bar.advance(1)

        running = [pool.submit(one, *each) for each in missing]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
        finally:  # an interrupt too: what is left is not asked
            pool.shutdown(wait=False, cancel_futures=True)
        for each in done:
            each.result()


def _answer(chat: Chat, path: Path, question: Question, settings: Vlm) -> Answer:
    try:
        frames = read_frames(path)[0]
    except BadClip as reason:
        raise UserError(f"{path}: {reason}") from None
    shown = list(pictures(frames, settings.frames, settings.width))
    text = ASK.format(frames=len(shown), question=question.text, choices=", ".join(question.choices))
    return chat.ask(settings.model or "", text, shown)


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
