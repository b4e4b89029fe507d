"""Names of models: what is a path and what is looked up on the hub, and what is said if neither has it."""

from __future__ import annotations

import pytest

from anymamba.models.checkpoints import find_tokenizer, local_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder to work in, and a hub that answers with the error that a test sets."""
    import huggingface_hub

    asked = []

    def answer(repository, *rest, **options):
        asked.append(repository)
        raise answer.error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    answer.asked, answer.error = asked, OSError("the hub was asked")
    return answer


def missing(name) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        local_path(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["runs/nope", "runs/nope/", "runs/deep/nope", "./runs/nope", "../nope/nope", "/no/where"]
)
def test_a_mistyped_path_is_not_looked_up(hub, tmp_path, name):
    (tmp_path / "runs" / "nape").mkdir(parents=True)
    message = missing(name)
    assert not hub.asked and message.startswith("no model folder ")
    assert ("did you mean runs/nape?" in message) == (name in ("runs/nope", "runs/nope/", "./runs/nope"))
    with pytest.raises(FileNotFoundError, match="no tokenizer at "):
        find_tokenizer(given=name)
    assert not hub.asked


def test_a_name_with_hf_is_looked_up_also_beside_a_folder(hub, tmp_path):
    (tmp_path / "owner").mkdir()
    assert missing("owner/model").endswith(
        "give one with config.json and model.safetensors (a model of the hub: hf://owner/model)"
    )
    assert not hub.asked
    assert missing("hf://owner/model") == "no model on the hub: the hub was asked"
    missing("hf://owner/model/x.gguf")
    assert hub.asked == ["owner/model"] * 2


@pytest.mark.parametrize("name", ["x.gguf", "runs/x.gguf", "runs/deep/x.gguf", "x.safetensors", "runs/config.json"])
def test_a_missing_file_is_called_a_file(hub, tmp_path, name):
    for _ in range(2):  # without a folder runs, and with it
        if "deep" not in name or (tmp_path / "runs").exists():
            assert missing(name).startswith(f"no file {name}; give a .gguf file, or a folder")
            assert not hub.asked
        (tmp_path / "runs").mkdir(exist_ok=True)


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert local_path("~/m") == tmp_path / "m"


@pytest.mark.parametrize(
    ("kind", "offline", "way_out"),
    [
        ("RepositoryNotFoundError", False, "it has no model a/b, or a private one; check the name, or log in with"),
        ("GatedRepoError", False, "a/b asks for consent; accept its terms on https://huggingface.co/a/b and log in"),
        ("RevisionNotFoundError", False, "a/b has no revision None; https://huggingface.co/a/b/tree/main has a list"),
        ("RemoteEntryNotFoundError", False, "a/b has no file None; https://huggingface.co/a/b/tree/main has a list"),
        (
            "LocalEntryNotFoundError",
            True,
            "a/b is not in the cache, and HF_HUB_OFFLINE=1 turns downloads off; unset it",
        ),
        ("LocalEntryNotFoundError", False, "the hub cannot be reached (First. Second. Third.); check the connection"),
        ("HFValidationError", False, "First. Second. Third."),
        ("HfHubHTTPError", False, "First. Second. Third."),
    ],
)
def test_errors_of_the_hub_are_whole_and_say_the_way_out(hub, monkeypatch, kind, offline, way_out):
    from types import SimpleNamespace

    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    error = getattr(errors, kind)
    response = (
        {"response": SimpleNamespace(headers={}, request=None)} if issubclass(error, errors.HfHubHTTPError) else {}
    )
    hub.error = error("First. Second.\n\nThird.", **response)
    message = missing("a/b")
    assert message.startswith("no model a/b here, and none on the hub: ") and way_out in message
