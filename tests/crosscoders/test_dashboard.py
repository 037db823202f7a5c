"""SAEDashboard itself, on an exported SAE and the model it is of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_dfc import ModelConfig, ModelPair
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.loading import load_model
from tests.helpers import make_firing_dfc
from tests.model_classes import HAS_HOOKED_TRANSFORMER


@pytest.fixture
def sae_folder(pair: ModelPair, tmp_path: Path) -> Path:
    crosscoder = make_firing_dfc(d_a=pair.d_a, d_b=pair.d_b)
    crosscoder.b_dec.data.zero_()
    crosscoder.b_enc.data.zero_()
    crosscoder.threshold.data.fill_(0.02)
    crosscoder.cfg.metadata.model_a = pair.a.describe()
    crosscoder.export_sae("a").save_model(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.fixture
def tokens(pair: ModelPair) -> Tensor:
    ids = pair.a.tokenizer(reference_pages()[0])["input_ids"]
    return torch.tensor(ids[:512]).view(16, 32)


@pytest.mark.slow
@pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="SAEDashboard 0.8.0 itself imports HookedTransformer."
)
@pytest.mark.parametrize("model_class_name", ["TransformerBridge", "HookedTransformer"])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # eindex
def test_its_page_shows_the_exported_latents_firing_where_they_fire(
    model_class_name: str,
    sae_folder: Path,
    tokens: Tensor,
    pair: ModelPair,
    llama_config: ModelConfig,
    tmp_path: Path,
) -> None:
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    sae = SAE.load_from_disk(sae_folder)
    acts = pair.a.activations(tokens, torch.ones_like(tokens))
    # It scales the decoders to norm 1 itself.
    code = (sae.encode(acts) * sae.W_dec.norm(dim=-1)).detach()
    rates = (code > 0).float().mean(dim=(0, 1))
    latents = ((rates > 0.02) & (rates < 0.9)).nonzero()[:3, 0].tolist()
    assert len(latents) == 3

    model = load_model(replace(llama_config, model_class_name=model_class_name)).model
    cfg = SaeVisConfig(
        str(sae.cfg.metadata.hook_name), latents, minibatch_size_features=2, minibatch_size_tokens=4
    )
    data = SaeVisRunner(cfg).run(encoder=sae, model=model, tokens=tokens)  # type: ignore[arg-type]
    page = tmp_path / "dashboard.html"
    save_feature_centric_vis(data, page)

    html = page.read_text()
    for latent in latents:
        assert f"DENSITY = {rates[latent]:.3%}" in html
        [strongest, *_] = data.feature_data_dict[latent].sequence_data.seq_group_data
        # Around each place it shows five tokens on either side, and none nearer to an end.
        peaks = [
            code[s.original_index, s.qualifying_token_index, latent] for s in strongest.seq_data
        ]
        assert peaks[0].item() == pytest.approx(code[:, 6:-5, latent].max().item(), rel=1e-3)
        for s in strongest.seq_data:
            around = slice(s.qualifying_token_index - 5, s.qualifying_token_index + 6)
            assert s.token_ids == tokens[s.original_index, around].tolist()
            assert s.feat_acts == pytest.approx(
                code[s.original_index, around, latent].tolist(), abs=1e-3
            )
