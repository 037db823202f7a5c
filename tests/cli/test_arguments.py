"""Files that stand for flags."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_lens_dfc.cli.arguments import Arguments, with_files
from sae_lens_dfc.cli.parser import settings_taken


def read(values: Any, tmp_path: Path, command: str = "train") -> Arguments:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return with_files([command, "--config", str(tmp_path / "c.yaml")], settings_taken())


def test_each_crosscoder_of_a_list_keeps_what_the_recipe_says_of_it(tmp_path: Path) -> None:
    saes = [{"d_sae": 64, "k": 4}, {"d_sae": 128, "k": 4, "decoder_norm": "l2"}]
    first, second = read({"recipe": "dfc-reassigned", "sae": saes}, tmp_path).saes
    assert {"--sae.d-sae=64", "--sae.decoder-norm=sum"} <= {*first}
    assert {"--sae.d-sae=128", "--sae.decoder-norm=l2"} <= {*second}


@pytest.mark.parametrize("saes", [[], [1, 2], [{"k": 4}, "k"]])
@pytest.mark.parametrize("recipe", [{}, {"recipe": "dfc-reassigned"}])
def test_a_list_that_is_not_of_crosscoders_is_refused(
    saes: list[Any], recipe: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="sae is a list"):
        read({**recipe, "sae": saes}, tmp_path)


def test_a_name_may_have_hyphens_as_flags_do_and_is_the_same_name(tmp_path: Path) -> None:
    values = {"train-batch-size-tokens": 64, "context-size": 48}
    # The one file serves a command that has no such flag.
    assert read(values, tmp_path, "cache").of_files == ["--context-size=48"]
    with pytest.raises(ValueError, match="both sources and dataset_path"):
        read({"dataset-path": "x", "sources": [{"dataset_path": "y"}]}, tmp_path)
    with pytest.raises(ValueError, match="sets context_size twice"):
        read({"context-size": 48, "context_size": 48}, tmp_path)


@pytest.mark.parametrize("flag", ["-h", "--help", "-x"])
def test_a_flag_among_values_is_refused_and_a_negative_number_is_not(
    flag: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has the flag"):
        read({"reassign_at": [0.5, flag]}, tmp_path)
    assert read({"reassign_at": ["-1", -0.5, "-.5"]}, tmp_path).of_files == [
        *("--reassign-at", "-1", "-0.5", "-.5")
    ]
