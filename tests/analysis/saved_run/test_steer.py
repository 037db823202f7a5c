"""`sae-lens-dfc steer` on two tiny models."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc import ModelPair, load_crosscoder
from sae_lens_dfc.analysis.steering.hooks import changed, logits
from sae_lens_dfc.analysis.steering.prompts import prompt_ids, span_mask
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from tests.helpers import train_tiny

PROMPT = "The cat sat on the mat"
N_NEW = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("steer")
    return train_tiny(folder, llama_folder, gpt2_folder, "--eval-pairs", "600", "--sae.k", "8")


@pytest.fixture(scope="module")
def crosscoder(run: Path) -> Crosscoder:
    return load_crosscoder(run)


@pytest.fixture(scope="module")
def held_out(run: Path, pair: ModelPair) -> Tensor:
    """Both models' activations at the run's held-out pairs."""
    cfg = CrosscoderRunnerConfig.from_dict(json.loads((run / "runner_cfg.json").read_text()))
    rows = PairedText(cfg, pair).collect("held_out", "test").rows
    return torch.cat([r.acts for r in rows])


@pytest.fixture(scope="module")
def maxima(crosscoder: Crosscoder, held_out: Tensor) -> Tensor:
    return crosscoder.encode(held_out).max(dim=0).values.detach()


@pytest.fixture(scope="module")
def latents(crosscoder: Crosscoder, maxima: Tensor) -> dict[str, int]:
    """Of each partition the latent that fires most strongly."""
    return {
        name: where.start + int(maxima[where].argmax())
        for name, where in crosscoder.partition.slices.items()
    }


Steer = Callable[..., dict[str, Any]]


@pytest.fixture
def steer(run: Path, capsys: pytest.CaptureFixture[str]) -> Steer:
    def steer(*args: str) -> dict[str, Any]:
        capsys.readouterr()
        base = ["steer", str(run), "--prompt", PROMPT, "--max-new-tokens", str(N_NEW), "--json"]
        assert main([*base, *args]) == 0
        return json.loads(capsys.readouterr().out)

    return steer


@pytest.fixture
def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refused(*args: str) -> str:
        capsys.readouterr()
        assert main(["steer", str(run), "--prompt", PROMPT, *args]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return refused


def read_whole(pair: ModelPair, name: str, change: Callable[[Tensor], Tensor]) -> str:
    """The likeliest answer, by whole passes; `change` gets the activations of the whole text."""
    model = getattr(pair, name)
    prompt = prompt_ids(model, PROMPT)
    ids = list(prompt)
    with changed(model, change):
        for _ in range(N_NEW):
            row = torch.tensor([ids])
            ids.append(int(logits(model, row, torch.ones_like(row))[0, -1].argmax()))
    return model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_both_answers_are_the_models_own(
    steer: Steer,
    pair: ModelPair,
    crosscoder: Crosscoder,
    maxima: Tensor,
    latents: dict[str, int],
) -> None:
    latent = latents["a_exclusive"]
    found = steer("--model", "a", "--latent", str(latent), "--strength", "-2")
    step = -2 * maxima[latent] * crosscoder.W_dec[latent, :16].detach()
    assert found["untouched"] == read_whole(pair, "a", lambda x: x)
    assert found["steered"] == read_whole(pair, "a", lambda x: x + step)
    assert found["untouched"] != found["steered"]
    [entry] = found["latents"]
    assert entry["partition"] == "a_exclusive" and entry["strength"] == -2
    assert entry["max_activation"] == pytest.approx(maxima[latent].item(), rel=1e-5)


@pytest.mark.slow
def test_several_latents_in_model_b_at_the_tokens_of_a_span(
    steer: Steer,
    pair: ModelPair,
    crosscoder: Crosscoder,
    maxima: Tensor,
    latents: dict[str, int],
) -> None:
    chosen = [latents["b_exclusive"], latents["shared"]]
    flags = ["--strength", "30", "-40", "--span", "mat", "--model", "b"]
    found = steer(*flags, "--latent", *map(str, chosen))
    rows = crosscoder.W_dec[chosen, 16:].detach()
    step = torch.tensor([30.0, -40.0]) * maxima[chosen] @ rows
    mask = torch.tensor(span_mask(pair.b, PROMPT, "mat")).float()
    assert 0 < mask.sum() < len(mask)

    def change(acts: Tensor) -> Tensor:
        here = torch.zeros(acts.shape[1])
        here[: len(mask)] = mask
        return acts + here[:, None] * step

    assert found["steered"] == read_whole(pair, "b", change)
    assert found["steered"] != found["untouched"] and (found["positions"], found["span"]) == (
        "span",
        "mat",
    )


@pytest.mark.slow
def test_the_first_token_is_left_out_where_the_activation_is_read(
    steer: Steer, pair: ModelPair, crosscoder: Crosscoder, maxima: Tensor, latents: dict[str, int]
) -> None:
    latent = latents["a_exclusive"]
    flags = ["--model", "a", "--latent", str(latent), "--operation", "clamp", "--strength", "4"]

    def change(acts: Tensor) -> Tensor:
        both = torch.cat([acts, torch.zeros(1, acts.shape[1], 24)], dim=-1)
        f = crosscoder.encode(both)[..., [latent]].detach()
        d = crosscoder.W_dec[latent, :16].detach()
        result = acts + (4 * maxima[latent] - f) * d
        result[:, 0] = acts[:, 0]
        return result

    assert steer(*flags)["steered"] == read_whole(pair, "a", change)


@pytest.mark.slow
def test_the_latents_table_beside_the_run_or_of_an_evaluation_gives_the_unit(
    steer: Steer, refused: Callable[..., str], run: Path, crosscoder: Crosscoder, tmp_path: Path
) -> None:
    def write(path: Path, unit: float, partitions: list[str]) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["latent", "partition", "max_activation"])
            writer.writerows([i, name, unit + i] for i, name in enumerate(partitions))

    names = [crosscoder.partition.name_of(i) for i in range(64)]
    write(tmp_path / "latents.csv", 100.0, names)
    flags = ["--model", "a", "--latent", "3", "--strength", "1"]
    found = steer(*flags, "--evaluation", str(tmp_path))
    assert found["latents"][0]["max_activation"] == 103
    write(run / "latents.csv", 200.0, names)
    try:
        assert steer(*flags)["latents"][0]["max_activation"] == 203
        assert steer(*flags, "--evaluation", str(tmp_path))["latents"][0]["max_activation"] == 103
    finally:
        (run / "latents.csv").unlink()
    write(tmp_path / "latents.csv", 100.0, ["shared"] * 64)
    assert "does not belong to this crosscoder" in refused(*flags, "--evaluation", str(tmp_path))
    assert "has no latents.csv" in refused(*flags, "--evaluation", str(tmp_path / "none"))


@pytest.mark.slow
def test_a_latent_of_a_alone_steers_b_by_a_map_only(
    steer: Steer,
    refused: Callable[..., str],
    latents: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    latent = str(latents["a_exclusive"])
    flags = ["--model", "b", "--latent", latent, "--strength", "40"]
    assert f"Latent {latent} is a_exclusive: it has no decoder in model b" in refused(*flags)
    found = steer(*flags, "--map")
    assert found["mapped"] and found["steered"] != found["untouched"]
    assert "fitted to" in caplog.text and "of B's variance from A" in caplog.text
    assert "activation_explained" not in found["latents"][0]


@pytest.mark.slow
def test_it_is_said_how_well_a_shared_latents_activation_is_guessed(
    steer: Steer, latents: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    latent = latents["shared"]
    found = steer("--model", "a", "--latent", str(latent), "--operation", "ablate")
    [entry] = found["latents"]
    assert entry["activation_explained"] <= 1 and entry["strength"] is None
    assert f"Latent {latent} is shared: its activation is predicted from model a" in caplog.text


@pytest.mark.slow
def test_people_read_both_texts(
    run: Path, latents: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    latent = str(latents["a_exclusive"])
    args = ["steer", str(run), "--model", "a", "--latent", latent, "--strength", "0"]
    assert main([*args, "--prompt", PROMPT, "--max-new-tokens", "5"]) == 0
    first, second = capsys.readouterr().out.split("\n\n", 1)
    title, untouched = first.split("\n", 1)
    how, steered = second.split("\n", 1)
    assert title == "Model a (tiny-llama), untouched:"
    assert how.startswith(f"Steered with latent {latent} (a_exclusive) add 0 x ")
    # With nothing added it says the same.
    assert steered == untouched + "\n"


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latent", "3"], "A strength goes with each operation but ablate"),
        (["--latent", "3", "--operation", "ablate", "--strength", "1"], "got ablate and 1.0"),
        (["--latent", "3", "4", "5", "--strength", "1", "2"], "one for each of 3 latents, got 2"),
        (["--latent", "64", "--strength", "1"], "different latents from 0 to 63, got [64]"),
        (["--latent", "3", "--strength", "1", "--span", "dog"], "The span 'dog' is not in"),
        (
            ["--latent", "3", "--strength", "1", "--span", "cat", "--positions", "generated"],
            "Give one of them",
        ),
        (["--latent", "3", "--strength", "1", "--max-new-tokens", "9999"], "do not fit model"),
        (["--latent", "3", "--map", "--strength", "1"], "no decoder in model b. Steer model a"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    refused: Callable[..., str], flags: list[str], message: str
) -> None:
    error = refused("--model", "a", *flags)
    assert message in error and error.count("error:") == 1


def test_a_latent_that_never_fires_is_refused(
    refused: Callable[..., str], crosscoder: Crosscoder, tmp_path: Path
) -> None:
    names = [crosscoder.partition.name_of(i) for i in range(64)]
    lines = [f"{i},{name},0.0" for i, name in enumerate(names)]
    (tmp_path / "latents.csv").write_text("\n".join(["latent,partition,max_activation", *lines]))
    error = refused(
        *("--model", "a", "--latent", "3", "--strength", "1", "--evaluation", str(tmp_path))
    )
    assert "Latent 3 has no maximum activation" in error


@pytest.mark.slow
@pytest.mark.parametrize("template", ["{{ raise_exception('no chats here') }}", "{% for %}"])
def test_a_raw_prompt_needs_no_chat_template_that_works(
    template: str,
    steer: Steer,
    refused: Callable[..., str],
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    model = tmp_path / "llama"
    shutil.copytree(llama_folder, model)
    (model / "chat_template.jinja").write_text(template)
    arguments = ["--model", "a", "--latent", "3", "--strength", "2"]
    arguments += ["--model-a", str(model)]
    assert "The chat template of tokenizer" in refused(*arguments).splitlines()[-1]
    raw = steer(*arguments, "--raw-prompt")
    plain = steer("--model", "a", "--latent", "3", "--strength", "2")
    assert (raw["untouched"], raw["steered"]) == (plain["untouched"], plain["steered"])
    assert steer(*arguments, "--raw-prompt", "--span", "cat")["positions"] == "span"


def test_a_runs_own_device_need_not_be_here(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Path(shutil.copytree(run, tmp_path / "run"))
    path = elsewhere / "runner_cfg.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:63"'))
    arguments = ["steer", str(elsewhere), "--prompt", PROMPT, "--model", "a", "--latent", "3"]
    arguments += ["--strength", "2"]
    assert main(arguments) == 1
    assert "device 'cuda:63' is not available" in capsys.readouterr().err
    assert main([*arguments, "--max-new-tokens", "2", "--device", "cpu"]) == 0
