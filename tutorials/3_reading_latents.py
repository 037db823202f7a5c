# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Reading latents, and the evidence that one is exclusive
#
# This tutorial reads latents of the crosscoder of [tutorial 2](2_two_models.ipynb) in both models' tokens, and tests for each latent in an exclusive
# partition whether the other model has the feature too. It compares the results with a pair on which nothing is exclusive, and writes a searchable report
# of all of it.
#
# - **Time**: about 2 minutes on 2 CPU cores, plus one and a half if the run of tutorial 2 is not in its folder and is trained first. **Memory**: 3 GB.
# - **Expect**: readable latents in every partition, and **no latent that is exclusive with evidence**. Gemma predicts when SmolLM2's exclusive latents fire, with an AUROC
#   around 0.95. This is a negative result of a short run on little text; the tutorial shows how to recognize one.

# %% tags=["parameters"]
folder = "runs/tutorial-3"  # output folder
run = "runs/tutorial-2/run"  # the crosscoder to read; trained below if missing
max_unique_pairs = 48_000  # these settings apply only if it is trained here; as in tutorial 2
training_tokens = 204_800
eval_pairs = 8_000
d_sae = 2048
k = 32
n_shown = 2  # latents shown with contexts, per partition

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display

from sae_lens_dfc import CrosscoderTrainingRunner
from sae_lens_dfc.analysis.evaluation.baselines import prefixed
from sae_lens_dfc.analysis.evaluation.demo import demo_models, demo_run_config
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.analysis.evaluation.measure import measure, train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.analysis.latents.cards import latent_cards, strongest_latents
from sae_lens_dfc.analysis.latents.max_activating import collect_max_activating
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.build import report_data
from sae_lens_dfc.analysis.report.notebook import latent_html
from sae_lens_dfc.analysis.report.page import render_report
from sae_lens_dfc.analysis.report.results import Measured
from sae_lens_dfc.analysis.saved_run.held_out import opened_run
from sae_lens_dfc.core.output_folder import is_made
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import relative_decoder_norms
from sae_lens_dfc.metrics.exclusivity.evidence import ranking, verdict

pd.options.display.max_colwidth = None
pd.options.display.float_format = "{:.3f}".format

# %% [markdown]
# ## The run
#
# The run of tutorial 2 is used if it exists. Otherwise the next cell trains it in this tutorial's folder.

# %%
if not is_made(run):
    run = f"{folder}/run"
    demo = DemoConfig(
        d_sae=d_sae,
        k=k,
        max_unique_pairs=max_unique_pairs,
        training_tokens=training_tokens,
        eval_pairs=eval_pairs,
    )
    cfg = demo_run_config(demo, *demo_models(demo))
    CrosscoderTrainingRunner(
        replace(cfg, keep_in_memory=True, output_path=run, overwrite=True)
    ).run()

# %% [markdown]
# The run is loaded with all layers of its models, because the tokens that a latent promotes are read from their unembeddings. The models are checked against those of the training.

# %%
crosscoder, cfg, pair = opened_run(run, HeldOutOptions(), drop_unused_layers=False)
data = PairData.collect(PairedText(cfg, pair), "The two models")
print(f"A is {pair.a.name}, B is {pair.b.name}; {crosscoder.partition.sizes}")
print(f"{sum(len(rows.acts) for rows in data.held_out):,} held-out pairs of positions")

# %% [markdown]
# ## Where latents fire
#
# One pass over held-out text collects, for all latents at once, the firing rate, the max-activating examples (at most one per context) and a uniform sample of all firings. Memory does not grow with the length of the text.

# %%
gathered = collect_max_activating(crosscoder, data.held_out)
firing = gathered.firing
alive = firing.counts > 0
pd.DataFrame(
    {
        name: {
            "latents": f"{len(alive[where])}",
            "dead": f"{int((~alive[where]).sum())}",
            "median firing rate of the others": f"{firing.rates[where][alive[where]].median():.2%}",
        }
        for name, where in crosscoder.partition.slices.items()
    }
).T

