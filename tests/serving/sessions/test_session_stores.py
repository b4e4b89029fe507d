"""Stores of sessions: what was saved is loaded, apart for each owner, for the same model only."""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from anymamba.generation.generate import generate
from anymamba.generation.state_store import pack_state
from anymamba.models.checkpoints import open_checkpoint, save_pretrained
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import state_tensors
from anymamba.serving.sessions import (
    DiskSessions,
    ModelIdentity,
    OtherModelError,
    QuotaError,
    RedisSessions,
    StoreError,
    model_identity,
    open_sessions,
)

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NAMES = ("a", "../../etc/passwd", "/", "..", "a b/ü☃", "CON", "x" * 256, "*", "{a}:b")


def test_a_session_goes_on_after_a_restart(open_store, keep, model):
    kept = keep([1, 2, 3])
    open_store().save("me", "chat", kept)
    loaded = open_store().load("me", "chat")
    assert loaded.tokens == kept.tokens
    for a, b in zip(
        state_tensors((loaded.model, loaded.logits)), state_tensors((kept.model, kept.logits)), strict=True
    ):
        assert torch.equal(a, b) and a.dtype == b.dtype
    states = (loaded.generation_state(), kept.generation_state())
    first, second = [generate(model, [[5]], max_new_tokens=8, seed=2, state=state).ids for state in states]
    assert first == second


