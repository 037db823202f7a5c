"""The hub is a folder here: huggingface_hub's uploads and downloads, where they would go over the
network, are replaced."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface
from torch import Tensor

from sae_lens_dfc import Crosscoder
from sae_lens_dfc.hub import from_pretrained, push_to_hub
from tests.helpers import make_acts, make_firing_dfc

METRICS = {"explained_variance/a": 0.75, "null/self/explained_variance/a": 0.5}
WEIGHTS = {"cfg.json", "sae_weights.safetensors"}


def not_there(error: type[Exception]) -> Exception:
    """Without the response that it would quote."""
    return error.__new__(error)


class FolderHub:
    """A hub of one branch in a folder, by repository; it remembers whether one was made private."""

    def __init__(self, root: Path):
        self.root = root
        self.private: dict[str, bool | None] = {}

    def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> str:
        assert exist_ok or repo_id not in self.private
        self.private.setdefault(repo_id, private)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id: str) -> str:
        if repo_id not in self.private:
            raise not_there(RepositoryNotFoundError)
        return repo_id

    def upload_folder(
        self,
        repo_id: str,
        folder_path: str | Path,
        path_in_repo: str = "",
        allow_patterns: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        files = [p.relative_to(folder_path) for p in Path(folder_path).rglob("*") if p.is_file()]
        patterns = None if allow_patterns is None else list(allow_patterns)
        for file in filter_repo_objects([str(f) for f in files], allow_patterns=patterns):
            target = self.root / repo_id / path_in_repo / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / file, target)

    def files(self, repo_id: str) -> set[str]:
        folder = self.root / repo_id
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        path = self.root / repo_id / filename
        if not path.is_file():
            raise not_there(RemoteEntryNotFoundError)
        return str(path)

    def snapshot(
        self, repo_id: str, revision: str | None, allow_patterns: list[str], **_: Any
    ) -> str:
        self.revision = revision
        target = self.root / "cache" / repo_id
        for file in filter_repo_objects(self.files(repo_id), allow_patterns=allow_patterns):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / repo_id / file, target / file)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    hub = FolderHub(tmp_path / "hub")
    for name in ("create_repo", "repo_info", "upload_folder"):
        fake = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda _, *a, fake=fake, **k: fake(*a, **k))
    uploader = "sae_lens.training.upload_saes_to_huggingface"
    monkeypatch.setattr(f"{uploader}.create_repo", hub.create_repo)
    loader = "sae_lens.loading.pretrained_sae_loaders"
    monkeypatch.setattr(f"{loader}.hf_hub_download", hub.download)
    monkeypatch.setattr("sae_lens_dfc.hub.snapshot_download", hub.snapshot)
    return hub


def made() -> Crosscoder:
    crosscoder = make_firing_dfc()
    crosscoder.cfg.metadata.model_a = {"model_name": "org/a", "hook_name": "blocks.1.hook_out"}
    return crosscoder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    made().save_model(folder)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "latents.csv").write_text("latent\n0\n")
    (folder / "runner_cfg.json").write_text("{}")
    (folder / "report.html").write_text("text of others")
    return folder


def same_weights(one: SAE[Any], other: SAE[Any]) -> bool:
    weights: dict[str, Tensor] = other.state_dict()
    return all(torch.equal(w, weights[name]) for name, w in one.state_dict().items())


def test_a_crosscoder_and_its_saes_go_up_and_come_back_to_the_bit(hub: FolderHub) -> None:
    crosscoder = made()
    sae = crosscoder.export_sae("a", rows=[make_acts(30, 12)])
    address = push_to_hub(crosscoder, "me/pair", {"sae_a": sae}, METRICS, private=True)
    assert address == "https://hub/me/pair" and hub.private == {"me/pair": True}
    folders = {f"{folder}/{name}" for folder in ("crosscoder", "sae_a") for name in WEIGHTS}
    assert hub.files("me/pair") == {*folders, "README.md", "crosscoder/metrics.json"}
    again = from_pretrained("me/pair", revision="v1")
    assert type(again) is Crosscoder and same_weights(crosscoder, again)
    assert again.cfg.to_dict() == crosscoder.cfg.to_dict() and hub.revision == "v1"


def test_an_unmodified_saelens_opens_what_was_pushed(hub: FolderHub) -> None:
    crosscoder = made()
    sae = crosscoder.export_sae("a", rows=[make_acts(30, 12)])
    push_to_hub(crosscoder, "me/pair", {"sae_a": sae})
    opened = SAE.from_pretrained("me/pair", "crosscoder")
    assert isinstance(opened, Crosscoder) and same_weights(crosscoder, opened)
    of_a = SAE.from_pretrained("me/pair", "sae_a")
    assert type(of_a) is JumpReLUSAE and same_weights(sae, of_a)
    assert of_a.cfg.metadata.to_dict() == sae.cfg.metadata.to_dict()
    assert hub.files("me/pair") >= {"crosscoder/cfg.json"}


def test_what_an_unmodified_saelens_pushed_is_opened(hub: FolderHub, run: Path) -> None:
    crosscoder = made()
    upload_saes_to_huggingface(
        {"crosscoder": crosscoder}, "me/plain", show_progress=False, add_default_readme=False
    )
    assert same_weights(from_pretrained("me/plain"), crosscoder)
    upload_saes_to_huggingface(
        {"crosscoder": run}, "me/run", show_progress=False, add_default_readme=False
    )
    # A run's measures are not among what SAELens uploads.
    assert hub.files("me/run") == {f"crosscoder/{n}" for n in (*WEIGHTS, "runner_cfg.json")}


def test_a_run_comes_back_as_a_run_without_the_text_it_quotes(hub: FolderHub, run: Path) -> None:
    push_to_hub(run, "me/run")
    names = {*WEIGHTS, "runner_cfg.json", "metrics.json", "latents.csv"}
    assert hub.files("me/run") == {"README.md", *(f"crosscoder/{n}" for n in names)}
    from_pretrained("me/run")
    cached = hub.root / "cache" / "me" / "run"
    assert json.loads((cached / "crosscoder" / "metrics.json").read_text()) == METRICS
    assert not (cached / "README.md").exists()
    card = (hub.root / "me" / "run" / "README.md").read_text()
    assert "| Explained variance, A | 0.750 | 0.500 |" in card and "org/a" in card


def test_pushed_again_it_takes_the_place_of_card_and_measures(hub: FolderHub) -> None:
    for value in (0.25, 0.75):
        push_to_hub(made(), "me/pair", metrics={"explained_variance/a": value})
    card = (hub.root / "me" / "pair" / "README.md").read_text()
    assert "0.750" in card and "0.250" not in card


def test_nothing_goes_up_when_something_is_wrong(hub: FolderHub, run: Path, tmp_path: Path) -> None:
    sae = made().export_sae("a")
    for saes in ({"../sae": sae}, {"crosscoder": sae}, {"a/b": sae}, {"": sae}):
        with pytest.raises(ValueError, match="cannot be an SAE's folder"):
            push_to_hub(made(), "me/pair", saes)
    for name in ("me/pair/more", "", "me/pair..more", "me pair", "x" * 97):
        for use in (lambda name: push_to_hub(made(), name), from_pretrained):
            with pytest.raises(
                ValueError, match=r"is not a valid Hub repository name\. Give account"
            ):
                use(name)
    with pytest.raises(ValueError, match="is not a crosscoder"):
        push_to_hub(tmp_path, "me/pair")
    (run / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match="metrics.json must hold a JSON object"):
        push_to_hub(run, "me/pair")
    assert hub.private == {} and not hub.root.exists()


@pytest.mark.usefixtures("hub")
def test_a_repository_without_a_crosscoder_is_refused() -> None:
    upload_saes_to_huggingface(
        {"sae_a": made().export_sae("a")}, "me/sae", show_progress=False, add_default_readme=False
    )
    with pytest.raises(ValueError, match="me/sae has no crosscoder/cfg.json"):
        from_pretrained("me/sae")


class Response:
    """What the hub's errors keep of its answer."""

    headers: Mapping[str, str] = {}
    request = None

    def __init__(self, status_code: int):
        self.status_code = status_code


