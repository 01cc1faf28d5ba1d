"""Runs the judges on the inputs of `videophy` and `videophy2`, and writes what their own scripts write.

Frames, prompts, tokens and answers are as in the scripts of the benchmarks. Decoding differs from theirs in the last
bits (PyAV in place of decord, both with FFmpeg's bicubic scaling), and the convolution over time runs where the model
is, in place of the CPU.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from phantom.errors import UserError
from phantom.evaluation.videocon.model import VideoOwl
from phantom.evaluation.videophy2 import answered
from phantom.progress import track

FRAMES, SIZE = 32, 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images
VIDEO = "<|video|>"
MAX_TOKENS = 257  # of VideoPhy's prompts, with those of the video
VIDEO_TOKENS = 65
ANSWER_TOKENS = 16  # of VideoPhy-2: a digit, and what ends it
EOS = 2
PREAMBLE = (
    "The following is a conversation between a curious human and an AI assistant. The assistant gives helpful, "
    f"detailed, and polite answers to the user's questions.\nHuman: {VIDEO}\nHuman: "
)
QUESTIONS = {  # of VideoPhy-2
    "sa": 'Does this video match the description: "{caption}"? Please rate the video on a scale from 1 to 5, where 5 '
    "indicates a perfect match and 1 indicates no relevance.",
    "pc": "Does this video adhere to the physical laws? Rate the video on a scale from 1 to 5, where 5 means full "
    "compliance and 1 means significant violations.",
    "rule": 'Does the video follow the physical rule: "{rule}"?\nChoose 0 if not, 1 if valid, or 2 if indeterminate. ',
}


class Judge:
    """A checkpoint of one of the judges on `device`."""

    def __init__(self, weights: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        folder = _folder(weights)
        self.device, self.dtype = device, dtype
        self.model = load_model(folder, device, dtype)
        tokenizer = folder / "tokenizer.model"
        if not tokenizer.is_file():
            raise UserError(f"{folder}: no tokenizer.model in it")
        # The library itself: transformers' tokenizer of the time did the same, piece by piece.
        self.words = SentencePieceProcessor(model_file=str(tokenizer))

    @torch.no_grad()
    def probability(self, video: Path, prompt: str) -> float:
        """P(Yes) / (P(Yes) + P(No)) of the first token of the answer: VideoPhy's score."""
        before, after = self._ids(prompt, ("AI: ", "\nHuman: "))
        after = after[: MAX_TOKENS - VIDEO_TOKENS - len(before)]
        logits = self.model.next_logits(self._embed(video, before, after))[0]
        yes, no = (self.words.encode(word)[0] for word in ("Yes", "No"))
        chances = logits.softmax(-1)
        return float(chances[yes] / (chances[yes] + chances[no]))

    @torch.no_grad()
    def answer(self, video: Path, prompt: str) -> str:
        """What the judge says, greedily: VideoPhy-2's answer."""
        before, after = self._ids(prompt, ())
        embedded = self._embed(video, before, after)
        found = self.model.language_model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=self.device),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0].tolist()
        return self.words.decode([token for token in found if EOS < token < len(self.words)]).strip().lower()

    def _embed(self, video: Path, before: list[int], after: list[int]) -> torch.Tensor:
        pixels = read_pixels(video).to(self.device, self.dtype)
        ids = (torch.tensor(part, device=self.device) for part in (before, after))
        return self.model.embed(pixels[None], *ids)

    def _ids(self, prompt: str, cuts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Token ids before and after the video. The text is cut at `cuts`, whose pieces are encoded on their own."""
        before, _, after = prompt.partition(VIDEO)
        return [self.words.bos_id(), *self._encode(before, cuts)], self._encode(after, cuts)

    def _encode(self, text: str, cuts: Sequence[str]) -> list[int]:
        pieces = re.split(f"({'|'.join(map(re.escape, cuts))})", text) if cuts else [text]
        return [token for piece in pieces if piece for token in self.words.encode(piece)]


def judge_videophy(judge: Judge, source: Path, out: Path) -> int:
    """Scores rows `videopath,caption`, the latter whole prompts, as `videopath,caption,score` without a header."""
    rows = _read(source, ("videopath", "caption"))
    with out.open("w", encoding="utf-8", newline="") as file, track("judge", len(rows), "videos") as bar:
        writer = csv.writer(file)
        for row in rows:
            writer.writerow(
                [row["videopath"], row["caption"], judge.probability(Path(row["videopath"]), row["caption"])]
            )
            bar.advance()
    return len(rows)


def judge_videophy2(judge: Judge, source: Path, out: Path, task: str) -> int:
    """Rates rows of `videopath` with `caption` (sa) or `rule`: the same rows, with `score` and the `answer` itself."""
    rows = _read(source, ("videopath", *{"sa": ["caption"], "rule": ["rule"]}.get(task, [])))
    with out.open("w", encoding="utf-8", newline="") as file, track("judge", len(rows), "answers") as bar:
        writer = csv.DictWriter(file, [*rows[0], "score", "answer"])
        writer.writeheader()
        for row in rows:
            prompt = PREAMBLE + QUESTIONS[task].format(**row) + "\nAI: "
            said = judge.answer(Path(row["videopath"]), prompt)
            writer.writerow({**row, "score": answered(said), "answer": said})
            bar.advance()
    return len(rows)


def read_pixels(path: Path) -> torch.Tensor:
    """`FRAMES` frames, spread over the video, as the judges see them: float32 (3, T, 224, 224). Raises UserError."""
    try:
        with av.open(str(path)) as container:
            frames = [
                frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()
                for frame in container.decode(container.streams.video[0])
            ]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not frames:
        raise UserError(f"{path}: no frame in it")
    shown = np.stack([frames[i] for i in frame_indices(len(frames), FRAMES)]).astype(np.float32) / 255
    shown = (shown - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(shown).permute(3, 0, 1, 2)


def frame_indices(count: int, shown: int) -> list[int]:
    """Which of `count` frames are shown: int(s / 2) + round(s i) with s = (count - 1) / `shown`."""
    step = (count - 1) / shown
    return [int(step / 2) + int(np.round(step * i)) for i in range(shown)]


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> VideoOwl:
    """The model of a checkpoint folder: config.json, and safetensors or weights of torch, loaded without code.

    Raises UserError where weights are missing or strange.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with init_empty_weights(include_buffers=False):
            model = VideoOwl(config).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no checkpoint of a VideoPhy judge ({type(error).__name__}: {error})") from None
    wanted, strange = set(model.state_dict()), set[str]()
    for tensors in _shards(folder):
        tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items() if "rotary_emb" not in name}
        found = model.load_state_dict(tensors, strict=False, assign=True)
        strange.update(found.unexpected_keys)
        wanted -= tensors.keys()
    if wanted or strange:
        which = f"without {min(wanted)}" if wanted else f"with {min(strange)}"
        raise UserError(f"{folder}: no checkpoint of a VideoPhy judge: {which}")
    return model.to(device)


def _folder(weights: str) -> Path:
    """The folder of a checkpoint: itself, or what the hub has under that id. Raises UserError."""
    if Path(weights).is_dir():
        return Path(weights)
    files = ["config.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(weights, allow_patterns=files))
    except (OSError, ValueError, HfHubHTTPError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--weights: {weights!r} is no folder, and the hub does not give it to us: {said}") from None


def _shards(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        yield load_file(path)
    if safe:
        return
    for path in sorted(folder.glob("pytorch_model*.bin")):
        yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; accepted: a csv with columns {', '.join(columns)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
        rows = [{key: value or "" for key, value in row.items() if key} for row in reader]
    if not rows:
        raise UserError(f"{path}: no video in it")
    return rows
