"""TransformerLens' two classes of model, as far as the installed version has them: 4.0 removed
HookedTransformer."""

from importlib.util import find_spec

import pytest

HAS_HOOKED_TRANSFORMER = find_spec("transformer_lens.HookedTransformer") is not None
needs_hooked_transformer = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="This TransformerLens has no HookedTransformer."
)
MODEL_CLASSES = [
    "TransformerBridge",
    pytest.param("HookedTransformer", marks=needs_hooked_transformer),
]
