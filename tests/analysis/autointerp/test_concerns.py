from pathlib import Path

import pytest

from sae_lens_dfc.analysis.autointerp.concerns import CONCERNS, read_concerns


def test_concerns_are_read_from_yaml_and_json(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "Debt trap: loans that bind a state\nrefusal: |\n  declining,\n  or evading\n"
    )
    (tmp_path / "mine.json").write_text('{\n\t"café": "coffee"\n}', encoding="utf-8")
    assert read_concerns(tmp_path / "mine.yaml") == {
        "Debt trap": "loans that bind a state",
        "refusal": "declining, or evading",
    }
    assert read_concerns(str(tmp_path / "mine.json")) == {"café": "coffee"}


def test_our_own_list_is_one_that_could_be_read_from_a_file(tmp_path: Path) -> None:
    lines = [f"{name}: {covers!r}" for name, covers in CONCERNS.items()]
    (tmp_path / "ours.yaml").write_text("\n".join(lines).replace("\\'", "''"))
    assert list(read_concerns(tmp_path / "ours.yaml")) == list(CONCERNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map names to what they cover.*got nothing"),
        ("- deception\n- hate\n", "must map names to what they cover.*got list"),
        ("deception", "must map names to what they cover.*got str"),
        ("a: b: c", "Could not read concerns: .*Give a YAML or JSON file"),
        (
            "deception:\n",
            "Concern 'deception' in .* must map to a description of what it covers, got None",
        ),
        ("deception: ' '\n", "must map to a description of what it covers, got ' '"),
        (
            "deception: {lies: all}\n",
            "must map to a description of what it covers, got {'lies': 'all'}",
        ),
        ("no: what YAML takes for false\n", "Concern False in .* cannot be parsed"),
        ("'lies, tricks': both\n", "Concern 'lies, tricks' in .* cannot be parsed"),
        ('"lies\\ntricks": both\n', "cannot be parsed"),
        ("None: all is well\n", "Concern 'None' in .* cannot be parsed"),
        ("'': nothing\n", "Concern '' in .* cannot be parsed"),
        ("lies.: with a full stop\n", "Concern 'lies.' in .* cannot be parsed"),
        ("Lies: one\nlies: two\n", "Concern 'lies' in .* cannot be parsed"),
    ],
)
def test_what_is_no_list_of_concerns_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_concerns(path)
    assert "mine.yaml" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Could not read concerns: .*No such file.*none.yaml"):
        read_concerns(tmp_path / "none.yaml")
    (tmp_path / "cut.json").write_text('{"deception": "lies"')
    with pytest.raises(ValueError, match="Could not read concerns: .*cut.json is not sound JSON"):
        read_concerns(tmp_path / "cut.json")
    (tmp_path / "latin.yaml").write_bytes("café: x".encode("latin-1"))
    with pytest.raises(ValueError, match="Could not read concerns: .*latin.yaml is not text"):
        read_concerns(tmp_path / "latin.yaml")
