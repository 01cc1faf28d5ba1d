"""The judges of VideoPhy: numbers of the official code at tiny size, and their files from command to score."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from phantom.cli.judge import Kind
from phantom.cli.judge import judge as judge_command
from phantom.config import Judge as JudgeSettings
from phantom.config import VideoPhy
from phantom.data.video import write_mp4
from phantom.errors import StageFailed, UserError
from phantom.evaluation.videocon.judge import (
    MEAN,
    STD,
    Judge,
    frame_indices,
    judge_videophy,
    judge_videophy2,
    load_model,
    read_pixels,
)
from phantom.evaluation.videocon.model import VideoOwl
from phantom.evaluation.videophy import sa_prompt, score_videophy
from phantom.evaluation.videophy2 import score_videophy2
from tests.evaluation.judges import write_captions

CONFIG = {
    "num_query_tokens": 64,
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 224, "patch_size": 56, "layer_norm_eps": 1e-6},
    },
    "visual_abstractor_config": {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"encoder_hidden_size": 32, "layer_norm_eps": 1e-6},
    },
    "text_config": {
        **{"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    },
}
TEXT = ["Yes", "No", "AI: ", "Human: ", "Does this video follow the physical laws?", "a ball falls", "1 2 3 4 5"]
# Of the official code (VIDEOPHY2/mplug_owl_video) on `weights`, with shims for what transformers 5 has dropped: logits
# of tokens 5, 6, 7, 30 and 100 after two random videos and these prompts, and what it generates greedily.
BEFORE, AFTER = [1, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25]
LOGITS = (
    (0.06892897933721542, -2.0083227157592773, -0.7667291164398193, 0.14081531763076782, 5.358508110046387),
    (0.029506664723157883, -2.1304094791412354, -0.8606262803077698, 0.0942772701382637, 5.347934722900391),
)
GENERATED = [100, 202, 100, 202, 100, 272]


def weights(model):
    """Random weights, a function of each one's name; norms are around 1."""
    found = {}
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        generator = torch.Generator().manual_seed(number)
        is_norm = name.endswith("norm.weight") or ("layernorm" in name and name.endswith("weight"))
        found[name] = 0.3 * torch.randn(tensor.shape, generator=generator) + float(is_norm)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as the published ones: config, weights in two files, a tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: tensor.contiguous() for name, tensor in weights(VideoOwl(CONFIG)).items()}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        **{"sentence_iterator": iter(TEXT * 20), "model_writer": trained, "vocab_size": 120},
        **{"model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},  # as LLaMA's
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    return folder


@pytest.fixture(scope="module")
def judge(checkpoint):
    return Judge(str(checkpoint), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, shade in (("0001-0", 240), ("0002-0", 20)):
        frames = np.full((12, 64, 96, 3), shade, np.uint8)
        frames[:, 10:30, 10:30, 0] = np.linspace(0, 255, 12)[:, None, None]
        write_mp4(folder / f"{name}.mp4", frames, fps=4)
    return folder


@torch.no_grad()
def test_logits_and_answers_are_those_of_the_official_code(judge):
    video = torch.randn(2, 3, 32, 224, 224, generator=torch.Generator().manual_seed(7))
    embedded = judge.model.embed(video, torch.tensor(BEFORE), torch.tensor(AFTER))
    assert embedded.shape == (2, len(BEFORE) + 65 + len(AFTER), 32)
    found = judge.model.next_logits(embedded)[:, [5, 6, 7, 30, 100]]
    torch.testing.assert_close(found, torch.tensor(LOGITS), rtol=0, atol=2e-5)
    said = judge.model.language_model.generate(
        inputs_embeds=embedded, do_sample=False, max_new_tokens=6, pad_token_id=0
    )
    assert said.tolist() == [GENERATED] * 2


def test_frames_are_spread_as_in_the_official_code():
    assert frame_indices(33, 32) == list(range(32))
    assert frame_indices(121, 32)[:4] == [1, 5, 9, 12] and frame_indices(121, 32)[-1] == 117
    assert frame_indices(1, 32) == [0] * 32
    assert max(frame_indices(10, 32)) == 9


def test_pixels_are_normed_as_clip_wants_them(videos):
    pixels = read_pixels(videos / "0001-0.mp4")
    assert pixels.shape == (3, 32, 224, 224) and pixels.dtype == torch.float32
    corner = pixels[:, 0, -1, -1] * torch.tensor(STD) + torch.tensor(MEAN)
    torch.testing.assert_close(255 * corner, torch.full((3,), 240.0), rtol=0, atol=3)


def test_prompts_are_cut_into_pieces_that_are_encoded_alone(judge):
    prompt = sa_prompt("a ball falls")
    before, after = judge._ids(prompt, ("AI: ", "\nHuman: "))
    start, question = prompt.split("<|video|>")
    assert before == [judge.words.bos_id()] + [
        token for piece in (start.removesuffix("\nHuman: "), "\nHuman: ") for token in judge.words.encode(piece)
    ]
    assert after[-len(judge.words.encode("AI: ")) :] == judge.words.encode("AI: ")
    assert after != judge.words.encode(question) and judge._ids(prompt, ())[1] == judge.words.encode(question)


def test_the_probability_is_that_of_yes_over_yes_and_no(judge, videos):
    found = [judge.probability(videos / f"000{i}-0.mp4", sa_prompt("a ball falls")) for i in (1, 2)]
    assert all(0 < value < 1 for value in found) and found[0] != found[1]
    long = judge.probability(videos / "0001-0.mp4", sa_prompt("a ball falls " * 200))  # truncated, as there
    assert 0 < long < 1


def test_the_files_are_those_of_the_official_scripts(judge, videos, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["videopath", "caption"], [videos / "0001-0.mp4", sa_prompt("a ball")]])
    assert judge_videophy(judge, tmp_path / "in.csv", tmp_path / "out.csv") == 1
    ((path, prompt, score),) = csv.reader((tmp_path / "out.csv").open(newline=""))
    assert path.endswith("0001-0.mp4") and prompt == sa_prompt("a ball") and 0 < float(score) < 1
    (tmp_path / "rule.csv").write_text(f"videopath,rule\n{videos / '0001-0.mp4'},a ball falls\n")
    judge_videophy2(judge, tmp_path / "rule.csv", tmp_path / "rated.csv", "rule")
    (row,) = csv.DictReader((tmp_path / "rated.csv").open(newline=""))
    assert row["rule"] == "a ball falls" and int(row["score"]) in range(6) and "answer" in row


@pytest.mark.parametrize("kind", list(Kind))
def test_from_videos_to_scores_in_a_process_of_its_own(kind, checkpoint, videos, tmp_path):
    captions = write_captions(tmp_path / "captions.csv", [{"caption": "a ball falls"}, {"caption": "a dark room"}])
    settings = VideoPhy(captions=None, samples=1, judge=JudgeSettings(command="native", weights=str(checkpoint)))
    score = score_videophy if kind is Kind.VIDEOPHY else score_videophy2
    found = score(videos, captions, settings, work=tmp_path / "work")
    assert found["videos"] == 2 and 0 <= found["score"] <= 100


def test_wrong_input_is_one_line(checkpoint, judge, videos, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of a VideoPhy judge"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint of a VideoPhy judge: without abstractor\."):
        load_model(broken, torch.device("cpu"), torch.float32)
    (broken / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no column caption"):
        (tmp_path / "in.csv").write_text("videopath\nx.mp4\n")
        judge_videophy(judge, tmp_path / "in.csv", tmp_path / "out.csv")
    (tmp_path / "no.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"no\.mp4: cannot be read"):
        read_pixels(tmp_path / "no.mp4")
    captions = write_captions(tmp_path / "captions.csv", [{"caption": "a"}, {"caption": "b"}])
    settings = VideoPhy(captions=None, samples=1, judge=JudgeSettings(command="native", weights=str(tmp_path / "no")))
    with pytest.raises(StageFailed, match="ended with code 2"):
        score_videophy(videos, captions, settings, work=tmp_path / "work")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, "--device: found 'gpu'; accepted: cpu, or a GPU"),
        ({"device": "cuda:99"}, "--device: found 'cuda:99'; accepted: cpu, or a GPU"),
        ({"device": "cpu", "out": "none/out.csv"}, "--output: .*none: no such folder"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, options, said):
    out = tmp_path / options.get("out", "out.csv")
    with pytest.raises(UserError, match=said):
        judge_command(Kind.VIDEOPHY, tmp_path / "in.csv", out, "nothing", device=options["device"])