# %% [markdown]
# ## Reading latents
#
# A `LatentCard` holds a latent's statistics and the contexts in which it fires. The cells below show the strongest latents of each partition, by summed activation. Each context is
# written twice, in A's tokens and in B's. A thin line ends a segment, where both models have read the same text, and the shade there is the latent's
# activation. The decoder norm is `|d_a| / (|d_a| + |d_b|)`: 1 is A only, 0 is B only.


# %%
def cards(latents, evidence=None, **places):
    where = {latent: gathered.places(latent, **places) for latent in latents}
    shown = {place.context for of_latent in where.values() for place in of_latent}
    return latent_cards(crosscoder, gathered, where, data.held_out_of(shown), pair, evidence)


for card in cards(strongest_latents(firing, n_shown)):
    display(HTML(latent_html(card)))

# %% [markdown]
# Max-activating examples show a latent at its most interpretable. Before you trust a description, look at its weak activations too. Here is the first shared latent from above, with one random firing
# from each quartile of its activations, weakest first.

# %%
[first_shared] = strongest_latents(firing, 1)[-1:]
[card] = cards([first_shared], n_strongest=0)
display(HTML(latent_html(card, n_contexts=4)))

# %% [markdown]
# From a shell, `sae-lens-dfc latents runs/tutorial-2/run --partition a_exclusive --top 5` prints one latent per line, or JSON with `--json`.
#
# ## The limits of decoder norms
#
# In a BatchTopK crosscoder, candidates are latents with almost all of their decoder norm in one model. In a DFC the exclusive latents are at 0 and 1 **by construction**, so
# their norms are not evidence. Evidence needs a null: the same crosscoder, trained on model A twice at the same positions, where nothing is exclusive.

# %%
case = PairTask(cfg, pair, data).with_losses()
null = null_case("self", case)
null_crosscoder = train_crosscoder(null)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, one, title in zip(
    axes, (crosscoder, null_crosscoder), ("SmolLM2 and Gemma", "null: SmolLM2 twice")
):
    norms = relative_decoder_norms(one)
    for name, where in one.partition.slices.items():
        ax.hist(norms[where].numpy(), bins=np.linspace(0, 1, 41), label=name)
    ax.set(title=title, xlabel="relative decoder norm", yscale="log")
axes[0].set_ylabel("latents")
axes[0].legend()
plt.show()

# %% [markdown]
# The real pair's shared latents lean slightly to A and spread more than in the null, but none comes near 0 or 1.
#
# ## Evidence from activations
#
# Each candidate is asked two questions:
#
# - **Share known**: how much of it does the other model *know*? A small neural network predicts its activation from the other model's activations, and another from its own model's. 0 means that the other model predicts nothing of it,
#   1 as much as its own.
# - **Worse after it**: after how many of its firings does the other model predict the text that follows worse, with a loss more than 1.25 times as large?
#
# Beside them stands the *transfer* test, which uses an affine map instead of a network: can the other model's activations predict when the latent fires? An AUROC of 1/2 is chance, 1 is perfect.
#
# The same measures are computed for the null's latents and for shared latents, which both models have. *Shared latents show the values to expect of a latent that is not exclusive*.

# %%
found, null_found = measure(crosscoder, case), measure(null_crosscoder, null)
evidence, null_evidence = found.evidence, null_found.evidence

# %%
measures = {
    "known": "share known to the other model",
    "target_worse": "firings after which it predicts worse",
    "auc": "transfer, AUROC",
}
groups = {
    "A-exclusive": (evidence, evidence.groups["a_exclusive"], "C0", "-"),
    "B-exclusive": (evidence, evidence.groups["b_exclusive"], "C1", "-"),
    "shared": (evidence, evidence.groups["shared"], "C2", "-"),
    "null: exclusive": (
        null_evidence,
        null_evidence.groups["a_exclusive"] | null_evidence.groups["b_exclusive"],
        "0.5",
        "--",
    ),
}
fig, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
for ax, (name, title) in zip(axes, measures.items()):
    for group, (of, members, color, style) in groups.items():
        values = getattr(of, name)[members].sort().values
        ax.plot(
            values,
            np.linspace(0, 1, len(values)),
            color=color,
            linestyle=style,
            label=f"{group} ({len(values)})",
        )
    ax.set_xlabel(title)
