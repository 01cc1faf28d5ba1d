from pathlib import Path

import pytest

from phantom.encoders.weights import BLOCK_BYTES, BLOCKS, fingerprint, weight_fingerprints
from phantom.errors import UserError

COMMIT, OTHER = "a" * 40, "b" * 40


def hold(cache: Path, id_: str, commit: str, *files: str) -> None:
    """Puts `files` of a repository into the hub cache, with its main branch at `commit`."""
    folder = cache / f"models--{id_.replace('/', '--')}"
    for file in files:
        path = folder / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(commit)


def test_hub_ids_are_known_by_the_commit_they_stand_for(make_params, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ids = ("models.base=some/base", "models.physics_encoder=some/encoder")
    models = make_params(*ids).models
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "physics_encoder"))
    assert weight_fingerprints(models, fetch=False) == nothing
    files = ("vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")
    hold(tmp_path, "some/base", COMMIT, *files)
    hold(tmp_path, "some/encoder", OTHER, "config.json")
    assert set(weight_fingerprints(models, fetch=False).items()) == {(p, COMMIT) for p in [*nothing][:3]} | {
        ("physics_encoder", OTHER)
    }
    hold(tmp_path, "some/base", OTHER, *files)
    assert set(weight_fingerprints(models, fetch=False).values()) == {OTHER}
    pinned = make_params(*ids, f"models.base_revision={COMMIT}").models
    assert weight_fingerprints(pinned, fetch=False)["vae"] == COMMIT


def test_what_cannot_be_fetched_is_one_line(make_params):
    with pytest.raises(UserError, match=r"^models\.base: 'absent': [^\n]+$"):
        weight_fingerprints(make_params("models.base=absent").models)


def test_a_fingerprint_sees_names_sizes_and_what_was_trained(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3 * BLOCK_BYTES * BLOCKS))
    found = [fingerprint(tmp_path)]
    for change in (lambda raw: raw[:1] + b"1" + raw[2:], lambda raw: raw[:-1] + b"1", lambda raw: raw + b"0"):
        path.write_bytes(change(path.read_bytes()))
        found.append(fingerprint(tmp_path))
    path.rename(tmp_path / "other.safetensors")
    assert len({*found, fingerprint(tmp_path)}) == 5
    (tmp_path / ".cache").write_text("a note of the hub's")
    assert fingerprint(tmp_path) == fingerprint(tmp_path)