def test_the_state_at_the_end_of_the_prompt_is_kept_beside_it(open_store, keep):
    open_store().save("me", "chat", dataclasses.replace(keep([1, 2, 3, 4]), earlier=keep([1, 2])))
    loaded = open_store().load("me", "chat")
    assert [kept.tokens for kept in loaded.candidates()] == [(1, 2, 3, 4), (1, 2)]
    for kept in loaded.candidates():
        wanted = keep(kept.tokens)
        pairs = zip(state_tensors((kept.model, kept.logits)), state_tensors((wanted.model, wanted.logits)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert open_store().list("me")[0].n_tokens == 4


def test_owners_do_not_see_each_other(open_store, keep):
    store = open_store()
    for owner in ("", "me", "you", "m", "e"):
        assert store.load(owner, "chat") is None and store.list(owner) == [] and not store.delete(owner, "chat")
        store.save(owner, "chat", keep([len(owner)]))
    assert store.load("me", "chat").tokens == (2,)
    assert store.delete("me", "chat") and store.load("me", "chat") is None
    assert store.load("you", "chat").tokens == (3,) and len(store.list("you")) == 1


def test_names_are_only_names(open_store, keep, tmp_path):
    store = open_store()
    for number, name in enumerate(NAMES):
        store.save(name, name, keep([number]))
    assert [store.load(name, name).tokens for name in NAMES] == [(number,) for number in range(len(NAMES))]
    assert [[info.name for info in store.list(name)] for name in NAMES] == [[name] for name in NAMES]
    for path in tmp_path.rglob("*"):
        assert set(path.stem) <= set("0123456789abcdef") or path.name == "sessions", path


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb", "\0", "\ud800", 3, None])
def test_names_that_are_refused(open_store, keep, name):
    store = open_store()
    for call in (lambda: store.load("", name), lambda: store.save("", name, keep([1])), lambda: store.delete("", name)):
        with pytest.raises(ValueError, match="a session's name must be 1 to 256 printable characters, got"):
            call()


def test_the_list_has_the_last_used_first(open_store, keep):
    store, start = open_store(), time.time()
    for number, name in enumerate("abc"):
        store.save("", name, keep(range(number + 1)))
        time.sleep(0.02)
    store.load("", "a")
    infos = store.list("")
    assert [(info.name, info.n_tokens, info.model) for info in infos] == [
        ("a", 1, "tiny"),
        ("c", 3, "tiny"),
        ("b", 2, "tiny"),
    ]
    a = infos[0]
    assert start - 1 < a.created < a.used < time.time() + 1 and 5_000 < a.n_bytes < 50_000
    time.sleep(0.02)
    store.save("", "a", keep([4]))
    again = store.list("")[0]
    assert again.created == a.created and again.used > a.used, "a session keeps the time when it was made"


def test_states_of_another_model_are_refused_by_name(open_store, keep, model):
    open_store().save("", "chat", keep([1]))
    other = open_store(identity=ModelIdentity("large", "2" * 64))
    message = r"'chat' was made by the model 'tiny' \(weights 1{12}\), and this server runs 'large' \(weights 2{12}\)"
    with pytest.raises(OtherModelError, match=message):
        other.load("", "chat")
    assert other.list("")[0].model == "tiny" and other.delete("", "chat")
    wider = LanguageModel(dataclasses.replace(model.config, d_model=16))
    with pytest.raises(ValueError, match="not one of this model"):
        open_store(wider).save("", "chat", keep([1]))
    assert other.list("") == []


def test_sessions_expire_after_their_last_use(open_store, keep):
    store = open_store(time_to_live=0.6)
    store.save("", "used", keep([1]))
    store.save("", "left", keep([2]))
    for _ in range(5):
        time.sleep(0.2)
        assert store.load("", "used") is not None
    assert store.load("", "left") is None
    assert [info.name for info in store.list("")] == ["used"]
    store.save("", "left", keep([3]))
    assert store.load("", "left").tokens == (3,), "a name can be used again"


def test_the_quota_counts_each_owner_s_other_sessions(open_store, keep):
    open_store().save("me", "a", keep([1]))
    size = open_store().list("me")[0].n_bytes
    store = open_store(quota=2 * size)
    store.require_room("me", "b")
    store.save("me", "b", keep([1]))
    with pytest.raises(QuotaError, match=r"your other sessions use 0.0 MB of the 0.0 MB that one API key may use"):
        store.save("me", "c", keep([1]))
    with pytest.raises(QuotaError):
        store.require_room("me", "c")
    store.save("me", "a", keep([2]))
    store.save("you", "c", keep([1]))
    store.delete("me", "b")
    store.save("me", "c", keep([3]))
    assert {info.name for info in store.list("me")} == {"a", "c"}


def test_of_two_that_save_the_last_is_kept(open_store, keep):
    store, other = open_store(), open_store()
    store.save("", "chat", keep([1]))
    assert store.load("", "chat").tokens == other.load("", "chat").tokens == (1,)
    other.save("", "chat", keep([1, 3]))
    store.save("", "chat", keep([1, 2]))
    assert other.load("", "chat").tokens == (1, 2)


def test_many_threads_at_once(open_store, keep):
    kept, barrier = [keep(range(1, n + 2)) for n in range(8)], threading.Barrier(8)

    def work(n: int) -> None:
        store = open_store()
        barrier.wait()
        for _ in range(10):
            store.save("", "shared", kept[n])
            found = store.load("", "shared")
            assert found is None or found.tokens == tuple(range(1, len(found.tokens) + 1))
            store.save("", f"own {n}", kept[n])
            assert store.load("", f"own {n}").tokens == kept[n].tokens
            store.list("")
            if n == 0:
                store.delete("", "shared")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(open_store().list("")) in (8, 9)


def test_identity_is_that_of_the_weights(model, tmp_path):
    save_pretrained(model, tmp_path / "a")
    save_pretrained(model, tmp_path / "b.gguf")
    names = [model_identity("m", open_checkpoint(tmp_path / name)) for name in ("a", "b.gguf")]
    assert names[0] == names[1] and names[0].name == "m" and len(names[0].digest) == 64
    torch.manual_seed(2)
    save_pretrained(LanguageModel(model.config), tmp_path / "c")
    assert model_identity("m", open_checkpoint(tmp_path / "c")).digest != names[0].digest


def test_a_packed_model_takes_the_session_of_the_plain_one(model, keep, tmp_path):
    DiskSessions(tmp_path, model, ModelIdentity("m", "1")).save("", "chat", keep([1, 2]))
    packed = model.for_inference(weights="int8")
    store = DiskSessions(tmp_path, packed, ModelIdentity("m", "1"))
    loaded = store.load("", "chat")
    store.save("", "chat", loaded)
    assert generate(packed, [[3]], max_new_tokens=3, state=loaded.generation_state()).ids


@pytest.mark.parametrize("kind", ["float64", "bfloat16", pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_session_moves_between_dtypes_and_devices(model, keep, tmp_path, kind):
    other = copy.deepcopy(model).to(kind if kind == "cuda" else getattr(torch, kind))
    stores = [DiskSessions(tmp_path, m, ModelIdentity("m", "1")) for m in (model, other)]
    stores[0].save("", "chat", dataclasses.replace(keep([1, 2]), earlier=keep([1])))
    there = stores[1].load("", "chat")
    for kept in there.candidates():
        for a, b in zip(state_tensors(kept.model), state_tensors(other.init_state(1)), strict=True):
            assert a.dtype == b.dtype and a.device == b.device
    assert generate(other, [[3]], max_new_tokens=3, state=there.generation_state()).ids
    stores[1].save("", "chat", there)
    back = stores[0].load("", "chat")
    for a, b in zip(state_tensors(back.model), state_tensors(keep([1, 2]).model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ the disk


def files(folder: Path) -> list[Path]:
    """The files of the sessions in a folder."""
    return sorted(folder.glob("*/*/*.session"))


def test_files_of_the_first_version_are_read_and_of_later_ones_refused(model, keep, tmp_path):
    store, kept = DiskSessions(tmp_path, model, ModelIdentity("m", "1")), keep([1, 2])
    notes = {"name": "chat", "model": "m", "weights": "1", "n_tokens": "2", "created": "1.5"}
    store.save("", "chat", kept)
    path, extra = files(tmp_path)[0], {"tokens": torch.tensor(kept.tokens, dtype=torch.int32)}
    for version in (1, 3):
        state = kept.generation_state()
        packed = pack_state(state, model, kind="anymamba-session", version=version, extra=extra, notes=notes)
        path.write_bytes(save(*packed))
        if version == 1:
            loaded = store.load("", "chat")
            assert loaded.tokens == (1, 2) and loaded.earlier is None and torch.equal(loaded.logits, kept.logits)
            assert store.list("")[0].created == 1.5
    with pytest.raises(StoreError, match="has format version 3, and this anymamba reads versions up to 2"):
        store.load("", "chat")


def test_damaged_files_are_refused_and_can_be_deleted(model, keep, tmp_path):
    store = DiskSessions(tmp_path, model, ModelIdentity("m", "1"))
    store.save("", "chat", dataclasses.replace(keep([1, 2]), earlier=keep([1])))
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for data in (b"", whole[:5], whole[:200], whole[:-1], bytes(flipped), b"\xff" * 100, whole[:9] + b"x" + whole[10:]):
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"the session 'chat' (is damaged|cannot be read).*; delete it"):
            store.load("", "chat")
        store.list("")
    assert store.delete("", "chat") and store.load("", "chat") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the file of a descriptor in /proc")
def test_a_session_is_flushed_before_save_returns(model, keep, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    DiskSessions(tmp_path, model, ModelIdentity("m", "1")).save("", "chat", keep([1]))
    path = files(tmp_path)[0]
    assert [p.name for p in flushed if p.suffix == ".session"] == [path.name]
    assert {path.parent, path.parent.parent, tmp_path} <= set(flushed), "the names of new folders are flushed, too"
    assert flushed[-1] == path.parent, "the file's new name is flushed last"


def test_a_full_disk_leaves_the_old_session(model, keep, tmp_path, monkeypatch):
    store = DiskSessions(tmp_path, model, ModelIdentity("m", "1"))
    store.save("", "chat", keep([1]))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StoreError, match="No space left on device; see to that folder"):
            store.save("", "chat", keep([1, 2]))
    assert store.load("", "chat").tokens == (1,)
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be read or written"):
        DiskSessions(tmp_path / "file", model, ModelIdentity("m", "1"))


def test_expired_files_are_deleted(model, keep, tmp_path):
    identity = ModelIdentity("m", "1")
    DiskSessions(tmp_path, model, identity).save("", "chat", keep([1]))
    DiskSessions(tmp_path, model, identity, time_to_live=60)
    assert len(files(tmp_path)) == 1
    DiskSessions(tmp_path, model, identity, time_to_live=0)
    assert files(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- the server


def test_the_place_chooses_the_store(model, tmp_path, redis_url):
    identity = ModelIdentity("m", "1")
    assert isinstance(open_sessions(str(tmp_path), model, identity), DiskSessions)
    assert isinstance(open_sessions(redis_url, model, identity), RedisSessions)


def test_a_server_that_is_gone_is_an_error_of_the_store(model):
    pytest.importorskip("redis", reason="needs the package redis (pip install redis)")
    with pytest.raises(
        StoreError, match=r"sessions in Redis cannot be read or written: .*see whether that server runs"
    ):
        RedisSessions("redis://127.0.0.1:9/0", model, ModelIdentity("m", "1"))


def test_expired_names_leave_the_owner_s_set(model, keep, redis_url):
    store = RedisSessions(redis_url, model, ModelIdentity("m", "1"), time_to_live=0.05, prefix="expiry")
    store.save("", "chat", keep([1]))
    time.sleep(0.1)
    assert store._server.keys("expiry:*") == [store._index("").encode()]
    assert store.list("") == [] and store._server.keys("expiry:*") == []