axes[0].set(ylabel="cumulative share of latents", xlim=(-0.2, 1.2))
axes[1].set_xlim(0, 1)
axes[2].set_xlim(0.5, 1.01)
axes[2].axvline(0.5, color="k", lw=0.5)
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# A latent exclusive to one model would be at 0 in the first panel, at 1 in the second and at 1/2 in the third. The real pair's candidates lie left of the shared latents and of the null's (dashed) in the first panel: the other
# model knows less of them. That alone is no finding: two models trained on the *same* text have many such latents too, because they represent the same text in different ways.
#
# The same as numbers, medians with the 5th and 95th percentile over latents:


# %%
def over(values) -> str:
    known = values[~values.isnan()]
    if len(known) == 0:
        return "no latent fires often enough"
    low, middle, high = (
        known.double().quantile(known.new_tensor([0.05, 0.5, 0.95]).double()).tolist()
    )
    return f"{middle:.3f} [{low:.2f}, {high:.2f}]"


pd.DataFrame(
    {
        group: {title: over(getattr(of, name)[members]) for name, title in measures.items()}
        for group, (of, members, *_) in groups.items()
    }
)

# %% [markdown]
# ## The criterion for an exclusive latent
#
# A candidate is exclusive with evidence if **both** conditions hold beyond their standard errors, at a false discovery rate of 5 % over all candidates:
#
# 1. the other model knows less than half of it;
# 2. the other model predicts worse after more than half of its firings.
#
# Latents that fire too rarely are not judged. *Power* is the probability that a clear difference would have been found with as much text: "none found" means something only if it is near 1.

# %%
counts = {"judged": "judged", "significant": "exclusive, with evidence", "power": "power"}
pd.DataFrame(
    {
        f"{column}, {group}": {
            title: round(of.metrics.get(f"exclusive/{key}/{group}", np.nan), 2)
            for key, title in counts.items()
        }
        for column, of in (("this run", found), ("null", null_found))
        for group in ("a_exclusive", "b_exclusive")
    }
)

# %% [markdown]
# The next cell shows the candidates with the most evidence, with their verdicts and contexts. Is there anything in them that the other model could not represent?

# %%
most = ranking(evidence)[:n_shown].tolist()
for latent, card in zip(most, cards(most, evidence)):
    print(f"{latent}: {verdict(evidence, latent)}")
    display(HTML(latent_html(card)))

# %% [markdown]
# Three things could change this result: more text and longer training, so that more latents fire often enough to be judged; several seeds, because a latent found in only one seed is weak
# evidence (`sae-lens-dfc evaluate` takes several runs); or a test during training that turns false candidates into shared latents (`--recipe dfc-reassigned`).
# None of these measures can show that a model lacks a *concept*: they look at one layer, at one position. The next step is causal, in tutorials [4](4_steering_one_model.ipynb) and [5](5_base_and_fine_tuned.ipynb).
#
# ## The report
#
# The report holds all of the above for every latent, on one page that works offline: verdicts first, each metric next to its null, and a sortable, searchable table of latents.

# %%
metrics = found.metrics | data.metrics | prefixed("null/self/", null_found.metrics)
page = report_data(Measured(crosscoder, found._replace(metrics=metrics)), data, pair, cfg)
path = Path(folder) / "report.html"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(render_report(page), encoding="utf-8")
print(
    f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(page.cards)} latents, {sum(bool(c.contexts) for c in page.cards)} with contexts"
)

# %% [markdown]
# From a shell, with the shuffled null, next-token losses and steering as well (6 minutes here):
#
# ```
# sae-lens-dfc evaluate runs/tutorial-2/run --output runs/tutorial-2/evaluation
# ```
#
# **Next**: [4, steering one model and not the other](4_steering_one_model.ipynb).
