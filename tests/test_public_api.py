from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import sae_lens_dfc


def test_all_is_what_is_exported() -> None:
    public = {
        name
        for name, value in vars(sae_lens_dfc).items()
        if isinstance(value, type) or callable(value)
        if not name.startswith("_") and value.__module__.startswith("sae_lens_dfc")
    }
    assert public == set(sae_lens_dfc.__all__)


def test_importing_registers_the_architectures_with_saelens() -> None:
    assert {"dfc", "batchtopk_crosscoder"} <= set(SAE_TRAINING_CLASS_REGISTRY)
    assert "crosscoder" in SAE_CLASS_REGISTRY


def test_importing_adds_no_log_handler() -> None:
    import logging

    assert logging.getLogger("sae_lens_dfc").handlers == []
