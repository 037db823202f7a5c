"""Every error of the package and its benchmarks is a sentence or two: what each `raise` can say, read from its
source."""

import ast
import importlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub.errors import HFValidationError

import sae_lens_dfc
from sae_lens_dfc.core.parsing import parse_yaml
from sae_lens_dfc.core.terminal import ENDS, MOST_SAID, said_by

PACKAGE = Path(sae_lens_dfc.__file__).parent
VALUE = "\N{REPLACEMENT CHARACTER}"
"""In the place of what is only known when it is raised."""
SENTENCE = "\N{BLACK SQUARE}."
"""In the place of a sentence that is only known then."""
SENTENCES = ("said_by", "sentence")
"""Functions whose text always ends."""
MOST_TEXTS = 64
"""Of one message, where parts of it can be one thing or another."""
MOST_STEPS = 4
"""From a message to what a name or a function in it stands for."""

READ_BY_NOBODY = {
    "AttributeError(wanted)": "Python asks a module for a name, and catches it",
    "StopIteration": "it ends an iterator",
    "Interrupted(number)": "main() says how a signal ended it",
    "Interrupted(self.number or signal.SIGTERM)": "main() says how a signal ended it",
    "Interrupted(stopped.number, self._stopped_at())": "main() says how a signal ended it",
    "ComposerError": "parse_yaml makes a sentence of its parts",
}
"""Errors that are no message, and why."""

COMPLETED = {
    "models.opening.adapters._merge": [
        "models.opening.adapters._check_shapes",
        "models.opening.adapters._resize",
    ],
    "benchmarks.recovery._resumed": ["benchmarks.recovery._resumed"],
    "benchmarks.suite.figures_of": ["benchmarks.suite.figures_of"],
    "data.cache.reader.read_manifest": ["data.cache.reader._check_manifest"],
    "data.contexts.batches": ["data.contexts.__init__"],
    "core.parsing.read_json": ["core.parsing.parse_json", "core.parsing._check_values"],
    "core.untrusted.gguf.check_gguf": [
        "core.untrusted.gguf.skip",
        "core.untrusted.gguf.several",
        "core.untrusted.gguf._walk",
        "core.untrusted.gguf._size",
        "core.untrusted.gguf._tensor",
    ],
    "data.cache.manifest.load": ["data.cache.manifest.load"],
    "models.hooked_model.check_device": ["models.hooked_model.check_device"],
    "models.loading._loading": [
        "models.opening.adapters.naming_base",
        "models.opening.pretrained.load_pretrained",
        "models.opening.pretrained._from_pretrained",
        "models.opening.pretrained.check_room",
    ],
    "models.loading._to_hooked_transformer": ["models.loading._hooked_transformer"],
    "core.journal._read": ["core.journal._parsed"],
    "data.text.datasets._one_error": [
        "core.untrusted.arrow.check_unpacked",
        "core.untrusted.arrow._read",
        "core.untrusted.arrow._messages",
        "core.untrusted.dataset_folder.files_in",
        "core.untrusted.dataset_folder._patterns",
        "core.untrusted.dataset_folder._configurations",
        "core.untrusted.dataset_folder._card",
        "core.untrusted.dataset_folder._relative",
        "core.untrusted.dataset_folder.check_table",
        "core.untrusted.dataset_folder.check_saved",
        "data.text.columns.as_stored",
        "core.untrusted.parquet.check_parquet",
        "data.text.datasets._open_dataset",
    ],
    "training.checkpoint._load": ["core.tensor_files._opened"],
    "training.checkpoint._readable": [
        "training.checkpoint._check_trainer_state",
        "training.checkpoint.load_place",
    ],
}
"""Functions whose messages begin in the middle of a sentence, by the function that writes its
beginning."""