def answered(kind: type[HfHubHTTPError], status_code: int, message: str = "") -> Exception:
    said = f"{status_code} Client Error. (Request ID: Root=1-2)\n\n{message}"
    response: Any = Response(status_code)
    return kind(said, response=response)


LOG_IN = "log in with `hf auth login`"
NO_WAY = "The hub cannot be reached for me/pair, and the cache does not hold it: "
REFUSALS: dict[str, Exception] = {
    f"is not on the hub, or hidden from this account. Check its name (account/name), or {LOG_IN}.": answered(
        RepositoryNotFoundError, 401
    ),
    f"is gated. Ask for access at https://huggingface.co/me/pair, and {LOG_IN}.": answered(
        GatedRepoError, 403
    ),
    "Repository me/pair has no revision 'v1'. Name an existing branch, tag or": answered(
        RevisionNotFoundError, 404
    ),
    f"The hub rejected the login for me/pair: {LOG_IN}, with": answered(HfHubHTTPError, 401),
    f"The hub denies this account that access to me/pair: {LOG_IN}, with": answered(
        HfHubHTTPError, 403
    ),
    "The hub refuses me/pair: 400 Client Error. (Request ID: Root=1-2). No such license. Fix": answered(
        BadRequestError, 400, "No such license"
    ),
    "The hub refuses me/pair: 503 Client Error. (Request ID: Root=1-2).": answered(
        HfHubHTTPError, 503
    ),
    f"No account is logged in to access me/pair on the hub: {LOG_IN}.": LocalTokenNotFoundError(
        "none"
    ),
    f"{NO_WAY}Cannot reach it. Check the connection": OfflineModeIsEnabled("Cannot reach it"),
    f"{NO_WAY}[no name]. Check the connection, and": HTTPError("[no name]"),
    f"{NO_WAY}No folder. Check the connection, and": LocalEntryNotFoundError("No folder"),
    "Could not exchange me/pair with the hub: No space left on device: 'x'.": OSError(
        28, "No space left on device", "x"
    ),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    said: str, hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise REFUSALS[said]

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr("sae_lens_dfc.hub.snapshot_download", refuse)
    for use in (
        lambda: push_to_hub(made(), "me/pair", revision="v1"),
        lambda: from_pretrained("me/pair", "v1"),
    ):
        with pytest.raises(OSError, match=re.escape(said)) as caught:
            use()
        line = str(caught.value)
        assert "\n" not in line and line.endswith(".") and caught.value.__cause__ is REFUSALS[said]
    assert not hub.root.exists()


def test_a_mistake_in_the_way_to_the_hub_is_not_taken_for_its_refusal(
    hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        push_to_hub(made(), "me/pair")
    assert set(hub.private) == {"me/pair"}
