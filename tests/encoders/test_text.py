import pytest
import torch
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from phantom.encoders import TextEncoder
from phantom.encoders.text import pad
from tests import tiny

CAPTIONS = ["A red ball falls.", "", "  Ein &amp; Würfel\n rutscht – „schnell“.  ", "A ball. " * 20]


@pytest.fixture(scope="module")
def parts():
    """The text encoder and tokenizer, and a diffusers pipeline of the same parts."""
    model, tokenizer = tiny.tiny_text_encoder(), tiny.tiny_tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model,
        vae=tiny.tiny_vae(),
        scheduler=tiny.tiny_scheduler(),
        transformer=tiny.tiny_wan(),
    )
    return model, tokenizer, pipeline


@torch.no_grad()
def theirs(pipeline, captions, tokens):
    return pipeline.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=tokens)[0]


@pytest.mark.parametrize("tokens", [24, 96, 512])
def test_padded_embeddings_are_those_of_the_pipeline(parts, tokens):
    model, tokenizer, pipeline = parts
    found = TextEncoder(tokenizer, model, tokens).encode(CAPTIONS)
    assert torch.allclose(pad(found, tokens), theirs(pipeline, CAPTIONS, tokens), atol=1e-6)
    assert len(found[1]) == 1 and len(found[3]) == min(tokens, 160)  # bytes of the cleaned caption, plus the end token
    assert all(embedding.shape[1] == tiny.TEXT_CHANNELS for embedding in found)


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_caption_is_embedded_as_the_pipeline_does_it(parts, caption):
    model, tokenizer, pipeline = parts
    found = TextEncoder(tokenizer, model, 32).encode([caption])
    assert torch.allclose(pad(found, 32), theirs(pipeline, [caption], 32), atol=1e-6)


def test_an_embedding_does_not_depend_on_its_batch(parts):
    model, tokenizer, _ = parts
    encoder = TextEncoder(tokenizer, model, 96)
    together = encoder.encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, together, strict=True):
        assert torch.allclose(encoder.encode([caption])[0], embedding, atol=1e-5)


def test_padding_is_zero_and_cuts_what_is_too_long():
    padded = pad([torch.ones(2, 3), torch.ones(5, 3)], 4)
    assert padded.shape == (2, 4, 3)
    assert padded.sum(-1).tolist() == [[3, 3, 0, 0], [3, 3, 3, 3]]
