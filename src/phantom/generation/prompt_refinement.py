"""`--refine prompt`: language models rewrite the prompt, after each video as in PhyT2V (2412.00596) or once before it.

    once      text model   what the prompt is about, and the physical laws that rule it
    a round   captioner    what the frames of the video show; how well they score
              text model   where that and the prompt disagree; from all of this, a new prompt
              the video    again, from the same seed

With the template `diffphy` it is the prompt part of DiffPhy (2505.21653): the text model reasons from the principles to
the phenomena that must be seen, and the video is made of the prompt that it ends with. Its training is not here.

What is asked for here follows the paper; the words are this project's own (`TEMPLATES`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phantom.errors import StageFailed, UserError
from phantom.generation.chat import Chat, Endpoint, pictures, spoken
from phantom.generation.generate import Generated, generate
from phantom.progress import say

FRAMES, WIDTH = 8, 512  # shown to the captioner; pixels
GRADES = 1, 5
KINDS = ("phyt2v", "diffphy")
SHOWN = "These are {frames} frames of one video, in order and evenly spaced in time. "
TEMPLATES = {
    "analysis": (
        "A text-to-video model is asked for this video: {prompt}\n"
        "Name the main object, the one whose motion matters most, and the physical laws that its motion and shape obey "
        "in this scene, in at most two sentences.\n"
        'Answer with JSON alone: {{"main_object": "...", "physical_law": "..."}}'
    ),
    "reasoning": (
        "A text-to-video model is asked for this video: {prompt}\n"
        "Reason about its physics, step by step: the principles that rule the scene, the role of each object in it, "
        "how the objects interact, and the phenomena that must be seen if all of this holds.\n"
        "Then write the prompt anew, with these phenomena as they are seen, moment by moment, in at most 120 words "
        "that name no law of physics.\n"
        'Answer with JSON alone: {{"principles": ["..."], "roles": ["..."], "interactions": ["..."], "phenomena": '
        '["..."], "prompt": "..."}}'
    ),
    "caption": (
        SHOWN
        + "Describe what {main_object} does in it, moment by moment: how it moves, what it touches, how its shape "
        "changes. Then say which laws of physics that obeys and which it breaks. At most 150 words."
    ),
    "score": (
        SHOWN + "It was asked for as: {prompt}\n"
        "Grade from {low} (not at all) to {high} (fully) how well it shows what was asked for, and how well what "
        'happens in it obeys the laws of physics.\nAnswer with JSON alone: {{"prompt": grade, "physics": grade}}'
    ),
    "mismatch": (
        "A video was asked for as: {prompt}\nIt shows: {caption}\n"
        "Say in at most 80 words where they disagree: what is missing, what is wrong, what cannot happen. If nothing "
        "disagrees, answer with the one word No."
    ),
    "rewriting": (
        "Write the prompt of a text-to-video model anew, so that its next video has none of the last one's faults.\n"
        "To be shown, all of it: {prompt}\nPhysics of the scene: {law}\nThe last video was asked for as: {current}\n"
        "Its faults: {mismatch}\nIts score, from 0 to 1: {score}\n"
        "Describe what is seen, moment by moment, in at most 120 words, and name no law of physics. Answer with the "
        "prompt alone."
    ),
}


@dataclass(frozen=True)
class PromptRefinement:
    """Who is asked, and when it ends.

    template: phyt2v, the loop; diffphy: one video, of a prompt that is reasoned out before, without a captioner.
    rounds: videos after the first one, at most. stop_score: a video that scores as much, of 1, is the last. text_model,
    captioner: names at the endpoint; the captioner sees pictures. Raises UserError.
    """

    endpoint: Endpoint
    text_model: str
    captioner: str
    rounds: int = 3
    stop_score: float = 0.9
    template: str = "phyt2v"

    def __post_init__(self) -> None:
        if self.template not in KINDS:
            raise UserError(f"template: found {self.template!r}; accepted: {', '.join(KINDS)}")
        if not re.match(r"https?://\S+$", self.endpoint.url):
            accepted = "an address such as http://localhost:8000/v1"
            raise UserError(f"{self.endpoint.name}: found {self.endpoint.url!r}; accepted: {accepted}")
        if self.rounds < 1:
            raise UserError(f"refine-rounds: found {self.rounds}; accepted: at least 1")
        if not 0 < self.stop_score <= 1:
            raise UserError(f"stop-score: found {self.stop_score:g}; accepted: above 0, at most 1")


def generate_refined(
    model: str | Path, prompt: str, out: str | Path, refinement: PromptRefinement, **options: Any
) -> Generated:
    """`generate` with its further `options`, once for each round; returns what it says of the last video.

    `out` is always the newest video. Beside it are all of them, in `<name>-rounds`, and `<name>.prompts.json`: every
    prompt and answer, and why the loop ended. Raises UserError as `generate`; StageFailed where a model does not answer
    any more, with what is kept.
    """
    if Path(out).suffix != ".mp4":
        raise UserError(f"out: found {str(out)!r}; accepted: a file name that ends in .mp4")
    return refine_prompt(lambda text, path: generate(model, text, path, **options), prompt, Path(out), refinement)


def refine_prompt(
    make: Callable[[str, Path], Generated], prompt: str, out: Path, refinement: PromptRefinement
) -> Generated:
    """The loop, with any `make`, which writes the video of a prompt to an mp4, always from the same seed."""
    log = _Log(out, prompt, refinement)
    try:
        if refinement.template == "diffphy":
            return replace(log.keep(make, log.reason(prompt)), out=str(out))
        object_, law = log.analyse(prompt)
        made, current = log.keep(make, prompt), prompt
        for round_ in range(1, refinement.rounds + 1):
            rewritten = log.rewrite(prompt, current, object_, law)
            if rewritten is None:
                break
            current = rewritten
            say(f"refine prompt: round {round_} of {refinement.rounds}: {current}")
            made = log.keep(make, current)
        else:
            log.end("all rounds are made")
    except (UserError, StageFailed) as error:
        log.end(str(error))
        if not log.videos:
            raise
        kept = f"{out}, {len(log.videos)} videos in {log.folder}, prompts and answers in {log.path}"
        raise StageFailed(f"{error}; kept: {kept}") from None
    return replace(made, out=str(out))


class _Log:
    """What was asked, answered and made for one prompt: in a file beside the video, after every answer."""

    def __init__(self, out: Path, prompt: str, refinement: PromptRefinement) -> None:
        self.out, self.refinement, self.chat = out, refinement, Chat(refinement.endpoint)
        self.path, self.folder = out.with_name(f"{out.stem}.prompts.json"), out.with_name(f"{out.stem}-rounds")
        self.videos: list[Path] = []
        self.found: dict[str, Any] = {
            "prompt": prompt,
            "template": refinement.template,
            "text_model": refinement.text_model,
            "captioner": refinement.captioner,
            "rounds": refinement.rounds,
            "stop_score": refinement.stop_score,
            "ended": None,
            "videos": [],
            "exchanges": [],
        }

    def analyse(self, prompt: str) -> tuple[str, str]:
        """The main object of a prompt and the laws that rule it; of an answer in no known form all of it."""
        answer = self._ask("analysis", prompt=prompt)
        found = read_json(answer)
        law = as_text(found.get("physical_law")) or ("" if found else spoken(answer))
        return as_text(found.get("main_object")) or "the main object", law or "everyday physics"

    def reason(self, prompt: str) -> str:
        """The prompt that reasoning about `prompt` ends with; `prompt` itself where the answer has none."""
        answer = self._ask("reasoning", prompt=prompt)
        found = read_json(answer)
        # JSON without a prompt, or cut off before it, is none.
        written = read_prompt(answer) if as_text(found.get("prompt")) or "{" not in spoken(answer) else ""
        self.end("the prompt is written once, before the video" if written else "no prompt in the answer")
        if written:
            say(f"refine prompt: {written}")
        return written or prompt

    def keep(self, make: Callable[[str, Path], Generated], prompt: str) -> Generated:
        """Makes a video, in the folder and as `out`. The first one replaces all that an earlier call has left."""
        path, new = self.folder / f"round-{len(self.videos)}.mp4", self.folder.with_name(f".{self.folder.name}.new")
        if self.videos:
            made = make(prompt, path)
        else:
            shutil.rmtree(new, ignore_errors=True)
            made = make(prompt, new / path.name)
            shutil.rmtree(self.folder, ignore_errors=True)
            new.rename(self.folder)
        copy = self.out.with_name(f".{self.out.name}.new")
        shutil.copyfile(path, copy)
        copy.replace(self.out)
        self.videos.append(path)
        about = {"file": f"{self.folder.name}/{path.name}", "prompt": prompt, "seed": made.seed}
        self.found["videos"].append({**about, "evaluations": made.evaluations, "score": None, "mismatch": None})
        self._write()
        return made

    def rewrite(self, prompt: str, current: str, object_: str, law: str) -> str | None:
        """The prompt of the next video; None, with the reason in the file, where the newest is the last."""
        from phantom.data.video import read_frames

        shown, video = list(pictures(read_frames(self.videos[-1])[0], FRAMES, WIDTH)), self.found["videos"][-1]
        caption = spoken(self._ask("caption", shown, frames=len(shown), main_object=object_))
        low, high = GRADES
        graded = self._ask("score", shown, frames=len(shown), prompt=prompt, low=low, high=high)
        score = video["score"] = read_score(graded)
        if score is None:
            say(f"refine prompt: {self.refinement.captioner} names no grades from {low} to {high}; the loop goes on")
        elif score >= self.refinement.stop_score:
            self.end(f"the score is {score:.3g}")
            return None
        mismatch = video["mismatch"] = spoken(self._ask("mismatch", prompt=prompt, caption=caption))
        if re.fullmatch(r"\W*(no|none|no mismatch)\W*", mismatch, re.IGNORECASE):
            self.end("nothing disagrees with the prompt")
            return None
        about = {"prompt": prompt, "law": law, "current": current, "mismatch": mismatch}
        written = read_prompt(self._ask("rewriting", **about, score="unknown" if score is None else f"{score:.2f}"))
        if not written or written == current:
            self.end("the prompt does not change" if written else "no prompt in the answer")
            return None
        return written

    def end(self, reason: str) -> None:
        """Notes why the loop ended."""
        self.found["ended"] = reason
        self._write()

    def _ask(self, step: str, shown: list[str] | None = None, /, **about: Any) -> str:
        model = self.refinement.text_model if shown is None else self.refinement.captioner
        text = TEMPLATES[step].format(**about)
        answer = self.chat.ask(model, text, shown or ())
        exchange = {"step": step, "model": model, "video": len(self.videos) - 1 if self.videos else None}
        said = {"asked": text, "pictures": len(shown or ()), "answer": answer.text}
        tokens = {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
        self.found["exchanges"].append(exchange | said | tokens)
        self._write()
        return answer.text

    def _write(self) -> None:
        if not self.videos and self.folder.exists():
            return  # an earlier call's prompts stay as long as its videos
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text(json.dumps(self.found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.path)


def read_json(answer: str) -> dict[str, Any]:
    """The first JSON object in an answer, whatever is around it; an empty one where there is none."""
    text, decoder = spoken(answer), json.JSONDecoder(strict=False)
    for brace in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, brace.start())
        except ValueError:
            continue
        return dict(found)
    return {}


def as_text(value: Any) -> str:
    """A value of an answer's JSON as one line: models give lists, or nothing, for a text."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    return " ".join(", ".join(str(part) for part in parts).split())


def read_score(answer: str) -> float | None:
    """The mean of both grades, from 0 to 1: those under their names or else the first two numbers. None without."""
    found, (low, high) = read_json(answer), GRADES
    given = [str(found[name]) for name in ("prompt", "physics") if name in found]
    text = " ".join(given) if len(given) == 2 else spoken(answer)
    numbers = [float(number) for number in re.findall(r"(?<![\d./])\d+(?:\.\d+)?(?!\d)", text)]
    grades = [number for number in numbers if low <= number <= high][:2]
    return sum((grade - low) / (high - low) for grade in grades) / 2 if len(grades) == 2 else None


def read_prompt(answer: str) -> str:
    """The prompt in an answer, on one line, without label, quotes and fences."""
    text = as_text(read_json(answer).get("prompt")) or spoken(answer)
    text = re.sub(r"^```\w*|```$", "", text.strip()).strip()
    text = re.sub(r"^\W*(?:(?:new|rewritten|revised|refined|enhanced)\s+)?prompt\W*:\W*", "", text, flags=re.IGNORECASE)
    return " ".join(text.strip(" \n\"'`*“”").split())
