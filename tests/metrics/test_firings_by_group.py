import torch

from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.alignment.segments import Segment, Segments
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.firings_by_group import firings_by_group, top_group


def test_firings_are_counted_by_group() -> None:
    crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=1, d_a=1, d_b=1))
    crosscoder.W_enc.data = torch.ones(2, 1)
    crosscoder.W_dec.data = torch.ones(1, 2)
    segments = Segments.of([Segment((1,), (1,))])
    languages = ("English", "Portuguese", "Portuguese")
    contexts = [Context(segments, i, 0, group=group) for i, group in enumerate(languages)]
    acts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.5, 0.0]])
    rows = PairedRows(acts, torch.tensor([0, 1, 1, 0, 2]), torch.zeros(5, dtype=torch.long))
    data = PairData([], [rows], contexts, {})
    shares = firings_by_group(crosscoder, data)
    assert {name: x.item() for name, x in shares.items()} == {"English": 0.25, "Portuguese": 0.75}
    assert top_group(shares, 0) == ("Portuguese", 0.75)


def test_a_latent_that_never_fires_has_no_group() -> None:
    name, share = top_group({"en": torch.tensor([torch.nan]), "de": torch.tensor([torch.nan])}, 0)
    assert name == "" and share != share