BENCHMARKS = PACKAGE.parent / "benchmarks"
MODULES = {
    ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text())
    for folder, root in ((PACKAGE, PACKAGE), (BENCHMARKS, BENCHMARKS.parent))
    for path in sorted(folder.rglob("*.py"))
}
"""By dotted name below `sae_lens_dfc`, or beginning with benchmarks."""
FUNCTIONS = {
    module: {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for module, tree in MODULES.items()
}


class Raised(NamedTuple):
    """A `raise`, in the innermost function around it."""

    module: str
    function: ast.AST
    error: ast.expr

    @property
    def name(self) -> str:
        return f"{self.module}.{getattr(self.function, 'name', '')}"

    def texts(self) -> list[str]:
        """What it can say; nothing where it says nothing."""
        arguments = getattr(self.error, "args", ())
        return texts(arguments[0], self.module, self.function) if arguments else []


def raised(module: str, node: ast.AST, function: ast.AST) -> Iterator[Raised]:
    function = node if isinstance(node, ast.FunctionDef) else function
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            said = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
            if not {ast.unparse(child.exc), ast.unparse(said)} & READ_BY_NOBODY.keys():
                yield Raised(module, function, child.exc)
        yield from raised(module, child, function)


def texts(node: ast.expr, module: str, function: ast.AST, steps: int = MOST_STEPS) -> list[str]:
    """What an expression can be as text, with VALUE for what the source does not tell."""

    def joined(parts: Iterable[ast.expr]) -> list[str]:
        several = [texts(part, module, function, steps) for part in parts]
        return ["".join(one) for one in islice(product(*several), MOST_TEXTS)]

    def followed(parts: Iterable[ast.expr], where: ast.AST) -> list[str]:
        found = [text for part in parts for text in texts(part, module, where, steps - 1)]
        return found or [VALUE]

    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return texts(value, module, function, steps)
        case ast.JoinedStr(values=parts):
            return joined(parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return joined([left, right])
        case ast.IfExp(body=one, orelse=other):
            return joined([one]) + joined([other])
        case ast.Call(func=ast.Name(id=name)) if name in SENTENCES:
            return [SENTENCE]
        case ast.Name(id=name) if steps:
            full = module if module.startswith("benchmarks.") else f"sae_lens_dfc.{module}"
            constant = getattr(importlib.import_module(full), name, None)
            if isinstance(constant, str):
                return [constant]
            return followed(assigned(name, function), function)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if steps:
            if (called := FUNCTIONS[module].get(name)) is not None:
                return followed(returned(called), called)
        case _:
            pass
    return [VALUE]


def assigned(name: str, function: ast.AST) -> Iterator[ast.expr]:
    """What a function's own variable is set to."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if [ast.unparse(target) for target in targets] == [name]:
                yield node.value


def returned(function: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and ast.unparse(node) != "return None":
            yield node.value or ast.Constant("")


RAISED = [one for module, tree in MODULES.items() for one in raised(module, tree, tree)]
TEXTS = sorted({(one.name, text) for one in RAISED for text in one.texts()})


def offending(pattern: str) -> list[tuple[str, str]]:
    """The messages in which a pattern is found, with where they are raised."""
    return [(name, text) for name, text in TEXTS if re.search(pattern, text)]


def settings() -> set[str]:
    """Names of fields and arguments: a sentence may begin with one, written as the user writes
    it."""
    names: set[str] = set()
    for node in (node for tree in MODULES.values() for node in ast.walk(tree)):
        match node:
            case ast.arg(arg=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case _:
                pass
    return names - {"a", "at", "it", "one", "other", "the"}


def test_the_texts_of_an_error_are_all_that_it_can_say() -> None:
    assert len(RAISED) > 400
    [hook] = [one for one in RAISED if one.name == "models.hooked_model._check_hook"]
    start = f"Hook {VALUE} is not in model {VALUE} ({VALUE} layers: blocks.0 to blocks.{VALUE}). "
    end = f"The output of a middle block is {VALUE}."
    assert hook.texts() == [f"{start}Close: {VALUE}. {end}", start + end]
    [missing] = [one for one in RAISED if ast.unparse(one.error) == "ValueError(what_to_do)"]
    assert missing.texts()[0].startswith(
        "dictionary-learning is not installed. Install it with `pip"
    )


def test_every_error_says_something() -> None:
    silent = [one.name for one in RAISED if not one.texts() or {"", VALUE} & {*one.texts()}]
    assert silent == []


def test_every_message_ends() -> None:
    ends = "".join(ENDS)
    assert offending(rf"[^{re.escape(ends)}]\Z") == []


def test_every_message_is_one_line_with_one_space_between_words() -> None:
    assert offending(r"\n|\t|  |\A | \Z") == []


def test_between_sentences_is_a_space() -> None:
    # A name after a dot, as in README.md, begins with a small letter.
    assert offending(rf"[\w)\]'\"`{VALUE}][.?!][A-Z]|{VALUE}[A-Z][a-z]|[.?!][.?!]") == []
    assert offending(rf"[^ (]{re.escape(SENTENCE)}|{re.escape(SENTENCE)}[^ ]") == []


def test_every_message_begins_a_sentence_or_goes_on_with_one() -> None:
    known, begun = settings(), {name for several in COMPLETED.values() for name in several}
    small = offending(r"\A[a-z]")
    words = {(name, text): re.split(r"[^\w.]", text)[0] for name, text in small}
    fragments = {
        name
        for (name, text), word in words.items()
        if word not in known and "=" not in text.split()[0]
    }
    assert fragments == begun


@pytest.mark.parametrize("name", COMPLETED)
def test_what_begins_in_the_middle_of_a_sentence_is_put_after_its_beginning(name: str) -> None:
    errors = [ast.unparse(one.error) for one in RAISED if one.name == name]
    assert any(re.search(r"f['\"].*[a-z{].*\bsaid_by\(|_misfit\(.*said_by", e) for e in errors)


# --- what other libraries say ---

MESSAGES = {
    "No such name.": ValueError("No such name."),
    "no such name.": ValueError("no such name,\n"),
    "Is it there?": ValueError(" Is it\t there? "),
    "Choose from: a, b.": ValueError("Choose from:\n  - a\n  - b\n"),
    "a, b.": ValueError("a\n* b"),
    "Not here. Look there: x.": ValueError("Not here\n\n  Look there:\n x"),
    "a wrapped line.": ValueError("a wrapped\nline"),
    "'gemma9' is missing.": KeyError("gemma9"),
    "('a', 1) is missing.": KeyError(("a", 1)),
    "There is no model 'x'.": KeyError("There is no model 'x'"),
    "Timeout error.": TimeoutError(),
    "HF validation error.": HFValidationError("\n"),
    "No such file or directory: 'x'.": FileNotFoundError(2, "No such file or directory", "x"),
}


@pytest.mark.parametrize("wanted", MESSAGES)
def test_an_error_of_another_library_is_said_in_a_line_that_ends(wanted: str) -> None:
    assert said_by(MESSAGES[wanted]) == wanted


@pytest.mark.parametrize("text", ["word " * 100, "word. " * 100, "w" * 1000, "w, " * 200])
def test_a_long_error_is_cut_at_a_word(text: str) -> None:
    said = said_by(ValueError(text))
    assert 0.9 * MOST_SAID < len(said) <= MOST_SAID and re.search(r"\w…\Z", said)
    assert text.startswith(said[:-1]) and (text[len(said) - 1] != "w" or " " not in text)
    assert said_by(ValueError(text), 2000) in (
        text,
        text.strip(),
        text.strip() + ".",
        text.strip(" ,") + ".",
    )


def test_yaml_that_is_none_is_said_with_its_line_and_without_its_text() -> None:
    said = {
        "a: [1, 2": "line 1, column 9: expected ',' or ']'",
        "a: 1\nb: *c": "line 2, column 4: *c ",
    }
    for text, wanted in said.items():
        with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
            parse_yaml(text)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
