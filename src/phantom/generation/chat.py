"""Asks language and vision-language models behind an OpenAI-compatible endpoint: vLLM, Ollama, a paid service."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from phantom.errors import StageFailed, UserError

MAX_TOKENS = 2048  # of an answer: models that think aloud need room
RETRIES = 5  # by the client, with growing waits, where the endpoint is busy or fails
HIDDEN = "***"


@dataclass(frozen=True)
class Endpoint:
    """Where models are asked. key: the environment variable that holds the key, where one is wanted.

    name: what errors begin with, the setting or option that names the address.
    """

    url: str
    name: str
    key: str = "OPENAI_API_KEY"
    timeout_seconds: int = 120  # of one answer


class Answer(NamedTuple):
    """What the model said, and the tokens that it read and wrote."""

    text: str
    tokens_in: int
    tokens_out: int


class Chat:
    """A client of one endpoint. kept: what an error says where the endpoint cannot be reached.

    Raises UserError if the package openai is missing.
    """

    def __init__(self, endpoint: Endpoint, kept: str = "") -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError(
                f"{endpoint.name}: the package openai is not installed; pip install '.[judges]' adds it"
            ) from None
        self.endpoint, self.kept, key = endpoint, kept and f"; {kept}", os.environ.get(endpoint.key)
        self._key = key
        self._client = openai.OpenAI(
            base_url=endpoint.url,
            api_key=key or "none",  # servers of one's own want none
            max_retries=RETRIES,
            timeout=float(endpoint.timeout_seconds),
        )

    def ask(self, model: str, text: str, pictures: Sequence[str] = ()) -> Answer:
        """The answer of `model` to a text and `pictures` (data URIs), at temperature 0, in which the key is hidden.

        Raises UserError if the endpoint does not know us, the model or the address; StageFailed if it fails or cannot
        be reached after `RETRIES` more tries.
        """
        import openai
        from openai.types.chat import ChatCompletion

        name, url = self.endpoint.name, self.endpoint.url
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        content += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        try:
            reply = self._client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:  # its text may hold part of the key
            raise UserError(
                f"{name}: {url} refuses us ({error.status_code}); it wants a key in the environment variable "
                f"{self.endpoint.key}"
            ) from None
        except openai.APIStatusError as error:
            kind = UserError if error.status_code in (400, 404, 413, 422) else StageFailed
            raise kind(f"{name}: {url} answers {error.status_code}: {self._said(error)}") from None
        except openai.APIConnectionError as error:
            raise StageFailed(f"{name}: {url} cannot be reached ({self._said(error)}){self.kept}") from None
        except ValueError:
            raise StageFailed(f"{name}: {url} answers with damaged JSON{self.kept}") from None
        if not isinstance(reply, ChatCompletion):  # the client hands on whatever it is
            raise UserError(f"{name}: {url} answers with a page; accepted: an address such as .../v1")
        message = reply.choices[0].message if reply.choices else None
        said, used = message.content if message else None, reply.usage
        tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        return Answer(self._without_key(said) if isinstance(said, str) else "", *tokens)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, HIDDEN) if self._key else text

    def _said(self, error: Exception) -> str:
        return self._without_key(str(error).strip() or type(error).__name__).splitlines()[0][:200]


def spoken(answer: str) -> str:
    """What a model answers, without what it thinks aloud before."""
    return answer.rpartition("</think>")[2].partition("<think>")[0].strip()


def pictures(frames: np.ndarray, count: int, width: int) -> Iterator[str]:
    """`count` evenly spaced frames of uint8 RGB (F, H, W, 3), at most `width` pixels wide, as data URIs of JPEGs."""
    import cv2

    for index in np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int):
        frame = frames[index]
        if frame.shape[1] > width:
            size = width, round(frame.shape[0] * width / frame.shape[1])
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        yield f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
